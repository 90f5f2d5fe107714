import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from headrace.datasets.normalize import Normalizer, NormalizerConfig, Statistics


@pytest.fixture
def values():
    return np.random.default_rng(0).normal([1.0, -2.0, 30.0], [0.5, 4.0, 1e-9], (501, 3))


def test_statistics_are_numpys(values):
    statistics = Statistics.of(values)
    np.testing.assert_allclose(statistics.mean, values.mean(0))
    np.testing.assert_allclose(statistics.std, values.std(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.q01, np.quantile(values, 0.01, axis=0))
    np.testing.assert_allclose(statistics.q99, np.quantile(values, 0.99, axis=0))
    assert statistics.count == 501


def test_weights_act_like_repeated_rows(values):
    weights = np.where(np.arange(501) < 100, 3.0, 1.0)
    repeated = Statistics.of(np.repeat(values, weights.astype(int), axis=0))
    weighted = Statistics.of(values, weights)
    np.testing.assert_allclose(weighted.mean, repeated.mean)
    np.testing.assert_allclose(weighted.std, repeated.std, rtol=1e-6)
    np.testing.assert_allclose(weighted.q99, repeated.q99, atol=0.15)


@pytest.mark.parametrize("kind", ["mean_std", "quantile", "min_max", "identity"])
def test_inverse_undoes_the_map(values, kind):
    normalizer = Normalizer(NormalizerConfig.from_statistics(Statistics.of(values), kind))
    raw = torch.from_numpy(values).float().reshape(167, 3, 3)
    torch.testing.assert_close(normalizer.inverse(normalizer(raw)), raw)


def test_each_kind_maps_to_its_range(values):
    statistics = Statistics.of(values)
    normal = {
        kind: Normalizer(NormalizerConfig.from_statistics(statistics, kind))(torch.from_numpy(values).float())[:, :2]
        for kind in ("mean_std", "quantile", "min_max")
    }
    torch.testing.assert_close(normal["mean_std"].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal["mean_std"].std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(normal["min_max"].amin(0), -torch.ones(2))
    torch.testing.assert_close(normal["min_max"].amax(0), torch.ones(2))
    inside = (normal["quantile"].abs() <= 1).float().mean(0)
    assert ((inside > 0.97) & (inside < 0.99)).all()


def test_a_constant_dimension_is_not_blown_up(values):
    for kind in ("mean_std", "quantile", "min_max"):
        normalizer = Normalizer(NormalizerConfig.from_statistics(Statistics.of(values), kind))
        assert normalizer(torch.tensor([[0.0, 0.0, 30.1]]))[0, 2].abs() < 0.2


def test_masked_dimensions_pass_unchanged(values):
    config = NormalizerConfig.from_statistics(Statistics.of(values), mask=(True, False, True))
    assert Normalizer(config)(torch.tensor([[0.0, 5.0, 0.0]]))[0, 1] == 5.0


def test_config_survives_json(values):
    config = NormalizerConfig.from_statistics(Statistics.of(values))
    data = json.loads(json.dumps(asdict(config)))
    assert NormalizerConfig(shift=tuple(data["shift"]), scale=tuple(data["scale"])) == config


def test_wrong_input_is_named(values):
    with pytest.raises(ValueError, match=r"3 dimensions, got shape .*4"):
        Normalizer(NormalizerConfig.identity(3))(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"3 entries.*got 2"):
        NormalizerConfig.from_statistics(Statistics.of(values), mask=(True, False))
    with pytest.raises(ValueError, match="got 'zscore'"):
        NormalizerConfig.from_statistics(Statistics.of(values), "zscore")
    with pytest.raises(ValueError, match="scale above 0"):
        NormalizerConfig(shift=(0.0,), scale=(0.0,))
    with pytest.raises(ValueError, match="row 1 holds"):
        Statistics.of(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="N at least 1"):
        Statistics.of(np.zeros((0, 3)))
