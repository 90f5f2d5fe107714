"""Which noise goes with which data in a batch: independent, optimal transport, entropic, or Gibbs-weighted pairs.

A coupling that does not know the condition makes the noise depend on it in training but not when sampling: a
conditional model then learns a shifted distribution, silently. So every coupling but the independent one refuses a
condition unless it is told how to treat it.

Sources: Tong et al. 2024, arXiv 2302.00482 (OT-CFM); Weighted CFM, arXiv 2507.22270; C2OT, arXiv 2503.10636.
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["independent", "exact", "sinkhorn", "gibbs"]
ConditionMode = Literal["block", "c2ot", "biased"]
Cost = Literal["distance", "squared"]
LEAST_EFFECTIVE_SHARE = 0.3
# One batch's share scatters around its mean, and a run must not end by chance: the mean is refused below the first, a
# single batch only where fewer pairs than the second count.
REFUSED_EFFECTIVE_SHARE = 0.15
LEAST_EFFECTIVE_PAIRS = 2.0
SHARES_AVERAGED = 20


class LowEffectiveShare(UserWarning):
    """The weights of W-CFM leave too few pairs that count, batch after batch."""


class EffectiveShare:
    """The effective share of W-CFM's weights over the last batches (about 20); warns once when it stays low, refuses
    when it is hopeless.

    Attributes:
        mean: Running mean of the effective sample size over the batch size, in (0, 1]; nan before the first batch.
        batches: How many it has seen.
    """

    def __init__(self) -> None:
        self.mean, self.batches, self.warned = math.nan, 0, False

    def add(self, share: float, epsilon: float) -> None:
        """Take in one batch's share.

        Warns:
            LowEffectiveShare: The mean is below 0.3 after 20 batches or more; once.

        Raises:
            ValueError: The mean is below 0.15 after 20 batches or more.
        """
        self.batches += 1
        before = share if self.batches == 1 else self.mean
        self.mean = before + (share - before) / min(self.batches, SHARES_AVERAGED)
        if self.batches >= SHARES_AVERAGED and self.mean < REFUSED_EFFECTIVE_SHARE:
            raise ValueError(
                f"epsilon={epsilon} leaves an effective share of {self.mean:.2f} of each batch, below "
                f"{REFUSED_EFFECTIVE_SHARE}: a few pairs decide everything. Raise epsilon (see choose_epsilon)"
            )
        if self.batches >= SHARES_AVERAGED and self.mean < LEAST_EFFECTIVE_SHARE and not self.warned:
            self.warned = True
            warnings.warn(
                f"epsilon={epsilon} leaves an effective share of {self.mean:.2f} of each batch, below "
                f"{LEAST_EFFECTIVE_SHARE}: few pairs decide the training. Raise epsilon (see choose_epsilon)",
                LowEffectiveShare,
                stacklevel=4,
            )


class BiasedCoupling(ValueError):
    """A coupling was asked to pair for a conditional model without saying how the condition is kept unbiased."""


class Coupled(NamedTuple):
    """A batch of pairs. Data and condition keep their order; only the noise moves.

    Attributes:
        noise: Shape (B, ...).
        data: Shape (B, ...), as given.
        weight: Weight of each pair with mean 1, shape (B,), or None where all count alike.
    """

    noise: Tensor
    data: Tensor
    weight: Tensor | None


def squared_distances(noise: Tensor, data: Tensor) -> Tensor:
    """|noise_i - data_j|^2, shape (B, B), float64; differences are taken before squaring, so nothing cancels."""
    return torch.cdist(
        noise.flatten(1).double(), data.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()


def exact_assignment(cost: Tensor) -> Tensor:
    """The permutation `order` with the least sum of `cost[order[j], j]`, int64, shape (B,). Runs on the CPU."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.detach().cpu().numpy().T)[1]).to(cost.device)


def gibbs_weights(noise: Tensor, data: Tensor, *, epsilon: float) -> Tensor:
    """Weights `B * softmax(-|noise_i - data_i| / epsilon)` of independent pairs, shape (B,), mean 1.

    The distance is not squared. Computed from logarithms: the raw exponentials underflow for pictures.
    For action chunks normalise the dimensions first, or the one with the largest unit decides.

    Raises:
        ValueError: `epsilon` is not above 0.

    Source: Weighted CFM, arXiv 2507.22270.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    distance = (noise.double() - data.double()).flatten(1).norm(dim=1)
    return (len(noise) * torch.softmax(-distance / epsilon, dim=0)).float()


def sinkhorn_plan(cost: Tensor, *, epsilon: float, iterations: int = 50) -> Tensor:
    """Entropic transport plan of a batch, shape (B, B), rows noise, columns data; every row and column sums to 1.

    Zero iterations give the unscaled kernel `exp(-cost / epsilon)`, whose diagonal Weighted CFM uses as weights.

    Args:
        cost: Shape (B, B); infinity forbids a pair.
        epsilon: Temperature in the units of the cost, above 0.
        iterations: Row and column scalings, at least 0.

    Raises:
        ValueError: `epsilon` is not above 0 or `iterations` is negative.

    Source: Cuturi 2013, arXiv 1306.0895, in logarithms.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    log_plan = -cost.double() / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return log_plan.exp()


