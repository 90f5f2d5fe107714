import dataclasses
import json

import pytest
import torch

from headrace.nn.pretrained import config_from_dict
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig, FlowCutTrace, step
from headrace.vlm.pruning.scores import Evidence, fused_score, normalised


def random_evidence(rows, tokens, sharpness=3.0):
    attention = normalised((torch.randn(rows, tokens) * sharpness).exp())
    return Evidence(attention, normalised(torch.rand(rows, tokens)), torch.rand(rows, tokens) + 0.5)


def run(config, batch=2, tokens=50, layers=12):
    torch.manual_seed(0)
    trace = FlowCutTrace.start(batch, tokens)
    for layer in range(layers):
        found = random_evidence(batch, trace.kept.shape[1])
        target = config.encoder_budget(tokens)
        step(
            trace, found.attention, fused_score(found), layer=layer, last_layer=layers - 3, target=target, config=config
        )
    return trace


@pytest.mark.parametrize("rule", ["per_image", "max"])
@pytest.mark.parametrize("schedule", ["entropy", "uniform", "last"])
@pytest.mark.parametrize("tokens", [1, 2, 20, 49])
def test_every_schedule_ends_exactly_at_the_budget(schedule, tokens, rule):
    trace = run(FlowCutConfig(budget=Budget(tokens=tokens), schedule=schedule, batch_rule=rule))
    assert trace.kept.shape == (2, tokens) and trace.valid is None
    assert bool((trace.kept[:, 1:] > trace.kept[:, :-1]).all()) and int(trace.kept.max()) < 50
    if schedule == "last":
        assert list(trace.counts) == [9]


def test_a_budget_of_everything_scores_and_cuts_nothing():
    trace = run(FlowCutConfig(budget=Budget(share=1.0)))
    assert trace.kept.shape == (2, 50) and not trace.counts and not trace.entropy


def test_the_batch_rule_decides_whether_company_matters():
    torch.manual_seed(0)
    flat = Evidence(*[torch.full((1, 40), 1 / 40)] * 2, torch.rand(1, 40))
    peaked = random_evidence(1, 40, sharpness=6.0)
    both = Evidence(*[torch.cat(pair) for pair in zip(flat, peaked, strict=True)])
    for rule, same in (("per_image", True), ("max", False)):
        config = FlowCutConfig(budget=Budget(tokens=5), batch_rule=rule)
        alone, together = FlowCutTrace.start(1, 40), FlowCutTrace.start(2, 40)
        for trace, found in ((alone, flat), (together, both)):
            step(trace, found.attention, fused_score(found), layer=1, last_layer=9, target=5, config=config)
        assert (int(together.present()[0]) == int(alone.present()[0])) is same


def test_decoder_cut_lets_the_encoder_keep_more():
    config = FlowCutConfig(budget=Budget(tokens=10), decoder=True)
    assert config.encoder_budget(100) == 20 and config.encoder_budget(15) == 15
    assert config.encoder_budget(100, crops=True) == 5
    fixed = FlowCutConfig(budget=Budget(tokens=10), decoder=True, encoder_factor=3.0)
    assert fixed.encoder_budget(100) == fixed.encoder_budget(100, crops=True) == 30
    shared = FlowCutConfig(budget=Budget(share=0.1), decoder=True)  # a share of all crops is a share of each
    assert shared.encoder_budget(100, crops=True) == 20


def test_config_survives_json():
    config = FlowCutConfig(budget=Budget(share=0.25), criteria=("attention", "density"))
    assert config_from_dict(FlowCutConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "change, message",
    [({"every": 0}, "every"), ({"history": 1.0}, "history"), ({"criteria": ("cosine",)}, "criteria"),
     ({"schedule": "linear"}, "schedule"), ({"batch_rule": "min"}, "batch_rule"), ({"relay": "sum"}, "relay"),
     ({"relay_softmax": "all"}, "relay_softmax"), ({"semantic_scale": "d"}, "semantic_scale"),
     ({"encoder_factor": 0.0}, "encoder_factor")],
)  # fmt: skip
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        FlowCutConfig(**({"budget": Budget(tokens=4)} | change))


def test_budgets():
    assert Budget(share=1 / 9).of(576) == 64 and Budget(tokens=7).of(7) == 7
    with pytest.warns(UserWarning, match="above the 7"):
        assert Budget(tokens=8).of(7) == 7
    for wrong in ({}, {"tokens": 3, "share": 0.5}, {"tokens": 0}, {"share": 0.0}, {"share": 1.1}):
        with pytest.raises(ValueError):
            Budget(**wrong)
