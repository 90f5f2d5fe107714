import itertools
import warnings

import pytest
import torch

from headrace.flow.coupling import (
    BiasedCoupling,
    Coupling,
    LowEffectiveShare,
    choose_epsilon,
    condition_weight,
    exact_assignment,
    gibbs_weights,
    kernel_report,
    sinkhorn_plan,
    squared_distances,
)


@pytest.fixture
def batch(draw):
    noise = torch.randn(64, 3, 2, generator=draw)
    return noise, 2.0 + 0.5 * torch.randn(64, 3, 2, generator=draw)


def test_exact_pairs_equal_brute_force(draw):
    noise, data = torch.randn(6, 2, generator=draw), torch.randn(6, 2, generator=draw)
    cost = squared_distances(noise, data)
    best = min(itertools.permutations(range(6)), key=lambda order: sum(cost[i, j] for j, i in enumerate(order)))
    assert exact_assignment(cost).tolist() == list(best)
    paired = Coupling(kind="exact").pair(noise, data)
    assert torch.equal(paired.noise, noise[list(best)]) and torch.equal(paired.data, data)


def test_sinkhorn_plan_has_even_marginals_and_tends_to_the_assignment(batch):
    cost = squared_distances(*batch)
    plan = sinkhorn_plan(cost, epsilon=2.0, iterations=50)
    ones = torch.ones(64, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), ones, atol=1e-3, rtol=0)
    torch.testing.assert_close(plan.sum(1), ones, atol=1e-3, rtol=0)
    sharp = sinkhorn_plan(cost[:8, :8], epsilon=0.01, iterations=3000)
    assert torch.equal(sharp.argmax(0), exact_assignment(cost[:8, :8]))


def test_zero_sinkhorn_iterations_are_the_gibbs_weights(batch):
    kernel = sinkhorn_plan(squared_distances(*batch).sqrt(), epsilon=3.0, iterations=0).diagonal()
    torch.testing.assert_close(gibbs_weights(*batch, epsilon=3.0), (kernel / kernel.mean()).float())


