r"""The exact velocity from standard noise to a mixture of equal round Gaussians: a field with a known answer.

Use it to measure a sampler, a step grid or an inversion without training anything. With one component the flow's map
is :math:`x \mapsto m + s\,x`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianMixture:
    """Equal-weight mixture, called like any velocity: `mixture(x, t)`.

    Attributes:
        means: Centres of the components, shape (K, D).
        std: Standard deviation of every component in every direction, above 0.
    """

    means: Tensor
    std: float

    def __post_init__(self) -> None:
        if self.means.ndim != 2:
            raise ValueError(f"means must have shape (K, D), got {tuple(self.means.shape)}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Marginal velocity of straight paths from N(0, I), shape (B, D).

        With :math:`\varsigma^2=(1-t)^2+t^2s^2` and :math:`r=\mathrm{softmax}_k(-|x-t\mu_k|^2/2\varsigma^2)` it is
        :math:`\sum_k r_k[\mu_k+(s^2t-(1-t))/\varsigma^2\,(x-t\mu_k)]`.

        Args:
            x: State, shape (B, D).
            t: Time, shape (B,).
        """
        time = t.to(x.dtype)[:, None]
        variance = (1.0 - time).square() + time.square() * self.std**2
        away_BKD = x[:, None] - time[:, :, None] * self.means
        share_BK = torch.softmax(-away_BKD.square().sum(-1) / (2.0 * variance), dim=1)
        pull = (self.std**2 * time - (1.0 - time)) / variance
        return torch.einsum("bk,bkd->bd", share_BK, self.means + pull[:, :, None] * away_BKD)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws from the mixture, shape (count, D)."""
        component = torch.randint(len(self.means), (count,), generator=generator, device=self.means.device)
        draw = torch.empty_like(self.means[component]).normal_(generator=generator)
        return self.means[component] + self.std * draw
