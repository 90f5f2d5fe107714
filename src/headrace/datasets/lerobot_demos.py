"""Training batches from any LeRobotDataset v3.0, read without LeRobot. Layout as written by LeRobot 0.6.1."""

# Shape letters in this file: B batch, K cameras, T pictures per camera, S state, H action horizon, A action dimension.

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.datasets.frame_cache import Frames, Size, column_frames, default_cache, video_frames
from headrace.datasets.lerobot_files import (
    data_files,
    find_cameras,
    read_columns,
    read_episodes,
    read_info,
    read_tasks,
    resolve_dataset,
    vector_names,
)
from headrace.datasets.normalize import Statistics


class DemoBatch(NamedTuple):
    """Samples of demonstrations, in the dataset's own units.

    Attributes:
        images: uint8 RGB 0..255, shape (B, K, T, height, width, 3); cameras and history in the order asked for, after
            the history the picture ahead where that is asked for (`looking_ahead`).
        state: float32, shape (B, S), at the present step.
        actions: float32, shape (B, H, A); entry h is the action h steps ahead, the episode's last one repeated.
        action_is_pad: bool, shape (B, H); True past the end of the episode.
        instructions: The task in words, B strings.
        rows: Frame number in the dataset, int64, shape (B,).
    """

    images: Tensor
    state: Tensor
    actions: Tensor
    action_is_pad: Tensor
    instructions: list[str]
    rows: Tensor


