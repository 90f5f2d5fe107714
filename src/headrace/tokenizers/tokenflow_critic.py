"""The discriminator of VQGAN training: real or reconstructed, judged patch by patch (PatchGAN)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchCritic(nn.Module):
    """Convolutions of side 4 with stride 2, then two of stride 1; higher output means more real.

    Args:
        width: Channels of the first layer, doubled per layer up to eight times.
        layers: Number of layers with stride 2.

    Source: Isola et al. 2017 (arXiv 1611.07004), with the sizes of TokenFlow's release: width 64, 3 layers.
    """

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise ValueError(f"width and layers must be at least 1, got {width} and {layers}")
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            parts += [
                nn.Conv2d(widths[index - 1], widths[index], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[index]),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in about [-1, 1] to one number per patch, (B, 1, h, w)."""
        return self.net(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """The critic's loss: real above 1, made below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())


def without_gradient_to(critic: nn.Module, images: Tensor) -> Tensor:
    """The critic's verdict with gradients to the pictures but none to its own parameters."""
    fixed = {name: parameter.detach() for name, parameter in critic.named_parameters()}
    return torch.func.functional_call(critic, fixed, (images,))
