"""What a run on an arm leaves behind: JSON lines for programs, a rerun recording for eyes."""

import json
from importlib.util import find_spec
from pathlib import Path

from headrace.robot.drive import DriveReport


def require_new(folder: Path) -> None:
    """Refuse a folder that holds a log, before anything moves.

    Raises:
        FileExistsError: It does.
    """
    if (folder / "summary.json").exists():
        raise FileExistsError(f"{folder} already holds a log; give this run its own --out")


def require_rerun() -> None:
    """Refuse to promise a recording where rerun is not installed, before anything moves.

    Raises:
        ModuleNotFoundError: Names the package.
    """
    if find_spec("rerun") is None:
        raise ModuleNotFoundError("recordings need the package rerun-sdk: pip install rerun-sdk")


def write_log(report: DriveReport, joints: tuple[str, ...], folder: Path) -> Path:
    """Write `summary.json` and `ticks.jsonl` into `folder`, each under a temporary name first; returns the summary.

    Raises:
        FileExistsError: The folder already holds a log.
    """
    require_new(folder)
    path = folder / "summary.json"
    folder.mkdir(parents=True, exist_ok=True)
    rows = (
        {
            "time": round(tick.time, 5),
            "late": round(tick.late, 5),
            "chunk": tick.chunk,
            "cut": list(tick.cut),
            "measured": _plain(tick.measured),
            "requested": None if tick.requested is None else _plain(tick.requested),
            "sent": _plain(tick.sent),
        }
        for tick in report.ticks
    )
    _write(folder / "ticks.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _write(path, json.dumps(summary(report, joints), indent=2) + "\n")
    return path


def summary(report: DriveReport, joints: tuple[str, ...]) -> dict:
    """The run in a few numbers, JSON-ready."""
    at_seam, within = report.seams()
    return {
        "reason": report.reason,
        "joints": list(joints),
        "period": report.period,
        "ticks": len(report.ticks),
        "missed_ticks": report.missed,
        "held_ticks": report.held,
        "cut_ticks": sum(bool(tick.cut) for tick in report.ticks),
        "chunks": len(report.thinking),
        "longest_thought": max(report.thinking, default=0.0),
        "largest_step_at_seam": at_seam,
        "largest_step_within": within,
    }


def write_rerun(report: DriveReport, joints: tuple[str, ...], path: Path) -> Path:
    """Write a recording that `rerun PATH` shows: measured, requested and sent position of each joint over time.

    Raises:
        ModuleNotFoundError: rerun is not installed; names the package.
    """
    require_rerun()
    import rerun

    path.parent.mkdir(parents=True, exist_ok=True)
    recording = rerun.RecordingStream("headrace_drive")
    recording.save(str(path))
    for tick in report.ticks:
        recording.set_time("time", duration=tick.time)
        for index, joint in enumerate(joints):
            for kind, values in (("measured", tick.measured), ("requested", tick.requested), ("sent", tick.sent)):
                if values is not None:
                    recording.log(f"{joint}/{kind}", rerun.Scalars(float(values[index])))
        recording.log("late_ms", rerun.Scalars(tick.late * 1e3))
    recording.flush()
    return path


def _plain(values) -> list[float]:
    return [round(float(value), 5) for value in values]


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)
