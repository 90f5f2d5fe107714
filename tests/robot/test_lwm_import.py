"""Checkpoints in JAX layout: every leaf has a place, rotary pairs are reordered, the way back is exact."""

import msgpack
import pytest
import torch

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import NormalizerConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.frame_codes import FrameCodesConfig
from headrace.robot.lwm_import import (
    LANGUAGE,
    POLICY,
    PRETRAINING,
    halves_of_pairs,
    load_leaves,
    pairs_of_halves,
    read_stream,
    theirs,
)
from headrace.robot.vipra import VipraConfig, VipraPolicy
from headrace.robot.vipra_config import BackboneConfig, PretrainingRecord
from headrace.robot.vipra_pretraining import VipraPretraining, VipraPretrainingConfig
from headrace.tokenizers.auto import tokenizer_config
from headrace.tokenizers.lwm_vqgan import LwmVQGAN
from headrace.vlm.sequence import Vocabulary
from headrace.vlm.video_language_model import VideoLanguageConfig, VideoLanguageModel
from headrace.vlm.visual_encoder import VisualEncoderConfig

WIDTH, HEADS, LAYERS, MLP, TEXT, LATENT, ACTIONS = 16, 2, 3, 24, 40, 9, 7
VISION = 16 + 256
SPEC = ActionSpec(names=tuple("abcdefg"), frame="base_delta", rotation="none", gripper="none", rate=5.0)


def official_tree(seed=0):
    """Random leaves of the whole ViPRA-7B tree at a small size, under the official paths."""
    random = torch.Generator().manual_seed(seed)
    half = WIDTH // 2
    shapes = {
        "transformer/wte/embedding": (TEXT, WIDTH),
        "transformer/vte/embedding": (VISION, WIDTH),
        "transformer/late/embedding": (LATENT, WIDTH),
        "transformer/ln_f/kernel": (WIDTH,),
        "transformer/action_encoder/linear_1/kernel": (ACTIONS, half),
        "transformer/action_encoder/linear_1/bias": (half,),
        "transformer/action_encoder/linear_2/kernel": (WIDTH, WIDTH),
        "transformer/action_encoder/linear_2/bias": (WIDTH,),
        "transformer/action_encoder/linear_3/kernel": (WIDTH, WIDTH),
        "transformer/action_encoder/linear_3/bias": (WIDTH,),
        "lm_head/kernel": (WIDTH, TEXT),
        "vision_head/kernel": (WIDTH, VISION),
        "latent_actions_head/kernel": (WIDTH, LATENT),
        "action_head/kernel": (WIDTH, ACTIONS),
        "action_head/bias": (ACTIONS,),
    }
    for index in range(LAYERS):
        block = f"transformer/h/{index}"
        shapes |= {f"{block}/attention/{w}/kernel": (WIDTH, WIDTH) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"{block}/feed_forward/{w}/kernel": (WIDTH, MLP) for w in ("w1", "w3")}
        shapes |= {f"{block}/feed_forward/w2/kernel": (MLP, WIDTH)}
        shapes |= {f"{block}/{n}/kernel": (WIDTH,) for n in ("attention_norm", "ffn_norm")}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def stacked(tree, axis):
    """The same tree with the layers of a scan."""
    answer = {name: value for name, value in tree.items() if "/h/" not in name}
    for name in [name for name in tree if "/h/0/" in name]:
        rows = [tree[name.replace("/h/0/", f"/h/{index}/")] for index in range(LAYERS)]
        answer[name.replace("/h/0/", "/h/scan_decoder/")] = torch.stack(rows, axis)
    return answer


def policy():
    tokenizer = LwmVQGAN(tokenizer_config("lwm-vqgan:tiny"))
    encoder = VisualEncoderConfig.of_tokenizer(tokenizer, family="lwm-vqgan", tokens="codes")
    return VipraPolicy(
        VipraConfig(
            spec=SPEC.to_dict(),
            cameras=("c",),
            image=FrameCodesConfig(encoder=encoder, size=32, width=WIDTH),
            backbone=BackboneConfig(width=WIDTH, layers=LAYERS, heads=HEADS, mlp=MLP),
            decoder=ActionDecoderConfig(width=WIDTH, action_dim=ACTIONS, horizon=14, time_features="paper"),
            camera_size=32,
            text_vocabulary=TEXT,
            action_normalizer=NormalizerConfig.identity(ACTIONS),
        )
    )


def pretraining():
    record = PretrainingRecord(
        history=(-1, 0), rate=5.0, horizon=14, latent_steps=14, future=True, lam_hash="", tokenizer_hash=""
    )
    tokenizer = LwmVQGAN(tokenizer_config("lwm-vqgan:tiny"))
    encoder = VisualEncoderConfig.of_tokenizer(tokenizer, family="lwm-vqgan", tokens="codes")
    return VipraPretraining(
        VipraPretrainingConfig(
            cameras=("c",),
            image=FrameCodesConfig(encoder=encoder, size=32, width=WIDTH),
            backbone=BackboneConfig(width=WIDTH, layers=LAYERS, heads=HEADS, mlp=MLP),
            camera_size=32,
            text_vocabulary=TEXT,
            record=record,
            frame_tokens=64,
            frame_codes=16,
        )
    )


