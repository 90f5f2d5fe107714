import dataclasses
import json

import pytest
import torch

from headrace.nn.pretrained import config_from_dict
from headrace.vlm.sequence import Delimiter, Field, SequenceLayout, Special, Vocabulary, pad_sequences
from headrace.vlm.vipra_sequences import VipraSizes, finetuning, pretraining


def spell(text: str) -> list[int]:
    return [3 + ord(c) % 200 for c in text]


def sample(sizes: VipraSizes) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "instruction": "put it there",
        "frames": torch.randint(sizes.frame_codes, (sizes.frames, sizes.frame_tokens), generator=generator),
        "future": torch.randint(sizes.frame_codes, (sizes.frame_tokens,), generator=generator),
        "latents": torch.randint(sizes.latent_codes, (sizes.horizon, sizes.latent_tokens), generator=generator),
    }


def test_vipra_token_counts_at_the_released_size():
    sizes = VipraSizes()
    sequence = pretraining(sizes).build(sample(sizes), encode_text=spell)
    lengths = {name: end - start for name, (start, end) in sequence.spans.items()}
    assert lengths["frames"] == 514 and lengths["future"] == 257 and lengths["latents"] == 238
    text = sum(len(t) for t in ("put it there", "<vision>", "</vision>", "<dynamics>", "</dynamics>")) + 2
    assert len(sequence.ids) == 1009 + text
    assert int(sequence.ids[sequence.spans["future"][1] - 1]) == 8193


def test_modalities_cover_the_sequence_and_follow_the_fields():
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    layout = pretraining(sizes)
    sequence = layout.build(sample(sizes), encode_text=spell)
    visual, latent = layout.index("visual"), layout.index("latent")
    assert int((sequence.modality == visual).sum()) == 3 * 5
    assert int((sequence.modality == latent).sum()) == 3 * 3
    start, end = sequence.spans["latents"]
    assert bool((sequence.modality[start:end] == latent).all())
    assert torch.equal(sequence.position, torch.arange(len(sequence.ids)))


def test_loss_weights_combine_modality_means():
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    layout = pretraining(sizes)
    sequence = layout.build(sample(sizes), encode_text=spell)
    for name, share in {"text": 0.02, "visual": 0.48, "latent": 0.48}.items():
        weight = sequence.loss_weight[sequence.modality == layout.index(name)]
        assert float(weight.sum()) == pytest.approx(share, rel=1e-5)
    start, end = sequence.spans["frames"]
    assert not sequence.loss_weight[:end].any() and start > 0
    start, end = sequence.spans["future"]
    assert bool((sequence.loss_weight[start:end] == sequence.loss_weight[start]).all())


def test_a_modality_without_scored_positions_adds_nothing():
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    sequence = pretraining(sizes, future=False).build(sample(sizes), encode_text=spell)
    assert torch.isfinite(sequence.loss_weight).all()
    assert float(sequence.loss_weight.sum()) == pytest.approx(0.5)


@pytest.mark.parametrize("future, latents", [(True, True), (True, False), (False, True)])
def test_reading_gives_back_what_was_laid_out(future, latents):
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    layout, given = pretraining(sizes, future=future, latents=latents), sample(sizes)
    found = layout.read(layout.build(given, encode_text=spell))
    assert found["instruction"].tolist() == spell("put it there")
    for name in ("frames", *(["future"] if future else []), *(["latents"] if latents else [])):
        assert torch.equal(found[name], given[name].reshape(-1))


def test_finetuning_sequences():
    sizes = VipraSizes(frame_tokens=4, horizon=5, action_dim=2)
    given = sample(sizes) | {"actions": 5}
    flow = finetuning(sizes).build(given, encode_text=spell)
    start, end = flow.spans["actions"]
    assert flow.ids[start:end].tolist() == [0, 1, 2, 3, 4] and not flow.loss_weight.any()
    bins = finetuning(sizes, discrete=True).build(given | {"actions": torch.arange(10)}, encode_text=spell)
    start, end = bins.spans["actions"]
    assert bins.ids[start:end].reshape(5, 3)[:, 2].tolist() == [2047] * 5


def test_a_prompt_is_a_prefix_of_the_whole_sequence():
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    layout, given = pretraining(sizes), sample(sizes)
    whole = layout.build(given, encode_text=spell)
    prompt = layout.build({k: given[k] for k in ("instruction", "frames")}, encode_text=spell, until="future")
    assert torch.equal(prompt.ids, whole.ids[: whole.spans["future"][0]])


def test_layout_survives_json():
    layout = pretraining(VipraSizes())
    again = config_from_dict(SequenceLayout, json.loads(json.dumps(dataclasses.asdict(layout))))
    assert again == layout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": torch.zeros(7)}, "needs 2 x 4 ids, got 7"),
        ({"latents": torch.full((3, 2), 8)}, "special ids of 'latent'"),
        ({"frames": torch.full((2, 4), 9000)}, "0..8447, got 9000"),
    ],
)
def test_bad_samples_are_named(change, message):
    sizes = VipraSizes(frame_tokens=4, latent_tokens=2, horizon=3)
    with pytest.raises(ValueError, match=message):
        pretraining(sizes).build(sample(sizes) | change, encode_text=spell)


def test_bad_layouts_cannot_exist():
    text = Vocabulary(name="text", size=10, specials={"bos": 1})
    with pytest.raises(ValueError, match="no special 'eos'"):
        SequenceLayout(vocabularies=(text,), parts=(Special(special="eos"),))
    with pytest.raises(ValueError, match="no vocabulary 'visual'"):
        SequenceLayout(vocabularies=(text,), parts=(Field(name="a", modality="visual"),))
    with pytest.raises(ValueError, match="lie outside"):
        Vocabulary(name="text", size=10, specials={"bos": 10})
    layout = SequenceLayout(vocabularies=(text,), parts=(Delimiter(text="<a>"),))
    with pytest.raises(ValueError, match="encode_text"):
        layout.build({})


def test_padding_keeps_content_and_marks_the_rest():
    text = Vocabulary(name="text", size=300)
    layout = SequenceLayout(vocabularies=(text,), parts=(Field(name="a", modality="text"),), loss_weights={"text": 1.0})
    sequences = [layout.build({"a": ids}) for ids in ([5, 6, 7], [8])]
    right, left = pad_sequences(sequences), pad_sequences(sequences, side="left", length=4)
    assert right.ids.tolist() == [[5, 6, 7], [8, 0, 0]] and right.attention_mask[1].tolist() == [True, False, False]
    assert left.ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]] and left.position[0].tolist() == [0, 0, 1, 2]
    assert torch.allclose(right.loss_weight.sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="3 positions, length is 2"):
        pad_sequences(sequences, length=2)
