"""One self-contained HTML page from a results folder: rates, videos, plots, timings, and how they were made."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from headrace.nn.pretrained import void, write_atomically
from headrace.sim.statistics import Interval, spread, wilson_interval
from headrace.sim.svg import histogram, interval_bar, line_plot

RESULTS, EPISODES, REPORT = "results.json", "episodes.jsonl", "report.html"
Row = Mapping[str, Any]


def write_report(folder: Path, *, video_bytes: int = 40_000_000) -> Path:
    """Write `report.html` into a results folder, atomically.

    The page asks for nothing outside itself, and forbids it by a content security policy: videos are embedded, plots
    are inline SVG. It works from a file, offline and in an archive.

    Args:
        folder: Holds `results.json` and `episodes.jsonl` as `headrace rollout` writes them, and the videos they name.
        video_bytes: Videos are embedded in order until this many bytes are reached; the rest are only named.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: A file is missing: the rollout has not finished or the folder is another one.
        ValueError: A file is damaged; says which and where.
    """
    results, rows = _read_json(folder / RESULTS), _read_rows(folder / EPISODES)
    tasks = results.get("tasks") or [results]
    order = [str(task["task"]) for task in tasks]  # rows were written as episodes ended
    rows = sorted(rows, key=lambda row: (order.index(row["task"]) if row["task"] in order else 0, row["episode"]))
    title = f"{results.get('policy', 'policy')}: {', '.join(str(task['task']) for task in tasks)}"
    template = Template(Path(__file__).with_name(REPORT).read_text())
    page = template.substitute(
        title=escape(title),
        subtitle=_subtitle(tasks, rows, results),
        tasks=_task_table(tasks, rows),
        latency=_latency(rows),
        filters=_filters(rows),
        episodes=_episodes(folder, rows, results, video_bytes),
        origin=_origin(results),
    )
    target = folder / REPORT
    write_atomically(target, lambda path: void(path.write_text(page)))
    return target


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `headrace rollout` to the end, or give its --out folder")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); run the rollout again") from error


def _read_rows(path: Path) -> list[Row]:
    """Episodes; a last line that a kill cut off is left out, a broken one before it is an error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `headrace rollout` to the end, or give its --out folder")
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not valid JSON ({error}); run the rollout again") from error
    return rows


def _outcome(row: Row) -> str:
    if row.get("error"):
        return "errored"
    return "success" if row["success"] else "failure"


def _subtitle(tasks: Sequence[Row], rows: Sequence[Row], results: Row) -> str:
    errors = sum(_outcome(row) == "errored" for row in rows)
    parts = [f"{len(rows)} episodes in {len(tasks)} task{'s' if len(tasks) != 1 else ''}"]
    if errors:
        parts.append(f"{errors} ended with an error")
    parts += [str(results[key]) for key in ("date", "hardware") if isinstance(results.get(key), str)]
    return escape("; ".join(parts))


def _task_table(tasks: Sequence[Row], rows: Sequence[Row]) -> str:
    head = (
        "<tr><th>Task</th><th>Success rule</th><th class=number>Successes</th><th class=number>Rate</th>"
        "<th>95 % Wilson interval</th><th></th><th class=number>Errors</th><th class=number>Steps</th></tr>"
    )
    return f"<table>{head}{''.join(_task_row(task, rows) for task in tasks)}</table>"


def _task_row(task: Row, rows: Sequence[Row]) -> str:
    own = [row for row in rows if row["task"] == task["task"]]
    successes, trials = int(task["successes"]), int(task["episodes"])
    rate = successes / max(trials, 1)
    interval = Interval(*task["ci95"]) if task.get("ci95") else wilson_interval(successes, trials)
    rule = ", ".join(sorted({str(row.get("success_rule", "")) for row in own}))
    errors = sum(_outcome(row) == "errored" for row in own)
    steps = sum(int(row["steps"]) for row in own) / max(len(own), 1)
    return (
        f"<tr><td>{escape(str(task['task']))}</td><td>{escape(rule)}</td>"
        f"<td class=number>{successes} of {trials}</td><td class=number><b>{rate:.1%}</b></td>"
        f"<td>{interval.low:.1%} to {interval.high:.1%}</td><td>{interval_bar(rate, interval)}</td>"
        f"<td class=number>{errors}</td><td class=number>{steps:.1f}</td></tr>"
    )


