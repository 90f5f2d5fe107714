"""Named sizes of the policy network. Tiny and published differ in numbers only."""

from headrace.contracts import ActionSpec
from headrace.datasets.normalize import NormalizerConfig
from headrace.nn.image_tokens import ImageTokensConfig
from headrace.robot.action_decoder import ActionDecoderConfig
from headrace.robot.vipra import VipraConfig
from headrace.robot.vipra_config import Attention, BackboneConfig

SIZES = ("tiny", "small", "published")


def policy_config(
    size: str,
    spec: ActionSpec,
    *,
    cameras: tuple[str, ...],
    camera_size: int = 224,
    crop: tuple[int, int] | None = None,
) -> VipraConfig:
    """A config of a named size, without statistics and words: `headrace.robot.finetune` takes those from the data.

    `tiny` trains in seconds; `small` (3.2 M parameters) on two CPU cores in under an hour; `published` is ViPRA-FM's
    shape (LWM's 7 B decoder, two frames of 256 tokens from DINOv2-B/14, 14 actions ahead).

    Args:
        size: One of `SIZES`.
        spec: The action convention.
        cameras: Camera names.
        camera_size: Side of the cameras' pictures [px].
        crop: (left, top) of the square that the network sees [px]; the middle by default.

    Raises:
        ValueError: Unknown size, or cameras smaller than the network's picture.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r} (known: {', '.join(SIZES)})")
    history: tuple[int, ...]
    attention: Attention
    if size == "published":
        image = ImageTokensConfig(size=224, width=4096)
        backbone, history, attention, draws = BackboneConfig(), (-1, 0), "causal", 1
        decoder = ActionDecoderConfig(action_dim=spec.dim)
    elif size == "small":
        width = 192
        image = ImageTokensConfig(backbone="resnet10t", size=128, width=width, stage=3, keypoints=32)
        backbone = BackboneConfig(width=width, layers=4, heads=3, mlp=512, rope_theta=1e4)
        decoder = ActionDecoderConfig(width=width, action_dim=spec.dim)
        history, attention, draws = (0,), "bidirectional", 4
    else:
        width = 32
        image = ImageTokensConfig.tiny(width=width)
        backbone = BackboneConfig(width=width, layers=2, heads=2, mlp=64, rope_theta=1e4)
        decoder = ActionDecoderConfig(width=width, action_dim=spec.dim, horizon=4)
        history, attention, draws = (0,), "causal", 1
    margin = camera_size - image.size
    if margin < 0:
        raise ValueError(f"a {size} policy sees {image.size} px, the cameras give {camera_size} px")
    return VipraConfig(
        spec=spec.to_dict(),
        cameras=cameras,
        action_normalizer=NormalizerConfig.identity(spec.dim),
        image=image,
        backbone=backbone,
        decoder=decoder,
        camera_size=camera_size,
        crop=crop or (margin // 2, margin // 2),
        history=history,
        prefix_attention=attention,  # type: ignore[arg-type]
        action_attention=attention,  # type: ignore[arg-type]
        draws=draws,
    )
