import numpy as np
import pytest
import torch

from headrace.vlm.auto import load_vlm
from headrace.vlm.huggingface import HuggingFaceVLM
from headrace.vlm.kv_cache import KVCache
from headrace.vlm.prefill import read
from headrace.vlm.prompt import left_pad

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


def test_a_saved_model_is_found_by_its_folder(tiny_vlm, picture, tmp_path):
    model, processor = tiny_vlm("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    want = HuggingFaceVLM(model, processor).answer(picture(), QUESTIONS, max_new_tokens=4)
    assert again.answer(np.asarray(picture()), QUESTIONS, max_new_tokens=4) == want


def test_bad_input_is_named(tiny_vlm, picture, tmp_path):
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
