"""FlowCut against the official code's stored runs; every size comes from the set's JSON."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headrace.vlm.pruning.budget import Budget
from headrace.vlm.pruning.flowcut import FlowCutConfig, FlowCutTrace, step
from headrace.vlm.pruning.scores import Evidence, cut_size, entropy_ratio, fused_score, normalised, token_density

GOLDEN = Path(os.environ.get("HEADRACE_GOLDEN", Path(__file__).parents[2] / ".." / "shared" / "golden"))
SETS = sorted(GOLDEN.glob("flowcut_*.json"))
pytestmark = pytest.mark.skipif(not SETS, reason="no flowcut_*.json in HEADRACE_GOLDEN")


@pytest.fixture(scope="module", params=SETS, ids=lambda path: path.stem)
def golden(request):
    meta = json.loads(request.param.read_text())
    tensors = {}
    for part in meta["files"]:
        tensors |= load_file(request.param.parent / part["file"])
    return meta["config"], tensors


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


@pytest.mark.parametrize("which", ["batch", "img0", "img1"])
def test_injected_schedule(golden, which):
    config, tensors = golden
    layers, total = config["L"], tensors["inj/in/semantic"].shape[-1]
    images = slice(None) if which == "batch" else slice(int(which[3:]), int(which[3:]) + 1)
    for budget in (int(name[1:]) for name in groups(tensors, "inj/out/")):
        place = f"inj/out/T{budget}/{which}"
        trace = FlowCutTrace.start(tensors["inj/in/semantic"][0, images].shape[0], total - 1)
        rule = FlowCutConfig(budget=Budget(tokens=budget), history=config["beta"], batch_rule="max")
        for layer in range(layers):
            before = trace.kept
            found = injected_evidence(tensors, layer, images, before)
            step(trace, found, layer=layer, last_layer=layers - 3, target=budget, config=rule)
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
    for budget in (int(name[1:]) for name in groups(tensors, "inj/out/")):
        trace = FlowCutTrace.start(config["B"], total - 1)
        rule = FlowCutConfig(budget=Budget(tokens=budget), history=config["beta"])
        for layer in range(layers):
            found = injected_evidence(tensors, layer, slice(None), trace.kept)
            if trace.valid is not None:  # padding carries no weight
                real = [torch.where(trace.valid, row, 0) for row in found[:2]]
                found = Evidence(normalised(real[0]), normalised(real[1]), found.density)
            step(trace, found, layer=layer, last_layer=layers - 3, target=budget, config=rule)
        for image in range(config["B"]):
            assert torch.equal(trace.kept[image], tensors[f"inj/out/T{budget}/img{image}/kept_final"][0])
