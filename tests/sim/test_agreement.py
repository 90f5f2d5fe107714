"""Agreement of simulation and reality: known answers and the axioms of a rank measure."""

import json
import math

import numpy as np
import pytest

from headrace.cli.main import main
from headrace.sim.agreement import compare, mean_maximum_rank_violation, pearson, read_rates, variant_aggregate

# Published rates of RT-1-X, Octo-Base, Octo-Small (arXiv 2405.05941), simulated and real, and what the paper derives.
PUBLISHED = {
    "spoon": ((0.0, 0.125, 0.472), (0.0, 0.333, 0.417), 0.0, 0.827),
    "carrot": ((0.042, 0.083, 0.097), (0.0, 0.25, 0.083), 0.111, 0.571),
    "stack": ((0.0, 0.0, 0.042), (0.0, 0.0, 0.125), 0.0, 1.0),
    "eggplant": ((0.0, 0.431, 0.569), (0.0, 0.25, 0.4), 0.0, 0.989),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_tables_give_the_published_figures(task):
    simulated, real, mmrv, r = PUBLISHED[task]
    assert mean_maximum_rank_violation(simulated, real) == pytest.approx(mmrv, abs=6e-4)
    assert pearson(simulated, real) == pytest.approx(r, abs=6e-4)


def test_any_order_preserving_map_has_no_violation():
    real = np.random.default_rng(0).permutation(np.linspace(0.05, 0.95, 7))
    assert mean_maximum_rank_violation(real**3, real) == 0.0
    assert mean_maximum_rank_violation(1 - real, real) == pytest.approx(np.abs(real[:, None] - real).max(1).mean())


def test_the_real_gap_weighs_the_violation():
    simulated, real = (0.5, 0.4), (0.0, 0.9)
    assert mean_maximum_rank_violation(simulated, real) == pytest.approx(0.9)
    assert mean_maximum_rank_violation(real, simulated) == pytest.approx(0.1)


def test_pearson_is_numpys_and_says_when_it_is_undefined():
    s, r = np.random.default_rng(1).uniform(size=(2, 9))
    assert pearson(s, r) == pytest.approx(np.corrcoef(s, r)[0, 1])
    assert math.isnan(pearson([0.5, 0.5], [0.1, 0.9]))
    assert pearson([0.2, 0.2], [0.7, 0.7]) == 1.0


def test_files_are_matched_by_task_and_policy(tmp_path):
    simulated = {"a": {"p": 0.1, "q": 0.9, "only here": 0.5}, "b": {"p": 0.3}}
    (tmp_path / "s.json").write_text(json.dumps(simulated))
    rows = compare(read_rates(tmp_path / "s.json"), {"a": {"q": 0.2, "p": 0.4}, "c": {}})
    assert [(row.task, row.policies, row.mmrv) for row in rows] == [("a", ("p", "q"), pytest.approx(0.2))]


@pytest.mark.parametrize("bad", ["[1]", '{"a": 3}', '{"a": {"p": "high"}}'])
def test_a_file_of_another_form_is_refused(tmp_path, bad):
    (tmp_path / "r.json").write_text(bad)
    with pytest.raises(ValueError, match=r"r\.json"):
        read_rates(tmp_path / "r.json")


def test_percentages_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="divide percentages"):
        pearson([50.0, 20.0], [0.5, 0.2])
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        mean_maximum_rank_violation([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="two policies"):
        compare({"a": {"p": 1.0}}, {"a": {"p": 1.0}})


def test_variants_are_averaged_and_left_out_ones_refused():
    assert variant_aggregate({"base": 0.2, "background 1": 0.4, "lighting darker": 0.6}) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="camera"):
        variant_aggregate({"base": 0.2, "camera left": 0.4})


def test_the_command_reads_runs_and_published_rates(tmp_path, capsys):
    """Two runs of `headrace rollout` and a file of real rates, which the second policy leads by 0.3."""
    for policy, rates in {"ours": (0.6, 0.5), "theirs": (0.4, 0.1)}.items():
        rows = [{"task": task, "success_rate": rate} for task, rate in zip(("spoon", "stack"), rates, strict=True)]
        (tmp_path / f"{policy}.json").write_text(json.dumps({"policy": policy, "tasks": rows}))
    real = {"spoon": {"ours": 0.2, "theirs": 0.5}, "stack": {"ours": 0.3, "theirs": 0.0}}
    (tmp_path / "real.json").write_text(json.dumps(real))
    runs = [str(tmp_path / "ours.json"), str(tmp_path / "theirs.json")]
    assert main(["agreement", "--simulated", *runs, "--real", str(tmp_path / "real.json")]) == 0
    printed = capsys.readouterr().out
    assert (
        "| spoon | ours, theirs | 0.300 | -1.000 |" in printed and "| stack | ours, theirs | 0.000 | 1.000 |" in printed
    )
    assert "| mean | | 0.150 | 0.000 |" in printed
    assert main(["agreement", "--simulated", runs[0], runs[0], "--real", str(tmp_path / "real.json")]) == 2
    assert "ours is given twice" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["agreement", "--simulated", str(tmp_path / "broken.json"), "--real", runs[0]]) == 2
    assert "not JSON" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of success rates at .*absent\.json"):
        read_rates(tmp_path / "absent.json")