class LeRobotDemos:
    """A LeRobotDataset as `len()` and `batch(indices)`; every picture is decoded once, then batches are array slices.

    Numbers are held in memory, pictures in a mapped cache on disk (`headrace.datasets.frame_cache`), so the first use
    decodes the dataset once and later ones start at once. Wrap it in `headrace.training.batches.batches` to train.

    Args:
        source: Folder, name of a dataset in LeRobot's own cache, or Hub id.
        cameras: Camera names, either the whole key `observation.images.base` or its last part `base`; None for all.
        state: Keys whose vectors make up the state, in this order; may be empty.
        action: Key of the action.
        horizon: Actions per sample, H.
        history: Steps of the pictures relative to the present, each 0 or below, such as (-4, 0); before the start of an
            episode its first picture is repeated.
        image_size: (height, width) of the pictures [px], stretched to it; None keeps the stored size.
        episodes: Which episodes; None for all.
        action_dim, state_dim: What a checkpoint expects; another size in the dataset is refused.
        cache: Folder of the frame cache; None for `$HEADRACE_CACHE` or the user's cache folder.
        revision: Of a Hub dataset.

    Raises:
        FileNotFoundError: No such dataset.
        ValueError: Not v3.0, empty, missing cameras or keys, another action or state size (names both), truncated
            parquet or video files, numbers that are not finite.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        state: Sequence[str] = ("observation.state",),
        action: str = "action",
        horizon: int = 1,
        history: Sequence[int] = (0,),
        image_size: Size | None = None,
        episodes: Sequence[int] | None = None,
        action_dim: int | None = None,
        state_dim: int | None = None,
        cache: Path | None = None,
        revision: str | None = None,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        if not history or max(history) > 0:
            raise ValueError(f"history holds steps of 0 or below, at least one, got {tuple(history)}")
        self.folder = resolve_dataset(source, revision=revision)
        info = read_info(self.folder)
        features: dict[str, Any] = info["features"]
        self.fps = float(info["fps"])
        self.robot_type: str | None = info.get("robot_type")
        self.camera_keys = find_cameras(features, cameras, self.folder)
        self.cameras = tuple(key.rsplit(".", 1)[-1] for key in self.camera_keys)
        self.action_names = vector_names(features, [action], self.folder)
        self.state_names = vector_names(features, state, self.folder)
        _require_size("action", self.action_names, action_dim, self.folder)
        _require_size("state", self.state_names, state_dim, self.folder)
        self.horizon, self.history, self.ahead = horizon, tuple(history), 0

        columns = read_columns(self.folder, [action, *state, "timestamp", "episode_index", "task_index"])
        count = len(columns["episode_index"])
        if count != info["total_frames"]:
            raise ValueError(
                f"{self.folder}: {count} frames in data/, {info['total_frames']} by meta/info.json; "
                "the recording was cut short or the copy is incomplete"
            )
        self.actions = columns[action].astype(np.float32).reshape(count, -1)
        parts = [columns[key].astype(np.float32).reshape(count, -1) for key in state]
        self.states = np.concatenate(parts, axis=1) if parts else np.zeros((count, 0), np.float32)
        self._episode = columns["episode_index"].astype(np.int64)
        _require_finite(self.actions, "action", self._episode, self.folder)
        _require_finite(self.states, "state", self._episode, self.folder)
        self._task = columns["task_index"].astype(np.int64)
        self.tasks = read_tasks(self.folder, int(self._task.max()))
        self._first, self._last = _episode_ends(self._episode)
        self.rows = _select(self._episode, episodes, self.folder)
        self.image_size = image_size
        cache = cache or default_cache()
        chosen = set(np.unique(self._episode[self.rows]).tolist())
        self._pictures = [
            _Pictures.read(self.folder, key, info, columns["timestamp"], chosen, image_size, cache)
            for key in self.camera_keys
        ]
        sizes = {pictures.size for pictures in self._pictures}
        if len(sizes) > 1:
            named = ", ".join(f"{n} {p.size}" for n, p in zip(self.cameras, self._pictures, strict=True))
            raise ValueError(f"the cameras have different sizes ({named}); give an image_size")
        self.image_size = next(iter(sizes), image_size)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def action_dim(self) -> int:
        """A."""
        return self.actions.shape[1]

    @property
    def state_dim(self) -> int:
        """S."""
        return self.states.shape[1]

    @property
    def action_statistics(self) -> Statistics:
        """Of the actions of the chosen episodes, one row per frame."""
        return Statistics.of(self.actions[self.rows])

    @property
    def state_statistics(self) -> Statistics:
        """Of the states of the chosen episodes, one row per frame."""
        return Statistics.of(self.states[self.rows])

    def looking_ahead(self, steps: int) -> "LeRobotDemos":
        """The same samples, each with one more picture: that of `steps` later, at most the episode's last.

        Raises:
            ValueError: Fewer than 1 step.
        """
        if steps < 1:
            raise ValueError(f"a picture ahead is at least 1 step away, got {steps}")
        other = copy(self)
        other.ahead = steps
        return other

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """Episode number of frames, int64, shape of `rows`."""
        return self._episode[rows]

    def batch(self, indices: np.ndarray) -> DemoBatch:
        """Samples by number, 0 to `len(self) - 1`; a pure function, safe in threads.

        Args:
            indices: int64, shape (B,).
        """
        row_B = self.rows[indices]
        first_B, last_B = self._first[row_B], self._last[row_B]
        ahead_BH = row_B[:, None] + np.arange(self.horizon)
        past_BT = np.maximum(row_B[:, None] + np.array(self.history), first_B[:, None])
        seen_BT = past_BT
        if self.ahead:
            seen_BT = np.concatenate((past_BT, np.minimum(row_B + self.ahead, last_B)[:, None]), 1)
        height, width = self.image_size or (0, 0)
        images = np.empty((len(row_B), len(self._pictures), seen_BT.shape[1], height, width, 3), np.uint8)
        for camera, pictures in enumerate(self._pictures):
            pictures.copy_to(images[:, camera], seen_BT)
        return DemoBatch(
            images=torch.from_numpy(images),
            state=torch.from_numpy(self.states[row_B]),
            actions=torch.from_numpy(self.actions[np.minimum(ahead_BH, last_B[:, None])]),
            action_is_pad=torch.from_numpy(ahead_BH > last_B[:, None]),
            instructions=[self.tasks[task] for task in self._task[row_B]],
            rows=torch.from_numpy(row_B),
        )


class _Pictures:
    """One camera's frames: which file and which frame in it belongs to each row of the dataset."""

    def __init__(self, files: list[Frames], file_of_row: np.ndarray, frame_of_row: np.ndarray) -> None:
        self._files, self._file, self._frame = files, file_of_row, frame_of_row
        self.size: Size = (files[0].pictures.shape[1], files[0].pictures.shape[2])

    @classmethod
    def read(
        cls,
        folder: Path,
        key: str,
        info: dict[str, Any],
        time: np.ndarray,
        episodes: set[int],
        size: Size | None,
        cache: Path,
    ) -> "_Pictures":
        file_of_row = np.zeros(len(time), np.int64)
        frame_of_row = np.zeros(len(time), np.int64)
        files: list[Frames] = []
        if info["features"][key]["dtype"] == "image":
            start = 0
            for path in data_files(folder):
                files.append(column_frames(path, key, size, cache))
                here = slice(start, start + len(files[-1].times))
                file_of_row[here], frame_of_row[here] = len(files) - 1, np.arange(len(files[-1].times))
                start = here.stop
            return cls(files, file_of_row, frame_of_row)
        opened: dict[Path, int] = {}
        for video in read_episodes(folder, key):
            if video.episode not in episodes:
                continue
            path = folder / info["video_path"].format(video_key=key, chunk_index=video.chunk, file_index=video.file)
            if path not in opened:
                opened[path] = len(files)
                files.append(video_frames(path, size, cache))
            rows = slice(video.first_row, video.end_row)
            file_of_row[rows] = opened[path]
            frame_of_row[rows] = _nearest(files[opened[path]].times, time[rows] + video.start, info["fps"], path)
        return cls(files, file_of_row, frame_of_row)

    def copy_to(self, target: np.ndarray, rows: np.ndarray) -> None:
        """Fill `target` (B, T, height, width, 3) with the pictures of `rows` (B, T), each copied once."""
        files, frames = self._file[rows].tolist(), self._frame[rows].tolist()
        for sample, here in enumerate(zip(files, frames, strict=True)):
            for step, (file, frame) in enumerate(zip(*here, strict=True)):
                target[sample, step] = self._files[file].pictures[frame]


