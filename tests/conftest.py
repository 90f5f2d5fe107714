"""Fixtures that tests of several rooms share: stored runs of official code ("golden sets"), a disk that fills up."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

SCENES = Path(__file__).parents[2] / "shared" / "simpler_assets"
if SCENES.is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(SCENES))  # before anything imports mani_skill, which reads it once
GOLDEN = Path(os.environ.get("HEADRACE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


class GoldenSet(NamedTuple):
    """One stored run: its name, the sizes that it was made with, and its tensors by name."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under a prefix, without it."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def read_golden_set(path: Path) -> GoldenSet:
    """Read one set whole; raises what json and safetensors raise, and AssertionError when entries are missing."""
    about = json.loads(path.read_text())
    tensors: dict[str, Tensor] = {}
    for part in about["files"]:
        tensors |= load_file(path.parent / part["file"])
    assert set(tensors) == set(about["entries"]), f"{path.name} lists other entries than its files hold"
    return GoldenSet(path.stem, about["config"], tensors)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of `test_<system>.py` that need `golden_set` run on every set of that system; skipped if there is none."""
    if "golden_set" not in metafunc.fixturenames:
        return
    system = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    sets: list[Any] = sorted(p for p in GOLDEN.glob(f"{system}_*.json") if not p.stem.endswith("_keys"))
    if not sets:
        sets = [pytest.param(None, marks=pytest.mark.skip(reason=f"no {system} set in {GOLDEN}; set HEADRACE_GOLDEN"))]
    metafunc.parametrize("golden_set", sets, indirect=True, scope="module", ids=lambda p: p.stem if p else "none")


@pytest.fixture(scope="module")
def golden_set(request: pytest.FixtureRequest) -> GoldenSet:
    """A golden set of the system that the test file is named after; an unreadable one is an error, not a skip."""
    return read_golden_set(request.param)


@pytest.fixture
def official_keys(request: pytest.FixtureRequest) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint; the test names the list with `indirect` parametrization."""
    path = GOLDEN / f"{request.param}_keys.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {GOLDEN}; set HEADRACE_GOLDEN")
    return {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text()).items()}


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file of this process can grow beyond so many bytes; a write stops in the middle then."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

    return limited


def noisy_demos(root: Path, *, side: int, length: int) -> None:
    """Two demonstrations of `length` random pictures, states and actions as a LeRobotDataset of pictures, 20 Hz."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    random = np.random.default_rng(0)
    features = {
        "observation.images.base": {
            "dtype": "image",
            "shape": (side, side, 3),
            "names": ["height", "width", "channel"],
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
        "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "gripper"]},
    }
    made = LeRobotDataset.create("local/demos", 20, features, root=root, use_videos=False)
    for _ in range(2):
        for _ in range(length):
            picture = random.integers(0, 256, (side, side, 3), np.uint8)
            numbers = {"observation.state": random.normal(size=4), "action": random.normal(size=3)}
            floats = {key: value.astype(np.float32) for key, value in numbers.items()}
            made.add_frame({"observation.images.base": picture, **floats, "task": "push the cube"})
        made.save_episode()
    made.finalize()


@pytest.fixture(scope="session")
def make_noisy_demos() -> Callable[..., None]:
    """`noisy_demos`, for tests in any folder."""
    return noisy_demos
