"""Small LeRobot datasets, written by LeRobot itself."""

import numpy as np
import pytest

LENGTHS = (12, 9, 14)
CAMERAS = ("base", "wrist")
FPS = 10


def picture(episode, step, camera, size=32):
    y, x = np.mgrid[:size, :size]
    channels = (x * 4 + step * 9) % 256, (y * 4 + episode * 60) % 256, np.full_like(x, 90 + camera * 60 + step)
    return np.stack(channels, -1).astype(np.uint8)


def write_dataset(root, *, video, lengths=LENGTHS, cameras=CAMERAS, action_dim=4, seed=0):
    """Record a dataset with LeRobot's own writer."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = ["height", "width", "channel"]
    features = {
        f"observation.images.{camera}": {"dtype": "video" if video else "image", "shape": (32, 32, 3), "names": names}
        for camera in cameras
    }
    features["observation.state"] = {"dtype": "float32", "shape": (5,), "names": [f"s{i}" for i in range(5)]}
    features["observation.goal"] = {"dtype": "float32", "shape": (1,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (action_dim,), "names": [f"a{i}" for i in range(action_dim)]}
    encoder = RGBEncoderConfig(vcodec="h264")
    dataset = LeRobotDataset.create("local/tiny", FPS, features, root=root, use_videos=video, rgb_encoder=encoder)
    random = np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for step in range(length):
            frame = {f"observation.images.{c}": picture(episode, step, k) for k, c in enumerate(cameras)}
            frame["observation.state"] = random.normal(size=5).astype(np.float32)
            frame["observation.goal"] = np.array([episode], np.float32)
            frame["action"] = random.normal(size=action_dim).astype(np.float32)
            dataset.add_frame({**frame, "task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def video_dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("lerobot") / "video", video=True)


@pytest.fixture(scope="session")
def image_dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("lerobot") / "image", video=False)


@pytest.fixture(scope="session")
def other_action_dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("lerobot") / "other", video=False, lengths=(5,), action_dim=7, cameras=("base",), seed=1
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
