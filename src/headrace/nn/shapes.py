"""Shape checks at public borders."""

from collections.abc import Sequence

from torch import Tensor


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Check a tensor's shape.

    Args:
        name: What the caller calls the tensor.
        tensor: Any tensor.
        shape: Expected sizes; None accepts any size in that place.

    Raises:
        ValueError: Names the tensor, the expected and the given shape.
    """
    fits = tensor.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        letters = iter("BTNCHW")
        wanted = ", ".join(next(letters, "*") if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
