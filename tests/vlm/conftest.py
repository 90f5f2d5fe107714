"""Tiny random vision-language models of every family, with real processors over a byte tokenizer."""

import numpy as np
import pytest
import torch

SPECIALS = [
    "<pad>", "<s>", "</s>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
    "<fake_token_around_image>", "<global-img>", "<img>", "</img>", "<IMG_CONTEXT>", "<end_of_utterance>",
    *[f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)],
]  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "vocab_size": 300, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 8}


def byte_tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>", "video_token": "<video>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    )  # fmt: skip


def token_id(name):
    return SPECIALS.index(name)


def clip_vision(size):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**VISION, image_size=size)


def text_config(name="llama", **more):
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **(TEXT | more))


def build_llava():
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config = LlavaConfig(
        vision_config=clip_vision(48), text_config=text_config(), image_token_index=token_id("<image>"),
        image_seq_length=36,
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False)
    processor = LlavaProcessor(
        pixels, byte_tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def build_llava_next():
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    grids = [[48, 96], [96, 48], [96, 96]]
    config = LlavaNextConfig(
        vision_config=clip_vision(48), text_config=text_config(), image_token_index=token_id("<image>"),
        image_grid_pinpoints=grids, image_seq_length=36,
    )  # fmt: skip
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(
        pixels, byte_tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaNextForConditionalGeneration(config), processor


QWEN_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} A:"
)


def build_qwen(name):
    import transformers as tf

    ids = {
        "image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"), "vision_end_token_id": token_id("<|vision_end|>"),
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope}
    if name == "qwen2_vl":
        vision = {"depth": 6, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        config = tf.Qwen2VLConfig(text_config=text, vision_config={**vision, "spatial_merge_size": 2}, **ids)
        model = tf.Qwen2VLForConditionalGeneration(config)
        kind = tf.Qwen2VLProcessor
    else:
        vision = {
            "depth": 6, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [2, 5],
        }  # fmt: skip
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "spatial_merge_size": 2}, **ids)
        model = tf.Qwen2_5_VLForConditionalGeneration(config)
        kind = tf.Qwen2_5_VLProcessor
    tokenizer = byte_tokenizer()
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    tokenizer.image_token_id, tokenizer.video_token_id = ids["image_token_id"], ids["video_token_id"]
    limits = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    pixels = tf.Qwen2VLImageProcessor(patch_size=8, size=limits)
    clips = tf.Qwen2VLVideoProcessor(patch_size=8, size=limits)
    return model, kind(pixels, tokenizer, clips, chat_template=QWEN_TEMPLATE)


def build_smolvlm():
    import transformers as tf

    config = tf.SmolVLMConfig(
        vision_config={**VISION, "image_size": 64}, text_config=text_config(), scale_factor=2,
        image_token_id=token_id("<image>"), pad_token_id=0,
    )  # fmt: skip
    pixels = tf.SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    clips = tf.SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 64})
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %} A:"
    )
    processor = tf.SmolVLMProcessor(pixels, byte_tokenizer(), clips, image_seq_len=16, chat_template=template)
    return tf.SmolVLMForConditionalGeneration(config), processor


def build_internvl():
    import transformers as tf

    vision = {**VISION, "image_size": [64, 64], "patch_size": [8, 8]}
    config = tf.InternVLConfig(
        vision_config=vision, text_config=text_config("qwen2"), image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=16, downsample_ratio=0.5,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    pixels = tf.GotOcr2ImageProcessor(size={"height": 64, "width": 64}, crop_to_patches=False)
    clips = tf.InternVLVideoProcessor(size={"height": 64, "width": 64})
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %} A:"
    )
    processor = tf.InternVLProcessor(pixels, tokenizer, clips, image_seq_length=16, chat_template=template)
    return tf.InternVLForConditionalGeneration(config), processor


def build_video_llava():
    import transformers as tf

    config = tf.VideoLlavaConfig(
        vision_config=clip_vision(48), text_config=text_config(), image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"), image_seq_length=36, video_seq_length=288,
    )  # fmt: skip
    pixels = tf.VideoLlavaImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    clips = tf.VideoLlavaVideoProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    processor = tf.VideoLlavaProcessor(
        pixels, clips, byte_tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return tf.VideoLlavaForConditionalGeneration(config), processor


FAMILIES = {
    "llava": build_llava,
    "llava_next": build_llava_next,
    "qwen2_vl": lambda: build_qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: build_qwen("qwen2_5_vl"),
    "smolvlm": build_smolvlm,
    "internvl": build_internvl,
    "video_llava": build_video_llava,
}


def sharpen(model, factor=4.0):
    """Random weights attend and answer almost uniformly; larger ones make choices differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "norm" not in name:
                weight.mul_(factor)


@pytest.fixture(scope="session")
def byte_text():
    """A tokenizer over bytes with `<s>` 1 and `</s>` 2."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_vlm():
    """Family name to (model, processor), built once."""
    built = {}

    def get(family):
        if family not in built:
            torch.manual_seed(0)
            model, processor = FAMILIES[family]()
            sharpen(model)
            built[family] = (model.eval(), processor)
        return built[family]

    return get


@pytest.fixture
def picture():
    """A picture with structure, seeded: `picture(seed, height, width)`."""
    from PIL import Image

    def make(seed=0, height=60, width=80):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[10:30, 20:50] = (200, 30, 30)
        return Image.fromarray(pixels)

    return make
