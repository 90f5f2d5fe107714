"""LWM's tokenizer: nearest codes, its Flax weights under our names, and no pickle but of arrays."""

import pickle

import numpy as np
import pytest
import torch

from headrace.tokenizers.lwm_vqgan import LwmVQGAN, LwmVQGANConfig
from headrace.tokenizers.lwm_vqgan_import import from_flax, our_name, read_arrays

CONFIG = LwmVQGANConfig.tiny()


def flax_paths(config):
    """Every path of the Flax tree, as its modules are made: levels in order, a shortcut where the width changes."""
    paths = ["quantize/embeddings"]
    convolutions = ["quant_conv", "post_quant_conv"]
    norms = []

    def block(place, narrow, wide):
        norms.extend(f"{place}/GroupNorm_{i}" for i in (0, 1))
        convolutions.extend(f"{place}/Conv_{i}" for i in ((0, 1) if narrow == wide else (0, 1, 2)))

    for side, levels, count in (
        ("encoder", config.multipliers, config.blocks),
        ("decoder", config.multipliers[::-1], config.blocks + 1),
    ):
        name, move = ("DownsamplingBlock", "Downsample") if side == "encoder" else ("UpsamplingBlock", "Upsample")
        convolutions += [f"{side}/Conv_0", f"{side}/Conv_1"]
        norms.append(f"{side}/GroupNorm_0")
        widths = [m * config.width for m in levels]
        before = config.width if side == "encoder" else widths[0]
        for index, width in enumerate(widths):
            for number in range(count):
                block(f"{side}/{name}_{index}/ResnetBlock_{number}", before, width)
                before = width
            if index < len(widths) - 1:
                convolutions.append(f"{side}/{name}_{index}/{move}_0/Conv_0")
        for number in (0, 1):
            block(f"{side}/MidBlock_0/ResnetBlock_{number}", 1, 1)
    paths += [f"{c}/{leaf}" for c in convolutions for leaf in ("kernel", "bias")]
    return paths + [f"{n}/{leaf}" for n in norms for leaf in ("scale", "bias")]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LwmVQGAN(CONFIG).eval()


@pytest.fixture(scope="module")
def arrays(model):
    state = model.state_dict()
    found = {}
    for path in flax_paths(CONFIG):
        value = state[our_name(path)].numpy()
        found[path] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return found


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_whole_tree_has_a_place_and_gives_the_same_codes_and_pictures(model, arrays, images):
    assert len(arrays) == len(model.state_dict())
    loaded = from_flax(arrays, CONFIG)
    codes = model.encode(images)
    assert codes.shape == (2, 64) and torch.equal(loaded.encode(images), codes)
    torch.testing.assert_close(loaded.decode(codes), model.decode(codes))


def test_codes_are_the_nearest_rows(model, images):
    with torch.no_grad():
        wanted = torch.cdist(model.latents(images), model.codebook.weight).argmin(-1)
    assert torch.equal(model.encode(images), wanted)


def test_trees_that_do_not_fit_are_refused(arrays):
    with pytest.raises(ValueError, match="1 missing"):
        from_flax({k: v for k, v in arrays.items() if k != "quant_conv/bias"}, CONFIG)
    with pytest.raises(ValueError, match="AttnBlock"):
        from_flax({**arrays, "encoder/MidBlock_0/AttnBlock_0/Conv_0/kernel": np.zeros(1)}, CONFIG)


def test_the_published_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        published = LwmVQGAN(LwmVQGANConfig.published())
    assert (published.tokens_per_image, published.codebook_size) == (256, 8192)
    assert published.codebook.weight.shape == (8192, 64)
    assert not any("attn" in name for name in published.state_dict())


def test_only_arrays_are_unpickled(arrays, tmp_path):
    nested: dict = {}
    for path, value in arrays.items():
        *folders, leaf = path.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    (tmp_path / "good").write_bytes(pickle.dumps(nested))
    read = read_arrays(tmp_path / "good")
    assert set(read) == set(arrays) and all(np.array_equal(read[k], arrays[k]) for k in arrays)
    (tmp_path / "bad").write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(ValueError, match=r"asks for .*print"):
        read_arrays(tmp_path / "bad")
