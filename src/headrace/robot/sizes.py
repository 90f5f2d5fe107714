"""Named sizes of the policy network. Tiny and published differ in numbers only."""

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.frame_codes import FrameCodesConfig
from headrace.robot.vipra import VipraConfig
from headrace.robot.vipra_config import BackboneConfig, TrunkConfig, shared_fields
from headrace.vlm.visual_encoder import VisualEncoderConfig

SIZES = ("tiny", "small", "published")


# Width, layers, heads and MLP of the two sizes for a CPU; `published` has LWM's.
BACKBONES = {
    "tiny": BackboneConfig(width=32, layers=2, heads=2, mlp=64, rope_theta=1e4),
    "small": BackboneConfig(width=192, layers=4, heads=3, mlp=512, rope_theta=1e4),
    "published": BackboneConfig(),
}
HORIZONS = {"tiny": 4, "small": 14, "published": 14}
DRAWS = {"tiny": 1, "small": 4, "published": 1}


def trunk_config(
    size: str,
    *,
    cameras: tuple[str, ...],
    camera_size: int = 224,
    crop: tuple[int, int] | None = None,
    encoder: VisualEncoderConfig | None = None,
    backbone: BackboneConfig | None = None,
) -> TrunkConfig:
    """What a network of a named size sees and reads it with, without words.

    `tiny` trains in seconds; `small` on two CPU cores in under an hour; `published` has the shape of LWM's 7 B decoder
    and two frames.

    Args:
        size: One of `SIZES`.
        cameras: Camera names.
        camera_size: Side of the cameras' pictures [px].
        crop: (left, top) of the square that the network sees [px]; the middle by default.
        encoder: A discrete tokenizer whose ids the network reads, as published; else frames go through a trained
            encoder, DINOv2-B/14 at the published size.
        backbone: In place of the size's own.

    Raises:
        ValueError: Unknown size, or cameras smaller than the network's picture.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r} (known: {', '.join(SIZES)})")
    backbone = backbone or BACKBONES[size]
    image = _image(size, backbone.width, min(camera_size, 256) if size == "published" else camera_size, encoder)
    margin = camera_size - image.size
    if margin < 0:
        raise ValueError(f"a {size} policy sees {image.size} px, the cameras give {camera_size} px")
    return TrunkConfig(
        cameras=cameras,
        image=image,
        backbone=backbone,
        camera_size=camera_size,
        crop=crop or (margin // 2, margin // 2),
        history=(-1, 0) if size == "published" else (0,),
        prefix_attention="bidirectional" if size == "small" else "causal",
    )


def _image(
    size: str, width: int, camera_size: int, encoder: VisualEncoderConfig | None
) -> ImageTokensConfig | FrameCodesConfig:
    if encoder is not None:
        side = camera_size if size == "published" else image_size(size)
        return FrameCodesConfig(encoder=encoder, size=side, width=width, reserved=256 if size == "published" else 2)
    if size == "published":
        return ImageTokensConfig(size=image_size(size), width=width)
    if size == "small":
        return ImageTokensConfig(backbone="resnet10t", size=image_size(size), width=width, stage=3, keypoints=32)
    return ImageTokensConfig.tiny(width=width)


def image_size(size: str) -> int:
    """Side of the picture that a network of a named size sees [px]."""
    return {"tiny": 64, "small": 128, "published": 224}[size]


def policy_config(
    size: str,
    spec: ActionSpec,
    *,
    cameras: tuple[str, ...],
    camera_size: int = 224,
    crop: tuple[int, int] | None = None,
) -> VipraConfig:
    """A policy of a named size, without statistics and words: `headrace.robot.finetune` takes those from the data.

    `small` has 3.2 M parameters; `published` is ViPRA-FM's shape (two frames of 256 tokens from DINOv2-B/14, 14 actions
    ahead).

    Args:
        size: One of `SIZES`.
        spec: The action convention.
        cameras: Camera names.
        camera_size: Side of the cameras' pictures [px].
        crop: (left, top) of the square that the network sees [px]; the middle by default.

    Raises:
        ValueError: Unknown size, or cameras smaller than the network's picture.
    """
    trunk = trunk_config(size, cameras=cameras, camera_size=camera_size, crop=crop)
    return VipraConfig(
        **shared_fields(trunk, TrunkConfig),
        spec=spec.to_dict(),
        action_normalizer=NormalizerConfig.identity(spec.dim),
        decoder=ActionDecoderConfig(width=trunk.backbone.width, action_dim=spec.dim, horizon=HORIZONS[size]),
        action_attention=trunk.prefix_attention,
        draws=DRAWS[size],
    )
