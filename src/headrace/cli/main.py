"""`headrace COMMAND`: a visible table of commands, each a typed function that is also the Python API."""

import difflib
import errno
import os
import select
import sys
from importlib import import_module

# name: (module:function, one line for `headrace --help`). A dotted name such as "vqa run" is a group and a command.
COMMANDS: dict[str, tuple[str, str]] = {
    "rollout": ("headrace.cli.rollout:rollout", "run a policy in a simulator and write a report"),
    "collect": ("headrace.cli.collect:collect", "demonstrations from a scripted expert, as a LeRobotDataset"),
    "pretrain": ("headrace.cli.pretrain:pretrain", "train ViPRA's video-language model on labelled videos"),
    "finetune": ("headrace.cli.finetune:finetune", "train a policy on demonstrations"),
    "serve": ("headrace.cli.serve:serve", "answer observations over a websocket, in openpi's protocol"),
    "drive": ("headrace.cli.drive:drive", "run a policy on an arm, on a mock arm, or on a recording"),
    "videos": ("headrace.cli.videos:videos", "render videos without actions, of several tasks and robots"),
    "label": ("headrace.cli.label:label", "latent-action chunks for every frame of a corpus of videos"),
    "agreement": ("headrace.cli.agreement:agreement", "rank violation and correlation of simulated and real success"),
    "tasks": ("headrace.cli.tasks:tasks", "list what can be rolled out here"),
    "doctor": ("headrace.cli.doctor:doctor", "say what this machine has and what to do about the rest"),
    "flowlearn score": ("headrace.cli.flowlearn:score", "score predictions in the layout that FlowLearn released"),
    "flowlearn generate": ("headrace.cli.flowlearn:generate", "draw charts with questions like the simulated subset"),
    "vqa run": ("headrace.cli.vqa:run", "score a vision-language model on flowcharts, pruned or not"),
    "vqa compare": ("headrace.cli.vqa:compare", "two runs on the same questions, with paired intervals"),
    "vqa merge": ("headrace.cli.vqa:merge", "join the shards of a run"),
    "vqa bench-prune": ("headrace.cli.vqa:bench_prune", "accuracy and prefill time of pruning methods by budget"),
    "vqa export": ("headrace.cli.vqa:export", "questions for lmms-eval or VLMEvalKit"),
    "vqa report": ("headrace.cli.vqa:report", "one self-contained HTML page about runs"),
    "tokenizer train": ("headrace.cli.tokenizer_train:train", "train a TokenFlow tokenizer"),
    "tokenizer eval": ("headrace.cli.tokenizer_eval:evaluate", "measure how well a tokenizer gives pictures back"),
    "tokenizer reconstruct": ("headrace.cli.tokenizer_eval:reconstruct", "show pictures beside their reconstructions"),
}
EXIT_OK, EXIT_ERROR, EXIT_USAGE = 0, 1, 2


def help_text() -> str:
    """What `headrace --help` prints; needs no imports of the commands."""
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return f"usage: headrace COMMAND [OPTIONS]\n\ncommands:\n{rows}\n\n`headrace COMMAND --help` explains one of them."


def find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the arguments into a command's name and the rest.

    Raises:
        ValueError: No such command; names a near match.
    """
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if len(arguments) >= length and name in COMMANDS:
            return name, arguments[length:]
    group = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if group:
        raise ValueError(f"headrace {arguments[0]} needs one of: {', '.join(n.split(' ', 1)[1] for n in group)}")
    near = difflib.get_close_matches(" ".join(arguments[:2]), COMMANDS, n=1) or difflib.get_close_matches(
        arguments[0], COMMANDS, n=1
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no command {arguments[0]!r}{hint} (headrace --help lists them)")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 something failed, 2 wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _tell(help_text())
    if arguments[0] in ("-V", "--version"):
        from headrace import __version__

        return _tell(__version__)
    try:
        name, rest = find_command(arguments)
    except ValueError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return EXIT_USAGE
    import tyro

    module, attribute = COMMANDS[name][0].split(":")
    function = getattr(import_module(module), attribute)
    try:
        status = tyro.cli(function, prog=f"headrace {name}", args=rest)
        sys.stdout.flush()
    except BrokenPipeError as error:
        if _reader_left():
            return EXIT_OK
        print(f"headrace {name}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except (ValueError, FileNotFoundError, FileExistsError, ModuleNotFoundError, ConnectionError) as error:
        if os.environ.get("HEADRACE_TRACEBACK"):
            raise
        print(f"headrace {name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        if os.environ.get("HEADRACE_TRACEBACK"):
            raise
        full = error.errno == errno.ENOSPC
        print(f"headrace {name}: {error}{'; free some space and start again' if full else ''}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"headrace {name}: stopped", file=sys.stderr)
        return 130
    return int(status or EXIT_OK)


def _tell(text: str) -> int:
    """Print a text, also to a reader that leaves early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not _reader_left():
            raise
    return EXIT_OK


def _reader_left() -> bool:
    """Whether nobody reads our output any more, as after `headrace tasks | head`; it goes nowhere from then on."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file, or closed
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


if __name__ == "__main__":
    sys.exit(main())
