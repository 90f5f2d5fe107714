"""`headrace vqa ...`: run a model on flowchart questions, compare runs, join shards, write a report, sweep budgets."""

import json
import sys
from pathlib import Path
from typing import Any, Literal


def run(
    *,
    task: str,
    data: Path,
    model: str,
    out: Path,
    prune: str | None = None,
    keep: float | None = None,
    split: str = "test",
    prompts: str = "headrace-1",
    profile: Literal["paper", "lenient"] = "paper",
    limit: int | None = None,
    shard: str = "0/1",
    shots: int = 0,
    shots_from: Path | None = None,
    shots_split: str = "test",
    shots_seed: int = 0,
    retry_errors: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    report: bool = True,
) -> int:
    """Ask a model a data set's questions; writes results.json, samples.jsonl and report.html into OUT.

    Run it again to go on after a stop. Several questions on one picture encode it once.

    Args:
        task: Such as flowlearn/sim-word/num_nodes, flowlearn/sim-char, flowlearn/sci/ocr, flowvqa.
        data: Folder of the data set.
        model: Folder or Hub id of any vision-language model.
        out: Run folder.
        prune: Pruning method, such as flowcut, fastv, visionzip, prumerge, random; or a JSON file of all settings.
        keep: Visual tokens that stay per picture; below 1 it is a share.
        split: Split of the data set.
        prompts: Prompt set, or a JSON file: task to text.
        profile: How answers are read.
        limit: Questions per task.
        shard: Part of the pictures, i/n; join the parts with `headrace vqa merge`.
        shots: Worked examples before each question: picture, question and answer of the same task.
        shots_from: Folder of the data set that they are drawn from; a chart that is asked about is never drawn.
        shots_split: Split of that folder.
        shots_seed: Of the draw.
        retry_errors: Ask again where the model failed.
        dry_run: Print each task's first prompt and the number of questions; no model is loaded.
        device: Where the model runs.
        report: Write report.html at the end.
    """
    from headrace.datasets.flowlearn.load import require_images
    from headrace.datasets.flowlearn.prompts import find_prompts
    from headrace.vlm import vqa_model, vqa_run
    from headrace.vlm.vqa_data import load_task
    from headrace.vlm.vqa_shots import draw_shots

    if (shots == 0) != (shots_from is None):
        raise ValueError("--shots N and --shots-from DIR go together")
    tasks, wording = load_task(task, data, split=split, profile=profile), find_prompts(prompts)
    part, pruning = vqa_run.Shard.parse(shard), vqa_model.pruning_of(prune, keep)
    asked = [question for group in vqa_run.groups_of(tasks, limit=limit, shard=part) for question in group.questions]
    worked = None
    if shots_from is not None:
        worked = draw_shots(tasks, data, count=shots, folder=shots_from, split=shots_split, seed=shots_seed)
    if dry_run:
        require_images(data, asked)
        for name, prompt, image, count in vqa_run.first_prompts(asked, wording):
            print(f"{name}: {count} questions, first on {image}:\n  {prompt}")
            for example in worked.by_task[name] if worked else ():
                print(f"  behind {example.image}: {wording.ask(example)} -> {example.answer!r}")
        return 0
    settings = vqa_model.pruning_identity(pruning)
    name = vqa_model.model_name(model)
    identity = vqa_run.run_identity(tasks, wording, model=name, pruning=settings, data=data, split=split, shots=worked)
    notes = _PictureNotes(out / vqa_run.PICTURES_FILE, data, examples=shots)
    with _Bar(len(asked)) as bar:
        samples = vqa_run.run(
            tasks, vqa_model.opener(model, device=device, pruning=pruning), data=data, out=out, identity=identity,
            prompts=wording, limit=limit, shard=part, shots=worked, retry_errors=retry_errors,
            after_picture=notes.add, progress=bar.add,
        )  # fmt: skip
    failed = [sample for sample in samples if sample.error]
    for sample in failed[:3]:
        print(f"headrace vqa run: {sample.uid}: {sample.error}", file=sys.stderr)
    if part.count == 1:
        print(json.dumps(_summary(json.loads((out / "results.json").read_text())), indent=2))
        if report:
            from headrace.vlm.vqa_report import write_report

            print(write_report([out], out / "report.html", data=data), file=sys.stderr)
    else:
        print(f"{len(samples)} answers in {out / part.file}; join the parts with `headrace vqa merge --out {out}`")
    return 1 if failed else 0


