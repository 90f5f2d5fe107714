from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from headrace.tokenizers.base import Preprocessing, Tokenizer, check_codes, check_images, to_rgb

RANGES = {"minus one to one": ((0.5,) * 3, (0.5,) * 3, -1, 1), "unit": ((0.0,) * 3, (1.0,) * 3, 0, 1)}


@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    size: int = 8

    @classmethod
    def tiny(cls):
        return cls(size=4)


class MeanColour(Tokenizer):
    """The smallest honest tokenizer: a picture is its mean colour."""

    Config = MeanConfig
    VARIANTS = ("tiny",)
    kind = "continuous"
    tokens_per_image = 1
    feature_dim = 3

    @property
    def preprocessing(self):
        return Preprocessing(size=self.config.size)

    def encode(self, images):
        check_images(images, self.preprocessing)
        return images.mean((2, 3))[:, None]

    def decode(self, tokens):
        return tokens[:, 0, :, None, None].expand(-1, -1, self.config.size, self.config.size)

    def features(self, images):
        return self.encode(images)


@pytest.mark.parametrize("name", RANGES)
def test_pictures_come_back_from_the_stated_range(name):
    mean, std, low, high = RANGES[name]
    preprocessing = Preprocessing(size=6, mean=mean, std=std)
    picture = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3) * 2
    picture[0, 0], picture[0, 1] = 0, 255
    values = preprocessing(picture)
    assert (values.min().item(), values.max().item()) == (low, high) == (preprocessing.low, preprocessing.high)
    np.testing.assert_array_equal(preprocessing.to_uint8(values)[0], picture)


def test_crop_keeps_the_centre_and_squash_keeps_all():
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    assert Preprocessing(size=10, fit="crop")(picture).mean() == 1
    assert Preprocessing(size=10, fit="squash")(picture).mean() == pytest.approx(-1 / 3, abs=0.05)


@pytest.mark.parametrize("shape", [(7, 5), (33, 64), (200, 51)])
def test_any_size_becomes_the_asked_square(shape):
    assert Preprocessing(size=16)(np.full((*shape, 3), 128, np.uint8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), "alpha"),
        (Image.new("RGBA", (4, 4)), "alpha"),
        (Image.new("LA", (4, 4)), "alpha"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        ("cat.png", "PIL image"),
    ],
)
def test_bad_pictures_are_named(picture, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(picture)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 4, 8, 8), "alpha"),
        (torch.zeros(1, 3, 8, 9), r"\(1, 3, 8, 9\)"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), 255.0), r"\[255, 255\]"),
        (torch.full((1, 3, 8, 8), torch.nan), "nan"),
    ],
)
def test_bad_batches_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        check_images(images, Preprocessing(size=8))


def test_codes_outside_the_codebook_are_named():
    check_codes(torch.tensor([[0, 15]]), size=16)
    for codes in (torch.tensor([[0, 16]]), torch.tensor([[-1, 3]]), torch.tensor([0, 1]), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="codes must"):
            check_codes(codes, size=16)


def test_reconstruct_is_decode_of_encode_inside_the_range():
    model = MeanColour(MeanConfig())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(model.reconstruct(images), model.decode(model.encode(images)))


def test_a_tokenizer_must_have_every_part():
    class Half(MeanColour):
        encode = Tokenizer.encode

    with pytest.raises(TypeError, match="encode"):
        Half(MeanConfig())
