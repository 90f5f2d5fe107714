"""UniFlow: one vision transformer for understanding and pixels, decoded patch by patch with a rectified flow.

Source: arXiv 2510.10575 and ZhengrongYue/UniFlow (modeling_uniflow.py). Time runs from noise (0) to pixels (1).
"""

# Shape letters in this file: B batch, N patches, D encoder width, Z latent channels, P numbers in a patch.

from functools import partial
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from headrace.flow.blockwise import sample_blockwise
from headrace.flow.solver import SolverSettings
from headrace.nn.grid_positions import GridPositions
from headrace.nn.patch_flow import PatchFlow, power_grid
from headrace.nn.patches import patch_grid, unpatchify
from headrace.nn.segmented_patch_flow import SegmentedPatchFlow
from headrace.nn.shapes import expect_shape
from headrace.nn.starting_weights import draw_weights
from headrace.nn.vit_features import block_outputs, patch_tokens
from headrace.tokenizers.base import RANGE_SLACK, Preprocessing
from headrace.tokenizers.flow_tokenizer import FlowTokenizer, one_of
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import build_vit

Grid = tuple[int, int]


class Bottleneck(nn.Module):
    """Linear, GELU, Linear on each token."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width_in, hidden)
        self.c_proj = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class UniFlow(FlowTokenizer):
    """A vision transformer with a bottleneck and a pixel decoder. Pixels in [0, 1], normalised by `preprocessing`.

    Grids other than the native one are accepted wherever images are: sides that are multiples of the patch, with
    the position tables interpolated on the plane. `decode` then needs the grid if it is not square.
    """

    Config = UniFlowConfig
    kind: ClassVar[Literal["discrete", "continuous"]] = "continuous"
    VARIANTS = ("internvit_300m", "dinov2_l", "dfn_clip_l", "siglip2_so400m", "tiny")

    latent_count: Tensor
    latent_mean: Tensor
    latent_square: Tensor

    def __init__(self, config: UniFlowConfig) -> None:
        super().__init__(config)
        width, grid = config.encoder.width, config.encoder.grid
        self.encoder = build_vit(config.encoder)
        self.to_latent = Bottleneck(width, width, config.latent_channels)
        self.from_latent = Bottleneck(config.latent_channels, width, width)
        self.global_positions = GridPositions(grid, width, interpolate=config.interpolate_positions)
        self.decoder_positions = GridPositions(grid, width, interpolate=config.interpolate_positions)
        self.global_blocks = nn.Sequential(
            *(
                Block(width, config.global_heads, qkv_bias=True, norm_layer=nn.LayerNorm)
                for _ in range(config.global_depth)
            )
        )
        self.flow_head: PatchFlow | SegmentedPatchFlow = (
            PatchFlow(config.flow_head)
            if config.flow_segments == 1
            else SegmentedPatchFlow(config.flow_head, config.flow_segments)
        )
        for part in (self.to_latent, self.from_latent):
            part.apply(partial(draw_weights, gain=config.init_gain))
        self.global_blocks.apply(draw_weights)
        self.register_buffer("latent_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels, dtype=torch.float64))
        self.register_buffer("latent_square", torch.ones(config.latent_channels, dtype=torch.float64))

    @classmethod
    def adapt(cls, config: UniFlowConfig) -> Self:
        """A new tokenizer around timm's pretrained weights of `config.encoder`, ready for training.

        Raises:
            ValueError: The encoder config has no weight tag.
            OSError: The weights are neither cached nor reachable.
        """
        model = cls(config)
        model.encoder.load_state_dict(build_vit(config.encoder, pretrained=True).state_dict())
        return model

    @property
    def preprocessing(self) -> Preprocessing:
        """Centre crop to the native size, then the encoder's mean and deviation."""
        encoder = self.config.encoder
        return Preprocessing(size=encoder.image_size, mean=encoder.mean, std=encoder.std)

    @property
    def tokens_per_image(self) -> int:
        """Patches at the native size."""
        rows, columns = self.config.encoder.grid
        return rows * columns

    @property
    def feature_dim(self) -> int:
        """Encoder width D."""
        return self.config.encoder.width

    def grid_of(self, images: Tensor) -> Grid:
        """Rows and columns of patches in a batch of images.

        Raises:
            ValueError: Alpha channel, wrong type or range, sides that patches do not fill, or another grid than the
                native one while `interpolate_positions` is off.
        """
        p = self.preprocessing
        wanted = f"images must be floating point (B, 3, H, W) with values in [{p.low:.3g}, {p.high:.3g}]"
        if not images.is_floating_point():
            raise ValueError(f"{wanted}, got {images.dtype}; `preprocessing` turns pictures into such a batch")
        if images.ndim != 4 or images.shape[1] != 3 or not images.shape[0]:
            alpha = ": drop the alpha channel" if images.ndim == 4 and images.shape[1] == 4 else ""
            raise ValueError(f"{wanted}, got shape {tuple(images.shape)}{alpha}")
        low, high = (value.item() for value in images.detach().aminmax())
        slack = RANGE_SLACK if images.dtype == torch.float32 else 0.05
        if not (p.low - slack <= low and high <= p.high + slack):
            raise ValueError(f"{wanted}, got values in [{low:.3g}, {high:.3g}]")
        grid = patch_grid(images.shape[-2], images.shape[-1], self.config.encoder.patch)
        if grid != self.config.encoder.grid and not self.config.interpolate_positions:
            raise ValueError(
                f"images have a grid of {grid[0]} x {grid[1]} patches, the position tables {self.config.encoder.grid}, "
                f"and interpolate_positions is off; resize to {p.size} x {p.size} px"
            )
        return grid

    def hidden(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Patch tokens after every block, un-normed, L tensors (B, N, D), and the last ones after the final norm."""
        layers, last = [], images
        for last in block_outputs(self.encoder, images):
            layers.append(patch_tokens(self.encoder, last))
        return layers, patch_tokens(self.encoder, self.encoder.norm(last))

    def latent(self, tokens: Tensor) -> Tensor:
        """Encoder tokens (B, N, D) through the bottleneck to latents (B, N, Z)."""
        z = self.to_latent(tokens)
        return F.layer_norm(z, z.shape[-1:]) if self.config.latent_norm == "layernorm" else z

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to latents (B, N, Z), patches row-major; raises ValueError as `grid_of`."""
        self.grid_of(images)
        return self.latent(self.hidden(images)[1])

    def features(self, images: Tensor, *, merge: int = 1) -> Tensor:
        """Encoder tokens for a language model, before the bottleneck.

        Args:
            images: (B, 3, H, W).
            merge: Side of the square of neighbouring tokens joined into one; 2 quarters the count (InternVL).

        Returns:
            (B, N / merge**2, D * merge**2).

        Raises:
            ValueError: The grid does not divide by `merge`.
        """
        rows, columns = self.grid_of(images)
        if merge < 1 or rows % merge or columns % merge:
            raise ValueError(f"merge {merge} does not divide a grid of {rows} x {columns}")
        tokens = self.hidden(images)[1]
        if merge == 1:
            return tokens
        cut = tokens.reshape(len(tokens), rows // merge, merge, columns // merge, merge, -1)
        return cut.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)

    def condition(self, latents: Tensor, grid: Grid) -> Tensor:
        """Latents (B, N, Z) to the flow head's tokens (B, N, D): expand, add positions, mix globally."""
        c = self.from_latent(latents) + self.global_positions(grid)
        return self.global_blocks(c) + self.decoder_positions(grid)

    def decode(
        self,
        tokens: Tensor,
        *,
        grid: Grid | None = None,
        steps: int | None = None,
        solver: SolverSettings | None = None,
        noise: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Latents to images.

        Args:
            tokens: Latents, (B, N, Z).
            grid: Rows and columns; default the native grid, or the square of N.
            steps: Euler steps, default from the config. One step gives the mean image, which more do not sharpen.
            solver: In place of `steps`: how the flow is followed. Default: the step grid saved with the weights, else
                the config's steps.
            noise: Start of the flow, (B * N, P). Default: one draw per patch position from `seed`, the same for every
                image, so that an image decodes alike alone and in any batch.
            seed: Seed of that draw.

        Returns:
            Normalised images, (B, 3, H, W), not clamped.

        Raises:
            GridMismatch: The network is straightened for its own step grid, and another was asked for.
            ValueError: Wrong shapes, N does not fit the grid, both steps and solver, or fewer steps than the flow
                head has segments.
        """
        expect_shape("tokens", tokens, (None, None, self.config.latent_channels))
        batch, count = tokens.shape[:2]
        grid = grid or self._square(count)
        if grid[0] * grid[1] != count:
            raise ValueError(f"{count} tokens do not fill a grid of {grid[0]} x {grid[1]}")
        length = self.flow_head.config.patch_dim
        if noise is None:
            source = torch.Generator().manual_seed(seed)
            one = torch.randn(count, length, generator=source).to(tokens.device, tokens.dtype)
            noise = one.repeat(batch, 1)
        expect_shape("noise", noise, (batch * count, length))
        condition = self.condition(tokens, grid).flatten(0, 1)
        asked = one_of(solver, None if steps is None else self._power_steps(steps))
        chosen = self.settings(asked, default=self._power_steps(self.config.steps))
        patches = self._follow(condition, noise, chosen)
        return unpatchify(patches.reshape(batch, count, length), grid) / self.config.target_scale

    def _power_steps(self, steps: int) -> SolverSettings:
        """Euler on the config's schedule."""
        return SolverSettings(grid=power_grid(steps, self.config.schedule_power))

    def _follow(self, condition: Tensor, noise: Tensor, solver: SolverSettings) -> Tensor:
        """Patches (M, P) from noise of that shape and condition tokens (M, D)."""
        head = self.flow_head
        if isinstance(head, SegmentedPatchFlow):
            return sample_blockwise(head.bind(condition), noise[:, None], solver, borders=head.borders)[:, 0]
        return solver.sample(lambda x, t: head(x, t, condition), noise)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images of any grid through encoder and decoder, clamped to the range of `preprocessing`."""
        grid = self.grid_of(images)
        return self.decode(self.encode(images), grid=grid).clamp(self.preprocessing.low, self.preprocessing.high)

    def _square(self, count: int) -> Grid:
        side = round(count**0.5)
        if side * side != count:
            raise ValueError(f"{count} tokens are no square grid; give grid=(rows, columns)")
        return side, side

    @torch.no_grad()
    def observe_latents(self, latents: Tensor) -> None:
        """Add latents (B, N, Z) to the running mean and variance per channel that diffusion models need."""
        flat = latents.detach().double().flatten(0, -2)
        total = self.latent_count + len(flat)
        keep = self.latent_count / total
        self.latent_mean.mul_(keep).add_(flat.sum(0) / total)
        self.latent_square.mul_(keep).add_(flat.square().sum(0) / total)
        self.latent_count.copy_(total)

    @torch.no_grad()
    def forget_latents(self) -> None:
        """Begin the running statistics anew: after the encoder has changed, those of its earlier latents are wrong."""
        self.latent_count.zero_()
        self.latent_mean.zero_()
        self.latent_square.fill_(1.0)

    def latent_std(self) -> Tensor:
        """Deviation of each latent channel seen so far, (Z,)."""
        return (self.latent_square - self.latent_mean.square()).clamp_min(1e-12).sqrt()

    def normalise_latents(self, latents: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 per channel; raises ValueError before `observe_latents` was called."""
        if not self.latent_count.item():
            raise ValueError("no latent statistics yet; call observe_latents on encoded training images first")
        return ((latents - self.latent_mean) / self.latent_std()).to(latents.dtype)

    def denormalise_latents(self, latents: Tensor) -> Tensor:
        """Undo `normalise_latents`."""
        if not self.latent_count.item():
            raise ValueError("no latent statistics yet; call observe_latents on encoded training images first")
        return (latents * self.latent_std() + self.latent_mean).to(latents.dtype)
