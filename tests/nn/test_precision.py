"""bfloat16 is chosen only where a device multiplies it natively."""

import pytest
import torch

from headrace.nn import precision
from headrace.nn.precision import mixed, resolve_precision


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_device(native, chosen, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: native)
    assert resolve_precision("auto", "cpu") == chosen
    with mixed("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]


def test_a_named_precision_is_kept_whatever_the_device(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    assert resolve_precision("bf16", "cpu") == "bf16"
    with mixed("cpu", "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_native_means_faster():
    """The claim behind `auto` on this very processor."""
    import time

    def seconds(dtype):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            a @ b
            best = min(best, time.process_time() - start)
        return best

    native = precision.multiplies_bf16("cpu")
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    assert ratio < 2 if native else ratio > 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="got 'half'"):
        resolve_precision("half", "cpu")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
