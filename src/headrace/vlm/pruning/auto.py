"""Pruning by name, and as a context around any model with a vision encoder."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import torch

from headrace.nn.pretrained import config_from_dict
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.encoder_cut import EncoderCut, NewPolicy, cut_encoder
from headrace.vlm.pruning.flowcut import FlowCutConfig
from headrace.vlm.pruning.peer_policies import (
    ControlConfig,
    FastVConfig,
    OutputPolicy,
    PruMergeConfig,
    VisionZipConfig,
)
from headrace.vlm.pruning.policy import FlowCutPolicy, Policy
from headrace.vlm.pruning.towers import Tower, find_tower

PruningConfig = FlowCutConfig | ControlConfig | VisionZipConfig | PruMergeConfig | FastVConfig

# name: settings at a budget
METHODS: dict[str, Callable[[Budget], PruningConfig]] = {
    "flowcut": lambda budget: FlowCutConfig(budget=budget),
    "flowcut-decoder": lambda budget: FlowCutConfig(budget=budget, decoder=True),
    "cls-only": lambda budget: FlowCutConfig(budget=budget, schedule="last", criteria=("attention",), history=0.0),
    "fastv": lambda budget: FastVConfig(budget=budget),
    "visionzip": lambda budget: VisionZipConfig(budget=budget),
    "prumerge": lambda budget: PruMergeConfig(budget=budget),
    "random": lambda budget: ControlConfig(budget=budget),
    "grid": lambda budget: ControlConfig(budget=budget, choice="grid"),
}
KINDS: tuple[type[PruningConfig], ...] = (FlowCutConfig, ControlConfig, VisionZipConfig, PruMergeConfig, FastVConfig)
CONFIGS = {kind.__name__: kind for kind in KINDS}


def pruning_config(method: str, budget: Budget) -> PruningConfig:
    """A method's settings by its name.

    Raises:
        ValueError: No such method; names a near match.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown pruning method {method!r}{hint} (known: {', '.join(METHODS)})")
    return METHODS[method](budget)


def pruning_to_dict(config: PruningConfig) -> dict[str, Any]:
    """JSON-ready form, saved with results; `pruning_from_dict` reads it back. `method` is there for readers."""
    return {"pruning": type(config).__name__, "method": method_name(config), **asdict(config)}


def method_name(config: PruningConfig) -> str:
    """A method of `METHODS` by its settings; other switches are named behind it, such as `flowcut (every=4)`."""
    budget = config.budget or Budget(share=1.0)
    alike = {name: made for name, new in METHODS.items() if type(made := new(budget)) is type(config)}

    def differing(made: PruningConfig) -> list[str]:
        mine, plain = asdict(config), asdict(made)
        return [f"{key}={value}" for key, value in mine.items() if key != "budget" and value != plain[key]]

    name, switches = min(((n, differing(made)) for n, made in alike.items()), key=lambda pair: len(pair[1]))
    return f"{name} ({', '.join(switches)})" if switches else name


def pruning_from_dict(data: dict[str, Any]) -> PruningConfig:
    """Rebuild settings from `pruning_to_dict`; switches that are left out have their defaults.

    Raises:
        ValueError: Unknown kind or keys, a value of another type, or one that cannot be.
    """
    kind = data.get("pruning")
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"unknown pruning settings {kind!r} (known: {', '.join(CONFIGS)})")
    given = {key: value for key, value in data.items() if key not in ("pruning", "method")}
    for key, hint in typing.get_type_hints(CONFIGS[kind]).items():
        if key in given and not _fits(hint, given[key]):
            raise ValueError(f"{kind}: {key} must be {_wanted(hint)}, got {given[key]!r}")
    return config_from_dict(CONFIGS[kind], given)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value has the type that a setting wants; unknown keys inside an object are found elsewhere."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(arguments[0], item) for item in value)
    if origin is typing.Literal:
        return value in arguments
    if is_dataclass(hint):
        inner = typing.get_type_hints(hint)
        return isinstance(value, dict) and all(_fits(inner[key], v) for key, v in value.items() if key in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _wanted(hint: Any) -> str:
    """What `_fits` asks for, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(option) for option in arguments)
    if origin is tuple:
        return f"a list, each {_wanted(arguments[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(repr(choice) for choice in arguments)}"
    if is_dataclass(hint):
        inner = typing.get_type_hints(hint)
        return f"an object ({', '.join(f'{key}: {_wanted(kind)}' for key, kind in inner.items())})"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}[hint]


def encoder_policy(config: PruningConfig, tower: Tower) -> NewPolicy | None:
    """What the encoder is to do under `config`; None when it is left alone.

    Raises:
        ValueError: FlowCut's last cut would come after the block whose features are used.
    """
    if isinstance(config, FastVConfig):
        return None
    if not isinstance(config, FlowCutConfig):
        return lambda batch, units, device: OutputPolicy(config, batch=batch, units=units, consumed=tower.consumed)
    final = len(tower.layers) - 1
    last = config.last_layer
    if last is None:
        last = tower.consumed if tower.consumed == final else tower.consumed - 1
    if not 0 <= last <= tower.consumed:
        raise ValueError(f"last_layer must lie in 0..{tower.consumed}, the block whose features are used, got {last}")

    def new(batch: int, units: int, device: torch.device) -> Policy:
        return FlowCutPolicy(config, batch=batch, units=units, last_layer=last, device=device, crops=tower.crops)

    return new


@contextmanager
def prune(
    model: Any, config: PruningConfig, *, feature_layer: int | None = None, video: bool = False
) -> Iterator[EncoderCut]:
    """Let the vision encoder of `model` drop tokens while the context is open; nothing is changed afterwards.

    Features come out short, in raster order, with CLS in its place. A LLaVA-1.5 prompt must then hold as many
    placeholders as tokens stay, see `placeholders.shrink`. With a budget of everything nothing is scored and outputs
    are bit-identical. The part of a method that acts inside the language model is run by `HuggingFaceVLM`.

    Args:
        model: Vision-language model or vision encoder, see `towers.find_tower`.
        config: The method and its budget.
        feature_layer: Which hidden state is used, for a bare encoder; None asks the model.
        video: Take the encoder for clips where there is one of its own.

    Yields:
        An `EncoderCut`, whose `report` says what the last run kept.

    Raises:
        ValueError: No attention to score, nested use on one model, or settings that do not fit the encoder.
    """
    tower = find_tower(model, feature_layer=feature_layer, video=video)
    policy = encoder_policy(config, tower)
    if policy is None:
        raise ValueError(
            f"{type(config).__name__} acts inside the language model only; use HuggingFaceVLM(pruning=...)"
        )
    with cut_encoder(tower, policy) as cut:
        yield cut
