"""Heads that are there in training only: what each patch of a chart should know, and what a row should say of a box."""
# Shape letters in this file: B charts, N patches, K boxes (padded), D width, C concepts, 26 letters.

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.datasets.flowlearn.drawn import LETTERS
from headrace.datasets.flowlearn.targets import CONCEPTS, COURSES, MOST_EDGES, MOST_NODES

_LETTERS = len(LETTERS)
_PARTS = (_LETTERS, _LETTERS, _LETTERS, 1, MOST_NODES + 1, MOST_EDGES + 1, len(COURSES))
_COUNTS = MOST_NODES + 1 + MOST_EDGES + 1


class Facts(NamedTuple):
    """`targets.NodeFacts` of several charts: letter (B, K), out and into (B, K, 26), red (B, K), counts (B, 2),
    course (B,)."""

    letter: Tensor
    out: Tensor
    into: Tensor
    red: Tensor
    counts: Tensor
    course: Tensor


def concept_rows(facts: Facts) -> Tensor:
    """What is true of each box as numbers 0 and 1, (B, K, C); zeros for padding."""
    real = (facts.letter >= 0)[..., None].float()
    boxes = facts.letter.shape[1]
    chart = [
        F.one_hot(facts.counts[:, 0], MOST_NODES + 1),
        F.one_hot(facts.counts[:, 1], MOST_EDGES + 1),
        F.one_hot(facts.course, len(COURSES)),
    ]
    parts = [
        F.one_hot(facts.letter.clamp(min=0), _LETTERS).float(),
        facts.out,
        facts.into,
        facts.red[..., None],
        torch.ones_like(real),
        *(part.float()[:, None].expand(-1, boxes, -1) for part in chart),
    ]
    rows = torch.cat(parts, dim=-1) * real
    assert rows.shape[-1] == CONCEPTS
    return rows


class ChartHeads(nn.Module):
    """Reads boxes, letters and neighbours from an encoder's last rows, and lines from its middle ones."""

    def __init__(self, width: int, pair: int = 64) -> None:
        super().__init__()
        self.centre = nn.Linear(width, 1)
        self.node = nn.Linear(width, sum(_PARTS))
        self.chart = nn.Linear(width, _COUNTS)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, 2 * pair)
        self.keys = nn.Linear(width, 2 * pair)
        self.bias = nn.Parameter(torch.full((2,), -2.0))
        nn.init.constant_(self.centre.bias, -3.0)

    def lines(self, middle: Tensor, node: Tensor) -> Tensor:
        """Logits (2, B, N, K): does a line in patch N end at box K; does one begin there. `node` int64 (B, K)."""
        normed = self.norm(middle)
        boxes = gathered(normed, node)
        queries, keys = self.queries(normed).float().chunk(2, -1), self.keys(boxes).float().chunk(2, -1)
        scale = queries[0].shape[-1] ** -0.5
        return torch.stack(
            [q @ k.transpose(1, 2) * scale + b for q, k, b in zip(queries, keys, self.bias, strict=True)]
        )

    def losses(
        self, rows: Tensor, cls: Tensor, middle: Tensor, facts: Facts, node: Tensor, leads: Tensor, comes: Tensor
    ) -> dict[str, Tensor]:
        """One scalar per thing to know.

        Args:
            rows: Last rows of the patches, (B, N, D). `cls`: of the CLS token, (B, D).
            middle: Rows of an earlier block, (B, N, D).
            facts: About the boxes. `node`: their patches, int64 (B, K), -1 for padding.
            leads, comes: uint8 (B, N, K), see `targets.PatchTargets`.
        """
        real = node >= 0
        told = self.node(gathered(rows, node))[real].float().split(_PARTS, dim=-1)
        centre = torch.zeros(rows.shape[:2], device=rows.device)
        centre.scatter_add_(1, node.clamp(min=0), real.float())
        nodes, edges = self.chart(cls).float().split((MOST_NODES + 1, MOST_EDGES + 1), dim=-1)
        counts, course = facts.counts[:, None].expand(-1, node.shape[1], -1)[real], facts.course[:, None]
        bce = F.binary_cross_entropy_with_logits
        return {
            "centre": 5 * bce(self.centre(rows)[..., 0].float(), centre.clamp(max=1), pos_weight=rows.new_tensor(5.0)),
            "letter": F.cross_entropy(told[0], facts.letter[real]),
            "out": bce(told[1], facts.out[real], reduction="sum") / len(told[1]),
            "into": bce(told[2], facts.into[real], reduction="sum") / len(told[2]),
            # framed boxes are few: without the factor it was the last thing to be learned
            "red": 5 * bce(told[3][:, 0], facts.red[real]),
            "nodes": F.cross_entropy(told[4], counts[:, 0]) + F.cross_entropy(nodes, facts.counts[:, 0]),
            "edges": F.cross_entropy(told[5], counts[:, 1]) + F.cross_entropy(edges, facts.counts[:, 1]),
            "course": F.cross_entropy(told[6], course.expand_as(node)[real]),
            "lines": self._line_loss(self.lines(middle, node), real, leads, comes),
        }

    def _line_loss(self, logits: Tensor, real: Tensor, leads: Tensor, comes: Tensor) -> Tensor:
        truth = torch.stack([leads, comes]).float()
        asked = (truth.amax((0, 3)) > 0)[..., None] & real[:, None]  # patches with a line, real boxes
        both = asked.expand_as(truth)
        return 5 * F.binary_cross_entropy_with_logits(logits[both], truth[both])