def _nearest(times: np.ndarray, wanted: np.ndarray, fps: float, path: Path) -> np.ndarray:
    """Number of the frame nearest to each wanted time; more than half a frame off means that it is missing."""
    after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    found = np.where(np.abs(times[after] - wanted) < np.abs(times[before] - wanted), after, before)
    late = np.abs(times[found] - wanted) > 0.5 / fps
    if late.any():
        raise ValueError(
            f"{path} has no frame at {wanted[late][0]:.3f} s, it holds {len(times)} frames up to {times[-1]:.3f} s; "
            "it is truncated or was recorded at another rate. Copy or record it again."
        )
    return found


def _require_size(what: str, names: tuple[str, ...], wanted: int | None, folder: Path) -> None:
    if wanted is not None and len(names) != wanted:
        raise ValueError(f"{folder} has {len(names)} {what} dimensions ({', '.join(names)}), wanted {wanted}")


def _episode_ends(episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last row of the episode that each row belongs to."""
    starts = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]])
    lengths = np.diff(np.r_[starts, len(episode)])
    return np.repeat(starts, lengths), np.repeat(starts + lengths - 1, lengths)


def _select(episode: np.ndarray, wanted: Sequence[int] | None, folder: Path) -> np.ndarray:
    if wanted is None:
        return np.arange(len(episode))
    present = np.unique(episode)
    unknown = sorted(set(wanted) - set(present.tolist()))
    if unknown or not len(wanted):
        raise ValueError(f"{folder} has the episodes {present[0]} to {present[-1]}, asked for {unknown or 'none'}")
    return np.flatnonzero(np.isin(episode, np.asarray(wanted)))


def _require_finite(values: np.ndarray, what: str, episode: np.ndarray, folder: Path) -> None:
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        row = int(np.argmax(broken))
        raise ValueError(f"{folder}: the {what} of frame {row} in episode {episode[row]} is not finite: {values[row]}")
