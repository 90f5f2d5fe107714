"""What a policy and an environment promise each other. numpy only, so either side runs without the other's packages."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard, runtime_checkable

import numpy as np

Frame = Literal["base_delta", "base_absolute", "joint_delta", "joint"]
Rotation = Literal["euler_xyz", "axis_angle", "quat_wxyz", "none"]
Gripper = Literal["open_is_1", "close_is_1", "none"]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy sees at one moment.

    Attributes:
        images: Camera name to picture, uint8 in 0..255, shape (height, width, 3), RGB.
        state: Proprioception and what else the environment hands out beside pictures, float32, shape (S,), in the units
            that `state_names` of the checkpoint lists. Empty for a policy that works from pictures alone.
        instruction: The task in words.
        past: `images` of the control steps before this one, the latest first: as many as the policy's `look_back` asks
            for, fewer where the episode is younger.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    instruction: str = ""
    past: tuple[dict[str, np.ndarray], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """How the numbers of an action are meant; policy and environment each declare one and they must agree.

    Attributes:
        names: One name per action dimension, such as ("x", "y", "z", "roll", "pitch", "yaw", "gripper").
        frame: `base_delta` moves relative to the present pose in the robot's base frame; `joint` gives joint targets.
        rotation: Meaning of the rotation numbers, `none` where there are none.
        gripper: Which end of the gripper number is open.
        rate: Control rate [Hz].
        controller: The environment's own name of the controller, such as `pd_ee_delta_pose`.
        low, high: Bounds per dimension, in the controller's units.
    """

    names: tuple[str, ...]
    frame: Frame
    rotation: Rotation
    gripper: Gripper
    rate: float
    controller: str = ""
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("an ActionSpec needs at least one action name")
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0 Hz, got {self.rate}")
        for bound in (self.low, self.high):
            if bound and len(bound) != len(self.names):
                raise ValueError(f"bounds need {len(self.names)} numbers, one per action name, got {len(bound)}")

    @property
    def dim(self) -> int:
        """Number of action dimensions."""
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ActionSpec":
        """Rebuild from `to_dict`, rejecting unknown keys by name."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown ActionSpec fields: {', '.join(sorted(unknown))}")
        fixed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fixed)


class SpecMismatch(ValueError):
    """A policy's ActionSpec does not fit the environment; the message names each field that differs."""


