"""The per-patch velocity network over time segments: shared blocks, and some of its own for each segment.

Source: Blockwise Flow Matching, arXiv 2510.21167, on UniFlow's decoder.
"""

# Shape letters in this file: M patches of all images, P numbers in a patch, C condition width.

from torch import Tensor, nn

from headrace.nn.blockwise import BlockwiseConfig, BlockwiseVelocity, BoundBlockwise
from headrace.nn.patch_flow import PatchFlowConfig
from headrace.nn.shapes import expect_shape


class SegmentedPatchFlow(nn.Module):
    """As `PatchFlow`, with a third of the blocks once for each segment; gates and output start at zero.

    Every patch is a sequence of one token to the blockwise network, so each has a time and a stack of its own.

    Args:
        config: Sizes; `time_features`, `zero_init` and `init_gain` are of `PatchFlow` alone.
        segments: Equal segments of time.
    """

    def __init__(self, config: PatchFlowConfig, segments: int) -> None:
        super().__init__()
        self.config = config
        sizes = BlockwiseConfig.patches(
            patch_dim=config.patch_dim,
            condition_dim=config.condition_dim,
            width=config.width,
            grid=(1, 1),
            depth=config.depth,
            segments=segments,
            residual_depth=0,
        )
        self.network = BlockwiseVelocity(sizes)

    @property
    def borders(self) -> tuple[float, ...]:
        """Times at which segments begin and end, from 0 to 1."""
        return self.network.config.borders

    def bind(self, condition: Tensor) -> BoundBlockwise:
        """The network under condition tokens (M, C), over patches as sequences of one, (M, 1, P)."""
        return self.network.bind(condition[:, None])

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity from noise (t=0) to pixels (t=1), (M, P); arguments and errors as `PatchFlow.forward`."""
        expect_shape("x", x, (None, self.config.patch_dim))
        expect_shape("t", t, (x.shape[0],))
        expect_shape("condition", condition, (x.shape[0], self.config.condition_dim))
        return self.bind(condition)(x[:, None], t)[:, 0]