def test_gibbs_limits_and_scale(batch):
    noise, data = batch
    torch.testing.assert_close(gibbs_weights(*batch, epsilon=1e6), torch.ones(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(gibbs_weights(10 * noise, 10 * data, epsilon=30.0), gibbs_weights(*batch, epsilon=3.0))
    far = gibbs_weights(noise, data + 1000.0, epsilon=5.0)  # raw exponentials would all be 0
    assert abs(far.mean().item() - 1.0) < 1e-5 and far.max() < 64


def test_kernel_report_sees_tilt_and_its_absence(draw):
    angle = 6.283 * torch.rand(512, generator=draw)
    ring = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    round_pair = kernel_report(torch.randn(512, 2, generator=draw), ring, epsilon=4.0)
    lopsided = kernel_report(torch.randn(512, 2, generator=draw), ring * torch.tensor([3.0, 0.1]), epsilon=4.0)
    assert round_pair.data_tilt < 0.02 < 0.1 < lopsided.data_tilt


def test_chosen_epsilon_is_flat_and_effective(batch):
    epsilon = choose_epsilon(*batch)
    assert kernel_report(*batch, epsilon=epsilon).effective_share >= 0.3
    assert choose_epsilon(*batch, kappas=(100.0, 1000.0)) < 1000.0 * 6**0.5
    with pytest.raises(ValueError, match="larger kappas"):
        choose_epsilon(*batch, kappas=(1e-4,))


@pytest.mark.parametrize("kind", ["exact", "sinkhorn", "gibbs"])
def test_a_condition_without_a_mode_is_refused_with_the_reason(kind, batch):
    coupling = Coupling(kind=kind, epsilon=None if kind == "exact" else 5.0)
    with pytest.raises(BiasedCoupling, match=r"depend on the condition .*'biased' accepts") as refused:
        coupling.pair(*batch, condition=torch.zeros(64, dtype=torch.long))
    for mode in ("block", "c2ot", "biased"):  # what is suggested is what this kind takes
        try:
            Coupling(kind=kind, epsilon=coupling.epsilon, condition_mode=mode)
        except ValueError:
            assert repr(mode) not in str(refused.value)
        else:
            assert repr(mode) in str(refused.value)
    coupling.pair(*batch)
    biased = Coupling(kind=kind, epsilon=coupling.epsilon, condition_mode="biased")
    biased.pair(*batch, condition=torch.zeros(64, dtype=torch.long))


def separability(noise, label):
    """Accuracy of telling the label from the noise by the nearer class mean; chance is one half."""
    means = torch.stack([noise[label == k].mean(0) for k in (0, 1)])
    return (torch.cdist(noise, means).argmin(1) == label).float().mean().item()


@pytest.mark.parametrize("kind", ["exact", "sinkhorn"])
def test_blocks_keep_noise_and_label_independent(kind, draw):
    noise, label = torch.randn(600, 2, generator=draw), torch.arange(600) % 2
    data = torch.randn(600, 2, generator=draw) + 6.0 * label[:, None]
    epsilon = None if kind == "exact" else 1.0
    blind = Coupling(kind=kind, epsilon=epsilon, condition_mode="biased").pair(noise, data, condition=label)
    block = Coupling(kind=kind, epsilon=epsilon, condition_mode="block").pair(
        noise, data, condition=label, generator=draw
    )
    assert separability(blind.noise, label) > 0.9
    assert separability(block.noise, label) < 0.58
    before, after = ((n - data).square().sum(1).mean() for n in (noise, block.noise))
    assert after < 0.95 * before


def test_condition_weight_meets_its_target(draw):
    cost = squared_distances(torch.randn(80, 2, generator=draw), torch.randn(80, 2, generator=draw))
    apart = torch.rand(80, 80, generator=draw, dtype=torch.float64).fill_diagonal_(0.0)
    weight = condition_weight(cost, apart, target=0.01)
    assert abs(((cost + weight * apart) < cost.diagonal()[None]).double().mean().item() - 0.01) < 0.001


def test_c2ot_lies_between_blind_and_independent(draw):
    noise = torch.randn(300, 2, generator=draw)
    angle = 3.1 * torch.rand(300, generator=draw)
    condition = torch.stack([angle.cos(), angle.sin()], 1)
    data = 5.0 * condition + 0.3 * torch.randn(300, 2, generator=draw)

    def dependence(mode):
        paired = Coupling(kind="exact", condition_mode=mode).pair(noise, data, condition=condition)
        return (paired.noise * condition).sum(1).mean().item()

    assert abs(dependence("c2ot")) < 0.5 * dependence("biased")


def test_weights_that_stay_uneven_are_warned_of_once(batch):
    low, high = 0.1, 10.0
    for _ in range(40):  # the epsilon at which this batch has an effective share of 0.2
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kernel_report(*batch, epsilon=middle).effective_share < 0.2 else (low, middle)
    uneven, even = Coupling(kind="gibbs", epsilon=high), Coupling(kind="gibbs", epsilon=10.0)
    assert uneven == Coupling(kind="gibbs", epsilon=high)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            uneven.pair(*batch)
        for _ in range(40):
            even.pair(*batch)
    with pytest.warns(LowEffectiveShare, match=r"effective share of 0\.20 .*below 0\.3") as caught:
        for _ in range(40):
            uneven.pair(*batch)
    assert len(caught) == 1
    assert abs(uneven.effective.mean - 0.2) < 0.01 < 0.3 < even.effective.mean


def test_a_low_share_ends_a_run_when_it_stays_not_by_one_batch(batch):
    low, high = 0.1, 10.0
    for _ in range(40):  # the epsilon at which this batch has an effective share of 0.1
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kernel_report(*batch, epsilon=middle).effective_share < 0.1 else (low, middle)
    coupling = Coupling(kind="gibbs", epsilon=high)
    for _ in range(19):
        coupling.pair(*batch)
    with pytest.raises(ValueError, match=r"effective share of 0\.10 of each batch, below 0\.15"):
        coupling.pair(*batch)


def test_modes_that_do_not_fit_are_refused(batch):
    with pytest.raises(ValueError, match="no condition mode 'block'"):
        Coupling(kind="gibbs", epsilon=1.0, condition_mode="block")
    with pytest.raises(ValueError, match="epsilon belongs"):
        Coupling(kind="exact", epsilon=1.0)
    with pytest.raises(ValueError, match="unknown coupling"):
        Coupling(kind="magic")
    block = Coupling(kind="exact", condition_mode="block")
    with pytest.raises(ValueError, match="label of its own"):
        block.pair(*batch, condition=torch.arange(64))
    with pytest.raises(ValueError, match="integer labels"):
        block.pair(*batch, condition=torch.randn(64, 3))
    with pytest.raises(ValueError, match="vectors"):
        Coupling(kind="exact", condition_mode="c2ot").pair(*batch, condition=torch.arange(64))
    with pytest.raises(ValueError, match=r"lets 1\.\d of 64 pairs of this batch count"):
        Coupling(kind="gibbs", epsilon=0.01).pair(*batch)
    for coupling in (Coupling(), block, Coupling(kind="gibbs", epsilon=5.0, condition_mode="biased")):
        with pytest.raises(ValueError, match=r"64 pairs need as many conditions, got shape \(63,\)"):
            coupling.pair(*batch, condition=torch.zeros(63, dtype=torch.long))
    with pytest.raises(ValueError, match="one shape"):
        Coupling().pair(batch[0], batch[1][:3])
    with pytest.raises(ValueError, match="one device"):
        Coupling().pair(torch.zeros(4, 2), torch.zeros(4, 2, device="meta"))


def test_one_pair_alone_counts_fully():
    """A process of several may have a batch of one, which no epsilon could make two pairs."""
    paired = Coupling(kind="gibbs", epsilon=0.1).pair(torch.zeros(1, 2), torch.full((1, 2), 3.0))
    torch.testing.assert_close(paired.weight, torch.ones(1))
