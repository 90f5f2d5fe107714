import numpy as np
import pytest
import torch

from headrace.robot.action_bins import ActionBins, ActionBinsConfig


def some_actions() -> np.ndarray:
    generator = np.random.default_rng(0)
    moves = generator.normal(size=(500, 2))
    moves[:200, 1] = 0.0  # a dimension that rests a lot
    return np.concatenate([moves, generator.choice([-1.0, 1.0], size=(500, 1))], 1)


def test_decoding_is_off_by_less_than_the_bin():
    actions = some_actions()
    config = ActionBinsConfig.from_actions(actions, bins=32, binary=(False, False, True))
    bins = ActionBins(config)
    given = torch.from_numpy(actions).float()
    ids = bins.encode(given)
    back = bins.decode(ids)
    for column, edges in enumerate(config.edges):
        width = torch.tensor(edges).diff()[ids[:, column]]
        assert bool(((back - given)[:, column].abs() <= width + 1e-5).all())


def test_equal_quantiles_are_one_bin_and_the_gripper_has_two():
    config = ActionBinsConfig.from_actions(some_actions(), bins=32, binary=(False, False, True))
    assert len(config.values[0]) == 32 and len(config.values[1]) < 32
    assert config.values[2] == (-1.0, 1.0)


def test_quantile_bins_are_equally_full():
    actions = np.random.default_rng(1).exponential(size=(1000, 1))
    bins = ActionBins(ActionBinsConfig.from_actions(actions, bins=10))
    counts = torch.bincount(bins.encode(torch.from_numpy(actions)).flatten())
    assert counts.tolist() == [100] * 10


def test_values_outside_the_training_data_fall_into_the_end_bins():
    bins = ActionBins(ActionBinsConfig.from_actions(np.linspace(0, 1, 50)[:, None], bins=5))
    assert bins.encode(torch.tensor([[-9.0], [9.0]])).tolist() == [[0], [4]]


def test_an_id_of_another_dimension_is_refused():
    config = ActionBinsConfig.from_actions(some_actions(), bins=32, binary=(False, False, True))
    with pytest.raises(ValueError, match="outside"):
        ActionBins(config).decode(torch.tensor([[0, 0, 2]]))


def test_a_dimension_that_never_moves_is_one_bin_at_its_value():
    config = ActionBinsConfig.from_actions(np.full((10, 1), 0.25), bins=8)
    assert config.values == ((0.25,),)
