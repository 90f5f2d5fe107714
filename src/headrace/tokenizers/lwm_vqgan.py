"""LWM's image tokenizer: 256 x 256 pixels to 16 x 16 codes of 8,192; ViPRA's frames are made of them.

Source: LargeWorldModel/LWM@a1a6dd7 and sroutray/vipra@d5d8c0d, vqgan.py. Weights: `lwm_vqgan_import`.
"""
# Shape letters: B pictures, N codes of a picture, D code dimension, h w sides of the code map.

from dataclasses import dataclass

from torch import Tensor, nn

from headrace.tokenizers.base import Preprocessing, Tokenizer, check_codes, check_images
from headrace.tokenizers.vqgan import VQGANConfig, VQGANDecoder, VQGANEncoder


@dataclass(frozen=True, kw_only=True)
class LwmVQGANConfig:
    """Sizes; the defaults are the published ones.

    Attributes:
        size: Side of the pictures [px].
        width, multipliers, blocks: See `VQGANConfig`.
        codes: Size of the codebook.
        dim: Dimension of a code, and of the latent map before it.
    """

    size: int = 256
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)
    blocks: int = 2
    codes: int = 8192
    dim: int = 64

    def __post_init__(self) -> None:
        if self.size % self.network.factor or self.codes < 2:
            raise ValueError(f"size must be a multiple of {self.network.factor}, codes at least 2, got {self}")

    @property
    def network(self) -> VQGANConfig:
        """Of encoder and decoder alike."""
        return VQGANConfig(
            width=self.width, multipliers=self.multipliers, blocks=self.blocks, latent=self.dim, attention=False
        )

    @classmethod
    def published(cls) -> "LwmVQGANConfig":
        """LWM's own."""
        return cls()

    @classmethod
    def tiny(cls) -> "LwmVQGANConfig":
        """32 px pictures, 8 x 8 codes of 16."""
        return cls(size=32, width=32, multipliers=(1, 1, 2), blocks=1, codes=16, dim=8)


class LwmVQGAN(Tokenizer):
    """Discrete tokenizer with one codebook, pictures in [-1, 1]."""

    Config = LwmVQGANConfig
    VARIANTS = ("published", "tiny")
    kind = "discrete"

    def __init__(self, config: LwmVQGANConfig) -> None:
        super().__init__(config)
        self.encoder = VQGANEncoder(config.network)
        self.quant_conv = nn.Conv2d(config.dim, config.dim, 1)
        self.codebook = nn.Embedding(config.codes, config.dim)
        nn.init.uniform_(self.codebook.weight, -1 / config.codes, 1 / config.codes)
        self.post_quant_conv = nn.Conv2d(config.dim, config.dim, 1)
        self.decoder = VQGANDecoder(config.network)

    @property
    def preprocessing(self) -> Preprocessing:
        """Squashed to the size, [-1, 1]."""
        return Preprocessing(size=self.config.size, fit="squash")

    @property
    def side(self) -> int:
        """Codes per side."""
        return self.config.size // self.config.network.factor

    @property
    def tokens_per_image(self) -> int:
        """N."""
        return self.side**2

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codes

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.config.dim

    def latents(self, images: Tensor) -> Tensor:
        """What is compared with the codes, row by row of the map, (B, N, D)."""
        check_images(images, self.preprocessing)
        return self.quant_conv(self.encoder(images)).flatten(2).mT

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) in [-1, 1] to the nearest codes, int64 (B, N)."""
        rows = self.latents(images).float()
        table = self.codebook.weight.float()
        distance = table.square().sum(1) - 2 * rows @ table.T  # the row's own square is the same for all codes
        return distance.argmin(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Codes, int64 (B, N), to pictures (B, 3, size, size), about in [-1, 1]."""
        check_codes(tokens, size=self.config.codes)
        maps = self.codebook(tokens).mT.unflatten(2, (self.side, self.side))
        return self.decoder(self.post_quant_conv(maps))

    def features(self, images: Tensor) -> Tensor:
        """Vectors of the nearest codes, (B, N, D)."""
        return self.codebook(self.encode(images))
