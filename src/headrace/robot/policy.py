"""Loaded checkpoints and simple stand-ins as `headrace.contracts.Policy`."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from headrace.contracts import ActionChunk, ActionSpec, Needs, Observation
from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import settings_for
from headrace.nn.pretrained import read_config, resolve_folder
from headrace.robot.continuation import sample_after
from headrace.robot.lerobot_checkpoint import load_network
from headrace.robot.vipra import VipraPolicy
from headrace.robot.vipra_actor import PolicyInput, VipraActor
from headrace.robot.vipra_bins import VipraBins

log = logging.getLogger(__name__)


class RandomPolicy:
    """Uniform actions within the bounds; what any policy must beat."""

    def __init__(self, spec: ActionSpec, *, horizon: int = 1) -> None:
        self.spec, self.horizon = spec, horizon
        self._generators: dict[int, np.random.Generator] = {}

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode."""
        self._generators[slot] = np.random.default_rng(seed)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """Random chunks, shape (B, horizon, A)."""
        shape = (self.horizon, self.spec.dim)
        low, high = self.spec.low or (-1.0,) * self.spec.dim, self.spec.high or (1.0,) * self.spec.dim
        chunks = [self._generators[slot].uniform(low, high, shape) for slot in slots]
        return ActionChunk(np.asarray(chunks, np.float32), 0.0)


class ObservationHistory:
    """Observations as what a network sees.

    Earlier frames come with the observation. Of a source that sends none they are those of earlier calls, which is
    right only where every control step is a call; a warning says so once.

    Args:
        model: The network; inputs go to its device.
    """

    def __init__(self, model: VipraActor) -> None:
        self.model, self.config = model, model.config
        self.look_back = -self.config.history[0]
        self.needs = Needs(cameras=self.config.cameras, state_names=self.config.state_names)  # any size is stretched
        self._frames: dict[int, deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=1 + self.look_back))
        self._told = False

    def reset(self, slot: int) -> None:
        """Forget a slot's frames."""
        self._frames[slot].clear()

    def inputs(self, observations: list[Observation], slots: list[int]) -> PolicyInput:
        """Inputs of the present step; frames before an episode's first are taken to equal it.

        Everything is checked before anything is remembered, so that a call that fails can be tried again.

        Raises:
            ValueError: A camera is missing, a picture is not uint8 RGB, or the state has another length.
        """
        present = [self._pictures(observation.images) for observation in observations]
        earlier = [[self._pictures(images) for images in one.past[: self.look_back][::-1]] for one in observations]
        states = np.stack([self._state(observation) for observation in observations])
        text = self.model.encode_text([observation.instruction for observation in observations])
        pictures = []
        for observation, past, now, slot in zip(observations, earlier, present, slots, strict=True):
            frames = self._frames[slot]  # the oldest first
            if observation.past:
                frames.clear()
                frames.extend(past)
            elif frames and self.look_back and not self._told:
                self._told = True
                log.warning(
                    "the policy looks %d steps back and gets no earlier pictures; those of earlier calls stand in, "
                    "which is right only if every control step is a call",
                    self.look_back,
                )
            frames.append(now)
            seen = [frames[max(len(frames) - 1 + step, 0)] for step in self.config.history]
            pictures.append(np.stack(seen, 1))
        device = self.model.device
        images = torch.from_numpy(np.stack(pictures)).to(device, non_blocking=True)
        return PolicyInput(images, torch.from_numpy(states).to(device), text.to(device))

    def _pictures(self, images: dict[str, np.ndarray]) -> np.ndarray:
        config = self.config
        absent = [camera for camera in config.cameras if camera not in images]
        if absent:
            raise ValueError(
                f"the policy needs the cameras {', '.join(config.cameras)}; "
                f"the observation has {', '.join(images) or 'none'}"
            )
        return np.stack([self._stretched(camera, images[camera]) for camera in config.cameras])

    def _stretched(self, camera: str, picture: np.ndarray) -> np.ndarray:
        """The picture at the network's size, as training reads it (`headrace.datasets.frame_cache`)."""
        size = self.config.camera_size
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"camera {camera} must give uint8 pictures (height, width, 3), got {picture.dtype} {picture.shape}"
            )
        if picture.shape[:2] == (size, size):
            return picture
        return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)

    def _state(self, observation: Observation) -> np.ndarray:
        names = self.config.state_names
        if len(observation.state) != len(names) and names:
            raise ValueError(f"the policy needs a state of {len(names)} numbers, got {len(observation.state)}")
        return observation.state.astype(np.float32)[: len(names)]


