"""What every image tokenizer offers, discrete or continuous: encode, decode, features for a language model."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headrace.nn.pretrained import WEIGHTS_FILE, MisfitError, Pretrained, read_weights, resolve_folder

RANGE_SLACK = 1e-3
Picture = Image.Image | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes a tokenizer's input and comes back: resize to a square, then (x / 255 - mean) / std.

    Attributes:
        size: Side of the square input [px].
        mean, std: Per RGB channel. 0.5 and 0.5 give values in [-1, 1]; 0 and 1 give [0, 1].
        fit: `crop` keeps the aspect and cuts the centre (halving with a box filter while the short side is at least
            twice `size`, then bicubic: the evaluation crop of Dhariwal and Nichol 2021); `squash` resizes both sides.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 px, got {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}")
        if self.fit not in ("crop", "squash"):
            raise ValueError(f"fit must be 'crop' or 'squash', got {self.fit!r}")

    @property
    def low(self) -> float:
        """Smallest value that a picture can have after preprocessing."""
        return min((0 - m) / s for m, s in zip(self.mean, self.std, strict=True))

    @property
    def high(self) -> float:
        """Largest value that a picture can have after preprocessing."""
        return max((1 - m) / s for m, s in zip(self.mean, self.std, strict=True))

    def __call__(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Turn pictures into a model input.

        Args:
            pictures: One picture or a list, of any size: PIL images without transparency, or uint8 arrays of shape
                (H, W, 3) or (H, W) with values 0..255.

        Returns:
            float32, shape (B, 3, size, size), values in [low, high].

        Raises:
            ValueError: A picture has an alpha channel, is not uint8, or is empty.
        """
        several = pictures if isinstance(pictures, Sequence) else [pictures]
        if not several:
            raise ValueError("no pictures given; at least one is needed")
        stacked = np.stack([np.asarray(self._resize(to_rgb(p)), dtype=np.float32) for p in several])
        values = torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255
        return ((values - self._channels(self.mean, values)) / self._channels(self.std, values)).contiguous()

    def to_uint8(self, images: Tensor) -> np.ndarray:
        """Turn model output, shape (B, 3, H, W), into uint8 pictures of shape (B, H, W, 3); values are clamped."""
        unit = self.to_unit(images)
        return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def to_unit(self, images: Tensor) -> Tensor:
        """Undo mean and std and clamp: model output, shape (B, 3, H, W), as float32 in [0, 1]."""
        images = images.detach().float()
        return (images * self._channels(self.std, images) + self._channels(self.mean, images)).clamp(0, 1)

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Where a picture of this size [px] lies: left, top, right, bottom as shares of the square.

        What is cropped off lies below 0 and above 1.
        """
        if self.fit == "squash":
            return 0.0, 0.0, 1.0, 1.0
        wide, high = width / min(width, height), height / min(width, height)
        return (1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2

    def _channels(self, numbers: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)

    def _resize(self, picture: Image.Image) -> Image.Image:
        size = self.size
        if self.fit == "squash":
            return picture.resize((size, size), Image.Resampling.BICUBIC)
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = size / min(picture.size)
        wide, high = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (high - size) // 2
        return picture.crop((left, top, left + size, top + size))


def to_rgb(picture: Picture) -> Image.Image:
    """A PIL image in mode RGB; refuses transparency, because what lies behind it is the caller's choice.

    Raises:
        ValueError: The picture has an alpha channel, is no uint8 array of shape (H, W, 3) or (H, W), or is empty.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise ValueError(f"a picture array must be uint8 with values 0..255, got {picture.dtype}")
        if picture.ndim != 2 and not (picture.ndim == 3 and picture.shape[2] in (3, 4)):
            raise ValueError(f"a picture array must have shape (H, W, 3) or (H, W), got {picture.shape}")
        if 0 in picture.shape:
            raise ValueError(f"the picture is empty: shape {picture.shape}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture must be a PIL image or a uint8 array, got {type(picture).__name__}")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        raise ValueError(
            f"the picture has an alpha channel (mode {picture.mode}); paste it on a background of your choice "
            "and convert it to RGB first"
        )
    return picture.convert("RGB")


