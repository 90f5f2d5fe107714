"""Running a vision encoder so that it gets shorter on the way, through forward hooks and the attention interface.

Hooks are PyTorch's public ones: one after each block replaces its output by the patches that stay, one before each
adjusts what belongs to the dropped ones (rotary tables, picture borders). All are gone when the context closes.
"""
# Shape letters in this file: B pictures, S tokens in a row, N patches, D width, M all patches of a packed run.

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headrace.vlm.pruning.observe import Qkv, observed_attention
from headrace.vlm.pruning.policy import Decision, Patches, Policy
from headrace.vlm.pruning.towers import Tower

NewPolicy = Callable[[int, int, torch.device], Policy]  # pictures, units per picture, device


@dataclass
class EncoderReport:
    """What was kept in the last run of the encoder.

    Attributes:
        kept: One list per picture (crop, frame): the units that stayed, in raster order of units.
        units: Units per picture before.
        grids: Columns and rows of each picture's units, None where they are not known.
        facts: What the method adds, one entry per group of pictures cut together.
    """

    kept: list[list[int]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    grids: list[tuple[int, int] | None] = field(default_factory=list)
    facts: list[dict] = field(default_factory=list)


@dataclass
class _Group:
    """Pictures of one size that are cut together: a batch, or one picture of a packed run."""

    policy: Policy
    patches: Patches
    total: int  # patches per picture before any cut

    @property
    def batch(self) -> int:
        return self.patches.original.shape[0]

    @property
    def length(self) -> int:
        return self.patches.prefix + self.patches.original.shape[1]


class EncoderCut:
    """One encoder under one pruning method. `report` describes the last run."""

    def __init__(self, tower: Tower, new_policy: NewPolicy, *, mark: bool) -> None:
        self.tower = tower
        self.new_policy = new_policy
        self.mark = mark
        self.report = EncoderReport()
        self.groups: list[_Group] = []
        self.seen: list[Qkv] = []
        self.peeking = False
        self.sizes: list[int] = []
        self.grids: list[tuple[int, int]] = []
        self.order: Tensor | None = None  # unit in the picture of each unit in the sequence, where they differ
        self.call: tuple[tuple, dict] = ((), {})

    # Before a run

    def note_sizes(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        """Packed encoders: patches of each picture or frame, from the grid that the caller hands over."""
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self.sizes = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0]).tolist()
        unit = self.tower.unit
        self.grids = [(wide // unit, high // unit) for frames, high, wide in grid.tolist() for _ in range(frames)]
        if hasattr(self.tower.model, "get_window_index"):  # Qwen2.5-VL sorts units by window
            self.order = torch.as_tensor(self.tower.model.get_window_index(grid)[0])

    def begin(self, hidden: Tensor) -> None:
        """A new run: every patch is present."""
        if self.tower.packing == "batch":
            self.groups = [self._group(hidden.shape[0], hidden.shape[1] - self.tower.prefix, hidden.device)]
        else:
            self.groups = [self._group(1, size, hidden.device) for size in self.sizes]

    def _group(self, batch: int, tokens: int, device: torch.device) -> _Group:
        unit = self.tower.units(tokens, device)
        units = int(unit.max()) + 1
        original = torch.arange(tokens, device=device).expand(batch, -1)
        patches = Patches(original, unit.expand(batch, -1), units, self.tower.prefix, self.tower.has_cls, None)
        return _Group(self.new_policy(batch, units, device), patches, tokens)

    # Around a block

    def before(self, layer: int) -> Callable:
        """Hook before block `layer`: drop what belongs to patches that are gone."""

        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if self.peeking:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                self.begin(hidden)
            self.seen = []
            self.call = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
            cut = any(len(g.patches.original[0]) < g.total for g in self.groups)
            if not cut:
                return None
            if layer > self.tower.consumed and self.tower.skips_rest:
                hidden = hidden[:, :1]
            if self.tower.packing == "packed":
                return args, kwargs | self._packed_kwargs(kwargs)
            rest = tuple(None if _is_open_mask(v) else v for v in args[1:])
            more = {k: None if _is_open_mask(v) else v for k, v in kwargs.items() if k != "hidden_states"}
            return (hidden, *rest), more

        return hook

    def _packed_kwargs(self, kwargs: dict) -> dict:
        """Picture borders and rotary tables of the patches that are present."""
        index = self._packed_index()
        cuts = kwargs["cu_seqlens"]
        segment = torch.bucketize(index, cuts[1:].to(index.dtype), right=True)
        lengths = torch.bincount(segment, minlength=len(cuts) - 1)
        borders = nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).to(cuts.dtype)
        return {
            "cu_seqlens": borders,
            "position_embeddings": tuple(table[index] for table in kwargs["position_embeddings"]),
        }

    def _packed_index(self) -> Tensor:
        starts, rows = 0, []
        for group in self.groups:
            rows.append(group.patches.original[0] + starts)
            starts += group.total
        return torch.cat(rows)

    def observe(self, layer: int) -> Callable[[Qkv], Tensor | None]:
        """Observer of block `layer`'s attention."""

        def see(qkv: Qkv) -> Tensor | None:
            if self.peeking or any(group.policy.wants(layer) for group in self.groups):
                self.seen.append(qkv)
            valid = self.groups[0].patches.valid if self.tower.packing == "batch" else None
            return None if valid is None else nn.functional.pad(valid, (self.tower.prefix, 0), value=True)

        return see

    def after(self, layer: int) -> Callable:
        """Hook after block `layer`: ask the method, and hand on what stays."""

        def hook(block: nn.Module, _: tuple, output: Any) -> Any:
            if self.peeking or layer > self.tower.consumed:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            seen = self._collected()
            rows = self._split(hidden)
            outcome = [
                self._decide(layer, g, s, h) for g, s, h in zip(self.groups, self._split_seen(seen), rows, strict=True)
            ]
            if layer == self.tower.consumed:
                self._finish()
            if not any(changed for _, changed in outcome):
                short = self._last(layer, hidden)
                return None if short is hidden else self._like(output, short)
            joined = self._join([h for h, _ in outcome])
            return self._like(output, self._last(layer, joined))

        return hook

    def _last(self, layer: int, hidden: Tensor) -> Tensor:
        if layer != self.tower.consumed or not self.mark or self.tower.packing == "packed":
            return hidden
        return self._marked(hidden)

    @staticmethod
    def _like(output: Any, hidden: Tensor) -> Any:
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _collected(self) -> Qkv | None:
        if not self.seen:
            return None
        seen, self.seen = self.seen, []
        if len(seen) == 1:
            return seen[0]
        return Qkv(
            query=torch.cat([call.query for call in seen], dim=2),
            key=torch.cat([call.key for call in seen], dim=2),
            value=torch.cat([call.value for call in seen], dim=2),
            scaling=seen[0].scaling,
        )

    def _split(self, hidden: Tensor) -> list[Tensor]:
        if self.tower.packing == "batch":
            return [hidden]
        return [part[None] for part in hidden.split([group.length for group in self.groups])]

    def _split_seen(self, seen: Qkv | None) -> list[Qkv | None]:
        if seen is None or self.tower.packing == "batch":
            return [seen] * len(self.groups)
        lengths = [group.length for group in self.groups]
        parts = [t.split(lengths, dim=2) for t in seen[:3]]
        return [Qkv(q, k, v, seen.scaling) for q, k, v in zip(*parts, strict=True)]

    def _join(self, rows: list[Tensor]) -> Tensor:
        return rows[0] if self.tower.packing == "batch" else torch.cat([row[0] for row in rows])

    def _decide(self, layer: int, group: _Group, seen: Qkv | None, hidden: Tensor) -> tuple[Tensor, bool]:
        wanted = group.policy.wants(layer)
        peek = partial(self._peek, layer, hidden, seen)
        decision = group.policy.decide(layer, group.patches, seen if wanted else None, hidden, peek)
        if decision is None:
            return hidden, False
        keep, valid = _patch_rows(group.patches, decision)
        prefix = group.patches.prefix
        index = nn.functional.pad(keep + prefix, (prefix, 0))
        index[:, :prefix] = torch.arange(prefix, device=keep.device)
        shorter = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        if decision.hidden is not None:
            shorter = torch.cat([shorter[:, :prefix], decision.hidden.to(hidden.dtype)], dim=1)
        group.patches = group.patches._replace(
            original=group.patches.original.gather(1, keep), unit=group.patches.unit.gather(1, keep), valid=valid
        )
        return shorter, True

    def _peek(self, layer: int, hidden: Tensor, seen: Qkv | None) -> Qkv:
        """q, k and v of the next block on `hidden`; the block's own where it is the last or pictures are packed."""
        if layer + 1 == len(self.tower.layers) or self.tower.packing == "packed":
            assert seen is not None
            return seen
        args, kwargs = self.call
        self.peeking = True
        try:
            self.tower.layers[layer + 1](hidden, *args, **kwargs)
        finally:
            self.peeking = False
        found = self._collected()
        assert found is not None
        return found

    # After a run

    def _finish(self) -> None:
        self.report = EncoderReport()
        for group in self.groups:
            start = sum(self.report.units) if self.order is not None else 0
            for row in group.patches.unit:
                kept = torch.unique(row)
                if self.order is not None:
                    kept = (self.order[kept + start] - start).sort().values
                self.report.kept.append(kept.tolist())
            units, side = group.patches.units, math.isqrt(group.patches.units)
            self.report.units += [units] * group.batch
            self.report.grids += [(side, side) if side * side == units else None] * group.batch
            self.report.facts.append(group.policy.facts())
        if self.tower.packing == "packed":
            self.report.grids = list(self.grids)

    def _marked(self, hidden: Tensor) -> Tensor:
        """Whole-length rows again, NaN where a patch was dropped, so that layouts of the picture still work."""
        group = self.groups[0]
        prefix = group.patches.prefix
        if hidden.shape[1] == prefix + group.total:
            return hidden
        whole = hidden.new_full((hidden.shape[0], prefix + group.total, hidden.shape[2]), torch.nan)
        whole[:, :prefix] = hidden[:, :prefix]
        place = (group.patches.original + prefix)[..., None].expand(-1, -1, hidden.shape[-1])
        return whole.scatter(1, place, hidden[:, prefix:])

    def scatter_merged(self, _: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        """Packed encoders: whole-length merged tokens, NaN where a unit was dropped."""
        per_unit = self.tower.unit**2
        index = torch.unique_consecutive(self._packed_index() // per_unit)
        total = sum(group.total for group in self.groups) // per_unit
        if len(index) == total:
            return None
        whole = output.new_full((total, output.shape[-1]), torch.nan)
        whole[index] = output
        return whole


def _patch_rows(patches: Patches, decision: Decision) -> tuple[Tensor, Tensor | None]:
    """Positions among the present patches that belong to kept units, int64 (B, K), and which are real."""
    kept = torch.zeros(len(patches.unit), patches.units + 1, dtype=torch.bool, device=patches.unit.device)
    units = decision.units if decision.valid is None else decision.units.masked_fill(~decision.valid, patches.units)
    kept = kept.scatter(1, units, True)
    stays = kept[:, :-1].gather(1, patches.unit)
    if patches.valid is not None:
        stays &= patches.valid
    counts = stays.sum(1)
    order = (~stays).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    real = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return order, None if bool(real.all()) else real


def _is_open_mask(value: Any) -> bool:
    """Whether `value` is an attention mask; one that hides patches is refused.

    Raises:
        ValueError: Some patches are padding.
    """
    if not isinstance(value, Tensor):
        return False
    if not bool(value.all() if value.dtype == torch.bool else (value >= 0).all()):
        raise ValueError("the encoder masks some patches as padding; pruning needs pictures that fill their input")
    return True


@contextmanager
def cut_encoder(tower: Tower, new_policy: NewPolicy, *, mark: bool = False) -> Iterator[EncoderCut]:
    """Let `tower` drop patches on the way while the context is open.

    Args:
        tower: From `find_tower`.
        new_policy: Makes the method's state for a batch of pictures.
        mark: Hand out rows of the whole length with NaN at dropped patches, for models that lay features out as a
            picture; the projector then runs on the real rows only. Otherwise rows are short.

    Raises:
        ValueError: The encoder is being pruned already.
    """
    cut = EncoderCut(tower, new_policy, mark=mark)
    observers = {module: cut.observe(layer) for layer, module in enumerate(tower.attentions)}
    with ExitStack() as stack:
        stack.enter_context(observed_attention(tower.model, observers))
        for layer, block in enumerate(tower.layers):
            stack.enter_context(block.register_forward_pre_hook(cut.before(layer), with_kwargs=True))
            stack.enter_context(block.register_forward_hook(cut.after(layer), prepend=True))
        if tower.packing == "packed":
            stack.enter_context(tower.model.register_forward_pre_hook(cut.note_sizes, with_kwargs=True))
            assert tower.projector is not None
            stack.enter_context(tower.projector.register_forward_hook(cut.scatter_merged))
        elif mark and tower.projector is not None:
            rows = _RealRows()
            stack.enter_context(tower.projector.register_forward_pre_hook(rows.gather))
            stack.enter_context(tower.projector.register_forward_hook(rows.scatter))
        yield cut


class _RealRows:
    """Runs a token-wise module on the rows that are not NaN."""

    def __init__(self) -> None:
        self.real: Tensor | None = None

    def gather(self, _: nn.Module, args: tuple) -> tuple | None:
        real = ~args[0][..., 0].isnan()
        self.real = None if bool(real.all()) else real
        return None if self.real is None else (args[0][self.real], *args[1:])

    def scatter(self, _: nn.Module, __: tuple, output: Tensor) -> Tensor | None:
        if self.real is None:
            return None
        whole = output.new_full((*self.real.shape, output.shape[-1]), torch.nan)
        whole[self.real] = output
        return whole
