import numpy as np
import pytest
import torch

from headrace.vlm.auto import load_vlm
from headrace.vlm.huggingface import HuggingFaceVLM
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import read
from headrace.vlm.prompt import left_pad
from headrace.vlm.vqa_shots import require_worked

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl", "video_llava")
QUESTIONS = ["How many nodes?", "Is A linked to B", "What does the box say, if there is one?"]


def processed(processor, vlm, images, question, video=False):
    text = vlm._text(question, len(images), video=video)
    media = {"videos": [images]} if video else {"images": images}
    return processor(text=[text], **media, return_tensors="pt")


@torch.no_grad()
def check(model, processor, images, *, video=False):
    """Answers equal `generate`, and first logits equal the model's own forward pass, question by question."""
    vlm = HuggingFaceVLM(model, processor)
    prompts = vlm.prompts(images, QUESTIONS, video=video)
    firsts = []
    for question, prompt, answer in zip(
        QUESTIONS, prompts, vlm.answer(images, QUESTIONS, max_new_tokens=8, video=video), strict=True
    ):
        inputs = processed(processor, vlm, images, question, video)
        assert torch.equal(inputs["input_ids"][0], prompt.ids)
        batch = left_pad([prompt])
        firsts.append(read(model, batch, KVCache(), past=batch.mask[:, :0])[0])
        torch.testing.assert_close(firsts[-1], model(**inputs).logits[0, -1], rtol=1e-4, atol=1e-4)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(out, skip_special_tokens=True).strip() == answer
    assert not torch.allclose(firsts[0], firsts[1], atol=1e-2)
    return torch.stack(firsts)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(tiny_vlm, picture, family):
    """One pass of the encoder and one shared prefix give what a loop over `generate` gives."""
    model, processor = tiny_vlm(family)
    first = check(model, processor, [picture()])
    assert not torch.allclose(first, check(model, processor, [picture(seed=5)]), atol=1e-2)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_several_pictures(tiny_vlm, picture, family):
    check(*tiny_vlm(family), [picture(), picture(seed=3)])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "video_llava"])
def test_video(tiny_vlm, picture, family):
    model, processor = tiny_vlm(family)
    check(model, processor, [picture(seed=s) for s in range(8 if family == "video_llava" else 4)], video=True)


def test_the_encoder_runs_once_for_all_questions(tiny_vlm, picture):
    model, processor = tiny_vlm("llava")
    runs = []
    with model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1)):
        HuggingFaceVLM(model, processor).answer(picture(), QUESTIONS, max_new_tokens=2)
    assert len(runs) == 1


WORKED = [[("How many?", "3"), ("And here?", "12")], [("How many?", "3"), ("And here?", "12")], [("Right?", "no")] * 2]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_worked_examples_are_read_as_generate_reads_them(tiny_vlm, picture, family):
    """Questions with different examples behind the same pictures, and limits of their own."""
    model, processor = tiny_vlm(family)
    vlm, images = HuggingFaceVLM(model, processor), [picture(seed=s) for s in range(3)]
    require_worked(vlm, 2)
    prompts = vlm.prompts(images, QUESTIONS, worked=WORKED)
    answers = vlm.answer(images, QUESTIONS, max_new_tokens=[8, 3, 8], worked=WORKED)
    for question, worked, prompt, answer, limit in zip(QUESTIONS, WORKED, prompts, answers, (8, 3, 8), strict=True):
        text = vlm._text(question, 3, video=False, worked=worked)
        parts = [*(part for turn in worked for part in turn), question]
        assert [text.find(part) >= 0 for part in parts] == [True] * 5
        inputs = processor(text=[text], images=images, return_tensors="pt")
        assert torch.equal(inputs["input_ids"][0], prompt.ids)
        out = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(out, skip_special_tokens=True).strip() == answer


def test_worked_examples_that_do_not_fit_are_refused(tiny_vlm, picture, monkeypatch):
    model, processor = tiny_vlm("llava")
    vlm = HuggingFaceVLM(model, processor)
    with pytest.raises(ValueError, match="2 worked examples need 3 pictures"):
        vlm.answer([picture()] * 2, QUESTIONS, worked=WORKED)
    with pytest.raises(ValueError, match="as many lists of worked examples"):
        vlm.answer([picture()] * 3, QUESTIONS, worked=WORKED[:1])
    with pytest.raises(ValueError, match="as many max_new_tokens"):
        vlm.answer(picture(), QUESTIONS, max_new_tokens=[3])
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 100)
    with pytest.raises(ValueError, match="made for 100"):
        vlm.answer([picture()] * 3, QUESTIONS, worked=WORKED)
    monkeypatch.setattr(processor, "chat_template", "<image>{{ messages[-1].content[-1].text }}")
    with pytest.raises(ValueError, match="shows 1 of 3 pictures"):
        require_worked(vlm, 2)
    monkeypatch.setattr(processor, "chat_template", "{% if messages | length > 1 %}{{ messages | nothing }}{% endif %}")
    with pytest.raises(ValueError, match="takes no examples"):
        require_worked(vlm, 2)


def test_a_saved_model_is_found_by_its_folder(tiny_vlm, picture, tmp_path):
    model, processor = tiny_vlm("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    want = HuggingFaceVLM(model, processor).answer(picture(), QUESTIONS, max_new_tokens=4)
    assert again.answer(np.asarray(picture()), QUESTIONS, max_new_tokens=4) == want


def test_bad_input_is_named(tiny_vlm, picture, tmp_path, monkeypatch):
    vlm = HuggingFaceVLM(*tiny_vlm("llava"))
    with pytest.raises(FileNotFoundError, match="no picture at"):
        vlm.answer(tmp_path / "nothing.png", ["?"])
    with pytest.raises(ValueError, match="at least one question"):
        vlm.answer(picture(), [])
    with pytest.raises(ValueError, match="at least one picture"):
        vlm.answer([], ["?"])
    with pytest.raises(ValueError, match="uint8"):
        vlm.answer(np.zeros((4, 4, 3)), ["?"])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not a picture"):
        vlm.answer(tmp_path / "text.png", ["?"])
    picture().save(tmp_path / "torn.png")
    whole = (tmp_path / "torn.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:60] + bytes(9) + whole[69:])
    for lenient in (False, True):  # as other libraries leave Pillow
        monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises((ValueError, OSError)):  # a run records these and goes on
            vlm.answer(tmp_path / "torn.png", ["?"])
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    picture().save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="decompression bomb"):
        vlm.answer(tmp_path / "large.png", ["?"])
