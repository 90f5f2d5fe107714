"""What the semantic half is taught: features of a frozen vision network on the tokenizer's grid."""

import copy
from typing import Any, NamedTuple, Protocol

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.nn.perceptual import EFFICIENTNET_WIDTHS, EfficientNetLite0, Frozen
from headrace.tokenizers.tokenflow_semantic import (
    CLIP_MEAN,
    CLIP_STD,
    EFFICIENTNET_STAGE,
    SemanticTower,
    TowerConfig,
    normalise,
)

# The published weights that towers start from and teachers keep.
PRETRAINED = {
    "clip": "vit_base_patch16_clip_quickgelu_224.openai",
    "vitamin": "vitamin_xlarge_256.datacomp1b_clip",
    "siglip": "vit_so400m_patch14_siglip_384.webli",
}


class TowerTeacher(Frozen):
    """A frozen copy of the tower as it was before training.

    The `clip` tower's teacher sees pictures with CLIP's mean and std (the student does not) and its features go through
    CLIP's projection; the others give what the student's tower gives.

    Args:
        tower: The tower with pretrained weights; it is copied.
        projection: CLIP's projection, shape (teacher, width); only for `clip`.
    """

    projection: Tensor | None

    def __init__(self, tower: SemanticTower, projection: Tensor | None = None) -> None:
        super().__init__()
        if (projection is None) == (tower.config.family == "clip"):
            raise ValueError(f"a projection is for the clip tower and only for it, the tower is {tower.config.family}")
        self.tower = copy.deepcopy(tower)
        self.register_buffer("projection", projection, persistent=True)
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) in [-1, 1] to features (B, g * g, T)."""
        if self.projection is None:
            return self.tower(images)
        return F.linear(self.tower(normalise(images, CLIP_MEAN, CLIP_STD)), self.projection)


class EfficientNetTeacher(Frozen):
    """Features of EfficientNet-Lite0 at 1/16 of its input, for training without a network connection.

    Args:
        net: The network; its `side` should be 16 times `grid`, otherwise its map is averaged to the grid.
        grid: Side of the tokenizer's grid.
    """

    width = EFFICIENTNET_WIDTHS[EFFICIENTNET_STAGE]

    def __init__(self, net: EfficientNetLite0, *, grid: int) -> None:
        super().__init__()
        self.net, self.grid = net, grid
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to features (B, g * g, 112)."""
        return self.on_grid(self.map(images))

    @torch.no_grad()
    def map(self, images: Tensor) -> Tensor:
        """The network's own map, shape (B, 112, side / 16, side / 16)."""
        return self.net.stages(images)[EFFICIENTNET_STAGE]

    def on_grid(self, features: Tensor) -> Tensor:
        """A map (B, 112, h, w) on the tokenizer's grid, (B, g * g, 112)."""
        if features.shape[-1] < self.grid:
            features = F.interpolate(features, size=(self.grid, self.grid), mode="bilinear")
        return F.adaptive_avg_pool2d(features, self.grid).flatten(2).transpose(1, 2)

    def start(self, tower: SemanticTower) -> None:
        """Give a tower of family `efficientnet` these weights, as the paper's students start from their teachers.

        Raises:
            ValueError: The tower is of another family.
        """
        if tower.config.family != "efficientnet":
            raise ValueError(f"the efficientnet teacher cannot start a tower of family {tower.config.family!r}")
        state = self.net.net.state_dict()
        tower.model.load_state_dict({name: state[name] for name in tower.model.state_dict()})


class Pictures(Protocol):
    """Pictures by index, the same at every call."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Tensor:
        """Shape (B, 3, size, size) in [-1, 1]."""


class Taught(NamedTuple):
    """Pictures (B, 3, size, size) in [-1, 1] and their teacher's features (B, g * g, T)."""

    images: Tensor
    features: Tensor


class TaughtPictures:
    """Pictures with the features that an `EfficientNetTeacher` has for them, computed once and kept in memory.

    The teacher's map is kept as half-precision numbers before it is interpolated: 14 KiB a picture at a grid of 8.

    Args:
        pictures: Where pictures come from; each is made once here and again when it is asked for.
        teacher: The frozen teacher.
        at_once: Pictures per pass of the teacher.
    """

    def __init__(self, pictures: Pictures, teacher: EfficientNetTeacher, *, at_once: int = 16) -> None:
        self.pictures, self.teacher = pictures, teacher
        blocks = np.array_split(np.arange(len(pictures)), -(-len(pictures) // at_once))
        self.maps = torch.cat([teacher.map(pictures.batch(block)).half() for block in blocks])

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: np.ndarray) -> Taught:
        """Pictures of these indices with their features."""
        return Taught(self.pictures.batch(indices), self.teacher.on_grid(self.maps[torch.as_tensor(indices)].float()))


def pretrained_teacher(config: TowerConfig) -> TowerTeacher:
    """The teacher with the published weights of a tower, from timm's cache or the Hub; the student copies its tower."""
    full: Any = timm.create_model(PRETRAINED[config.family], pretrained=True)
    projection = full.head.weight.detach().clone() if config.family == "clip" else None
    state = full.state_dict()
    tower = SemanticTower(config)
    tower.model.load_state_dict({name: state[name] for name in tower.model.state_dict()})
    return TowerTeacher(tower, projection)