def require_same_spec(policy: ActionSpec, environment: ActionSpec) -> None:
    """Refuse a policy whose action convention differs from the environment's.

    Raises:
        SpecMismatch: Names every field that differs with both values.
    """
    differing = [
        f"{f.name}: policy {getattr(policy, f.name)!r}, environment {getattr(environment, f.name)!r}"
        for f in fields(ActionSpec)
        if getattr(policy, f.name) != getattr(environment, f.name) and getattr(policy, f.name) not in ("", ())
    ]
    if differing:
        raise SpecMismatch(
            "the policy's actions do not fit this environment: "
            + "; ".join(differing)
            + ". Use a policy trained for this controller, or convert its actions in a policy that wraps it."
        )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a policy must be shown; what is empty may be anything.

    Attributes:
        cameras: Names of the cameras that it looks at, of those that there are.
        picture_size: (height, width) of their pictures [px].
        state_names: Names of the state's numbers.
    """

    cameras: tuple[str, ...] = ()
    picture_size: tuple[int, ...] = ()
    state_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Needs":
        """Rebuild from `to_dict`; keys of a later version are passed over."""
        return cls(**{f.name: tuple(data[f.name]) for f in fields(cls) if f.name in data})

    def require(self, cameras: tuple[str, ...], state_names: tuple[str, ...]) -> str:
        """Refuse an environment that cannot show it; returns a remark where the state is called by other names.

        Raises:
            SpecMismatch: A camera is absent, or the state has another length.
        """
        absent = [camera for camera in self.cameras if camera not in cameras]
        if absent:
            raise SpecMismatch(
                f"the policy needs the camera {', '.join(absent)}; this environment has {', '.join(cameras) or 'none'}"
            )
        wanted = self.state_names
        if not wanted or wanted == state_names:
            return ""
        if len(wanted) != len(state_names):
            raise SpecMismatch(
                f"the policy needs a state of {len(wanted)} numbers ({', '.join(wanted)}), this environment's has "
                f"{len(state_names)} ({', '.join(state_names)})"
            )
        differing = [f"{one} is {other}" for one, other in zip(wanted, state_names, strict=True) if one != other]
        return f"the policy knows the state by other names than this environment: {', '.join(differing)}"

    def require_pictures(self, observation: Observation) -> None:
        """Refuse pictures of another size.

        Raises:
            SpecMismatch: Names the camera and both sizes.
        """
        for camera in self.cameras if self.picture_size else ():
            size = observation.images[camera].shape[:2] if camera in observation.images else self.picture_size
            if tuple(size) != self.picture_size:
                raise SpecMismatch(
                    f"the policy needs pictures of {' x '.join(map(str, self.picture_size))} px, camera {camera} "
                    f"gives {' x '.join(map(str, size))}"
                )

    def require_shown(self, observation: Observation) -> None:
        """Refuse an observation that lacks what the policy must be shown, in the present or in earlier steps.

        Raises:
            SpecMismatch: A camera is absent, a picture has another size, or the state another length.
        """
        for images in (observation.images, *observation.past):
            absent = [camera for camera in self.cameras if camera not in images]
            if absent:
                raise SpecMismatch(
                    f"the policy needs the camera {', '.join(absent)}; the observation has "
                    f"{', '.join(images) or 'none'}"
                )
            self.require_pictures(Observation(images=images, state=observation.state))
        if self.state_names and len(observation.state) != len(self.state_names):
            raise SpecMismatch(
                f"the policy needs a state of {len(self.state_names)} numbers ({', '.join(self.state_names)}), the "
                f"observation has {len(observation.state)}"
            )


class EpisodesLost(ConnectionError):
    """A policy has forgotten running episodes, such as after a lost connection; the others go on.

    Attributes:
        slots: Whose episodes are lost.
    """

    def __init__(self, message: str, slots: frozenset[int] = frozenset()) -> None:
        super().__init__(message)
        self.slots = slots


class ActionChunk(NamedTuple):
    """A policy's answer for a batch of observations.

    Attributes:
        actions: float32, shape (B, H, A), in the units of the policy's ActionSpec.
        milliseconds: Wall-clock time of the call [ms].
    """

    actions: np.ndarray
    milliseconds: float


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into action chunks. Batched, so that parallel environments share one call.

    A policy that keeps a state between calls (a queue of actions, an ensemble) keys it by slot. One that wants to see
    earlier steps says how many in `look_back`, one that needs certain cameras or a certain state says so in `needs`;
    others may leave them out.
    """

    spec: ActionSpec

    def reset(self, slot: int, *, seed: int) -> None:
        """Forget what belongs to `slot`, whose next observation starts an episode; `seed` fixes its randomness."""

    def act(self, observations: list[Observation], slots: list[int]) -> ActionChunk:
        """Actions for each observation; `slots[i]` says which running episode `observations[i]` belongs to."""


@runtime_checkable
class PrefixPolicy(Protocol):
    """A policy that can continue a chunk which is already being executed (real-time chunking proper).

    One that has the method and yet cannot, such as for a server that does not offer it, says `continues = False`.
    """

    def act_after(
        self, observations: list[Observation], slots: list[int], *, prefix: np.ndarray, delay: int
    ) -> ActionChunk:
        """Actions that continue `prefix`, shape (B, P, A) or (P, A), of which `delay` rows are executed in any case."""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions that a result was made with, by package name."""

    packages: dict[str, str] = field(default_factory=dict)


def look_back(policy: Any) -> int:
    """How many control steps before the present a policy wants in `Observation.past`; 0 for one that does not say."""
    return int(getattr(policy, "look_back", 0))


def needs_of(policy: Any) -> Needs:
    """What a policy must be shown; anything, for one that does not say."""
    return getattr(policy, "needs", Needs())


def can_continue(policy: Any) -> TypeGuard[PrefixPolicy]:
    """Whether a policy can be told what is being executed meanwhile, by `act_after`."""
    return isinstance(policy, PrefixPolicy) and bool(getattr(policy, "continues", True))
