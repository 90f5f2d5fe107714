"""Are SIMPLER's scenes on this machine? Checked file by file, so that ManiSkill never asks on standard input."""

import os
import re
import sys
from pathlib import Path

from headrace.sim.simpler import SimplerTask, simpler_task

DOWNLOAD = (
    "python -m mani_skill.utils.download_asset bridge_v2_real2sim -y && "
    "python -m mani_skill.utils.download_asset widowx250s -y"
)
LICENCE_NOTE = (
    "The scenes come from simpler-env/ManiSkill2_real2sim (repository Apache-2.0; ManiSkill's README puts assets under "
    "CC BY-NC 4.0) and haosulab/ManiSkill-WidowX250S: treat them as non-commercial research material."
)
_SCENES = "tasks/bridge_v2_real2sim_dataset"


class AssetsMissing(FileNotFoundError):
    """The scenes are not there; the message lists what is missing and the command that fetches it."""


def asset_folder() -> Path:
    """Where ManiSkill looks for assets: the `data` child of `MS_ASSET_DIR`, by default `~/.maniskill/data`.

    ManiSkill reads the variable once, when it is imported; from then on its own answer counts.
    """
    loaded = sys.modules.get("mani_skill")
    if loaded is not None:
        return Path(loaded.ASSET_DIR)
    return Path(os.environ.get("MS_ASSET_DIR", Path.home() / ".maniskill")).expanduser() / "data"


def _visual(models: Path, model: str) -> list[Path]:
    """The visual mesh that ManiSkill will take: the first of these that exists, or the first when none does."""
    candidates = [models / model / f"textured.{kind}" for kind in ("obj", "dae", "glb")]
    return [next((path for path in candidates if path.exists()), candidates[0])]


def needed_files(task: SimplerTask, folder: Path) -> list[Path]:
    """Every file that the task opens by name."""
    scenes, models = folder / _SCENES, folder / _SCENES / "custom" / "models"
    baked = "_baked_tex" if task.source.startswith("baked") else ""
    stage, picture = ("v2", "bridge_sink") if task.on_sink else ("v1", "bridge_real_eval_1")
    files = [
        folder / "robots/widowx/wx250s.urdf",
        folder / "robots/widowx/wx250s.srdf",
        folder / "robots/widowx/interbotix_black.png",
        scenes / f"custom/info_bridge_custom{baked}_v0.json",
        scenes / f"stages/bridge_table_1_{stage}.glb",
        scenes / f"real_inpainting/{picture}.png",
    ]
    for model in (task.source, task.target, *(["sink"] if task.on_sink else [])):
        files += [models / model / "collision.obj", *_visual(models, model)]
    return files


def _robot_meshes(folder: Path) -> list[Path]:
    """The mesh files that the robot's URDF names, if the URDF is there."""
    urdf = folder / "robots/widowx/wx250s.urdf"
    names = sorted(set(re.findall(r'filename="([^"]+)"', urdf.read_text()))) if urdf.is_file() else []
    return [urdf.parent / name for name in names]


def missing_files(task: SimplerTask, folder: Path | None = None) -> list[Path]:
    """The needed files that are absent or empty; an empty folder left by a failed download counts as missing."""
    folder = folder or asset_folder()
    files = needed_files(task, folder) + _robot_meshes(folder)
    return [path for path in files if not path.is_file() or path.stat().st_size == 0]


def download_command(name: str) -> str:
    """What fetches the scenes of the task of that name; an empty text when they are here."""
    return DOWNLOAD if missing_files(simpler_task(name)) else ""


def require_assets(task: SimplerTask, folder: Path | None = None) -> None:
    """Refuse to start without the scenes, which are looked for under `folder`, by default `asset_folder()`.

    Raises:
        AssetsMissing: Names the missing files and the command that downloads them.
    """
    folder = folder or asset_folder()
    gone = missing_files(task, folder)
    if gone:
        shown = ", ".join(str(path.relative_to(folder)) for path in gone[:4]) + (", ..." if len(gone) > 4 else "")
        raise AssetsMissing(
            f"{task.name} needs {len(gone)} files that are not under {folder}: {shown}. Fetch them with `{DOWNLOAD}`, "
            f"or set MS_ASSET_DIR to the parent of a `data` folder that has them. {LICENCE_NOTE}"
        )
