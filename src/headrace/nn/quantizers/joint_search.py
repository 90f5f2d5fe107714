"""Nearest code under a weighted sum of cosine distances in several codebooks that share one index."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_TILE = 256
CODE_TILE = 2048
BLOCK = 64


def unit_parts(vectors: Tensor, dims: Sequence[int]) -> Tensor:
    """Scale each part of the last dimension to length 1 on its own.

    Args:
        vectors: Shape (..., D) with D = sum(dims).
        dims: Sizes of the parts, one per codebook.

    Returns:
        Same shape; every part has length 1 (a part of zeros stays zero).
    """
    return torch.cat([F.normalize(part, dim=-1) for part in vectors.split(tuple(dims), dim=-1)], dim=-1)


@torch.no_grad()
def nearest_codes(queries: Tensor, codebook: Tensor, *, dims: Sequence[int], weights: Sequence[float]) -> Tensor:
    r"""Index of the code with the smallest :math:`\sum_i w_i \lVert q_i - e_{k,i} \rVert^2` over unit parts.

    For parts of length 1 this equals the largest :math:`\sum_i w_i \cos(q_i, e_{k,i})`, which is one matrix product
    with the concatenated codebook. It runs in float32 over tiles of queries and codes and keeps only the best code so
    far, so no distance matrix and no one-hot matrix exists. Of equal codes the first wins.

    Args:
        queries: Shape (M, D), each part of length 1.
        codebook: Shape (K, D), each part of length 1.
        dims: Sizes of the parts, sum D.
        weights: Weight of each part, above 0.

    Returns:
        int64, shape (M,), values 0..K-1.

    Source: TokenFlow (arXiv 2412.03069), eq. for the shared mapping; the identity is plain algebra.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, codebook = queries.float(), codebook.float()
        if any(weight != 1 for weight in weights):
            scale = torch.cat([queries.new_full((d,), w) for d, w in zip(dims, weights, strict=True)])
            queries = queries * scale
        codes = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
        for start in range(0, len(queries), QUERY_TILE):
            codes[start : start + QUERY_TILE] = largest_products(queries[start : start + QUERY_TILE], codebook)
    return codes


def largest_products(queries: Tensor, codebook: Tensor) -> Tensor:
    """Index of the row of `codebook` (K, D) with the largest inner product with each query (M, D), int64 (M,).

    Only tiles of the product exist at a time. Of equal products the first wins.
    """
    best = queries.new_full((len(queries),), -torch.inf)
    codes = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(codebook), CODE_TILE):
        score, index = _row_maximum(queries @ codebook[start : start + CODE_TILE].T)
        better = score > best
        best = torch.where(better, score, best)
        codes = torch.where(better, index + start, codes)
    return codes


def _row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and its first place.

    Blocks first, because a maximum without its place is vectorised on a CPU and one with it is not.
    """
    rows, columns = scores.shape
    if columns % BLOCK:
        values, places = scores.max(dim=1)
        return values, places
    blocks = scores.view(rows, columns // BLOCK, BLOCK)
    block = blocks.amax(dim=2).argmax(dim=1)
    inside = blocks[torch.arange(rows, device=scores.device), block]
    values, places = inside.max(dim=1)
    return values, block * BLOCK + places
