import numpy as np
import pytest
import torch

from headrace.datasets.lerobot_demos import LeRobotDemos
from headrace.datasets.mixture import Mixture
from headrace.datasets.normalize import Statistics


@pytest.fixture
def large(image_dataset):
    return LeRobotDemos(image_dataset, horizon=4)


@pytest.fixture
def small(video_dataset):
    return LeRobotDemos(video_dataset, horizon=4, episodes=[1])


def test_without_weights_every_sample_comes_once(large, small):
    assert len(Mixture([large, small])) == len(large) + len(small)


def test_weights_give_the_shares_and_leave_nothing_out(large, small):
    mixture = Mixture([large, small], weights=(1, 3))
    rows = mixture.batch(np.arange(len(mixture)))
    assert len(mixture) == 35 + 105
    from_small = rows.rows[35:]
    assert set(rows.rows[:35].tolist()) == set(range(35))
    assert set(from_small.tolist()) == set(range(12, 21))


def test_a_mixed_batch_keeps_the_order_asked_for(large, small):
    mixture = Mixture([large, small])
    indices = np.array([40, 0, 36, 34, 35])
    mixed = mixture.batch(indices)
    for place, index in enumerate(indices):
        alone = large.batch(np.array([index])) if index < 35 else small.batch(np.array([index - 35]))
        assert torch.equal(mixed.images[place], alone.images[0])
        assert torch.equal(mixed.actions[place], alone.actions[0])
        assert mixed.instructions[place] == alone.instructions[0]


def test_statistics_count_by_weight(large, small):
    mixture = Mixture([large, small], weights=(1, 1))
    expected = (np.array(large.action_statistics.mean) + np.array(small.action_statistics.mean)) / 2
    np.testing.assert_allclose(mixture.action_statistics.mean, expected, atol=1e-9)
    by_size = Mixture([large, small]).state_statistics
    joined = Statistics.of(np.concatenate([large.states, small.states[small.rows]]))
    np.testing.assert_allclose(by_size.std, joined.std)


def test_datasets_that_do_not_fit_are_named(large, other_action_dataset):
    other = LeRobotDemos(other_action_dataset, horizon=4)
    with pytest.raises(ValueError, match=r"cameras: \('base', 'wrist'\) in .*action_dim: 4 in .*image.*, 7 in .*other"):
        Mixture([large, other])


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1)])
def test_wrong_weights_are_refused(large, small, weights):
    with pytest.raises(ValueError, match="as many weights, each above 0"):
        Mixture([large, small], weights=weights)
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
