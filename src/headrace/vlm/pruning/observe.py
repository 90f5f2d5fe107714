"""Reading a layer's queries, keys and values while it runs, without computing them twice and without patching anything.

Models of transformers call an attention function by name; a registered function that first shows q, k and v to an
observer and then calls the model's previous one leaves the result as it was. Modules with one fused `qkv` projection,
as in timm, are read by a forward hook on that projection.
"""
# Shape letters in this file: B batch, H heads, S tokens, D head dimension.

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Qkv(NamedTuple):
    """Inputs of one attention call: query, key, value (B, H, S, D), and the factor on q.k."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


# Called with the inputs; may return bool (B, S), the keys that are real, which are then the only ones attended to.
Observer = Callable[[Qkv], Tensor | None]

_observers: WeakKeyDictionary[nn.Module, Observer] = WeakKeyDictionary()


def _base_function(module: nn.Module, base: str) -> Callable:
    if base == "eager":  # every modelling file brings its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _with_key_mask(mask: Tensor | None, real: Tensor, query: Tensor, base: str) -> Tensor:
    if mask is not None or base not in ("sdpa", "eager"):
        raise ValueError(
            f"pictures of one batch were cut to different lengths, which {base!r} attention with a mask of its own "
            "cannot follow; use batch_rule='max', or encode one picture at a time"
        )
    allowed = real[:, None, None, :]
    return allowed if base == "sdpa" else torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, -torch.inf)


def _register(base: str) -> str:
    """Name of the observed twin of the attention function `base`, registered on first use."""
    name = f"{base}_observed"
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ):
        observer = _observers.get(module)
        if observer is not None:
            real = observer(Qkv(query, key, value, more.get("scaling") or query.shape[-1] ** -0.5))
            if real is not None:
                attention_mask = _with_key_mask(attention_mask, real, query, base)
        return _base_function(module, base)(module, query, key, value, attention_mask, **more)

    AttentionInterface.register(name, attend)
    if base in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():  # a name without a mask builder would silently get no mask
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@contextmanager
def observed_attention(model: Any, observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """Show q, k and v of some attention modules to observers while the context is open.

    Args:
        model: The transformers model whose attention modules these are, or any module for those with a fused `qkv`.
        observers: Attention module to observer.

    Raises:
        ValueError: One of the modules is observed already.
    """
    busy = [module for module in observers if module in _observers]
    if busy:
        raise ValueError(f"{type(model).__name__} is being pruned already; close that context first")
    fused = {module: seen for module, seen in observers.items() if reads_by_hook(module)}
    with ExitStack() as stack:
        for module, seen in fused.items():
            stack.enter_context(_qkv_hook(module, seen))
        if len(fused) < len(observers):
            stack.enter_context(_interface(model, {m: o for m, o in observers.items() if m not in fused}))
        yield


@contextmanager
def _interface(model: Any, observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(_register(before))
    _observers.update(observers)
    try:
        yield
    finally:
        for module in observers:
            _observers.pop(module, None)
        model.set_attn_implementation(before)


def reads_by_hook(module: nn.Module) -> bool:
    """Whether an attention module has one fused projection and no rotation after it, so that a hook sees q, k and v."""
    fused = isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    return fused and hasattr(module, "q_norm") and not hasattr(module, "rope") and not hasattr(module, "config")


def _qkv_hook(module: Any, observer: Observer) -> Any:
    def show(_: nn.Module, __: Any, output: Tensor) -> None:
        batch, tokens, width = output.shape
        parts = output.reshape(batch, tokens, 3, module.num_heads, width // (3 * module.num_heads))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        real = observer(Qkv(module.q_norm(query), module.k_norm(key), value, query.shape[-1] ** -0.5))
        if real is not None:
            raise ValueError(
                "pictures of one batch were cut to different lengths, which this encoder cannot follow; "
                "use batch_rule='max', or encode one picture at a time"
            )

    return module.qkv.register_forward_hook(show)
