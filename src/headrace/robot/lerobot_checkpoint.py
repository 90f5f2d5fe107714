"""Policies that LeRobot saved (`--policy.type=vipra`), read without LeRobot.

Such a folder has LeRobot's config.json, in which `network` is ours, `model.safetensors` with the keys prefixed by
`model.`, and the processors' files. Where the processors normalise, their statistics are moved into the network.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.pretrained import (
    WEIGHTS_FILE,
    config_from_dict,
    load_strictly,
    read_config,
    read_weights,
    resolve_folder,
)
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.vlm.text_tokenizer import TOKENIZER_FOLDER

POLICY_TYPE = "vipra"
PREFIX = "model."
EPSILON = 1e-8  # LeRobot's, added to a standard deviation when it divides


def load_network(source: str | Path) -> VipraPolicy:
    """The network of a policy folder or hub id, ours or LeRobot's, in eval mode.

    Raises:
        FileNotFoundError: No such folder or hub id, or a file of it is missing.
        ValueError: Another type of policy, statistics missing, or weights that do not fit.
    """
    folder = resolve_folder(source)
    data = read_config(folder)
    if "type" not in data:
        return VipraPolicy.from_pretrained(folder)
    if data["type"] != POLICY_TYPE:
        raise ValueError(f"{folder} holds a LeRobot policy of type {data['type']!r}, only {POLICY_TYPE!r} can be read")
    config = network_config(data)
    if data.get("normalization") == "processors":
        config = replace(
            config,
            action_normalizer=processor_statistics(folder, "policy_postprocessor", "action", "ACTION"),
            state_normalizer=processor_statistics(folder, "policy_preprocessor", "observation.state", "STATE")
            if config.state_names
            else None,
        )
    model = VipraPolicy(config)
    state = {key.removeprefix(PREFIX): value for key, value in read_weights(folder / WEIGHTS_FILE).items()}
    load_strictly(model, state, what=str(folder))
    read_tokenizer(model, folder)
    return model.eval()


def read_tokenizer(model: VipraPolicy, folder: Path) -> None:
    """Give a network that reads a tokenizer's ids the tokenizer that was saved beside its weights.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not model.config.text_vocabulary:
        return
    place = folder / TOKENIZER_FOLDER
    if not place.is_dir():
        raise FileNotFoundError(f"{place} is missing; download the whole checkpoint folder and give its path")
    from transformers import AutoTokenizer

    model.tokenizer = AutoTokenizer.from_pretrained(place)


def network_config(data: dict[str, Any]) -> VipraConfig:
    """Our config from LeRobot's config.json.

    Raises:
        ValueError: The policy was never built, so there is none.
    """
    network = {key: value for key, value in (data.get("network") or {}).items() if key != "model"}
    if not network:
        raise ValueError("this LeRobot config describes no network yet; it is filled when the policy is first made")
    return config_from_dict(VipraConfig, network)


def processor_statistics(folder: Path, pipeline: str, key: str, kind: str) -> NormalizerConfig:
    """What a saved processor pipeline does to one feature, as our affine map.

    Args:
        folder: LeRobot's folder.
        pipeline: `policy_preprocessor` or `policy_postprocessor`.
        key: The feature, such as `action`.
        kind: Its type in LeRobot's table of modes, such as `ACTION`.

    Raises:
        FileNotFoundError: The pipeline's file is missing.
        ValueError: No normalising step, no statistics of the feature, or a mode that is no affine map of ours.
    """
    path = folder / f"{pipeline}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the checkpoint with its processors")
    steps = [s for s in json.loads(path.read_text())["steps"] if s["registry_name"].endswith("normalizer_processor")]
    if not steps:
        raise ValueError(f"{path} has no step that normalises")
    mode = str(steps[0]["config"]["norm_map"].get(kind, "IDENTITY"))
    state = read_weights(folder / steps[0]["state_file"]) if steps[0].get("state_file") else {}
    stats = {
        name.rsplit(".", 1)[-1]: value.double().numpy() for name, value in state.items() if name.startswith(key + ".")
    }
    if not stats:
        raise ValueError(f"{path} holds no statistics of {key}: the policy would pass it through unchanged")
    return affine(mode, {name: np.atleast_1d(value) for name, value in stats.items()}, dividing=kind != "ACTION")


def affine(mode: str, stats: dict[str, np.ndarray], *, dividing: bool) -> NormalizerConfig:
    """LeRobot's normalisation of one feature as shift and scale.

    Args:
        mode: LeRobot's NormalizationMode.
        stats: Arrays (D,) by name.
        dividing: The map is used from raw to normal, where LeRobot adds an epsilon to deviations.

    Raises:
        ValueError: Another mode, or the statistics it needs are missing.
    """
    ends = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
    if mode == "IDENTITY":
        return NormalizerConfig.identity(len(next(iter(stats.values()))))
    wanted = ends.get(mode, ("mean", "std"))
    if mode not in (*ends, "MEAN_STD") or not set(wanted) <= set(stats):
        raise ValueError(f"mode {mode} with the statistics {', '.join(sorted(stats))} cannot be read")
    first, second = (stats[name] for name in wanted)
    if mode == "MEAN_STD":
        shift, scale = first, second + (EPSILON if dividing else 0.0)
        scale = np.where(scale == 0, EPSILON, scale)
    else:
        width = np.where(second == first, EPSILON, second - first)
        shift, scale = first + width / 2, width / 2
    return NormalizerConfig(shift=tuple(map(float, shift)), scale=tuple(map(float, scale)))
