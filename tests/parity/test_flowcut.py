"""FlowCut against the official code's stored runs; every size comes from the set's JSON."""

import pytest
import torch

from headrace.vlm.pruning.auto import prune
from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig, FlowCutTrace, step
from headrace.vlm.pruning.scores import Evidence, cut_size, entropy_ratio, fused_score, normalised, token_density


@pytest.fixture(scope="module")
def golden(golden_set):
    return golden_set.config, golden_set.tensors


def groups(tensors, prefix):
    """Names between `prefix` and the next slash, such as the budgets."""
    return sorted({key[len(prefix) :].split("/")[0] for key in tensors if key.startswith(prefix)})


def test_unit_scores_and_cut_sizes(golden):
    _, tensors = golden
    for case in groups(tensors, "unit/"):
        given = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"unit/{case}/in/")}
        p = normalised(given["cls_attention"])
        found = Evidence(p, normalised(given["semantic"]), token_density(given["value"][:, None]))
        torch.testing.assert_close(fused_score(found), tensors[f"unit/{case}/out/score"], rtol=1e-5, atol=1e-5)
        count = torch.full(p.shape[:1], p.shape[1])
        drop = cut_size(count, int(given["target_num"]), int(given["rpl"]), entropy_ratio(p)).max()
        assert int(drop) == int(tensors[f"unit/{case}/out/prune_num"]), case


def injected_evidence(tensors, layer, images, kept):
    """Rows of the original tokens gathered to those that are left, with CLS at 0, then normalised."""
    columns = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
    attention = tensors["inj/in/cls_attention"][layer, images].mean(1)
    semantic = tensors["inj/in/semantic"][layer, images]
    value = tensors["inj/in/value"][layer, images]
    row, similar = (t.gather(1, columns)[:, 1:] for t in (attention, semantic))
    width = value.shape[-1]
    mean_value = value.gather(1, columns[..., None].expand(-1, -1, width))[:, 1:]
    return Evidence(normalised(row), normalised(similar), token_density(mean_value[:, None]))


def runs(tensors, prefix):
    """Budgets of the set with what ran under each: `batch`, or one picture alone, such as `img0`."""
    budgets = [name for name in groups(tensors, prefix) if name.startswith("T")]
    found = [(int(budget[1:]), which) for budget in budgets for which in groups(tensors, f"{prefix}{budget}/")]
    assert found
    return found


def rows_of(which):
    return slice(None) if which == "batch" else slice(int(which[3:]), int(which[3:]) + 1)


def test_injected_schedule(golden):
    config, tensors = golden
    layers, total = config["L"], tensors["inj/in/semantic"].shape[-1]
    for budget, which in runs(tensors, "inj/out/"):
        images = rows_of(which)
        place = f"inj/out/T{budget}/{which}"
        trace = FlowCutTrace.start(tensors["inj/in/semantic"][0, images].shape[0], total - 1)
        rule = FlowCutConfig(budget=Budget(tokens=budget), history=config["beta"], batch_rule="max")
        for layer in range(layers):
            before = trace.kept
            found = injected_evidence(tensors, layer, images, before)
            step(
                trace,
                found.attention,
                fused_score(found),
                layer=layer,
                last_layer=layers - 3,
                target=budget,
                config=rule,
            )
            assert before.shape[1] == int(tensors[f"{place}/n_before"][layer])
            assert trace.kept.shape[1] == int(tensors[f"{place}/n_after"][layer])
            if (key := f"{place}/kept/{layer:02d}") in tensors:
                assert torch.equal(trace.kept, tensors[key]), key
            if (key := f"{place}/score/{layer:02d}") in tensors:
                torch.testing.assert_close(fused_score(found), tensors[key], rtol=1e-5, atol=1e-5)
            if (key := f"{place}/entropy_ratio/{layer:02d}") in tensors:
                ratio = entropy_ratio(found.attention)
                torch.testing.assert_close(ratio, tensors[key], rtol=1e-5, atol=1e-5)
            if (key := f"{place}/cum/{layer:02d}") in tensors and trace.kept is before:
                torch.testing.assert_close(trace.cumulative, tensors[key], rtol=1e-5, atol=1e-5)
        assert torch.equal(trace.kept, tensors[f"{place}/kept_final"])


