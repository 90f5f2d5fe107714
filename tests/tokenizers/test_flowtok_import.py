import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_bridge import TextToImage
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.flowtok_import import from_official, load_flow, load_official, official_state

TINY = FlowTokConfig.tiny()
OPTIONS = {"captions": TINY.captions, "heads": TINY.net.heads, "projector_heads": TINY.projector.heads}


@pytest.fixture
def official():
    torch.manual_seed(0)
    model = FlowTok(TINY).eval()
    return model, *official_state(model)


@pytest.fixture
def files(official, tmp_path):
    """The two files of a release."""
    paths = tmp_path / "tokenizer.safetensors", tmp_path / "flow.safetensors"
    for state, path in zip(official[1:], paths, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return paths


@torch.no_grad()
def test_both_files_give_the_model_back(official, files):
    again = load_official(*files, **OPTIONS)
    assert again.to_text is None and again.config.legacy_grid
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again.posterior(images).mean, official[0].posterior(images).mean)
    x, t, label = torch.randn(2, 12, 4), torch.rand(2), torch.zeros(2, dtype=torch.long)
    assert again.to_image.velocity(x, t, label).shape == x.shape


def test_the_text_tower_of_the_release_is_clip(files, monkeypatch):
    loaded = []
    monkeypatch.setattr("headrace.tokenizers.flowtok_captions.CaptionEncoder.load_clip", lambda _: loaded.append(1))
    load_official(*files, **OPTIONS)
    assert not loaded
    monkeypatch.setattr("headrace.tokenizers.flowtok_import.CaptionConfig", lambda: TINY.captions)
    load_official(*files, **OPTIONS | {"captions": None})
    assert loaded


def test_both_files_are_needed_by_name(files):
    with pytest.raises(ValueError, match=r"two files.*flowtok:TOKENIZER_FILE,FLOW_FILE"):
        load_tokenizer(f"flowtok:{files[0]}")
    with pytest.raises(ValueError, match="give heads"):  # so both were read: 64 is no published width
        load_tokenizer(f"flowtok:{files[0]},{files[1]}")


def test_files_that_are_broken_or_changed_places_are_named(files):
    with pytest.raises(ValueError, match="no official FlowTok image tokenizer"):
        load_official(files[1], files[0], **OPTIONS)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"flow\.safetensors cannot be read.*truncated"):
        load_official(*files, **OPTIONS)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"flow\.safetensors is missing"):
        load_official(*files, **OPTIONS)


def test_a_missing_key_is_named(official):
    _, image, flow = official
    with pytest.raises(ValueError, match=r"1 missing: decoder\.smooth\.bias"):
        from_official({k: v for k, v in image.items() if k != "decoder.conv_out.bias"}, flow, TINY.captions, heads=4,
                      projector_heads=4)  # fmt: skip
    with pytest.raises(ValueError, match=r"1 missing: align\.log_temperature"):
        from_official(image, {k: v for k, v in flow.items() if k != "t2t_temperature"}, TINY.captions, heads=4,
                      projector_heads=4)  # fmt: skip
    with pytest.raises(ValueError, match="no 'pos_embed'"):
        from_official(image, {k: v for k, v in flow.items() if k != "pos_embed"}, TINY.captions, heads=4)


def test_a_flow_of_another_size_is_named(official):
    wider = TextToImage(32, TINY.projector, dataclasses.replace(TINY.net, width=96))
    with pytest.raises(ValueError, match=r"of another shape: .*\(.*64.*\) for \(.*96.*\)"):
        load_flow(wider, official[2])


def test_a_foreign_table_of_places_is_refused(official):
    model, _, flow = official
    with pytest.raises(ValueError, match="pos_embed is not the sine-cosine table"):
        load_flow(model.to_image, flow | {"pos_embed": flow["pos_embed"].flip(1)})