class NetworkPolicy:
    """What every policy that is a network shares: where it runs, its action convention and what it sees.

    Args:
        model: The network; put into eval mode.
        device: Where it runs; a GPU if there is one.
        precision: `bf16` runs the transformer and the picture encoder under autocast.

    Raises:
        ValueError: Unknown precision.
    """

    def __init__(self, model: VipraActor, *, device: str | None, precision: str) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = precision
        model.to(self.device).eval()
        self.spec: ActionSpec = model.config.action_spec
        self._history = ObservationHistory(model)

    @property
    def look_back(self) -> int:
        """Control steps before the present that the network sees."""
        return self._history.look_back

    @property
    def needs(self) -> Needs:
        """Cameras and state of the checkpoint."""
        return self._history.needs

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class FlowPolicy(NetworkPolicy):
    """A `VipraPolicy` network that acts: it keeps each slot's history of frames and its own noise.

    Args:
        model: The network, with statistics.
        solver: How the flow is followed; ten Euler steps are the paper's.
        device: Where it runs; a GPU if there is one.
        precision: `bf16` runs the transformer and the picture encoder under autocast; the flow stays float32.

    Raises:
        ValueError: The solver leaves out a time segment of the network's decoder.
    """

    def __init__(
        self,
        model: VipraPolicy,
        *,
        solver: SolverSettings | None = None,
        device: str | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(model, device=device, precision=precision)
        self.model = model
        self.solver = solver or SolverSettings(method="euler", steps=10)
        model.decoder.require(self.solver)
        self._generators: dict[int, torch.Generator] = {}

    @property
    def horizon(self) -> int:
        """Actions per chunk."""
        return self.model.config.decoder.horizon

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode: no history, noise from `seed`."""
        self._history.reset(slot)
        self._generators[slot] = torch.Generator().manual_seed(seed)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """Action chunks, shape (B, H, A), within the spec's bounds; gripper either fully open or fully closed.

        Raises:
            ValueError: A camera is missing, a picture is not uint8 RGB, or the state has another length.
        """
        return self._chunk(observations, slots, lambda inputs, noise: self.model.sample(inputs, noise, self.solver))

    @property
    def continues(self) -> bool:
        """Whether `act_after` works: held features have no gradient to continue a chunk by."""
        return self.model.decoder.config.features != "hold"

    def act_after(
        self, observations: list[Observation], slots: list[int], *, prefix: np.ndarray, delay: int
    ) -> ActionChunk:
        """Chunks that continue `prefix`, raw, (B, P, A) or (P, A), of which `delay` rows are executed in any case.

        Raises:
            ValueError: As `act`, a prefix of another shape, or a policy that cannot (see `continues`).
        """
        rows = torch.from_numpy(np.asarray(prefix, np.float32)).to(self.device)
        rows = rows.expand(len(slots), *rows.shape[-2:])
        return self._chunk(
            observations,
            slots,
            lambda inputs, noise: sample_after(self.model, inputs, noise, self.solver, prefix=rows, delay=delay),
        )

    def _chunk(
        self, observations: list[Observation], slots: list[int], sample: Callable[[PolicyInput, Tensor], Tensor]
    ) -> ActionChunk:
        started = time.perf_counter()
        inputs = self._history.inputs(observations, slots)
        decoder = self.model.config.decoder
        noise = torch.stack(
            [torch.randn(decoder.horizon, decoder.action_dim, generator=self._generators[slot]) for slot in slots]
        ).to(self.device)
        with self._autocast():
            actions = sample(inputs, noise)
        raw = actions.float().cpu().numpy()
        return ActionChunk(settle(raw, self.spec), (time.perf_counter() - started) * 1e3)


class BinsPolicy(NetworkPolicy):
    """A `VipraBins` network that acts, taking the most likely bin of every number.

    Args:
        model: The network, with its bins.
        device, precision: As in `FlowPolicy`.
    """

    def __init__(self, model: VipraBins, *, device: str | None = None, precision: str = "fp32") -> None:
        super().__init__(model, device=device, precision=precision)
        self.model = model

    @property
    def horizon(self) -> int:
        """Actions per chunk."""
        return self.model.config.horizon

    def reset(self, slot: int, *, seed: int) -> None:
        """Start an episode; nothing is drawn, so the seed changes nothing."""
        self._history.reset(slot)

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """Action chunks as in `FlowPolicy.act`."""
        started = time.perf_counter()
        inputs = self._history.inputs(observations, slots)
        with self._autocast():
            raw = self.model.sample(inputs).float().cpu().numpy()
        return ActionChunk(settle(raw, self.spec), (time.perf_counter() - started) * 1e3)


def settle(actions: np.ndarray, spec: ActionSpec) -> np.ndarray:
    """Bring sampled actions to the controller: clip to the bounds, gripper to whichever end is nearer.

    Numbers that are not finite pass unchanged, so that the runner can name them.
    """
    if not (spec.low and spec.high):
        return actions
    low, high = np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32)
    clipped = np.clip(actions, low, high)
    if spec.gripper != "none" and "gripper" in spec.names:
        index = spec.names.index("gripper")
        middle = (low[index] + high[index]) / 2
        ends = np.where(clipped[..., index] > middle, high[index], low[index])
        clipped[..., index] = np.where(np.isfinite(clipped[..., index]), ends, clipped[..., index])
    return clipped


def load_policy(source: str, *, solver: SolverSettings | None = None, **options: Any) -> FlowPolicy | BinsPolicy:
    """A policy from a checkpoint folder or hub id, ours or LeRobot's with `--policy.type=vipra`.

    Args:
        source: Folder or hub id.
        solver: How the flow is followed; by default as the grid saved with the checkpoint says, else ten Euler steps.
        options: Go to `FlowPolicy` or `BinsPolicy`.

    Raises:
        FileNotFoundError: No such folder or hub id.
        ValueError: Not a policy's folder, a truncated file, a checkpoint that was straightened for another grid, a
            solver for a policy without a flow, or one that leaves out a time segment.
    """
    folder = resolve_folder(source)
    if read_config(folder).get("model") == VipraBins.__name__:
        if solver is not None:
            raise ValueError(f"{source} writes action bins and follows no flow; leave the solver out")
        return BinsPolicy(VipraBins.from_pretrained(folder), **options)
    model = load_network(folder)
    return FlowPolicy(model, solver=settings_for(folder, solver), **options)