def test_per_image_rule_keeps_what_each_image_keeps_alone(golden):
    """Unlike the official batch rule, whose cut is the largest in the batch."""
    config, tensors = golden
    layers, total = config["L"], tensors["inj/in/semantic"].shape[-1]
    alone = [run for run in runs(tensors, "inj/out/") if run[1] != "batch"]
    for budget in sorted({budget for budget, _ in alone}):
        trace = FlowCutTrace.start(len(tensors["inj/in/semantic"][0]), total - 1)
        rule = FlowCutConfig(budget=Budget(tokens=budget), history=config["beta"])
        for layer in range(layers):
            found = injected_evidence(tensors, layer, slice(None), trace.kept)
            if trace.valid is not None:  # padding carries no weight
                real = [torch.where(trace.valid, row, 0) for row in found[:2]]
                found = Evidence(normalised(real[0]), normalised(real[1]), found.density)
            step(
                trace,
                found.attention,
                fused_score(found),
                layer=layer,
                last_layer=layers - 3,
                target=budget,
                config=rule,
            )
        for which in (which for own, which in alone if own == budget):
            assert torch.equal(trace.kept[rows_of(which)], tensors[f"inj/out/T{budget}/{which}/kept_final"])


@pytest.fixture(scope="module")
def tower(golden):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config, tensors = golden
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config["w"], intermediate_size=config["ff"], num_hidden_layers=config["L"],
            num_attention_heads=config["h"], image_size=config["img"], patch_size=config["patch"],
        )
    )  # fmt: skip
    state = {k.removeprefix("state_dict/clip/"): v for k, v in tensors.items() if k.startswith("state_dict/clip/")}
    own = set(model.state_dict())
    state = {k if k in own else k.removeprefix("vision_model."): v for k, v in state.items()}
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith("position_ids")})
    return model.eval()


@torch.no_grad()
def run_tower(tower, pixels, config, budget, rule):
    layer = config["select_layer"] - config["L"]  # as an index into the hidden states
    settings = FlowCutConfig(budget=Budget(tokens=budget), history=config["beta"], batch_rule=rule)
    with prune(tower, settings, feature_layer=layer) as cut:
        states = tower(pixels, output_hidden_states=True).hidden_states
    return states, states[layer][:, 1:], cut.report


def test_clip_keeps_the_official_tokens(golden, tower):
    config, tensors = golden
    for budget, which in runs(tensors, "clip/out/"):
        place = f"clip/out/T{budget}/{which}"
        pixels = tensors["clip/in/pixel_values"][rows_of(which)]
        states, feature, report = run_tower(tower, pixels, config, budget, "max")
        assert torch.equal(torch.tensor(report.kept), tensors[f"{place}/kept_final"])
        torch.testing.assert_close(feature, tensors[f"{place}/feature"], rtol=1e-4, atol=1e-4)
        if (key := f"{place}/tokens_per_state") in tensors:
            assert [s.shape[1] - 1 for s in states] == tensors[key].tolist()
        if (key := f"{place}/entropy_ratio") in tensors:
            got = torch.tensor([report.facts[0]["entropy"][i] for i in sorted(report.facts[0]["entropy"])])
            torch.testing.assert_close(got, tensors[key], rtol=1e-4, atol=1e-4)


def test_per_image_rule_in_the_encoder(golden, tower):
    """Pictures of one batch, cut to different lengths on the way, end as each does alone."""
    config, tensors = golden
    pixels = tensors["clip/in/pixel_values"]
    budget = max(int(name[1:]) for name in groups(tensors, "clip/out/") if name.startswith("T"))
    _, together, report = run_tower(tower, pixels, config, budget, "per_image")
    for image in range(len(pixels)):
        _, alone, own = run_tower(tower, pixels[image][None], config, budget, "per_image")
        assert report.kept[image] == own.kept[0]
        torch.testing.assert_close(together[image], alone[0], rtol=1e-4, atol=1e-4)
        if (key := f"clip/out/T{budget}/img{image}/kept_final") in tensors:
            assert own.kept[0] == tensors[key][0].tolist()


def test_the_unpruned_tower_is_the_official_one(golden, tower):
    config, tensors = golden
    with torch.no_grad():
        states = tower(tensors["clip/in/pixel_values"], output_hidden_states=True).hidden_states
    feature = states[config["select_layer"] - config["L"]][:, 1:]
    torch.testing.assert_close(feature, tensors["clip/out/unpruned_feature"], rtol=1e-4, atol=1e-4)
