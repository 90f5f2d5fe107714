"""A key/value cache that can go back: rewind, fork for several continuations, keep a selection of entries.

It is the cache of transformers made of full layers, so Hugging Face decoders take it as `past_key_values`. Layers with
a sliding window also store all entries here and get their window from the mask alone, which makes rewinding safe.
"""
# Shape letters in this file: B batch, H key/value heads, N entries, D head dimension.

from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import DynamicCache


class KVCache(DynamicCache):
    """Keys and values of all layers, each (B, H, N, D), filled by a decoder's forward pass."""

    @property
    def length(self) -> int:
        """Entries stored per layer; after `keep` this is less than the tokens seen."""
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Memory of the stored keys and values [bytes]."""
        return sum(t.numel() * t.element_size() for layer in self._filled() for t in (layer.keys, layer.values))

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` entries; the next pass writes there.

        Raises:
            ValueError: `length` is negative or above what is stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} entries, cannot rewind to {length}")
        for layer in self._filled():
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]

    def fork(self, count: int = 1) -> Self:
        """An independent cache whose batch is this one's, each row repeated `count` times.

        With `count` 1 no memory is copied: updates build new tensors, so the two never see each other's entries.

        Raises:
            ValueError: `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        other = type(self)()
        for index, layer in enumerate(self._filled()):
            keys, values = layer.keys, layer.values
            if count > 1:
                keys, values = keys.repeat_interleave(count, dim=0), values.repeat_interleave(count, dim=0)
            other.update(keys, values, index)
            copied: Any = other.layers[index]
            copied.keys, copied.values = keys, values
        return other

    def keep(self, indices: Tensor, *, layers: range | None = None) -> None:
        """Keep a selection of entries, in the given order.

        Args:
            indices: Entries to keep, int64, (K,) for all rows alike or (B, K).
            layers: Layers to cut; None cuts all. Layers of different lengths break the decoder's mask, so a caller that
                cuts some must know that the others are already that long.
        """
        filled = self._filled()
        for layer in filled if layers is None else [filled[i] for i in layers]:
            rows = indices.expand(layer.keys.shape[0], -1) if indices.ndim == 1 else indices
            picked = rows[:, None, :, None].expand(-1, layer.keys.shape[1], -1, -1)
            layer.keys = layer.keys.gather(2, picked.expand(-1, -1, -1, layer.keys.shape[-1]))
            layer.values = layer.values.gather(2, picked.expand(-1, -1, -1, layer.values.shape[-1]))

    def _filled(self) -> list[Any]:
        layers: list[Any] = self.layers  # transformers' union has kinds without keys, which this cache never makes
        return [layer for layer in layers if layer.is_initialized]