def check_images(images: Tensor, preprocessing: Preprocessing) -> None:
    """Check a batch at the border of a tokenizer.

    A picture in [0, 1] cannot be told from a bright one in [-1, 1], so only values outside the range are refused.

    Raises:
        ValueError: Wrong type, shape (alpha channel, other size) or value range; says what `Preprocessing` would give.
    """
    size = preprocessing.size
    wanted = f"images must be floating point of shape (B, 3, {size}, {size}) with values in "
    wanted += f"[{preprocessing.low:.3g}, {preprocessing.high:.3g}] (tokenizer.preprocessing(pictures) makes them)"
    if not images.is_floating_point():
        raise ValueError(f"{wanted}; got {images.dtype}")
    if images.ndim == 4 and images.shape[1] == 4:
        raise ValueError(f"{wanted}; got 4 channels, shape {tuple(images.shape)}: drop or blend the alpha channel")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size) or images.shape[0] == 0:
        raise ValueError(f"{wanted}; got shape {tuple(images.shape)}")
    low, high = (value.item() for value in images.detach().aminmax())
    slack = RANGE_SLACK if images.dtype == torch.float32 else 0.05
    if not (preprocessing.low - slack <= low and high <= preprocessing.high + slack):
        raise ValueError(f"{wanted}; got values in [{low:.3g}, {high:.3g}]")


def check_codes(codes: Tensor, *, size: int, name: str = "codes") -> None:
    """Check the codes of a discrete tokenizer.

    Raises:
        ValueError: Not an integer tensor of shape (B, N), or a code outside 0..size-1.
    """
    if codes.dtype not in (torch.int64, torch.int32) or codes.ndim != 2 or codes.numel() == 0:
        raise ValueError(f"{name} must be integers of shape (B, N), got {codes.dtype} {tuple(codes.shape)}")
    low, high = (int(value) for value in codes.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in 0..{size - 1} for a codebook of {size}, got {low}..{high}")


class Tokenizer(Pretrained, ABC):
    """An image tokenizer: pictures to tokens and back, and features that a language model can read.

    `kind` says what tokens are: `discrete`, int64 codes of shape (B, N); `continuous`, latents of shape (B, N, D).
    A subclass may add keyword-only arguments to `encode`, `decode` and `features` (a text, noise, a choice of
    features) as long as the call without them works.

    Attributes:
        VARIANTS: Names of class methods of `Config` that build a published or tiny configuration; the first is the
            default of `load_tokenizer`. `tiny` is always one of them.
    """

    kind: ClassVar[Literal["discrete", "continuous"]]
    VARIANTS: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """As `Pretrained.from_pretrained`; weights that do not fit are told by their variant where they have one."""
        try:
            return super().from_pretrained(source, revision=revision)
        except MisfitError as error:
            weights = read_weights(resolve_folder(source, revision=revision) / WEIGHTS_FILE)
            variant = cls.variant_of({name: tensor.shape for name, tensor in weights.items()})
            if variant is None:
                raise
            raise MisfitError(f"{error}; they look like the variant {variant!r}") from error

    @classmethod
    def variant_of(cls, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """The one of `VARIANTS` whose weights have these names and shapes, or None."""
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        for variant in cls.VARIANTS:
            with torch.device("meta"):
                state = cls(getattr(cls.Config, variant)()).state_dict()
            if {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted:
                return variant
        return None

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """Size and value range of the pictures that `encode` takes and `decode` returns."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """Number N of tokens that `encode` gives for one picture."""

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Last dimension F of what `features` returns."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Pictures, shape (B, 3, size, size) in the range of `preprocessing`, to tokens (B, N) or (B, N, D)."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to pictures, shape (B, 3, size, size), about in the range of `preprocessing` (not clamped)."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Pictures to features for a language model, shape (B, M, F); M need not be N."""

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """`decode(encode(images))` without gradients, clamped to the range of `preprocessing`."""
        return self.decode(self.encode(images)).clamp(self.preprocessing.low, self.preprocessing.high)
