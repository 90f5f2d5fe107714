"""Action tokens through a LLaMA-shaped decoder whose prefix is already read: the inner loop of the flow sampler.

It computes what transformers' `LlamaModel` computes, with another layout in memory. A pass holds a dozen tokens, so
its time goes to reading weights and to the number of operations. Here tokens are columns: every product is `weight @ x`
with the weights as they lie, which is faster than `x @ weight.T` at so few tokens. Keys and values lie in one tensor
per layer whose last places each pass overwrites; rotary tables and masks are made once for all passes.
"""
# Shape letters: B batch, H action tokens (horizon), N prefix tokens, A heads, E numbers per head, D width = A * E.

from typing import Any, cast

import torch
from torch import Tensor, nn

from headrace.nn.lean_imports import without
from headrace.nn.shapes import expect_shape
from headrace.vlm.kv_cache import KVCache

with without("sklearn"):
    from transformers import LlamaModel

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def reads_weights_of(backbone: LlamaModel) -> bool:
    """Whether the decoder's linear maps are plain ones without bias: adapters and quantised maps are not seen here."""
    maps = (layer.get_submodule(name) for layer in backbone.layers for name in PROJECTIONS + FEED_FORWARD)
    plain = all(type(part) is nn.Linear and part.bias is None for part in maps)
    return plain and backbone.config.num_key_value_heads == backbone.config.num_attention_heads


class ActionPass:
    """Passes of action tokens over one prefix; for inference only.

    Args:
        backbone: The decoder; `reads_weights_of` must hold.
        cache: Keys and values of the prefix, N entries; copied.
        valid: True at prefix positions that are not padding, shape (B, N).
        horizon: Action tokens H of each pass.
        causal: Whether an action token sees only itself and those before it among the action tokens.
    """

    def __init__(self, backbone: LlamaModel, cache: KVCache, valid: Tensor, *, horizon: int, causal: bool) -> None:
        self.backbone, self.batch, self.horizon = backbone, valid.shape[0], horizon
        config = backbone.config
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.eps = config.rms_norm_eps
        prefix = valid.shape[1]
        like = backbone.layers[0].get_parameter("self_attn.q_proj.weight")
        rows, each, total = self.batch * self.heads, self.width // self.heads, prefix + horizon
        self.stores = []  # keys (B * A, E, N + H) and values (B * A, N + H, E) of each layer
        for layer in cast(Any, cache.layers):
            keys, values = like.new_empty(rows, each, total), like.new_empty(rows, total, each)
            keys[..., :prefix] = layer.keys[..., :prefix, :].flatten(0, 1).mT
            values[:, :prefix] = layer.values[..., :prefix, :].flatten(0, 1)
            self.stores.append((keys, values))
        self.prefix = prefix
        self.mask = self._mask(valid, causal, like.dtype)
        self.cos, self.sin = self._rotary(valid, like)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Last hidden states, shape (B, H, D), of action tokens' embeddings of that shape."""
        expect_shape("tokens", tokens, (self.batch, self.horizon, self.width))
        x = tokens.reshape(-1, self.width).mT.contiguous()  # (D, B * H)
        for layer, store in zip(self.backbone.layers, self.stores, strict=True):
            part = cast(Any, layer)
            x = self._attend(part, store, x)
            normed = self._norm(x, part.post_attention_layernorm)
            gate = nn.functional.silu(part.mlp.gate_proj.weight @ normed, inplace=True)
            gate.mul_(part.mlp.up_proj.weight @ normed)
            x = torch.addmm(x, part.mlp.down_proj.weight, gate)
        return self._norm(x, cast(Any, self.backbone.norm)).mT.reshape(self.batch, self.horizon, self.width)

    def _attend(self, layer: Any, store: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        (keys, values), attention = store, layer.self_attn
        normed = self._norm(x, layer.input_layernorm)
        both = x.new_empty(2, *x.shape)
        torch.mm(attention.q_proj.weight, normed, out=both[0])
        torch.mm(attention.k_proj.weight, normed, out=both[1])
        query, key = self._turned(self._by_head(both.flatten(0, 1), 2)).unbind(0)
        value = self._by_head(attention.v_proj.weight @ normed, 1)[0]
        keys[..., self.prefix :] = key
        values[:, self.prefix :] = value.mT
        scores = torch.baddbmm(self.mask, query.mT, keys)  # (B * A, H, N + H)
        seen = (scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ values).mT  # (B * A, E, H)
        joined = seen.unflatten(0, (self.batch, self.heads)).movedim(0, 2).reshape(x.shape)
        return torch.addmm(x, attention.o_proj.weight, joined)

    def _by_head(self, x: Tensor, parts: int) -> Tensor:
        """Columns (parts * D, B * H) as (parts, B * A, E, H); a view for one sample."""
        split = x.view(parts, self.heads, -1, self.batch, self.horizon)
        return split.movedim(3, 1).reshape(parts, self.batch * self.heads, -1, self.horizon)

    def _turned(self, both: Tensor) -> Tensor:
        """Rotary embedding of queries and keys, (2, B * A, E, H); the queries come out scaled for attention."""
        low, high = both.chunk(2, dim=2)
        return torch.cat((-high, low), 2).mul_(self.sin).addcmul_(both, self.cos)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return nn.functional.rms_norm(x.mT, (self.width,), norm.weight, self.eps).mT

    def _rotary(self, valid: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the action positions for queries (scaled) and keys, each (2, B or B * A, E, H)."""
        place = valid.sum(1, keepdim=True) + torch.arange(self.horizon, device=valid.device)
        tables = []
        for table in cast(Any, self.backbone.rotary_emb)(like, place):
            turned = table.mT.repeat_interleave(self.heads, 0) if self.batch > 1 else table.mT
            tables.append(torch.stack((turned * (self.width // self.heads) ** -0.5, turned)))
        return tables[0], tables[1]

    def _mask(self, valid: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
        """What is added to the scores: 0 where seen, the lowest number elsewhere, (1 or B * A, H, N + H)."""
        among = valid.new_ones(self.horizon, self.horizon)
        seen = torch.cat((valid[:, None].expand(-1, self.horizon, -1), among.expand(len(valid), -1, -1)), -1)
        if causal:
            seen[..., self.prefix :] = among.tril()
        mask = torch.zeros(seen.shape, dtype=dtype, device=valid.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask if self.batch == 1 else mask.repeat_interleave(self.heads, 0)