def language_model():
    language = {
        "model_type": "llama", "vocab_size": TEXT, "hidden_size": WIDTH, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    tokenizer = LwmVQGAN(tokenizer_config("lwm-vqgan:tiny"))
    encoder = VisualEncoderConfig.of_tokenizer(tokenizer, family="lwm-vqgan", tokens="codes")
    vocabularies = (Vocabulary(name="visual", size=VISION), Vocabulary(name="latent", size=LATENT))
    return VideoLanguageModel(VideoLanguageConfig(language=language, encoder=encoder, vocabularies=vocabularies))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("made", [(policy, POLICY), (pretraining, PRETRAINING), (language_model, LANGUAGE)])
def test_every_leaf_is_placed_and_comes_back(made, axis):
    make, names = made
    model, tree = make(), official_tree()
    leaves = tree if axis is None else stacked(tree, axis)
    load_leaves(model, leaves.items(), names, heads=HEADS, scan_axis=axis or 0)
    back = theirs(model, names, heads=HEADS)
    assert set(back) == set(tree) - set(names.unused)
    for name, value in back.items():
        assert torch.equal(value, tree[name]), name


def test_leaves_missing_surplus_and_of_another_shape_are_named():
    tree = official_tree()
    bias = tree.pop("action_head/bias")
    with pytest.raises(ValueError, match=r"1 missing: decoder.velocity_out.bias"):
        load_leaves(policy(), tree.items(), POLICY, heads=HEADS)
    with pytest.raises(ValueError, match=r"of another shape: decoder\.velocity_out\.bias"):
        load_leaves(policy(), {**tree, "action_head/bias": bias[:3]}.items(), POLICY, heads=HEADS)
    with pytest.raises(ValueError, match="wqkv"):
        load_leaves(policy(), {"transformer/h/0/attention/wqkv/kernel": bias}.items(), POLICY, heads=HEADS)


def rotate_pairs(rows, theta, heads):
    """Rotary embedding as LWM applies it: neighbouring numbers are the real and imaginary part. rows (L, D)."""
    length, size = rows.shape[0], rows.shape[1] // heads
    angle = torch.arange(length)[:, None] * theta ** -(torch.arange(0, size, 2) / size)
    turned = torch.view_as_complex(rows.reshape(length, heads, size // 2, 2)) * torch.polar(
        torch.ones_like(angle), angle
    ).unsqueeze(1)
    return torch.view_as_real(turned).flatten(2)


def test_attention_is_the_official_one_after_reordering():
    """One layer's attention logits by LWM's formula and by transformers' on the converted weights."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    tree, model, theta = official_tree(), policy(), 5e7
    load_leaves(model, tree.items(), POLICY, heads=HEADS)
    rows = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    q, k = (
        rotate_pairs(rows @ tree[f"transformer/h/1/attention/{w}/kernel"], theta, HEADS).transpose(0, 1)
        for w in ("wq", "wk")
    )
    attention = model.backbone.layers[1].self_attn
    cos, sin = model.backbone.rotary_emb(rows[None], torch.arange(5)[None])
    size = WIDTH // HEADS
    ours = [m(rows).view(1, 5, HEADS, size).transpose(1, 2) for m in (attention.q_proj, attention.k_proj)]
    ours = [part[0] for part in apply_rotary_pos_emb(*ours, cos, sin)]
    torch.testing.assert_close(ours[0] @ ours[1].mT, q @ k.mT, atol=1e-4, rtol=1e-4)


def test_reordering_comes_back():
    weight = torch.randn(12, 5)
    assert torch.equal(pairs_of_halves(halves_of_pairs(weight, 2), 2), weight)
    assert halves_of_pairs(torch.arange(4.0)[:, None], 1).flatten().tolist() == [0, 2, 1, 3]


def packed(value, chunk=None):
    """Flax's bytes of an array, cut into chunks where asked."""
    dtype = str(value.dtype).removeprefix("torch.")

    def one(part):
        raw = part.contiguous().view(torch.uint8).numpy().tobytes()
        return msgpack.ExtType(1, msgpack.packb((list(part.shape), dtype, raw)))

    if chunk is None:
        return msgpack.packb(one(value))
    parts = value.flatten().split(chunk)
    return msgpack.packb(
        {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): side for i, side in enumerate(value.shape)},
            "chunks": {str(i): one(part) for i, part in enumerate(parts)},
        }
    )


def test_streams_are_read_leaf_by_leaf(tmp_path):
    tree = {"a/b": torch.randn(3, 4), "c": torch.randn(5).to(torch.bfloat16), "d": torch.randn(7, 2)}
    path = tmp_path / "streaming_params"
    with path.open("wb") as file:
        for name, value in tree.items():
            chunk = 5 if name == "d" else None
            file.write(msgpack.packb((["params", *name.split("/")], packed(value, chunk))))
    read = dict(read_stream(path))
    assert set(read) == set(tree) and all(
        torch.equal(read[k], tree[k]) and read[k].dtype == tree[k].dtype for k in tree
    )
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="middle of record"):
        list(read_stream(path))
    path.write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="no stream"):
        list(read_stream(path))
