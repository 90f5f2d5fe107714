"""Our latent action model and action decoder against the official code, on every vipra set of the golden folder."""

import pytest
import torch

from headrace.flow.loss import flow_matching_loss
from headrace.flow.path import straight_path
from headrace.flow.solver import integrate
from headrace.nn.quantizers.dead_codes import PAPER_JITTER, DeadCodeSchedule, replace_dead_codes
from headrace.nn.quantizers.noise_substitution import NoiseSubstitution, NoiseSubstitutionConfig
from headrace.nn.spatiotemporal import SpatiotemporalConfig
from headrace.robot.action_decoder import ActionDecoder, ActionDecoderConfig, time_in_paper_order
from headrace.robot.frame_features import FrameFeaturesConfig
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.latent_action_import import from_official, our_name
from headrace.robot.latent_action_loss import pixel_loss


def lam_config(size):
    shape = {"width": size["dim"], "heads": size["heads"], "head_width": size["dim_head"]}
    return LatentActionConfig(
        image_size=size["image_size"],
        frames=size["T"],
        features=FrameFeaturesConfig(kind="stem", name="", width=size["dim"], patch=size["patch_size"]),
        encoder=SpatiotemporalConfig(depth=size["enc_depth"], **shape),
        decoder=SpatiotemporalConfig(depth=size["dec_depth"], causal=True, conditioned=True, **shape),
        quantizer=NoiseSubstitutionConfig(codes=size["codebook_size"], width=size["quant_dim"]),
        tokens=size["code_seq_len"],
        differences=size["encode_deltas"],
    )


@pytest.fixture(scope="module")
def golden(golden_set):
    model = from_official(golden_set.part("state_dict/lam/"), lam_config(golden_set.config))
    return golden_set.config, golden_set.tensors, model


def close(got, wanted, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def test_encoder(golden):
    _, t, model = golden
    clip = t["lam/in/videos"]
    with torch.no_grad():
        close(model.encoder.features(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]), t["lam/out/stem_features"])
        close(model.encoder.blocks.position_bias(*model.config.grid), t["lam/out/enc_spatial_bias"])
        close(model.encoder.states(clip), t["lam/out/encoder"])
        close(model.encoder.states(clip, t["lam/in/mask"].bool()), t["lam/out/encoder_masked"])
        close(model.encoder(clip).flatten(0, 2), t["lam/out/prequant"])


def test_codes_condition_frames_and_rollout(golden):
    size, t, model = golden
    clip, mask = t["lam/in/videos"], t["lam/in/mask"].bool()
    with torch.no_grad():
        predicted = model(clip)
        actions = predicted.actions
        assert torch.equal(actions.codes, t["lam/out/codes"].flatten(2).long())
        assert torch.equal(actions.vectors, t["lam/out/quantized"].flatten(2, 3))
        assert torch.equal(model.vectors(actions.codes), actions.vectors)
        close(model.decoder.conditions(actions.vectors), t["lam/out/cond"])
        close(predicted.frames, t["lam/out/recon"])
        given = size["T"] - t["lam/out/rollout_ar"].shape[1]
        close(model.rollout(clip[:, :given], actions.vectors), t["lam/out/rollout_ar"])
        close(masked_l1(predicted.frames, clip, mask), t["lam/out/l1_masked"])


def masked_l1(frames, clip, mask):
    return pixel_loss(frames, clip[:, 1:], mask[:, 1:] & mask[:, :-1])


def test_noise_branch_and_gradients(golden):
    size, t, model = golden
    quantizer = NoiseSubstitution(NoiseSubstitutionConfig(codes=size["codebook_size"], width=size["quant_dim"]))
    quantizer.codebook.data.copy_(model.quantizer.codebook)
    rows = t["nsvq/in/x"].clone().requires_grad_()
    result = quantizer.train().substitute(rows, t["nsvq/in/noise"])
    close(result.rows, t["nsvq/out/x_hat"])
    assert torch.equal(quantizer.usage, t["nsvq/out/usage"].long())
    (result.rows * t["nsvq/in/loss_weight"]).sum().backward()
    close(rows.grad, t["nsvq/out/grad_x"], rtol=1e-4)
    close(quantizer.codebook.grad, t["nsvq/out/grad_codebook"], rtol=1e-4)


