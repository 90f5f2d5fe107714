"""Images to rows of patch pixels and back: patches row-major, inside a patch (channel, row, column)."""

from torch import Tensor


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: A side is not a positive multiple of `patch`; the nearest sizes that are get named.
    """
    if height < patch or width < patch or height % patch or width % patch:
        fits = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
        raise ValueError(
            f"image of {height} x {width} px does not divide into patches of {patch} px; resize or crop it to {fits}"
        )
    return height // patch, width // patch


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to patch vectors (B, N, C * patch * patch)."""
    rows, columns = patch_grid(images.shape[-2], images.shape[-1], patch)
    batch, channels = images.shape[:2]
    cut = images.reshape(batch, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


def unpatchify(patches: Tensor, grid: tuple[int, int], *, channels: int = 3) -> Tensor:
    """Patch vectors (B, N, C * p * p) on a grid of (rows, columns) to images (B, C, rows * p, columns * p).

    Raises:
        ValueError: N is not rows times columns, or the vectors are not C squares.
    """
    (rows, columns), (batch, count, length) = grid, patches.shape
    patch = round((length / channels) ** 0.5)
    if count != rows * columns or patch * patch * channels != length:
        raise ValueError(
            f"patches must be (B, {rows * columns}, {channels} * p * p) for a {rows} x {columns} grid, "
            f"got {tuple(patches.shape)}"
        )
    cut = patches.reshape(batch, rows, columns, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * patch, columns * patch)
