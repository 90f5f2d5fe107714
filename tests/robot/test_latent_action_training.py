"""The objective for `fit`: codes that start where the rows are, terms that all reach the decoder, exact resume."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from headrace.nn.optical_flow import LucasKanade
from headrace.nn.quantizers.dead_codes import DeadCodeSchedule
from headrace.nn.quantizers.start_codes import start_codes
from headrace.robot import latent_action_training
from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.latent_action_loss import LatentActionLoss, LatentActionLossConfig, LossSchedule
from headrace.robot.latent_action_training import LatentActionObjective, StepBatch, StepBatches
from headrace.training.loop import fit


class Clips:
    """Random clips, a function of the step alone."""

    def at(self, step):
        frames = torch.randint(0, 256, (2, 4, 3, 32, 32), generator=torch.Generator().manual_seed(step))
        return StepBatch(frames.to(torch.uint8), torch.ones(2, 4, dtype=torch.bool), torch.tensor(-1))

    def shard(self, rank, world):
        return self


def new_model():
    torch.manual_seed(0)
    return LatentActionModel(LatentActionConfig.tiny(image_size=32, patch=16))


def objective_of(model, *, flow=0.1, unquantized=2):
    optimizer = torch.optim.AdamW(model.optimizer_groups(1e-3))
    weights = LatentActionLossConfig(perceptual=0.0, flow=LossSchedule(start=1, ramp=0, weight=flow))
    loss = LatentActionLoss(weights, estimate=LucasKanade(levels=2, steps=1) if flow else None)
    schedule = DeadCodeSchedule(phases=((1, 10, 1),))
    return LatentActionObjective(loss, schedule, optimizer, unquantized=unquantized), optimizer


def run(out, steps, *, resume=False):
    model = new_model()
    objective, optimizer = objective_of(model)
    fitted = fit(model, objective, optimizer, StepBatches(Clips()), steps=steps, out=out, resume=resume, progress=False)
    return fitted.losses, model


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_across_the_start_of_the_codes(tmp_path):
    whole, model = run(tmp_path / "a", 4)
    first, _ = run(tmp_path / "b", 2)
    rest, resumed = run(tmp_path / "b", 4, resume=True)
    assert whole == first + rest
    torch.testing.assert_close(resumed.quantizer.codebook, model.quantizer.codebook, rtol=0, atol=0)


def test_codes_are_placed_among_the_rows_when_they_take_over():
    model = new_model()
    objective, _ = objective_of(model)
    batch = StepBatches(Clips()).at(2)

    def gap():
        rows = model.encoder(batch.frames.float() / 255).flatten(0, 2)
        return float(torch.cdist(rows, model.quantizer.codebook).min(1).values.mean())

    before = gap()
    codes = model.quantizer.codebook.detach().clone()
    objective(model, batch._replace(step=torch.tensor(1)), torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.quantizer.codebook.detach(), codes)
    objective(model, batch, torch.Generator().manual_seed(0))
    assert gap() < 0.5 * before


def test_before_codes_take_over_the_decoder_is_given_the_rows():
    """Its gradient reaches the encoder without noise, so two passes agree; afterwards noise tells them apart."""
    model = new_model()
    objective, _ = objective_of(model, flow=0.0)

    def total(step, seed):
        batch = StepBatches(Clips()).at(step)
        return objective(model, batch, torch.Generator().manual_seed(seed))["total"]

    torch.manual_seed(0)
    model.eval()  # no dropout
    assert total(0, 1) == total(0, 2)
    model.quantizer.train()
    assert total(3, 1) != total(3, 2)


def test_the_log_has_the_flow_column_before_the_term_starts():
    model = new_model()
    objective, _ = objective_of(model)
    terms = [objective(model, StepBatches(Clips()).at(k), torch.Generator().manual_seed(0)) for k in (0, 1)]
    assert terms[0].keys() == terms[1].keys() and terms[0]["flow"] == 0 < terms[1]["flow"]


def test_features_that_are_predicted_must_not_be_learned():
    torch.manual_seed(0)
    config = replace(LatentActionConfig.tiny(image_size=32, patch=16), target="features")
    batch = StepBatches(Clips()).at(0)
    objective, _ = objective_of(LatentActionModel(config), flow=0.0, unquantized=0)
    with pytest.raises(ValueError, match="must not learn them"):
        objective(LatentActionModel(config), batch, torch.Generator().manual_seed(0))
    model = LatentActionModel(replace(config, features=replace(config.features, frozen=True))).train()
    objective(model, batch, torch.Generator().manual_seed(0))["total"].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned and not [name for name in learned if name.startswith("encoder.features.")]
    assert not model.encoder.features.net.training and model.encoder.blocks.training
    assert all(parameter.requires_grad for group in model.optimizer_groups(1e-3) for parameter in group["params"])


def test_use_of_the_codes_is_logged_and_a_collapse_is_told_once(monkeypatch):
    monkeypatch.setattr(latent_action_training, "POOR_BATCHES", 2)
    model = new_model()
    objective, _ = objective_of(model, flow=0.0, unquantized=1)
    terms = [objective(model, StepBatches(Clips()).at(k), torch.Generator().manual_seed(0)) for k in (0, 1)]
    assert terms[0]["used"] == 0 == terms[0]["perplexity"] and 0.25 <= terms[1]["used"] <= 1 < terms[1]["perplexity"]
    objective = LatentActionObjective(objective.loss, None, objective.optimizer)
    model.quantizer.codebook.data[1:] = 1e3
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for k in range(4):
            terms = objective(model, StepBatches(Clips()).at(k), torch.Generator().manual_seed(0))
    assert [str(w.message) for w in told if "2 batches in a row used 1 of 8 codes" in str(w.message)] and len(told) == 1
    assert terms["used"] == 1 / 8 and terms["perplexity"] == 1


def test_all_processes_start_from_the_first_one_s_codes(monkeypatch):
    first, sent = torch.full((8, 16), 7.0), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: (sent.append(src), tensor.copy_(first)))
    quantizer = new_model().quantizer
    start_codes(quantizer, torch.randn(20, 16))
    assert sent == [0] and torch.equal(quantizer.codebook.data, first)