def test_dead_code_replacement(golden):
    size, t, _ = golden
    book = t["nsvq/replace/in/codebook"]
    quantizer = NoiseSubstitution(NoiseSubstitutionConfig(codes=book.shape[0], width=book.shape[1]))
    quantizer.codebook.data.copy_(book)
    quantizer.usage.copy_(t["nsvq/replace/in/usage"])
    schedule = DeadCodeSchedule(below=size["discarding_threshold"], jitter=PAPER_JITTER)
    done = replace_dead_codes(quantizer, schedule, order=t["nsvq/replace/in/perm"].long())
    assert torch.equal(done.dead, t["nsvq/replace/out/unused"].long())
    close(quantizer.codebook.data, t["nsvq/replace/out/codebook"], rtol=0, atol=1e-6)
    assert torch.equal(quantizer.usage, t["nsvq/replace/out/usage"].long())


def test_training_pass(golden):
    _, t, model = golden
    clip, mask = t["lam/in/videos"], t["lam/in/mask"].bool()
    model.zero_grad()
    rows = model.encoder(clip)
    before = model.quantizer.usage.clone()
    vectors = model.quantizer.substitute(rows.flatten(0, 2), t["lam_train/in/noise"]).rows.unflatten(0, rows.shape[:3])
    model.quantizer.usage.copy_(before)
    frames = model.decode(clip[:, :-1], vectors)
    close(frames, t["lam_train/out/recon"])
    loss = masked_l1(frames, clip, mask)
    close(loss, t["lam_train/out/loss_l1"])
    loss.backward()
    gradients = {k.removeprefix("lam_train/out/grad/"): v for k, v in t.items() if k.startswith("lam_train/out/grad/")}
    assert gradients
    ours = dict(model.named_parameters())
    for name, wanted in gradients.items():
        close(ours[our_name(name)].grad, wanted, rtol=1e-4, atol=1e-6)
    model.zero_grad()


@pytest.fixture(scope="module")
def head(golden):
    size, t, _ = golden
    flow = size["flow"]
    decoder = ActionDecoder(
        ActionDecoderConfig(width=flow["w"], action_dim=flow["da"], horizon=flow["H"], time_features="paper")
    )
    names = {"linear_1": "action_in", "linear_2": "mix", "linear_3": "out", "action_head": "velocity_out"}
    state = {
        f"{ours}.{part}": t[f"state_dict/flow/{theirs}.{part}"]
        for theirs, ours in names.items()
        for part in ("weight", "bias")
    }
    state["mix.weight"] = time_in_paper_order(state["mix.weight"])
    decoder.load_state_dict(state)
    return decoder.eval()


def test_flow_point_and_loss(golden, head):
    _, t, _ = golden
    times = 0.999 * (1 - t["flow/in/beta_sample"])
    close(times, t["flow/out/time"])
    point = straight_path(t["flow/in/noise"], t["flow/in/actions"], times, sigma_min=head.config.sigma_min)
    close(point.x_t, t["flow/out/noisy_actions"])
    close(point.target, t["flow/out/target"])
    with torch.no_grad():
        encoded = head.embed(point.x_t, times)
        close(encoded, t["flow/out/action_encoder"])
        velocity = head.velocity(encoded)
    close(velocity, t["flow/out/velocity"])
    close(flow_matching_loss(velocity, point.target, weight=t["flow/in/action_mask"][..., None]), t["flow/out/loss"])


def test_time_embedding(golden, head):
    _, t, _ = golden
    sines = t["flow/out/time_embedding"].shape[1] // 2
    ours = head.time(t["flow/out/time"])
    close(torch.cat((ours[:, sines:], ours[:, :sines]), 1), t["flow/out/time_embedding"])


@pytest.mark.parametrize("method", ["euler", "rk2"])
def test_samples(golden, head, method):
    size, t, _ = golden
    with torch.no_grad():
        sample = integrate(
            lambda x, s: head.velocity(head.embed(x, s)),
            t["flow/in/noise"],
            steps=size["flow"]["steps"],
            method="heun" if method == "rk2" else "euler",
        )
    close(sample, t[f"flow/out/sample_{method}"])


def test_oracle_ends_near_the_actions(golden, head):
    _, t, _ = golden
    noise, actions = t["flow/in/noise"], t["flow/in/actions"]
    slope = actions - (1 - head.config.sigma_min) * noise
    for steps in (1, 7):
        close(integrate(lambda x, s: slope, noise, steps=steps), t["flow/out/oracle_end"])