class KernelReport(NamedTuple):
    """What a Gibbs kernel does to a batch.

    Attributes:
        effective_share: Effective sample size of the pair weights over the batch size, in (0, 1].
        noise_tilt, data_tilt: Relative variance of the kernel's row and column means; 0 where the weighting leaves the
            marginal as it is, and the bias that no batch size removes otherwise.
    """

    effective_share: float
    noise_tilt: float
    data_tilt: float


def kernel_report(noise: Tensor, data: Tensor, *, epsilon: float) -> KernelReport:
    """Measure a Gibbs kernel on one batch; costs one (B, B) matrix, so do it now and then, not at every step."""
    distance = squared_distances(noise, data).sqrt()
    share = torch.softmax(-distance.diagonal() / epsilon, dim=0)
    kernel = torch.exp(-(distance - distance.min()) / epsilon)
    tilts = [(mean.var(correction=0) / mean.mean().square()).item() for mean in (kernel.mean(1), kernel.mean(0))]
    return KernelReport(1.0 / (len(noise) * share.square().sum().item()), *tilts)


def choose_epsilon(noise: Tensor, data: Tensor, *, kappas: tuple[float, ...] | None = None) -> float:
    """The smallest `kappa * sqrt(D)` on a grid whose tilt has flattened and whose effective share is large enough.

    Flattened means: a step of the grid further down would add more than 0.05 to the larger of the two tilts.

    Args:
        noise: Shape (B, ...).
        data: Same shape.
        kappas: Rising candidates; by default 16 from 0.05 to 50, evenly in the logarithm.

    Raises:
        ValueError: No candidate keeps the effective share above 0.3.

    Source: the elbow rule of arXiv 2507.22270, as reported in its reviews; the threshold is ours.
    """
    grid = kappas or tuple(torch.logspace(-1.3, 1.7, 16).tolist())
    width = noise[0].numel() ** 0.5
    best, above = None, None
    for kappa in reversed(grid):
        report = kernel_report(noise, data, epsilon=kappa * width)
        tilt = max(report.noise_tilt, report.data_tilt)
        if report.effective_share < LEAST_EFFECTIVE_SHARE or (above is not None and tilt - above > 0.05):
            break
        best, above = kappa * width, tilt
    if best is None:
        raise ValueError("no candidate keeps an effective share of 0.3: give larger kappas, or normalise the data")
    return best


def condition_weight(cost: Tensor, condition_distance: Tensor, *, target: float = 0.01) -> float:
    """The factor of a condition distance at which the share of foreign pairs cheaper than the own pair is `target`.

    Args:
        cost: Pair costs, shape (B, B).
        condition_distance: Distance between the conditions of row and column, shape (B, B), 0 on the diagonal.
        target: Wanted share, in (0, 1).

    Source: C2OT, arXiv 2503.10636, sec. 4.2.
    """
    own = cost.diagonal()[None]

    def share(weight: float) -> float:
        return ((cost + weight * condition_distance) < own).double().mean().item()

    low, high = 0.0, 1.0
    while share(high) > target and high < 1e12:
        low, high = high, high * 4.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if share(middle) > target else (low, middle)
    return high