class _PictureNotes:
    """One line per picture: which visual tokens stayed, for the report's overlay."""

    def __init__(self, path: Path, data: Path, *, examples: int) -> None:
        self.path, self.data, self.examples = path, data, examples

    def add(self, model: Any, image: str) -> None:
        from headrace.vlm.vqa_model import note_kept

        note_kept(model, self.data, image, self.path, examples=self.examples)


class _Bar:
    """Progress with running accuracy and pictures per second."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="question", file=sys.stderr)
        self.sum = 0.0
        self.pictures: set[str] = set()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, samples: list[Any]) -> None:
        self.sum += sum(sample.score for sample in samples)
        self.pictures |= {sample.image for sample in samples}
        self.bar.update(len(samples))
        if self.bar.n:
            self.bar.set_postfix(score=f"{self.sum / self.bar.n:.3f}", pictures=len(self.pictures), refresh=False)


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    short = {name: {k: t[k] for k in ("score", "interval", "count", "unparsed", "majority")} | (
        {"link_f1": t["parts"]["link_f1"]["score"]} if "link_f1" in t.get("parts", {}) else {})
        for name, t in results["tasks"].items()}  # fmt: skip
    return {"tasks": short, **{k: results[k] for k in ("balanced", "mean_over_tasks", "errors") if k in results}}


def merge(*, out: Path) -> int:
    """Join the shards of a run into samples.jsonl and results.json.

    Args:
        out: Run folder with samples-i-of-n.jsonl.
    """
    from headrace.vlm.vqa_run import merge_shards
    from headrace.vlm.vqa_samples import RUN_FILE

    if not (out / RUN_FILE).is_file():
        raise FileNotFoundError(f"{out} holds no {RUN_FILE}: not a run folder")
    results = merge_shards(out, json.loads((out / RUN_FILE).read_text(encoding="utf-8")))
    print(json.dumps(_summary(results), indent=2))
    return 0


def compare(a: Path, b: Path, /, *, as_json: bool = False) -> int:
    """Compare two runs on the same questions: B minus A with 95 % intervals, questions on one picture kept together.

    Args:
        a: Run folder or samples file.
        b: Run folder or samples file.
        as_json: Print JSON instead of a table.
    """
    from headrace.vlm import vqa_compare

    found = vqa_compare.compare(a, b)
    if as_json:
        print(json.dumps(vqa_compare.comparison_to_dict(found), indent=2))
        return 0
    width = max(len(task) for task in found.tasks)
    print(f"{'task':<{width}}      n       A       B    B - A  95 % interval     better/worse  p")
    for task, (mean_a, mean_b, d) in found.tasks.items():
        low, high = d.interval
        print(
            f"{task:<{width}} {d.count:>6} {mean_a:>7.3f} {mean_b:>7.3f} {d.difference:>+8.3f}  "
            f"[{low:+.3f}, {high:+.3f}]  {d.better:>5}/{d.worse:<5}  {d.p_value:.4f}"
        )
    if found.only_a or found.only_b:
        print(f"left out: {found.only_a} questions of A only, {found.only_b} of B only", file=sys.stderr)
    return 0


def report(runs: list[Path], /, *, data: Path | None = None, out: Path = Path("report.html")) -> int:
    """Write one self-contained HTML page about one or several runs.

    Args:
        runs: Run folders; runs that differ in pruning only are also drawn as a sweep.
        data: Folder of the data set, for thumbnails and graphs.
        out: The page.
    """
    from headrace.vlm.vqa_report import write_report

    print(write_report(runs, out, data=data))
    return 0


def bench_prune(
    *,
    task: str,
    data: Path,
    model: str,
    out: Path,
    methods: tuple[str, ...] = ("flowcut", "fastv", "visionzip", "random"),
    keep: tuple[float, ...] = (0.5, 0.25, 0.111),
    split: str = "test",
    prompts: str = "headrace-1",
    limit: int | None = None,
    repeats: int = 20,
    warmup: int = 5,
    device: str = "cpu",
) -> int:
    """Score and time pruning methods at several budgets on one open model; writes runs, bench.json and report.html.

    Args:
        task: Task path, as for `headrace vqa run`.
        data: Folder of the data set.
        model: Folder or Hub id.
        out: Folder; one run folder per setting inside, resumed if it is there.
        methods: Pruning methods, or JSON files of all settings of one.
        keep: Budgets: tokens, or shares below 1.
        split: Split of the data set.
        prompts: Prompt set, or a JSON file: task to text.
        limit: Questions per task.
        repeats: Timed prefills per setting.
        warmup: Untimed prefills before them.
        device: Where the model runs.
    """
    from headrace.datasets.flowlearn.prompts import find_prompts
    from headrace.vlm.auto import require_prunable
    from headrace.vlm.vqa_bench import SweepConfig, sweep, sweep_table
    from headrace.vlm.vqa_data import load_task
    from headrace.vlm.vqa_model import model_name, opener
    from headrace.vlm.vqa_report import write_report
    from headrace.vlm.vqa_run import groups_of
    from headrace.vlm.vqa_samples import write_json

    config = SweepConfig(methods=methods, keep=keep, limit=limit, repeats=repeats, warmup=warmup)
    tasks, wording = load_task(task, data, split=split), find_prompts(prompts)
    questions = sum(len(group.questions) for group in groups_of(tasks, limit=limit))
    opened = opener(model, device=device, pruning=None)()
    for _, pruning in config.settings():
        require_prunable(opened, pruning)
    with _Bar(questions * len(config.settings())) as bar:
        folders = sweep(config, tasks, opened, name=model_name(model), data=data, out=out, prompts=wording, split=split,
                        progress=lambda _, samples: bar.add(samples))  # fmt: skip
    rows = sweep_table(folders)
    write_json(out / "bench.json", rows)
    print(f"{'setting':<20} tokens      score  prefill [ms]  times faster")
    for row in rows:
        print(f"{row['setting']:<20} {row['tokens']:>4}/{row['of']:<5} {row['mean_score']:>6.3f}"
              f"  {row['prefill_ms']:>12.1f}  {row['times_faster']:>12.2f}")  # fmt: skip
    print(write_report(folders, out / "report.html", data=data), file=sys.stderr)
    failed = sum(row["errors"] for row in rows)
    if failed:
        print(f"headrace vqa bench-prune: {failed} answers failed; samples.jsonl in {out} says why", file=sys.stderr)
    return 1 if failed else 0


def export(
    *,
    task: str,
    data: Path,
    out: Path,
    to: Literal["lmms-eval", "vlmevalkit"],
    split: str = "test",
    prompts: str = "headrace-1",
) -> int:
    """Write questions for another evaluation framework; answers are scored by the same scorer there.

    Args:
        task: Task path, as for `headrace vqa run`.
        data: Folder of the data set.
        out: Folder to write: for lmms-eval's --include_path, or VLMEvalKit's $LMUData.
        to: Which framework.
        split: Split of the data set.
        prompts: Prompt set, or a JSON file: task to text.
    """
    from headrace.datasets.flowlearn.prompts import find_prompts
    from headrace.vlm.vqa_data import load_task

    tasks, wording = load_task(task, data, split=split), find_prompts(prompts)
    if to == "lmms-eval":
        from headrace.vlm.adapters.lmms_eval import write_task_folder

        group = write_task_folder(tasks, data, out, prompts=wording)
        print(f"lmms_eval --model headrace --model_args source=MODEL --include_path {out} --tasks {group}")
    else:
        from headrace.vlm.adapters.vlmevalkit import write_tsv

        print(write_tsv(tasks, data, out, prompts=wording))
    return 0
