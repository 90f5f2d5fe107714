"""Our FlowTok against the official modules, on every flowtok set of the golden folder."""

import pytest
import torch

from headrace.nn.time_embedding import sinusoid_features
from headrace.tokenizers.flowtok_bridge import swap_flagged, transport
from headrace.tokenizers.flowtok_captions import CaptionConfig
from headrace.tokenizers.flowtok_image import Posterior
from headrace.tokenizers.flowtok_import import flow_name, from_official, official_state
from headrace.tokenizers.flowtok_loss import flow_terms


@pytest.fixture(scope="module")
def golden(golden_set):
    size = golden_set.config
    image, flow = golden_set.part("state_dict/tokenizer/"), golden_set.part("state_dict/flow/")
    captions = CaptionConfig(
        words=("word",), context=size["K"], width=size["clip"], depth=1, heads=size["ph"], hidden=size["ff"]
    )
    model = from_official(image, flow, captions, heads=size["h"], projector_heads=size["ph"])
    return size, golden_set.tensors, model, (image, flow)


def close(got, wanted, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def tokens(official):
    """[B, D, 1, K] to [B, K, D]."""
    return official.squeeze(2).transpose(1, 2)


def test_sizes_read_from_the_shapes(golden):
    size, _, model, _ = golden
    image, net = model.config.image, model.config.net
    assert (image.image_size, image.patch, image.tokens, image.channels) == (
        size["img"], size["patch"], size["K"], size["D"],
    )  # fmt: skip
    assert (image.encoder.width, image.encoder.heads, image.encoder.depth) == (size["ew"], size["eh"], size["el"])
    assert (image.decoder.width, image.decoder.heads, image.decoder.depth) == (size["dw"], size["dh"], size["dl"])
    assert (net.width, net.depth, net.mlp_ratio) == (size["w"], size["depth"], size["mlp_ratio"])


@torch.no_grad()
def test_image_encoder(golden):
    _, tensors, model, _ = golden
    close(model.image.encoder(tensors["in/image"]), tokens(tensors["out/tok/encoder_raw"]))
    posterior = model.image.encode(tensors["in/image"])
    close(posterior.mean, tokens(tensors["out/tok/mean"]))
    close(posterior.logvar, tokens(tensors["out/tok/logvar"]))
    close(posterior.sample(tokens(tensors["in/tok/noise"])), tokens(tensors["out/tok/z"]))
    each = [Posterior(*(part[:, k : k + 1] for part in posterior)).kl() for k in range(posterior.mean.shape[1])]
    close(torch.stack(each, dim=1), tensors["out/tok/kl"])
    close(posterior.kl(), tensors["out/tok/kl"].sum(-1))


@torch.no_grad()
def test_image_decoder(golden):
    _, tensors, model, _ = golden
    text = tensors["in/text_tokens"]
    close(model.image.decode(tokens(tensors["in/tok/z_dec"]), text), tensors["out/tok/decoded"])
    close(model.image.decode(tokens(tensors["out/tok/mean"]), text), tensors["out/tok/decoded_of_mean"])


@torch.no_grad()
def test_text_projector_and_alignment(golden):
    _, tensors, model, _ = golden
    text, bridge = tensors["in/text_tokens"], model.to_image
    close(bridge.projector.raw(text), tensors["out/proj/raw"])
    posterior = bridge.projector(text)
    close(posterior.mean, tensors["out/proj/mu"])
    close(posterior.logvar, tensors["out/proj/logvar"])
    close(posterior.sample(tensors["in/proj/noise"]), tensors["out/proj/z"])
    close(bridge.align(text), tensors["out/align/target"])
    close(bridge.align.log_temperature, tensors["out/align/log_temperature"])


@torch.no_grad()
@pytest.mark.parametrize("row", ["cond", "null", "mixed"])
def test_velocity(golden, row):
    _, tensors, model, _ = golden
    t, mixed = tensors["in/t"], tensors["in/indicator"]
    label = {"cond": torch.zeros_like(mixed), "null": torch.ones_like(mixed), "mixed": mixed}[row]
    close(model.to_image.velocity(tensors["in/x"], t, label), tensors[f"out/velocity_{row}"])
    close(sinusoid_features(t, tensors["out/t_embedding"].shape[1]), tensors["out/t_embedding"])


@pytest.mark.parametrize("case", ["flagged", "unflagged"])
def test_loss_and_gradients(golden, case):
    size, tensors, model, _ = golden
    target, flags = tensors["in/loss/x1"], tensors[f"in/loss_{case}/indicator"]
    before = target.clone()
    out = f"out/loss_{case}/"
    terms = flow_terms(
        model.to_image,
        tensors["in/text_tokens"],
        target,
        model.config,
        t=tensors["in/loss/t"],
        noise=tensors[f"in/loss_{case}/noise"],
        flags=flags,
    )
    close(swap_flagged(target, flags), tensors[out + "x1_after"])
    assert torch.equal(target, before)
    close(terms.flow, tensors[out + "flow"])
    close(terms.contrastive, tensors[out + "contrastive"])
    close(terms.kl * model.config.kl_weight, tensors[out + "kld"])
    assert model.config.kl_weight == size["kld_weight"] and model.config.align_weight == size["contrastive_weight"]
    shared = model.config.align_weight * terms.contrastive + model.config.kl_weight * terms.kl
    close(terms.flow + shared, tensors[out + "total"])
    close(terms.total, tensors[out + "total_mean"])
    model.to_image.zero_grad()
    terms.total.backward()
    parameters = dict(model.to_image.named_parameters())
    names = [k.removeprefix(out + "grad/") for k in tensors if k.startswith(out + "grad/")]
    assert names
    for name in names:
        close(parameters[flow_name(name)].grad, tensors[f"{out}grad/{name}"], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["step_in_dsigma", "step_in_dt"])
def test_guided_sample(golden, kind):
    size, tensors, model, _ = golden
    got = transport(
        model.to_image.velocity,
        tensors["out/proj/z"],
        steps=size["steps"],
        guidance=size["scale"],
        legacy_grid=model.config.legacy_grid,
    )
    close(got, tensors[f"out/sample/{kind}"])


@torch.no_grad()
def test_sampled_image(golden):
    size, tensors, model, _ = golden
    assert model.scale.item() == pytest.approx(size["scale_factor"])
    got = model.image.decode(tensors["out/sample/step_in_dsigma"] / model.scale, tensors["in/text_tokens"])
    close(got, tensors["out/sample/image"])


def test_export_gives_back_the_official_tensors(golden):
    _, _, model, official = golden
    for ours, theirs in zip(official_state(model), official, strict=True):
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
