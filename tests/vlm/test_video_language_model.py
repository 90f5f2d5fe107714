import dataclasses

import pytest
import torch

from headrace.tokenizers.auto import new_tokenizer
from headrace.vlm.auto import load_vlm
from headrace.vlm.pruning.auto import pruning_config
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.sequence import Delimiter, Field, SequenceLayout, Special, Vocabulary, pad_sequences
from headrace.vlm.video_language_model import VideoLanguageConfig, VideoLanguageModel
from headrace.vlm.visual_encoder import VisualEncoder, VisualEncoderConfig

QUESTIONS = ["How many nodes?", "Is A linked to B, or to C?", "?"]


@pytest.fixture(scope="module")
def build(byte_text):
    def make(**change):
        torch.manual_seed(0)
        model = VideoLanguageModel(dataclasses.replace(VideoLanguageConfig.tiny(), **change)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    weight.mul_(5)
        model.tokenizer = byte_text
        return model

    return make


@torch.no_grad()
def slow_answer(model, prompt, tokens):
    """Greedy decoding without a cache, one whole pass per token."""
    embeds, ids = prompt.embeds[None], []
    for _ in range(tokens):
        logits = model.language(inputs_embeds=embeds).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == 2:
            ids.pop()
            break
        embeds = torch.cat([embeds, model.language.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [1, 3])
def test_answers_equal_decoding_without_cache_or_sharing(build, picture, count):
    model = build()
    pictures = [picture(seed=s) for s in range(count)]
    want = [slow_answer(model, p, 6) for p in model.prompts(pictures, QUESTIONS)]
    assert model.answer(pictures, QUESTIONS, max_new_tokens=6) == want
    assert model.record.visual_before == 16 * count


def test_worked_examples_are_turns_of_the_conversation(build, picture):
    model, pictures = build(), [picture(seed=s) for s in range(3)]
    worked = [[("a", "1"), ("b", "2")], [("a", "1"), ("b", "2")], [("c", "no"), ("d", "yes")]]
    prompts = model.prompts(pictures, QUESTIONS, worked=worked)
    said = model.tokenizer.decode(prompts[2].ids[~prompts[2].visual])
    turns = [f"User: \n{asked}\nAssistant: {answer}</s>" for asked, answer in worked[2]]
    assert said == f"<s>{''.join(turns)}User: \n?\nAssistant:"
    want = [slow_answer(model, prompt, limit) for prompt, limit in zip(prompts, (6, 2, 6), strict=True)]
    assert model.answer(pictures, QUESTIONS, max_new_tokens=[6, 2, 6], worked=worked) == want
    small = build(language={**VideoLanguageConfig.tiny().language, "max_position_embeddings": 60})
    with pytest.raises(ValueError, match="the model was made for 60"):
        small.answer(pictures, QUESTIONS, worked=worked)


def test_saved_model_answers_the_same(build, picture, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = load_vlm(tmp_path, pruning=pruning_config("flowcut", Budget(tokens=16)))
    assert again.answer(picture(), QUESTIONS, max_new_tokens=4) == model.answer(picture(), QUESTIONS, max_new_tokens=4)


def test_an_encoder_without_attention_is_refused_when_it_is_opened(build, picture, tmp_path):
    convolutions = VisualEncoderConfig(source="timm", name="test_efficientnet", size=64)
    build(encoder=convolutions).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no attention to score"):
        load_vlm(tmp_path, pruning=pruning_config("flowcut", Budget(tokens=2)))
    model = load_vlm(tmp_path, pruning=pruning_config("fastv", Budget(tokens=2)))  # acts in the language model
    assert len(model.answer(picture(), QUESTIONS, max_new_tokens=2)) == len(QUESTIONS)


@pytest.mark.parametrize("merge", [1, 2])
def test_pruning_keeps_its_budget_and_all_is_all(build, picture, merge):
    config = dataclasses.replace(VideoLanguageConfig.tiny().encoder, merge=merge)
    model = build(encoder=config)
    (plain,) = model.prompts(picture(), QUESTIONS[:1])
    tokens = 16 // merge**2
    for method in ("flowcut", "visionzip", "random"):
        model.pruning = pruning_config(method, Budget(tokens=tokens))
        assert torch.equal(model.prompts(picture(), QUESTIONS[:1])[0].embeds, plain.embeds)
        model.pruning = pruning_config(method, Budget(tokens=3))
        (short,) = model.prompts(picture(), QUESTIONS[:1])
        assert int(short.visual.sum()) == 3 == model.record.visual_after and torch.isfinite(short.embeds).all()
        assert torch.equal(short.ids[~short.visual], plain.ids[~plain.visual])
    model.pruning = pruning_config("flowcut", Budget(tokens=3))
    assert len(model.answer([picture(), picture(seed=4)], QUESTIONS, max_new_tokens=2)) == 3
    assert [len(row) for row in model.record.kept] == [3, 3] and model.record.visual_after == 6


@pytest.mark.parametrize("name, tokens", [("tokenflow", "features"), ("tokenflow", "codes"), ("uniflow", "features"),
                                          ("uniflow", "latents"), ("flowtok", "latents")])  # fmt: skip
def test_headrace_tokenizers_see_for_it(build, picture, name, tokens):
    tokenizer = new_tokenizer(f"{name}:tiny")
    model = build(encoder=VisualEncoderConfig.of_tokenizer(tokenizer, family=name, tokens=tokens))
    first = model.prompts(picture(), QUESTIONS[:1])[0]
    other = model.prompts(picture(seed=9), QUESTIONS[:1])[0]
    assert int(first.visual.sum()) >= model.encoder.tokens_per_picture
    assert not torch.equal(first.embeds, other.embeds)
    assert len(model.answer(picture(), QUESTIONS[:2], max_new_tokens=2)) == 2
    if name == "tokenflow":
        model.pruning = pruning_config("flowcut", Budget(tokens=4))
        with pytest.raises(ValueError, match="not patches of one transformer"):
            model.answer(picture(), QUESTIONS[:1])


@pytest.mark.parametrize(("choice", "shape"), [("semantic", (16, 16)), ("all", (30, 24)), ("residual", (30, 24))])
def test_the_features_of_tokenflow_that_were_chosen_are_read(choice, shape):
    tokenizer = new_tokenizer("tokenflow:tiny")
    config = VisualEncoderConfig.of_tokenizer(tokenizer, family="tokenflow", tokens="features")
    encoder = VisualEncoder(dataclasses.replace(config, choice=choice))
    encoder.inner.load_state_dict(tokenizer.state_dict())
    assert (encoder.tokens_per_picture, encoder.width) == shape
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder(pixels), tokenizer.features(pixels, choice=choice))
    for wrong in (dataclasses.replace(config, tokens="codes"), VisualEncoderConfig(source="uniflow")):
        with pytest.raises(ValueError, match="choice of features is TokenFlow's"):
            dataclasses.replace(wrong, choice=choice)
    with pytest.raises(ValueError, match="'first'"):
        dataclasses.replace(config, choice="first")


def test_training_learns_what_a_picture_shows(build, picture):
    """Two pictures, one question, two answers: only the picture tells which."""
    model = build()
    pixels = model.encoder.preprocessing([picture(seed=1), picture(seed=2)])
    batch = pad_sequences([model.example("Which?", "left"), model.example("Which?", "right")])
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(batch, {"picture": model.picture_rows(pixels)}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    model.eval()
    assert [model.answer(picture(seed=s), ["Which?"], max_new_tokens=8)[0] for s in (1, 2)] == ["left", "right"]
    assert all(p.grad is None for p in model.encoder.parameters())


def test_a_trained_language_model_is_put_behind_an_encoder(byte_text, picture, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {k: v for k, v in VideoLanguageConfig.tiny().language.items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(tmp_path / "lm")
    byte_text.save_pretrained(tmp_path / "lm")
    encoder = VisualEncoder(VideoLanguageConfig.tiny().encoder)
    model = VideoLanguageModel.from_language_model(tmp_path / "lm", encoder, train_encoder=True)
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert all(torch.equal(a, b) for a, b in zip(model.language.parameters(), language.parameters(), strict=True))
    pixels = model.encoder.preprocessing([picture()])
    assert torch.equal(model.encoder(pixels), encoder(pixels))
    model(pad_sequences([model.example("?", "yes")]), {"picture": model.picture_rows(pixels)}).loss.backward()
    assert all(p.grad is not None for p in model.encoder.inner.blocks.parameters())
    model.save_pretrained(tmp_path / "vlm")
    again = VideoLanguageModel.from_pretrained(tmp_path / "vlm")
    assert again.config == model.config
    model.eval()
    assert again.answer(picture(), QUESTIONS, max_new_tokens=3) == model.answer(picture(), QUESTIONS, max_new_tokens=3)


@pytest.fixture(scope="module")
def robot(build):
    """A ViPRA-like arrangement: codes of a future frame, then latent actions."""
    vocabularies = (
        Vocabulary(name="visual", size=34, specials={"eof": 32, "eov": 33}),
        Vocabulary(name="latent", size=9, specials={"eola": 8}),
    )
    model = build(vocabularies=vocabularies)
    layout = SequenceLayout(
        vocabularies=model.vocabularies,
        parts=(
            Special(special="bos"),
            Field(name="instruction", modality="text", scored=False),
            Delimiter(text="<v>"),
            Field(name="frame", modality="visual", group=5, groups=1, group_end="eov"),
            Field(name="latents", modality="latent", group=2, groups=3, group_end="eola"),
        ),
        loss_weights={"visual": 0.5, "latent": 0.5},
    )
    return model, layout


def test_loss_is_the_weighted_mean_of_each_vocabulary(robot):
    model, layout = robot
    samples = [{"instruction": "go", "frame": torch.arange(5), "latents": torch.arange(6)},
               {"instruction": "go on", "frame": torch.arange(5) + 7, "latents": torch.arange(6) % 3}]  # fmt: skip
    sequences = [layout.build(s, encode_text=model.encode_text) for s in samples]
    with torch.no_grad():
        together = model(pad_sequences(sequences))
        alone = [model(pad_sequences([s])) for s in sequences]
    want = torch.stack([0.5 * (a.by_modality["visual"] + a.by_modality["latent"]) for a in alone]).mean()
    torch.testing.assert_close(together.loss, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together.loss, sum(a.loss for a in alone) / 2, rtol=1e-5, atol=1e-5)


def test_a_field_is_written_within_its_vocabulary(robot):
    model, layout = robot
    sample = {"instruction": "go"}
    prompt = layout.build(sample, encode_text=model.encode_text, until="frame")
    frame = model.continue_field(layout, "frame", prompt)
    assert len(frame) == 5 and int(frame.max()) < 32
    prompt = layout.build(sample | {"frame": frame}, encode_text=model.encode_text, until="latents")
    latents = model.continue_field(layout, "latents", prompt)
    assert len(latents) == 6 and int(latents.max()) < 8
    # the same choices from one pass over the finished sequence
    whole = layout.build(sample | {"frame": frame, "latents": latents}, encode_text=model.encode_text)
    with torch.no_grad():
        hidden = model(pad_sequences([whole])).hidden[0]
    start, end = whole.spans["latents"]
    logits = model.head(hidden[start - 1 : end - 1], "latent")[:, :8].argmax(-1)
    assert torch.equal(logits.view(3, 3)[:, :2].reshape(-1), latents)


def test_bad_requests_are_named(build, picture, robot):
    model, layout = robot
    with pytest.raises(ValueError, match="built in"):
        build(vocabularies=(Vocabulary(name="text", size=3),))
    with pytest.raises(ValueError, match="16 positions of 'picture' need as many rows, got none"):
        model(pad_sequences([model.example("?", "!")]))
    with pytest.raises(ValueError, match="needs `group`"):
        model.continue_field(layout, "instruction", layout.build({}, until="instruction"))
    blind = build()
    blind.tokenizer = None
    with pytest.raises(ValueError, match="no text tokenizer"):
        blind.answer(picture(), ["?"])
