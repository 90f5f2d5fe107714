import pytest
import torch
import torch.nn.functional as F

from headrace.tokenizers.compared_at import ComparedAt
from headrace.tokenizers.reconstruction import evaluate
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_protocol import psnr


class Perfect(UniFlow):
    def encode(self, images):
        self.grid_of(images)
        return images

    def decode(self, tokens):
        return tokens


@pytest.mark.parametrize("size", [32, 96])
def test_pictures_come_back_at_the_size_they_are_compared_at(size):
    model = ComparedAt(UniFlow(UniFlowConfig.tiny()).eval(), size=size)
    assert model.preprocessing.size == size
    low, high = model.preprocessing.low, model.preprocessing.high
    with torch.no_grad():
        tokens = model.encode(torch.rand(1, 3, size, size) * 0.5)
        assert tokens.shape == (1, 64, 32)
        out = model.decode(tokens)
    assert out.shape == (1, 3, size, size)
    assert low - 1e-5 <= out.min() and out.max() <= high + 1e-5


def test_a_perfect_tokenizer_loses_only_what_resizing_loses():
    inner = Perfect(UniFlowConfig.tiny())
    smooth = F.interpolate(torch.rand(2, 3, 4, 4), size=(32, 32), mode="bicubic").clamp(0, 1)
    model = ComparedAt(inner, size=32)
    p = model.preprocessing
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (p.mean, p.std))
    back = p.to_unit(model.decode(model.encode((smooth - mean) / std)))
    assert (psnr(smooth, back) > 35).all()


def test_the_report_says_what_a_detour_costs():
    inner = Perfect(UniFlowConfig.tiny())
    p = inner.preprocessing
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (p.mean, p.std))
    noise = (torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - mean) / std
    assert evaluate(inner, [noise]).psnr == float("inf")
    assert evaluate(ComparedAt(inner, size=32), [noise[..., :32, :32]]).psnr < 30