MODES: dict[str, tuple[str, ...]] = {
    "independent": (), "exact": ("block", "c2ot", "biased"), "sinkhorn": ("block", "biased"), "gibbs": ("biased",),
}  # fmt: skip
MEANING = {
    "block": "'block' pairs within each label",
    "c2ot": "'c2ot' weighs the distance of condition vectors",
    "biased": "'biased' accepts the shift",
}


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """A choice of pairs for training, checked once.

    Attributes:
        kind: `independent`; `exact` optimal transport by assignment; `sinkhorn`, entropic transport, one noise drawn
            for each data point; `gibbs`, independent pairs with the weights of Weighted CFM.
        epsilon: Temperature of `sinkhorn` and `gibbs`, in units of their cost.
        iterations: Scalings of `sinkhorn`.
        cost: Cost of `sinkhorn`; `exact` uses squared distances, `gibbs` distances, as published.
        condition_mode: What a condition means: `block` pairs only inside equal labels (exact, sinkhorn), `c2ot` adds a
            tuned condition distance (exact), `biased` ignores the condition and accepts the shift.
        effective: How many of the pairs count under the weights of `gibbs`; `effective.mean` is for a log.
    """

    kind: Kind = "independent"
    epsilon: float | None = None
    iterations: int = 50
    cost: Cost = "squared"
    condition_mode: ConditionMode | None = None
    effective: EffectiveShare = field(default_factory=EffectiveShare, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("independent", "exact", "sinkhorn", "gibbs"):
            raise ValueError(f"unknown coupling {self.kind!r} (known: independent, exact, sinkhorn, gibbs)")
        if (self.kind in ("sinkhorn", "gibbs")) != (self.epsilon is not None):
            raise ValueError(f"epsilon belongs to sinkhorn and gibbs couplings, got {self.epsilon} for {self.kind}")
        allowed = MODES[self.kind]
        if self.condition_mode is not None and self.condition_mode not in allowed:
            raise ValueError(
                f"coupling {self.kind!r} has no condition mode {self.condition_mode!r} "
                f"(it has: {', '.join(allowed) or 'none, it needs none'})"
            )

    def require_mode(self) -> None:
        """Refuse to serve a conditional model blindly; `pair` asks this whenever it gets a condition.

        Raises:
            BiasedCoupling: This coupling depends on the data and has no `condition_mode`.
        """
        if self.kind != "independent" and self.condition_mode is None:
            raise BiasedCoupling(
                f"coupling {self.kind!r} on a conditional model makes the noise depend on the condition in "
                "training but not in sampling, which shifts what is sampled. Keep the independent coupling and "
                f"straighten with BOSS, or choose a condition_mode: {'; '.join(MEANING[m] for m in MODES[self.kind])}"
            )

    def pair(
        self,
        noise: Tensor,
        data: Tensor,
        *,
        condition: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Coupled:
        """Pair a batch.

        Args:
            noise: Shape (B, ...).
            data: Same shape.
            condition: What the model is conditioned on, or None for an unconditional model: integer labels (B,) for
                `block`, vectors (B, C) for `c2ot`.
            generator: Randomness of `sinkhorn`'s draws.

        Raises:
            ValueError: Shapes or devices differ, another number of conditions than pairs, or a condition that the mode
                cannot use.
            BiasedCoupling: A condition without a mode.

        Warns:
            LowEffectiveShare: The weights of `gibbs` have left too few pairs over the last batches; once.
        """
        if noise.shape != data.shape:
            raise ValueError(f"noise and data must have one shape, got {tuple(noise.shape)} and {tuple(data.shape)}")
        if noise.device != data.device:
            raise ValueError(f"noise and data must lie on one device, got {noise.device} and {data.device}")
        if condition is not None and (condition.ndim == 0 or len(condition) != len(noise)):
            raise ValueError(f"{len(noise)} pairs need as many conditions, got shape {tuple(condition.shape)}")
        if self.kind == "independent":
            return Coupled(noise, data, None)
        if condition is not None:
            self.require_mode()
        if self.kind == "gibbs":
            return Coupled(noise, data, self._gibbs(noise, data))
        cost = squared_distances(noise, data)
        if condition is not None and self.condition_mode != "biased":
            cost = cost + self._condition_cost(cost, condition)
        if self.kind == "exact":
            return Coupled(noise[exact_assignment(cost)], data, None)
        cost = cost.sqrt() if self.cost == "distance" else cost
        plan = sinkhorn_plan(cost, epsilon=self.epsilon or 0.0, iterations=self.iterations)
        chosen = torch.multinomial(plan.T, 1, generator=generator)[:, 0]
        return Coupled(noise[chosen], data, None)

    def _gibbs(self, noise: Tensor, data: Tensor) -> Tensor:
        weight = gibbs_weights(noise, data, epsilon=self.epsilon or 0.0)
        share = 1.0 / weight.square().mean().item()
        if share * len(weight) < min(LEAST_EFFECTIVE_PAIRS, len(weight)) * (1 - 1e-6):
            raise ValueError(
                f"epsilon={self.epsilon} lets {share * len(weight):.1f} of {len(weight)} pairs of this batch count, "
                f"fewer than {LEAST_EFFECTIVE_PAIRS:g}. Raise epsilon (see choose_epsilon)"
            )
        self.effective.add(share, self.epsilon or 0.0)
        return weight

    def _condition_cost(self, cost: Tensor, condition: Tensor) -> Tensor:
        """What a pair of conditions adds to the cost, shape (B, B)."""
        if self.condition_mode == "block":
            if condition.is_floating_point() or condition.ndim != 1:
                raise ValueError(
                    f"condition_mode 'block' needs integer labels (B,), got {condition.dtype} {tuple(condition.shape)}"
                )
            if len(condition) > 1 and len(condition.unique()) == len(condition):
                raise ValueError(
                    "every sample has a label of its own, so pairs inside a label change nothing: "
                    "use the independent coupling and straighten with BOSS"
                )
            other = condition[:, None] != condition[None]
            return torch.where(other, 1e6 * (1.0 + cost.max()), 0.0)
        if not condition.is_floating_point() or condition.ndim != 2:
            raise ValueError(f"condition_mode 'c2ot' needs vectors (B, C), got {tuple(condition.shape)}")
        unit = torch.nn.functional.normalize(condition.double(), dim=1)
        apart = (1.0 - unit @ unit.T).clamp_min(0.0).fill_diagonal_(0.0)
        return condition_weight(cost, apart) * apart
