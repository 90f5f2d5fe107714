"""Weights of one ViPRA network in another of the same trunk: from pretraining to a policy, name by name."""

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.datasets.frame_rate import same_rate
from headrace.robot.vipra_actor import VipraActor
from headrace.robot.vipra_config import PretrainingRecord
from headrace.robot.vipra_trunk import VipraTrunk

TRUNK = ("backbone.", "image_tokens.")
ROWS = ("text.weight", "delimiters.weight", "view.weight")


class CarriedOver(NamedTuple):
    """What became of every parameter and buffer.

    Attributes:
        copied: Names in the target that hold the source's values.
        fresh: Names that stay as they were drawn.
        left: Names of the source that the target has no place for.
    """

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]


def carry_over(source: VipraTrunk, target: VipraTrunk, *, frames_per_step: int = 1) -> CarriedOver:
    """Copy transformer, picture encoder, words, marks and views; heads of the source stay behind.

    Words are copied one by one, so the target may know more of them; views are copied by frame of the history, from
    the source's first camera to all cameras of the target alike.

    Args:
        source: What was trained.
        target: What takes over its weights.
        frames_per_step: Frames of the target's history per step of the source's (`PretrainingRecord.frames_per_step`).

    Raises:
        ValueError: The target has a part of the trunk that the source lacks, or in another shape; names up to five.
    """
    theirs, own = source.state_dict(), target.state_dict()
    trunk = [name for name in own if name.startswith(TRUNK)]
    wrong = [name for name in trunk if name not in theirs or theirs[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"the networks differ in {len(wrong)} weights: {', '.join(wrong[:5])}; a policy has the trunk of its "
            "pretraining"
        )
    new = {name: theirs[name] for name in trunk} | _rows(source, target, own, frames_per_step)
    target.load_state_dict(new, strict=False)
    if source.tokenizer is not None:
        target.tokenizer = source.tokenizer
    left = [name for name in theirs if name not in new]
    return CarriedOver(tuple(new), tuple(name for name in own if name not in new), tuple(left))


def _rows(source: VipraTrunk, target: VipraTrunk, own: dict[str, Tensor], frames_per_step: int) -> dict[str, Tensor]:
    """Tables whose rows have names."""
    theirs, found = source.state_dict(), {}
    if bool(source.config.text_vocabulary) != bool(target.config.text_vocabulary):
        raise ValueError("one network reads a tokenizer's text and the other a list of words")
    if source.config.text_vocabulary:
        found["text.weight"] = theirs["text.weight"]
    else:
        names = {
            "text.weight": (("", "?", *source.config.words), ("", "?", *target.config.words)),
            "delimiters.weight": (source.MARKS, target.MARKS),
        }
        for table, (have, want) in names.items():
            found[table] = _named(theirs[table], have, own[table], want)
    if "view.weight" in own:
        steps = [step * frames_per_step for step in source.config.history]
        views = [str(step) for _ in target.config.cameras for step in target.config.history]
        first = theirs["view.weight"][: len(steps)]
        found["view.weight"] = _named(first, tuple(map(str, steps)), own["view.weight"], tuple(views))
    return found


def _named(rows: Tensor, have: tuple[str, ...], own: Tensor, want: tuple[str, ...]) -> Tensor:
    place = {name: index for index, name in enumerate(have)}
    result = own.clone()
    for index, name in enumerate(want):
        if name in place:
            result[index] = rows[place[name]]
    return result


def require_same_conditions(
    record: PretrainingRecord,
    *,
    history: tuple[int, ...],
    rate: float,
    lam_hash: str | None = None,
    override: tuple[str, ...] = (),
) -> None:
    """Refuse what would make pretraining mean something else.

    Demonstrations fit at the labels' rate, and at the rate of the videos where those were read with a stride: the
    history then counts that many frames per step.

    Args:
        record: Of the pretrained network.
        history: Frames that the policy is to see, in frames of the demonstrations.
        rate: Frames a second of the demonstrations [Hz].
        lam_hash: The latent action model that the user named; None for any.
        override: Names of the differences that are wanted: `history`, `rate`.

    Raises:
        ValueError: Something differs and is not named; says what and how to go on. Unknown names in `override`.
    """
    unknown = set(override) - {"history", "rate"}
    if unknown:
        raise ValueError(f"override takes 'history' and 'rate', got {sorted(unknown)}")
    step = record.frames_per_step(rate)
    if tuple(history) != record.history_at(rate) and "history" not in override:
        raise ValueError(
            f"the network was pretrained on frames {record.history_at(rate)}, the policy is to see {history}; use the "
            "same, or name it: --override history"
        )
    if record.rate is not None and not same_rate(record.rate * step, rate) and "rate" not in override:
        own = f" on videos of {record.rate * record.stride:g} Hz" if record.stride > 1 else ""
        raise ValueError(
            f"the network was pretrained at {record.rate:g} steps a second{own}, the demonstrations have {rate:g}; "
            "resample one of them, or name it: --override rate"
        )
    if lam_hash is not None and lam_hash != record.lam_hash:
        raise ValueError(f"the network learned the labels of model {record.lam_hash}, not of {lam_hash}")


@torch.no_grad()
def parameter_share(report: CarriedOver, model: VipraActor) -> float:
    """Share of a policy's numbers that came from pretraining."""
    state = model.state_dict()
    return sum(state[name].numel() for name in report.copied) / sum(value.numel() for value in state.values())
