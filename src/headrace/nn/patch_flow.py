"""The per-patch velocity network: an MLP with adaptive layer norm that sees one patch and its condition token.

Source: UniFlow (arXiv 2510.10575; ZhengrongYue/UniFlow, modeling_uniflow.py), after MAR (LTH14/mar, diffloss.py).
"""

# Shape letters in this file: M patches of all images, P numbers in a patch, C condition width, W hidden width.

from dataclasses import dataclass

from torch import Tensor, nn

from headrace.nn.shapes import expect_shape
from headrace.nn.starting_weights import draw_weights
from headrace.nn.time_embedding import TimeEmbedding

TIME_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class PatchFlowConfig:
    """Sizes of the head.

    Attributes:
        patch_dim: P, numbers in one patch (3 * 14 * 14 = 588 in the release).
        condition_dim: C.
        width: W. The head has no skip from input to output, so below P it cannot carry the noise to the output.
        depth: Residual blocks.
        time_features: Sinusoids of the time.
        zero_init: Zero the modulation and output layers (MAR). The release draws every linear layer from a
            truncated normal with standard deviation 0.02, which learned slightly faster.
        init_gain: Of the layers that bring in the condition, see `draw_weights`; 0 is the release. The others start at
            0.02 in any case: with a gain they learn to pass the noise on more slowly.
        allow_narrow: Accept `width < patch_dim`; for reading foreign tiny checkpoints, not for training.
    """

    patch_dim: int
    condition_dim: int
    width: int
    depth: int = 12
    time_features: int = 256
    zero_init: bool = False
    init_gain: float = 0.0
    allow_narrow: bool = False

    def __post_init__(self) -> None:
        for name in ("patch_dim", "condition_dim", "width", "depth", "time_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.init_gain < 0:
            raise ValueError(f"init_gain must not be negative, got {self.init_gain}")
        if self.width < self.patch_dim and not self.allow_narrow:
            raise ValueError(
                f"the flow head is {self.width} wide but a patch has {self.patch_dim} numbers: a narrower head leaves "
                f"about {1 - self.width / self.patch_dim:.0%} of the noise in a one-step image. Use width >= "
                f"{self.patch_dim} or a smaller patch"
            )


class ModulatedMLP(nn.Module):
    """`x + gate * MLP(LN(x) * (1 + scale) + shift)` with shift, scale and gate from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(active).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class PatchFlow(nn.Module):
    """Velocity of each patch at time t, given its condition token; patches do not see each other here."""

    def __init__(self, config: PatchFlowConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.input_proj = nn.Linear(config.patch_dim, width)
        self.time_embed = TimeEmbedding(width, features=config.time_features, scale=TIME_SCALE)
        self.cond_embed = nn.Linear(config.condition_dim, width)
        self.res_blocks = nn.ModuleList(ModulatedMLP(width) for _ in range(config.depth))
        self.out_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.patch_dim)
        self.initialise()

    def initialise(self) -> None:
        """Truncated normal weights and zero biases; with `zero_init` the gates and the output start at 0."""
        for module in self.modules():
            draw_weights(module)
        modulations = (module.modulation for module in self.res_blocks if isinstance(module, ModulatedMLP))
        for module in (self.cond_embed, self.out_modulation, *modulations):
            draw_weights(module, gain=self.config.init_gain)
        if self.config.zero_init:
            gates = [block.modulation for block in self.res_blocks if isinstance(block, ModulatedMLP)]
            for layer in (*gates, self.out_modulation, self.out):
                nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity from noise (t=0) to pixels (t=1).

        Args:
            x: Noisy patches, (M, P).
            t: Times in [0, 1], (M,).
            condition: Tokens, (M, C).

        Returns:
            (M, P).

        Raises:
            ValueError: A shape differs.
        """
        expect_shape("x", x, (None, self.config.patch_dim))
        expect_shape("t", t, (x.shape[0],))
        expect_shape("condition", condition, (x.shape[0], self.config.condition_dim))
        active = nn.functional.silu(self.time_embed(t) + self.cond_embed(condition))
        h = self.input_proj(x)
        for block in self.res_blocks:
            h = block(h, active)
        shift, scale = self.out_modulation(active).chunk(2, dim=-1)
        return self.out(self.out_norm(h) * (1 + scale) + shift)


def power_grid(steps: int, power: float = 1.0) -> tuple[float, ...]:
    """`steps + 1` times from 0 to 1 with `t_k = 1 - ((steps - k) / steps) ** (1 / power)`.

    Power 1 is the uniform grid; below 1 the steps are fine near the data.

    Raises:
        ValueError: `steps` is below 1 or `power` is not positive.
    """
    if steps < 1 or power <= 0:
        raise ValueError(f"steps must be at least 1 and power positive, got steps={steps}, power={power}")
    return tuple(1.0 - ((steps - k) / steps) ** (1.0 / power) for k in range(steps + 1))
