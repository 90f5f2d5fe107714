"""One self-contained HTML page about one or several runs, with a Markdown and a CSV table beside it."""

import csv
import io
import json
import math
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from headrace.datasets.flowlearn.records import Graph
from headrace.datasets.flowlearn.write import CHARTS_FILE
from headrace.vlm.vqa_bench import PREFILL_FILE
from headrace.vlm.vqa_charts import Series, interval_bar, line_chart
from headrace.vlm.vqa_gallery import WHOLE, Kept, graph_difference, kept_overlay, thumbnail
from headrace.vlm.vqa_run import PICTURES_FILE
from headrace.vlm.vqa_samples import RESULTS_FILE, Sample, read_samples

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em} h2{margin-top:1.8em;border-bottom:1px solid #ccc} table{border-collapse:collapse;font-size:14px}
td,th{padding:3px 9px;text-align:left;border-bottom:1px solid #eee;vertical-align:top} td.n{text-align:right}
svg{max-width:480px;width:100%} svg.bar{width:120px;height:14px} svg.graph{background:#fafafa;border:1px solid #eee}
svg .grid{stroke:#e5e5e5} svg .l{font-size:10px;fill:#555} svg .t{font-size:13px;font-weight:600}
svg .n{font-size:9px;font-weight:600} .row{display:flex;flex-wrap:wrap;gap:18px;align-items:flex-start}
.row>*{flex:1 1 300px;max-width:500px} img{max-width:100%;border:1px solid #ddd} .note{color:#666;font-size:13px}
pre{white-space:pre-wrap;background:#f6f6f6;padding:6px;font-size:12px;margin:4px 0;max-height:12em;overflow:auto}
.good{color:#2e8b40}.bad{color:#c23b3b}"""
GALLERY = 6
_PARTS = ("link_f1", "grammar_link_f1", "contains", "within_one", "rouge_l", "exact")


class Run(NamedTuple):
    """What a report reads of a run folder; `tokens` are visual tokens before and after pruning, by picture."""

    name: str
    folder: Path
    results: dict[str, Any]
    samples: list[Sample]
    kept: dict[str, Kept]
    tokens: dict[str, tuple[int, int]]
    prefill: dict[str, Any]


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: No `results.json`.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULTS_FILE}; run or merge it first")
    results = json.loads(path.read_text(encoding="utf-8"))
    notes = folder / PICTURES_FILE
    rows = _notes(notes.read_text(encoding="utf-8")) if notes.is_file() else []
    kept = {row["image"]: _kept(row) for row in rows if "kept" in row}
    tokens = {row["image"]: (row["before"], row["after"]) for row in rows if "before" in row}
    timed = folder / PREFILL_FILE
    prefill = json.loads(timed.read_text(encoding="utf-8")) if timed.is_file() else {}
    return Run(_run_name(results, folder), folder, results, read_samples(folder), kept, tokens, prefill)


def _notes(text: str) -> list[dict[str, Any]]:
    """Notes on pictures; one that was torn by a crash is left out, also where the next run went on behind it."""
    rows = []
    for line in text.split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _kept(row: dict[str, Any]) -> Kept:
    grid = row.get("grid")
    return Kept(row["kept"], row["of"], tuple(row.get("region", WHOLE)), (grid[0], grid[1]) if grid else None)


def _run_name(results: dict[str, Any], folder: Path) -> str:
    pruning = results["run"]["pruning"]
    return (
        f"{results['run']['model']} {pruning_name(pruning)}"
        if pruning
        else f"{results['run']['model']} ({folder.name})"
    )


def pruning_name(pruning: dict[str, Any]) -> str:
    """Method and budget in a few words."""
    budget = pruning.get("budget") or {}
    keep = f"{budget['tokens']} tokens" if budget.get("tokens") else f"{budget.get('share', 'no set share')} of tokens"
    return f"{method_of(pruning)}, {keep}"


def method_of(pruning: dict[str, Any]) -> str:
    """Method in a few words; runs of earlier versions tell its kind only."""
    if "method" in pruning:
        return str(pruning["method"])
    method, choice = str(pruning.get("pruning", "?")).removesuffix("Config"), pruning.get("choice", "")
    return f"{method} {choice}" if choice else method


def kept_share(run: Run) -> float:
    """Share of visual tokens that stayed: measured where the run noted it, else from the settings; NaN if unknown."""
    pruning = run.results["run"]["pruning"]
    if not pruning:
        return 1.0
    if before := sum(counts[0] for counts in run.tokens.values()):
        return sum(counts[1] for counts in run.tokens.values()) / before
    if run.prefill:
        return float(run.prefill["share"])
    if run.kept:
        return sum(len(kept.tokens) for kept in run.kept.values()) / sum(kept.of for kept in run.kept.values())
    return float((pruning.get("budget") or {}).get("share") or math.nan)


def _table(runs: list[Run]) -> str:
    rows = ["<tr><th>run<th>task<th>score<th>95 %<th><th>n<th>not read<th>constant answer<th>also"]
    for run in runs:
        for task, t in run.results["tasks"].items():
            low, high = t["interval"]
            also = ", ".join(f"{name} {t['parts'][name]['score']:.3f}" for name in _PARTS if name in t.get("parts", {}))
            if "clean_labels" in t:
                clean = t["clean_labels"]
                also += f"; without {t['count'] - clean['count']} faulty labels {clean['score']:.3f}"
            rows.append(
                f"<tr><td>{escape(run.name)}<td>{escape(task)}<td class=n><b>{t['score']:.3f}</b>"
                f"<td class=n>{low:.3f} to {high:.3f}<td>{interval_bar(t['score'], low, high, t['majority'])}"
                f"<td class=n>{t['count']}<td class=n>{t['unparsed']}<td class=n>{t['majority']:.3f}<td>{escape(also)}"
            )
        for name, value in run.results.get("balanced", {}).items():
            rows.append(f"<tr><td>{escape(run.name)}<td>{escape(name)}, balanced<td class=n><b>{value:.3f}</b><td><td>"
                        "<td><td><td class=n>0.500<td>")  # fmt: skip
    return f"<table>{''.join(rows)}</table><p class=note>Orange tick: what one constant answer gets.</p>"


def _node_curves(runs: list[Run]) -> str:
    charts = []
    for task in runs[0].results["tasks"]:
        lines = []
        for run in runs:
            groups = run.results["tasks"].get(task, {}).get("by_nodes", {})
            points = [(float(n), g["score"], *g["interval"]) for n, g in groups.items()]
            lines.append(Series(run.name, points))
        charts.append(line_chart(task, lines, x_label="nodes in the chart", y_label="score"))
    return f"<div class=row>{''.join(f'<div>{c}</div>' for c in charts if c)}</div>"


def _sweep(runs: list[Run]) -> str:
    """Score and time against kept tokens, one line per method; empty unless there are at least two budgets.

    Runs that do not tell how much they kept are left out.
    """
    runs = [run for run in runs if not math.isnan(kept_share(run))]
    methods: dict[str, list[Run]] = {}
    whole = [run for run in runs if not run.results["run"]["pruning"]]
    for run in runs:
        pruning = run.results["run"]["pruning"]
        if pruning:
            methods.setdefault(method_of(pruning), []).append(run)
    if not methods or len(runs) < 2:
        return ""
    charts = []
    for task in runs[0].results["tasks"]:
        lines = []
        for method, members in methods.items():
            chosen = sorted((r for r in [*members, *whole] if task in r.results["tasks"]), key=kept_share)
            points = []
            for run in chosen:
                numbers = run.results["tasks"][task]
                points.append((100 * kept_share(run), numbers["score"], *numbers["interval"]))
            lines.append(Series(method, points))
        charts.append(
            line_chart(f"{task} against kept tokens", lines, x_label="visual tokens kept [%]", y_label="score")
        )
    timed = all(run.prefill for run in runs)
    what = "prefill: encoder and first token" if timed else "time per question"
    times = [Series(method, [_time_point(run, timed) for run in sorted([*members, *whole], key=kept_share)])
             for method, members in methods.items()]  # fmt: skip
    charts.append(line_chart(what, times, x_label="visual tokens kept [%]", y_label="ms", y_range=None))
    return f"<h2>Pruning sweep</h2><div class=row>{''.join(f'<div>{c}</div>' for c in charts if c)}</div>"


def _time_point(run: Run, timed: bool) -> tuple[float, float, float, float]:
    """Share kept [%], time [ms] and its quartiles, or the mean time per question twice."""
    if timed:
        return (100 * kept_share(run), run.prefill["median_ms"], *run.prefill["quartiles_ms"])
    mean = run.results["milliseconds_per_question"]
    return 100 * kept_share(run), mean, mean, mean


def _confusion(runs: list[Run]) -> str:
    rows = ["<tr><th>run<th>task<th>said true<th>said false<th>neither"]
    for run in runs:
        for task in run.results["tasks"]:
            if task.startswith(("true_", "false_")):
                said = Counter(s.read if s.read in ("true", "false") else "" for s in run.samples if s.task == task)
                rows.append(f"<tr><td>{escape(run.name)}<td>{escape(task)}<td class=n>{said['true']}"
                            f"<td class=n>{said['false']}<td class=n>{said['']}")  # fmt: skip
    return f"<h2>True and false</h2><table>{''.join(rows)}</table>" if len(rows) > 1 else ""


def _drawn(data: Path | None) -> dict[str, Graph]:
    """Graphs with boxes by picture stem, for generated data."""
    path = data / CHARTS_FILE if data else None
    if path is None or not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {row["name"]: Graph.from_dict(row["graph"]) for row in rows}


def _graphs(run: Run, data: Path | None) -> str:
    chosen = [s for s in run.samples if s.task == "mermaid" and not s.error]
    if not chosen:
        return ""
    chosen.sort(key=lambda s: s.parts.get("link_f1", 0.0))
    step = max(1, len(chosen) // GALLERY)
    drawn, blocks = _drawn(data), []
    for sample in chosen[::step][:GALLERY]:
        picture = thumbnail(data / sample.image) if data else ""
        graph = graph_difference(sample.answer, sample.reference, drawn.get(Path(sample.image).stem))
        words = f"node F1 {sample.parts['node_f1']:.2f}, link F1 {sample.parts['link_f1']:.2f}"
        text = f"{graph}<p class=note>{escape(sample.image)}: {words}</p>"
        blocks.append(f"<div class=row><div>{picture}</div><div>{text}</div></div>")
    legend = (
        "<p class=note>Green: in both. Red: missing in the answer. Orange: only in the answer. From worst to best.</p>"
    )
    return f"<h2>Graphs: {escape(run.name)}</h2>{legend}{''.join(blocks)}"


def _overlays(run: Run, data: Path | None) -> str:
    if not run.kept or data is None:
        return ""
    shown = [(image, kept) for image, kept in run.kept.items() if (data / image).is_file()][:GALLERY]
    blocks = [f"<div>{kept_overlay(data / image, kept)}<p class=note>{escape(image)}: {len(kept.tokens)} of {kept.of} "
              "tokens</p></div>" for image, kept in shown]  # fmt: skip
    return f"<h2>Kept tokens: {escape(run.name)}</h2><div class=row>{''.join(blocks)}</div>"


def _answers(run: Run, data: Path | None) -> str:
    unread = [s for s in run.samples if not s.parsed]
    wrong = [s for s in run.samples if s.parsed and s.score < 0.5 and s.task != "mermaid"]
    right = [s for s in run.samples if s.score == 1.0 and s.task != "mermaid"]
    blocks = []
    for title, rows in (("not read", unread), ("wrong", wrong), ("right", right)):
        step = max(1, len(rows) // GALLERY)
        for s in rows[::step][:GALLERY]:
            picture = thumbnail(data / s.image, longest=240) if data else escape(s.image)
            blocks.append(
                f"<tr><td>{title}<td>{picture}<td>{escape(s.task)}<br><span class=note>{escape(s.question)}</span>"
                f"<td><pre>{escape(s.error or s.answer[:600]) or '(empty)'}</pre>"
                f"<td><pre>{escape(s.reference[:600])}</pre>"
            )
    head = "<tr><th><th>picture<th>task<th>answer<th>reference"
    return f"<h2>Answers: {escape(run.name)}</h2><table>{head}{''.join(blocks)}</table>"


def _facts(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        facts = {**run.results["run"], **run.results["versions"], "run_hash": run.results["run_hash"]}
        text = "; ".join(f"{key} {json.dumps(value)}" for key, value in facts.items())
        rows.append(f"<tr><td>{escape(run.name)}<td class=note>{escape(text)}")
    return f"<h2>How it was made</h2><table>{''.join(rows)}</table>"


def page(runs: list[Run], data: Path | None) -> str:
    """The HTML text."""
    title = f"Flowchart questions: {runs[0].results['run']['task']}"
    body = [f"<h1>{escape(title)}</h1>", _table(runs), _sweep(runs), "<h2>By number of nodes</h2>", _node_curves(runs)]
    body.append(_confusion(runs))
    for run in runs:
        body += [_graphs(run, data), _overlays(run, data), _answers(run, data)]
    body.append(_facts(runs))
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n")  # fmt: skip


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    """One flat row per run and task, for CSV and Markdown."""
    return [
        {"run": run.name, "task": task, "score": t["score"], "low": t["interval"][0], "high": t["interval"][1],
         "count": t["count"], "unparsed": t["unparsed"], "majority": t["majority"],
         "link_f1": t.get("parts", {}).get("link_f1", {}).get("score", "")}
        for run in runs for task, t in run.results["tasks"].items()
    ]  # fmt: skip


def write_report(folders: list[Path], out: Path, *, data: Path | None = None) -> Path:
    """Write `out` (HTML) and the same table as `.md` and `.csv` beside it.

    Args:
        folders: Finished run folders, at least one.
        out: The page.
        data: Folder of the data set, for thumbnails, overlays and drawn graphs.

    Returns:
        `out`.

    Raises:
        ValueError: No run given, or the page has the name of a table beside it.
        FileNotFoundError: A run is not finished.
    """
    if not folders:
        raise ValueError("a report needs at least one run folder")
    if out.suffix in (".md", ".csv"):
        raise ValueError(f"the page {out} would be overwritten by the table beside it; name it .html")
    runs = [read_run(folder) for folder in folders]
    rows = rows_of(runs)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += [
        "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |" for row in rows
    ]
    for path, text in ((out, page(runs, data)), (out.with_suffix(".md"), "\n".join(lines) + "\n"),
                       (out.with_suffix(".csv"), table.getvalue())):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    return out
