"""What training a latent action model needs beside `headrace.training.loop.fit`: the step, and codes kept alive."""

import warnings
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from headrace.nn.quantizers.code_usage import Usage
from headrace.nn.quantizers.dead_codes import DeadCodeSchedule, replace_dead_codes
from headrace.nn.quantizers.finite_scalar import FiniteScalar
from headrace.nn.quantizers.start_codes import start_codes
from headrace.robot.latent_action import LatentActionModel, LatentActions, Prediction
from headrace.robot.latent_action_loss import LatentActionLoss, feature_loss
from headrace.robot.latent_action_metrics import code_usage

POOR_BATCHES = 100


class Clips(Protocol):
    """What the batches hold: uint8 RGB (B, T, 3, S, S) and a mask (B, T), as `ClipBatch` does."""

    @property
    def frames(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...


class ClipBatches(Protocol):
    """Where the clips come from, such as `headrace.datasets.video_clips.ClipBatches`."""

    def at(self, step: int) -> Clips: ...
    def shard(self, rank: int, world: int) -> "ClipBatches": ...


class StepBatch(NamedTuple):
    """Clips and the number of their training step.

    Attributes:
        frames: uint8 RGB, shape (B, T, 3, S, S).
        mask: Shape (B, T), False for padding.
        step: int64 scalar, counted from 0.
    """

    frames: Tensor
    mask: Tensor
    step: Tensor


class StepBatches:
    """Clip batches that say which step they are, for losses that change over a run. Meets `Batches`."""

    def __init__(self, clips: ClipBatches) -> None:
        self.clips = clips

    def at(self, step: int) -> StepBatch:
        """Batch number `step`."""
        batch = self.clips.at(step)
        return StepBatch(batch.frames, batch.mask, torch.tensor(step))

    def shard(self, rank: int, world: int) -> "StepBatches":
        """The part of each batch that process `rank` of `world` computes."""
        return StepBatches(self.clips.shard(rank, world))


class LatentActionObjective:
    """The loss for `fit`: moves dead codes where the schedule says so, then predicts and compares.

    Everything it does at a step follows from the model, the batch and the generator, so a resumed run is the same run.

    Args:
        loss: Terms and weights.
        dead_codes: When unused codes are moved; None for never, and for finite scalars, which have no codebook.
        optimizer: Whose averages of moved codes are cleared.
        unquantized: Steps at the start in which the decoder gets the encoder's rows as they are; then the codes are
            placed by k-means. ViPRA has none; in a short run the noise of codes that are nowhere near the rows drowns
            them, and the decoder learns to do without.

    Raises:
        ValueError: At the first batch, a model that predicts features which it learns itself.
    """

    def __init__(
        self,
        loss: LatentActionLoss,
        dead_codes: DeadCodeSchedule | None,
        optimizer: torch.optim.Optimizer,
        *,
        unquantized: int = 0,
    ) -> None:
        self.loss, self.dead_codes, self.optimizer, self.unquantized = loss, dead_codes, optimizer, unquantized
        self._poor = 0  # batches in a row that used hardly any codes

    def __call__(self, model: nn.Module, batch: StepBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Terms of one batch, with `dead`, the number of codes moved, and `used` (share) and `perplexity` of its codes.

        Both are 0 before codes take over. Warns once when over `POOR_BATCHES` batches in a row no more than a tenth of
        the codes, or a single one, is used.
        """
        assert isinstance(model, LatentActionModel)
        if model.config.target == "features" and not model.config.features.frozen:
            raise ValueError(
                "a model that predicts features must not learn them, as features that are all alike are the easiest; "
                "set FrameFeaturesConfig(frozen=True) and load trained weights"
            )
        step, moved = int(batch.step), 0
        schedule, quantizer = self.dead_codes, model.quantizer
        clip = batch.frames.float() / 255
        if not isinstance(quantizer, FiniteScalar):
            if step == self.unquantized > 0:
                with torch.no_grad():
                    rows = model.encoder(clip).flatten(0, 2)
                start_codes(quantizer, rows, optimizer=self.optimizer, generator=generator)
            elif step > self.unquantized and schedule is not None and schedule.due(step):
                moved = len(replace_dead_codes(quantizer, schedule, optimizer=self.optimizer, generator=generator).dead)
        prediction = _unquantized(model, clip) if step < self.unquantized else model(clip, generator=generator)
        if model.config.target == "features":
            with torch.no_grad():
                features = model.encoder.frame_features(clip[:, 1:])
            terms = feature_loss(prediction, features, frame_mask=batch.mask)
        else:
            terms = self.loss(prediction, clip, step=step, frame_mask=batch.mask)
            if self.loss.estimate is not None:
                # A training log has the same columns at every step, also before the flow term starts.
                terms.setdefault("flow", terms["total"].new_zeros(()))
        use = self._usage(prediction.actions.codes, quantizer.codes, quantized=step >= self.unquantized)
        numbers = {"dead": float(moved), "used": use.share, "perplexity": use.perplexity}
        return {**terms, **{name: torch.tensor(number) for name, number in numbers.items()}}

    def _usage(self, codes: Tensor, size: int, *, quantized: bool) -> Usage:
        """Use of the codes by one batch; warns when it stays low."""
        if not quantized:
            return Usage(0, 0.0, 0.0, 0)
        use = code_usage(codes, size)
        self._poor = self._poor + 1 if use.used <= max(1, size // 10) else 0
        if self._poor == POOR_BATCHES:
            warnings.warn(
                f"{POOR_BATCHES} batches in a row used {use.used} of {size} codes: the codebook has collapsed; replace "
                "dead codes for longer, or begin with unquantized steps and unit rows",
                stacklevel=2,
            )
        return use


def _unquantized(model: LatentActionModel, clip: Tensor) -> Prediction:
    """As the model's own forward pass, with the encoder's rows in place of codes."""
    rows = model.encoder(clip).float()
    codes = torch.zeros(rows.shape[:3], dtype=torch.int64, device=rows.device)
    return Prediction(model.decode(clip[:, :-1], rows), LatentActions(codes, rows, rows.new_zeros(())))
