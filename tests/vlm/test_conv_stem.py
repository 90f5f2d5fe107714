"""Convolutional stem and canvas: translation, padding, and the encoder around them."""

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.vlm.canvas import Canvas
from headrace.vlm.conv_stem import ConvStem, StemConfig
from headrace.vlm.visual_encoder import VisualEncoder, VisualEncoderConfig

STEM = StemConfig(widths=(4, 8, 8), blocks=(0, 1, 0))


def config(**changes):
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    fields = {
        "source": "timm",
        "name": "vit_tiny_patch16_224",
        "arguments": vit,
        "size": 32,
        "fit": "pad",
        "stem": STEM,
    }
    return VisualEncoderConfig(**(fields | changes))


def test_tokens_move_with_the_picture():
    torch.manual_seed(0)
    stem = ConvStem(STEM, size=64, width=16)
    for block in stem.modules():
        if hasattr(block, "second"):
            torch.nn.init.normal_(block.second.weight, std=0.1)
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[:, :, 24:32, 24:32] = torch.randn(1, 3, 8, 8)
    moved = pixels.roll((8, 16), (2, 3))
    a, b = (stem(p).unflatten(1, (8, 8)) for p in (pixels, moved))
    assert torch.allclose(a[:, 2:5, 2:5], b[:, 3:6, 4:7], atol=1e-5)


def test_canvas_keeps_pixels_and_shrinks_only_what_is_too_large():
    canvas = Canvas(size=64)
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    out = canvas.to_uint8(canvas(small))[0]
    assert np.array_equal(out[22:42, 17:47], np.asarray(small))
    assert (out[0] == 128).all()
    assert canvas.region(30, 20) == (17 / 64, 22 / 64, 47 / 64, 42 / 64)
    wide = canvas.region(128, 32)
    assert wide == (0.0, 24 / 64, 1.0, 40 / 64)


def test_encoder_with_stem_is_rebuilt_from_its_config_and_can_be_pruned():
    encoder = VisualEncoder(config())
    assert encoder.tokens_per_picture == 16 and isinstance(encoder.preprocessing, Canvas)
    other = VisualEncoder(config())
    other.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder(pixels), other(pixels))
    assert encoder.tower().has_cls and encoder.tower().prefix == 1


def test_stem_that_does_not_fit_is_refused():
    vit = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
    with pytest.raises(ValueError, match="patches of 8 px"):
        VisualEncoder(config(arguments=vit))
    with pytest.raises(ValueError, match="must divide by 8"):
        ConvStem(STEM, size=36, width=8)
    with pytest.raises(ValueError, match="one per stage"):
        StemConfig(widths=(4, 8), blocks=(1,))
    with pytest.raises(ValueError, match="first layers"):
        VisualEncoderConfig(source="uniflow", stem=STEM)
    with pytest.raises(ValueError, match="'pad'"):
        config(fit="stretch")
