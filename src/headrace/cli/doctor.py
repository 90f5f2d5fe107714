"""`headrace doctor`: what this machine has, and the next step for each thing missing."""

import contextlib
import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report; `advice` is empty when all is well."""

    what: str
    found: str
    advice: str = ""


def vulkan_device(*, timeout: float = 120.0) -> str | None:
    """Name of the device that SAPIEN would render with, or None; asked in a process of its own, for it may abort.

    A device that does not answer within `timeout` seconds counts as none.
    """
    code = (
        "import sapien; sapien.Scene(); sapien.render.RenderCameraComponent(8, 8); "
        "print('@' + sapien.render.get_device_summary())"
    )
    try:
        probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    return device_name(probe.stdout.partition("@")[2]) if probe.returncode == 0 else None


def device_name(summary: str) -> str:
    """The device that renders in SAPIEN's summary, whose blocks begin `GPU: name`; the first one that is supported."""
    names = []
    for line in summary.splitlines():
        key, _, value = line.strip().partition(":")
        if key == "GPU":
            names.append(value.strip())
        elif key == "Supported" and value.strip() == "0" and names:
            names.pop()
    return names[0] if names else "a device without a name"


def forget_vulkan() -> None:
    """Drop the set-up's note that a device was found, so that `scripts/setup.sh` looks again."""
    with contextlib.suppress(OSError):
        (Path(sys.prefix) / ".vulkan").unlink()


def findings(folder: Path) -> list[Finding]:
    """Look at everything that headrace needs."""
    rows = [Finding("Python", platform.python_version())]
    if importlib.util.find_spec("torch") is None:
        return [*rows, Finding("torch", "missing", "run `make setup`")]
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    rows.append(Finding("torch", f"{torch.__version__} on {device}"))
    if importlib.util.find_spec("sapien") is None:
        rows.append(Finding("simulator", "missing", "run `make setup`"))
    else:
        name = vulkan_device()
        if name is None:
            forget_vulkan()
        advice = "" if name else "run `scripts/setup.sh`, which installs Mesa's software Vulkan driver"
        rows.append(Finding("Vulkan", name or "no usable device", advice))
    from importlib.metadata import PackageNotFoundError, version

    builds = []
    for package in ("opencv-python", "opencv-python-headless", "opencv-contrib-python"):
        try:
            builds.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    advice = "" if len(builds) == 1 else "run `make setup`: exactly one OpenCV build must be installed"
    rows.append(Finding("OpenCV", ", ".join(builds) or "missing", advice))
    import av

    encoders = [name for name in ("libx264", "libsvtav1", "h264_nvenc") if name in av.codecs_available]
    rows.append(Finding("video encoder", ", ".join(encoders) or "none", "" if encoders else "pip install av"))
    free = shutil.disk_usage(folder).free / 2**30
    rows.append(Finding("disk", f"{free:.0f} GiB free", "" if free > 5 else "free some room: 5 GiB are needed"))
    browser = next((b for b in ("chromium", "google-chrome", "chromium-browser") if shutil.which(b)), None)
    hint = "" if browser else "optional: a Chromium draws Mermaid charts and report screenshots (apt install chromium)"
    rows.append(Finding("browser", browser or "none", hint))
    return rows


def doctor() -> int:
    """Print what this machine has (Python, torch, Vulkan, encoder, disk) and the next step for each thing missing."""
    rows = findings(Path.cwd())
    width = max(len(row.what) for row in rows)
    for row in rows:
        mark = "!" if row.advice and not row.advice.startswith("optional") else " "
        print(f"{mark} {row.what:<{width}}  {row.found}")
        if row.advice:
            print(f"  {'':<{width}}  -> {row.advice}")
    return int(any(row.advice and not row.advice.startswith("optional") for row in rows))