def _latency(rows: Sequence[Row]) -> str:
    """Milliseconds of every policy call; the scripted experts make none."""
    calls = [float(ms) for row in rows for ms in row.get("policy_ms") or []]
    if not calls:
        return '<p class="soft">No policy calls were timed in this run.</p>'
    times = spread(calls)
    text = f"{len(calls)} calls: median {times.median:.1f} ms, 95 % below {times.p95:.1f} ms"
    title = f"Time of one policy call (a chunk of actions). {text}, longest {times.largest:.1f} ms."
    return histogram(calls, title=title, unit="ms")


def _filters(rows: Sequence[Row]) -> str:
    counts = {kind: sum(_outcome(row) == kind for row in rows) for kind in ("success", "failure", "errored")}
    return "".join(
        f'<label><input type="checkbox" value="{kind}" checked> {kind} ({count})</label>'
        for kind, count in counts.items()
        if count
    )


def _episodes(folder: Path, rows: Sequence[Row], results: Row, video_bytes: int) -> str:
    shown: list[str] = []
    opened: set[str] = set()
    left = video_bytes
    for row in rows:
        video = folder / row["video"] if row.get("video") else None
        size = video.stat().st_size if video is not None and video.is_file() else 0
        embed = size <= left
        left -= size if embed else 0
        first = bool(size) and row["task"] not in opened
        if first:
            opened.add(row["task"])
        shown.append(_episode(row, results, _video(video, embed), opened=first))
    return "\n".join(shown) or '<p class="soft">No episode has finished.</p>'


def _episode(row: Row, results: Row, video: str, *, opened: bool) -> str:
    kind = _outcome(row)
    facts = f"seed {row['seed']}, {row['steps']} steps, {float(row['seconds']):.1f} s"
    error = f'<p class="error">{escape(str(row["error"]))}</p>' if row.get("error") else ""
    parts = [video] if video else []
    for key, label in (("actions", "Actions, in the controller's units"), ("states", "Proprioception and goal")):
        if row.get(key):
            parts.append(line_plot(row[key], _names(key, row, results), title=label))
    words = f"<span>{escape(str(row['instruction']))}</span>" if row.get("instruction") else ""
    return (
        f'<details class="episode {kind}"{" open" if opened else ""}><summary><span class="badge {kind}">{kind}</span>'
        f'<b>{escape(str(row["task"]))} #{row["episode"]}</b><span class="soft">{facts}</span>{words}</summary>'
        f"<div>{error}{''.join(parts)}</div></details>"
    )


def _names(key: str, row: Row, results: Row) -> list[str]:
    """Names from results.json (`action_names`, `state_names`) where they fit, else numbers."""
    width = len(row[key][0])
    given = results.get(f"{key[:-1]}_names")
    return list(given) if given and len(given) == width else [f"{key[:-1]} {k}" for k in range(width)]


def _video(path: Path | None, embed: bool) -> str:
    if path is None:
        return ""
    name = escape(path.name)
    problem = _video_problem(path)
    if problem:
        return f'<p class="error">{name}: {escape(problem)}</p>'
    if not embed:
        return f'<p class="soft">{name} is not embedded, to keep this page small.</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<video controls loop muted playsinline preload="metadata" aria-label="{name}" '
        f'src="data:video/mp4;base64,{data}"></video>'
    )


def _video_problem(path: Path) -> str:
    """Why a browser would not play the file, or an empty string."""
    import av

    try:
        with av.open(str(path)) as container:
            codec = container.streams.video[0].codec_context.name
            next(container.decode(video=0))
    except (OSError, IndexError, StopIteration, av.error.FFmpegError) as error:
        return f"the video cannot be read ({error}); it is missing or truncated"
    return "" if codec == "h264" else f"browsers play H.264 in MP4, this video is {codec}"


def _origin(results: Row) -> str:
    rows = []
    for key in ("command", "policy", "policy_settings", "settings", "date", "hardware", "seeds", "seconds"):
        if results.get(key) not in (None, "", {}, []):
            rows.append((key, results[key]))
    rows += [(f"version of {name}", value) for name, value in (results.get("versions") or {}).items()]
    cells = "".join(
        f"<tr><th>{escape(key)}</th><td><pre>{escape(_plain(value))}</pre></td></tr>" for key, value in rows
    )
    return f"<table>{cells}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list) and len(value) > 2 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]} to {value[-1]}"
    return str(value)
