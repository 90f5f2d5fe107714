"""Frames as ids of a frozen image tokenizer, and the table of vectors that a transformer reads for them.

Source: ViPRA (arXiv 2511.07732; sroutray/vipra@d5d8c0d): context and future frames share one table (`vte`).
"""
# Shape letters: B pictures, N codes of a picture, D width.

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.vlm.visual_encoder import VisualEncoder, VisualEncoderConfig


@dataclass(frozen=True, kw_only=True)
class FrameCodesConfig:
    """A discrete tokenizer in front of a transformer.

    Attributes:
        encoder: The tokenizer, with `tokens="codes"`.
        size: Side of the square that is cut from the camera's picture [px]; it is resized to the tokenizer's own size.
        width: Width of the transformer.
        reserved: Ids kept after the codes: EOF first, EOV second.
    """

    encoder: VisualEncoderConfig
    size: int
    width: int = 4096
    reserved: int = 256

    def __post_init__(self) -> None:
        if self.encoder.tokens != "codes":
            raise ValueError(f"frames as ids need the encoder's codes, got {self.encoder.tokens}")
        if self.size < 8 or self.width < 1 or self.reserved < 2:
            raise ValueError(f"size {self.size}, width {self.width} and reserved {self.reserved} do not make sense")


class FrameCodes(nn.Module):
    """The frozen tokenizer and the table of its ids.

    Attributes:
        tokens: Codes of a picture, N.
        codes: Size of the codebook; ids `codes` and `codes + 1` are EOF and EOV.
    """

    def __init__(self, config: FrameCodesConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisualEncoder(config.encoder).requires_grad_(False)
        self.tokens = self.encoder.tokens_per_picture
        assert self.encoder.codes is not None  # the config asks for codes
        self.codes = self.encoder.codes
        self.table = nn.Embedding(self.codes + config.reserved, config.width)
        nn.init.normal_(self.table.weight, std=0.02)

    def train(self, mode: bool = True) -> Self:
        """The tokenizer stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures to codes.

        Args:
            images: uint8 in 0..255 or float in 0..1, RGB, shape (B, 3, s, s), of any side s.

        Returns:
            int64, shape (B, N).
        """
        return frames_to_codes(self.encoder, images)

    def forward(self, images: Tensor) -> Tensor:
        """Vectors of pictures, shape (B, N, D); `images` as in `encode`."""
        return self.table(self.encode(images))


@torch.no_grad()
def frames_to_codes(encoder: VisualEncoder, images: Tensor) -> Tensor:
    """Codes, int64 (B, N), of pictures (B, 3, s, s), uint8 in 0..255 or float in 0..1, resized to the encoder's size.

    Raises:
        ValueError: The pictures are not square.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must have shape (B, 3, s, s), got {tuple(images.shape)}")
    unit = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    wanted = encoder.preprocessing
    if unit.shape[-1] != wanted.size:
        side = (wanted.size, wanted.size)
        unit = F.interpolate(unit, size=side, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (unit.new_tensor(numbers).view(1, 3, 1, 1) for numbers in (wanted.mean, wanted.std))
    with torch.autocast(images.device.type, enabled=False):
        return encoder((unit - mean) / std)