class LookupHeads(nn.Module):
    """What a language model should have looked up half-way through its layers, read at the letters of a text.

    Finding a box by its letter and answering about it take two layers, and neither helps without the other: from
    answers alone a small model stayed at chance for 700 updates. These heads ask for the first half by itself, and for
    two boxes' relation one layer later.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.known = nn.Linear(width, 2 * _LETTERS)
        self.pair = nn.Linear(width, 2)

    def losses(
        self, looked_up: Tensor, compared: Tensor, letters: Tensor, block: Tensor, facts: Facts
    ) -> dict[str, Tensor]:
        """One scalar for the neighbours of each letter's box, one for its arrows with the question's first box.

        Args:
            looked_up, compared: Hidden states of the text, (B, L, D), the second from a later layer.
            letters: int64 (B, L), index in A..Z, -1 elsewhere.
            block: int64 (B, L), number of the question, -1 for padding.
            facts: About the boxes.
        """
        same = (facts.letter[:, None] == letters[..., None]) & (letters >= 0)[..., None] & (block >= 0)[..., None]
        found, box = same.any(-1), same.float().argmax(-1)
        chart = torch.arange(len(box), device=box.device)[:, None].expand_as(box)
        neighbours = torch.cat([facts.out[chart, box], facts.into[chart, box]], -1)[found]
        told = self.known(_even(looked_up))[found].float()
        bce = F.binary_cross_entropy_with_logits
        known = bce(told, neighbours, reduction="sum") / max(len(told), 1)

        place = torch.arange(letters.shape[1], device=box.device).expand_as(letters)
        far = letters.shape[1]
        first = torch.full((len(box), int(block.max()) + 1), far, device=box.device)
        first.scatter_reduce_(1, block.clamp(min=0), torch.where(found, place, far), "amin")
        start = first.gather(1, block.clamp(min=0))
        later = found & (place > start)
        origin = box.gather(1, start.clamp(max=far - 1))
        arrows = torch.stack([side[chart, origin].gather(2, letters.clamp(min=0)[..., None])[..., 0]
                              for side in (facts.out, facts.into)], -1)  # fmt: skip
        return {"known": known, "pair": bce(self.pair(_even(compared))[later].float(), arrows[later])}


def _even(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden.float(), hidden.shape[-1:]).to(hidden.dtype)


def gathered(rows: Tensor, node: Tensor) -> Tensor:
    """Rows (B, N, D) at the boxes' patches (B, K); padding takes row 0."""
    return rows.gather(1, node.clamp(min=0)[..., None].expand(-1, -1, rows.shape[-1]))
