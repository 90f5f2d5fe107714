"""Bellman schedules of the official BOSS code, on every `boss_<letter>` set of the golden folder."""

import numpy as np
import pytest
import torch

from headrace.flow.bellman import bellman_grids, cheapest_path, local_costs
from headrace.flow.gaussian_mixture import GaussianMixture
from headrace.flow.solver import trajectory


@pytest.fixture
def golden(golden_set):
    return golden_set.config, golden_set.tensors


def counts(tensors, prefix):
    return sorted(int(k.split("/K")[1].split("/")[0]) for k in tensors if k.startswith(prefix) and k.endswith("/path"))


def test_paths_through_random_costs_are_equal(golden):
    _, tensors = golden
    cases = {key.split("/")[1] for key in tensors if key.startswith("random/")}
    assert cases
    for case in cases:
        costs = tensors[f"random/{case}/in/cost"].numpy()
        for steps in counts(tensors, f"random/{case}/out/"):
            found = cheapest_path(costs, steps)
            assert list(found.indices) == tensors[f"random/{case}/out/K{steps}/path"].tolist()
            assert found.cost == pytest.approx(tensors[f"random/{case}/out/K{steps}/cost"].item(), rel=1e-12)


def test_trajectory_costs_and_grids_on_the_mixture(golden):
    config, tensors = golden
    velocity = GaussianMixture(means=tensors["gmm/in/means"], std=config["s"])
    noise, fine = tensors["gmm/in/z0"], config["Kmax"]
    path = trajectory(velocity, noise, steps=fine)
    torch.testing.assert_close(path.states, tensors["gmm/out/trajectory"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(path.slopes, tensors["gmm/out/velocity"], atol=1e-5, rtol=1e-5)
    upper = np.triu_indices(fine + 1, 1)
    official = tensors["gmm/out/cost"].numpy()[upper]
    np.testing.assert_allclose(local_costs(path)[upper], official, rtol=1e-4, atol=1e-6 * official.max())
    grids = bellman_grids(velocity, noise, steps=tuple(counts(tensors, "gmm/out/")), fine_steps=fine)
    for steps, grid in grids.items():
        assert [round(t * fine) for t in grid.times] == tensors[f"gmm/out/K{steps}/path"].tolist()
        assert grid.cost == pytest.approx(tensors[f"gmm/out/K{steps}/cost"].item(), rel=1e-4)
        torch.testing.assert_close(
            torch.tensor(grid.times), tensors[f"gmm/out/K{steps}/t_steps"].float(), atol=1e-6, rtol=0
        )
