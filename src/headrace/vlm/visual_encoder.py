"""Pictures as rows for a language model: any timm encoder, or any headrace tokenizer's features, latents or codes."""
# Shape letters in this file: B pictures, N tokens, D width, H, W sides of a feature map.

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from headrace.nn.pretrained import config_from_dict
from headrace.tokenizers.auto import tokenizer_class
from headrace.tokenizers.base import Preprocessing, Tokenizer
from headrace.vlm.canvas import Canvas
from headrace.vlm.conv_stem import ConvStem, StemConfig
from headrace.vlm.pruning.towers import Tower, find_tower


@dataclass(frozen=True, kw_only=True)
class VisualEncoderConfig:
    """Which encoder, and what is taken from it.

    Attributes:
        source: `timm`, or a tokenizer family of `headrace.tokenizers.auto`.
        name: timm's model name; empty for a tokenizer.
        arguments: Arguments of `timm.create_model`, or the tokenizer's config as a dict.
        size: Side of the pictures [px], for timm; a tokenizer knows its own.
        fit: Whether a picture is squashed to a square, cropped, or put on a canvas at its natural size, for timm.
        tokens: `features` for a language model; `latents`, what a continuous tokenizer's `encode` gives; `codes`,
            what a discrete one's gives.
        choice: Which features of TokenFlow, see `TokenFlow.features`; only `last` for all others.
        merge: Side of the square of neighbouring tokens that are joined into one.
        stem: Convolutions that take the place of a timm ViT's patch projection.
    """

    source: str
    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    fit: Literal["crop", "squash", "pad"] = "squash"
    tokens: Literal["features", "latents", "codes"] = "features"
    choice: Literal["last", "semantic", "all", "residual"] = "last"
    merge: int = 1
    stem: StemConfig | None = None

    def __post_init__(self) -> None:
        if self.source == "timm" and not self.name:
            raise ValueError("a timm encoder needs the model's name")
        if self.source == "timm" and self.tokens != "features":
            raise ValueError(f"a timm encoder gives features, not {self.tokens}")
        if self.source != "timm" and self.stem is not None:
            raise ValueError(f"a stem belongs to a timm ViT, {self.source} has its own first layers")
        if self.fit not in ("crop", "squash", "pad"):
            raise ValueError(f"fit must be 'crop', 'squash' or 'pad', got {self.fit!r}")
        if self.tokens not in ("features", "latents", "codes"):
            raise ValueError(f"tokens must be 'features', 'latents' or 'codes', got {self.tokens!r}")
        if self.choice not in ("last", "semantic", "all", "residual"):
            raise ValueError(f"choice must be 'last', 'semantic', 'all' or 'residual', got {self.choice!r}")
        if self.choice != "last" and (self.source != "tokenflow" or self.tokens != "features"):
            raise ValueError(f"a choice of features is TokenFlow's, {self.tokens} of {self.source} leave none")
        if self.merge < 1 or (self.merge > 1 and self.tokens == "codes"):
            raise ValueError(f"merge must be at least 1, and 1 for codes, got {self.merge}")

    @classmethod
    def of_tokenizer(
        cls, tokenizer: Tokenizer, *, family: str, tokens: Literal["features", "latents", "codes"], merge: int = 1
    ) -> "VisualEncoderConfig":
        """The settings that rebuild `tokenizer`, of the given family."""
        return cls(source=family, arguments=asdict(tokenizer.config), tokens=tokens, merge=merge)


class VisualEncoder(nn.Module):
    """An encoder under one call: `forward(pixels)` gives rows (B, N, D), or codes, int64 (B, N).

    Attributes:
        inner: The timm model or the tokenizer.
        preprocessing: Turns pictures into `pixels`.
        width: Size D of a row; 0 for codes.
        codes: Number of codes, None for rows.
        tokens_per_picture: Number N.
    """

    def __init__(self, config: VisualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.inner: Any
        if config.source == "timm":
            self.inner, self.preprocessing = _timm(config)
        else:
            family = tokenizer_class(config.source)
            self.inner = family(config_from_dict(family.Config, config.arguments))
            self.preprocessing = self.inner.preprocessing
            wanted = {"codes": "discrete", "latents": "continuous"}.get(config.tokens, self.inner.kind)
            if wanted != self.inner.kind:
                raise ValueError(f"{config.source} is a {self.inner.kind} tokenizer and has no {config.tokens}")
        self.eval()
        probe = torch.full((1, 3, self.preprocessing.size, self.preprocessing.size), self.preprocessing.low)
        with torch.no_grad():
            rows = self(probe)
        self.tokens_per_picture = rows.shape[1]
        self.width = rows.shape[2] if rows.ndim == 3 else 0
        self.codes = self._code_count() if config.tokens == "codes" else None

    def _code_count(self) -> int:
        config = self.inner.config
        return int(getattr(config, "quantizer", config).codes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Rows (B, N, D) or codes (B, N); rows are NaN where a pruning context dropped their patches."""
        if self.config.source == "timm":
            rows = _rows(self.inner, self.inner.forward_features(pixels))
        elif self.config.tokens == "features":
            chosen = {"choice": self.config.choice} if self.config.source == "tokenflow" else {}
            rows = self.inner.features(pixels, **chosen)
        else:
            rows = self.inner.encode(pixels)
        return rows if self.config.merge == 1 else merge_neighbours(rows, self.config.merge)

    def tower(self) -> Tower:
        """What pruning must know of this encoder.

        Raises:
            ValueError: The encoder has no attention to score, or its rows are not its patches one by one.
        """
        if self.config.source not in ("timm", "uniflow") or self.config.tokens != "features":
            raise ValueError(
                f"{self.config.tokens} of {self.config.source} are not patches of one transformer; pruning inside the "
                "encoder needs the features of a timm ViT or of UniFlow"
            )
        inner = self.inner if self.config.source == "timm" else self.inner.encoder
        return dataclasses.replace(find_tower(inner), unit=self.config.merge)


def _timm(config: VisualEncoderConfig) -> tuple[nn.Module, Preprocessing]:
    import timm
    from timm.data import resolve_model_data_config

    model = cast(Any, timm.create_model(config.name, pretrained=False, num_classes=0, **config.arguments))
    if config.stem is not None:
        if (
            not hasattr(model, "patch_embed")
            or model.patch_embed.num_patches != (config.size // config.stem.patch) ** 2
        ):
            raise ValueError(
                f"the stem makes patches of {config.stem.patch} px: give {config.name} this patch_size and img_size"
            )
        model.patch_embed = ConvStem(config.stem, size=config.size, width=model.embed_dim)
    data = resolve_model_data_config(model)
    if config.fit == "pad":
        return model, Canvas(size=config.size, mean=data["mean"], std=data["std"])
    return model, Preprocessing(size=config.size, mean=data["mean"], std=data["std"], fit=config.fit)


def _rows(model: nn.Module, features: Tensor) -> Tensor:
    """timm's features as rows: a map (B, D, H, W) flattened, a sequence without its prefix tokens."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, getattr(model, "num_prefix_tokens", 0) :]


def merge_neighbours(rows: Tensor, side: int) -> Tensor:
    """Join squares of `side` x `side` neighbours of a square grid: (B, N, D) -> (B, N / side^2, D * side^2).

    Raises:
        ValueError: The rows are no square grid that divides.
    """
    grid = round(rows.shape[1] ** 0.5)
    if grid * grid != rows.shape[1] or grid % side:
        raise ValueError(f"{rows.shape[1]} tokens are no square grid that divides by {side}")
    cut = rows.reshape(len(rows), grid // side, side, grid // side, side, rows.shape[-1])
    return cut.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
