"""Train TokenFlow and its text-to-image generator: the published recipe, or a small one for two CPU cores.

    python recipes/tokenflow.py mini --out runs/mini
    python recipes/tokenflow.py generator --tokenizer runs/mini/model --out runs/mini_generator
    accelerate launch recipes/tokenflow.py published --data pictures/ --vgg vgg16-397923af.pth --out runs/b
    accelerate launch recipes/tokenflow.py enhanced --data pictures/ --vgg vgg16-397923af.pth --start runs/b/model \
        --out runs/b_enhanced
    accelerate launch recipes/tokenflow.py generator --tokenizer runs/b_enhanced/model --data captioned/ \
        --language-model meta-llama/Llama-2-7b-hf --batch-size 1024 --out runs/generator

Source: TokenFlow (arXiv 2412.03069), appendix, and the scripts of ByteVisionLab/TokenFlow: Adam (0.9, 0.95), constant
1e-4, batch 256, 1,000,000 updates for B and 500,000 for L and XL, critic from update 20,000, gradient norm 1 for each
network, no weight decay, no restart of codes, no averaged weights. Generator: constant 5e-4 after 5,000 updates of
warm-up, weight decay 0.1, gradient norm 0.5, 16 pictures a GPU, two epochs of 60 million captioned pictures.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import tyro
from torch import Tensor

from headrace.cli.tokenizer_pictures import FolderPictures
from headrace.cli.tokenizer_train import train
from headrace.datasets.captioned_shapes import CAPTIONS, CaptionedShapes
from headrace.tokenizers.auto import load_tokenizer
from headrace.tokenizers.base import Preprocessing
from headrace.tokenizers.tokenflow import TokenFlow
from headrace.training.batches import batches
from headrace.training.loop import fit
from headrace.training.schedule import Schedule
from headrace.vlm.next_scale import NextScaleConfig, NextScaleGenerator, Prompt
from headrace.vlm.next_scale_prompts import end_ids, prompt_ids, training_caption


def published(
    *, data: str, vgg: Path, out: Path, variant: Literal["b", "l", "xl"] = "b", steps: int = 0, resume: bool = False
) -> int:
    """Stage 1 on a folder of pictures: teacher and student start from the tower's published weights.

    Args:
        data: Folder of pictures (the paper uses LAION and COYO-700M, its ablations ImageNet).
        vgg: VGG-16 weights for LPIPS.
        out: Run folder.
        variant: Model size.
        steps: Updates; 0 takes the paper's number for the variant.
        resume: Go on with the run.
    """
    return train(
        data=data,
        out=out,
        variant=variant,
        teacher="tower",
        vgg=vgg,
        steps=steps or {"b": 1_000_000, "l": 500_000, "xl": 500_000}[variant],
        batch_size=256,
        lr=1e-4,
        adversarial_start=20_000,
        scale_drop=0.1,
        checkpoint_every=5_000,
        resume=resume,
    )


def enhanced(
    *,
    data: str,
    vgg: Path,
    start: str,
    out: Path,
    variant: Literal["b_enhanced", "b_256"] = "b_enhanced",
    steps: int = 500_000,
    resume: bool = False,
) -> int:
    """Stage 2: the enhanced pixel decoder of B on fixed codes. The paper gives no number of updates for it.

    Args:
        data: Folder of pictures.
        vgg: VGG-16 weights for LPIPS.
        start: Folder of the trained tokenizer, or a file of the release as `tokenflow:FILE`.
        out: Run folder.
        variant: `b_256` where the trained tokenizer works at 256 px.
        steps: Updates.
        resume: Go on with the run.
    """
    return train(
        data=data,
        out=out,
        variant=variant,
        start=start,
        stage="decoder",
        vgg=vgg,
        steps=steps,
        batch_size=256,
        lr=1e-4,
        adversarial_start=20_000,
        checkpoint_every=5_000,
        resume=resume,
    )


def mini(
    *,
    out: Path,
    books: Literal["dual", "semantic", "pixel"] = "dual",
    steps: int = 800,
    horizon: int = 0,
    batch_size: int = 4,
    lr: float = 1e-3,
    pixel_weight: float = 20.0,
    book_factor: float = 5.0,
    recolour: float = 0.8,
    pool: int = 2048,
    seed: int = 0,
    resume: bool = False,
) -> int:
    """64 px crops of photographs that packages ship, and rendered shapes; EfficientNet-Lite0 teaches and compares.

    Args:
        out: Run folder.
        books: `dual` lets both codebooks choose the code; `semantic` or `pixel` gives the other a weight of 1e-4, so
            one chooses alone and the other follows: the paper's single-codebook comparisons at equal size.
        steps: Updates.
        horizon: Updates in which the learning rate falls to 0; 0 for `steps`.
        batch_size: Pictures per update.
        lr: Learning rate; ten times the published one, because the run is a thousand times shorter.
        pixel_weight: Weight of the mean squared error; at the published 1 it stays behind the perceptual term.
        book_factor: Codebooks learn this many times faster, and so follow the encoders.
        recolour: Share of the photographs' crops that come in other colours: half of the photographs are grey.
        pool: Pictures; their teacher's features stay in memory.
        seed: Of weights, order and scale drop; the pictures are the same for every seed.
        resume: Go on with the run.
    """
    return train(
        data="mixed",
        out=out,
        variant="mini",
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        decay_over=horizon or steps,
        pixel_weight=pixel_weight,
        tower_factor=0,  # the tower has its teacher's weights already, and 20 minutes would not improve it
        book_factor=book_factor,
        pool=pool,
        recolour=recolour,
        adversarial_start=10**9,  # a critic needs longer than this run
        scale_drop=0.1,
        distance_weights={"dual": (1.0, 1.0), "semantic": (1.0, 1e-4), "pixel": (1e-4, 1.0)}[books],
        restart_every=10,
        checkpoint_every=200,
        seed=seed,
        resume=resume,
    )


@dataclass(frozen=True, kw_only=True)
class GeneratorNumbers:
    """AdamW, warm-up, then constant. `epochs` counts visits of each picture."""

    lr: float
    warmup: int
    batch_size: int
    epochs: int
    decay: float = 0.1
    clip: float = 0.5


PUBLISHED = GeneratorNumbers(lr=5e-4, warmup=5_000, batch_size=16, epochs=2)
TINY = GeneratorNumbers(lr=1e-3, warmup=50, batch_size=16, epochs=8)
TINY_PICTURES = 2048


class Captioned(Protocol):
    """Pictures with captions by index."""

    def __len__(self) -> int: ...

    def pairs(self, indices: np.ndarray) -> tuple[Tensor, list[str]]:
        """Inputs of the tokenizer, shape (B, 3, size, size), and their captions."""


class RenderedShapes:
    """Shapes with captions of four words; indices past the end are further pictures."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.shapes = CaptionedShapes(size=preprocessing.size, count=TINY_PICTURES)

    def __len__(self) -> int:
        return TINY_PICTURES

    def pairs(self, indices: np.ndarray) -> tuple[Tensor, list[str]]:
        """See `Captioned`."""
        images, label = self.shapes.batch(indices)
        return images * 2 - 1, [CAPTIONS[i] for i in label]


class CaptionedFolder:
    """Pictures of a folder, whole and never mirrored; the caption of cat.png is in cat.txt."""

    def __init__(self, folder: Path, preprocessing: Preprocessing) -> None:
        self.pictures = FolderPictures(folder, preprocessing, part="held_out", seed=0)
        self.captions = [path.with_suffix(".txt") for path in self.pictures.files]
        missing = [path for path in self.captions if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} captions are missing, the first is {missing[0]}")

    def __len__(self) -> int:
        return len(self.captions)

    def pairs(self, indices: np.ndarray) -> tuple[Tensor, list[str]]:
        """See `Captioned`."""
        texts = [self.captions[i % len(self)].read_text(encoding="utf-8").strip() for i in indices]
        return self.pictures.batch(indices), texts


class Prompted(NamedTuple):
    """Prompts, see `Prompt`, and the pictures that they ask for, (B, 3, size, size)."""

    ids: Tensor
    real: Tensor
    images: Tensor


class PromptedPictures:
    """Captioned pictures as a generator trains on them; each visit draws anew what is left of the caption."""

    def __init__(self, source: Captioned, model: NextScaleGenerator, *, seed: int) -> None:
        self.source, self.model, self.seed = source, model, seed

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray) -> Prompted:
        """Samples of these numbers, counted on from visit to visit."""
        images, texts = self.source.pairs(indices)
        drawn = [
            training_caption(text, np.random.default_rng((self.seed, int(i))))
            for i, text in zip(indices, texts, strict=True)
        ]
        prompt = self.model.pad([prompt_ids(self.model.tokenizer, text) for text in drawn])
        return Prompted(prompt.ids, prompt.real, images)


def caption_words() -> Any:
    """A text tokenizer of the words of the shapes' captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<img>", "</img>", *sorted(set(" ".join(CAPTIONS).split()))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def new_generator(tokenizer: TokenFlow, language_model: str | None) -> NextScaleGenerator:
    """A generator for a tokenizer's codes: from a language model, or a tiny one that knows the shapes' words only."""
    quantizer = tokenizer.config.quantizer
    if language_model is None:
        words = caption_words()
        sizes = {"scales": quantizer.scales, "codes": quantizer.codes, "feature_dim": quantizer.dim}
        config = replace(NextScaleConfig.tiny(), **sizes, text_vocab=len(words), end=end_ids(words), max_positions=4096)
        model = NextScaleGenerator(config)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        language, words = (kind.from_pretrained(language_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
        config = NextScaleConfig.around(language.config, quantizer, end=end_ids(words))
        model = NextScaleGenerator.from_language_model(language, config)
    model.tokenizer = words
    return model


def generator(
    *,
    tokenizer: str,
    out: Path,
    data: str = "shapes",
    language_model: str | None = None,
    steps: int = 0,
    batch_size: int = 0,
    lr: float = 0.0,
    warmup: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    checkpoint_every: int = 1000,
    seed: int = 0,
    resume: bool = False,
) -> int:
    """Text to image: a Llama that predicts a trained TokenFlow's codes, written with its text tokenizer to OUT/model.

    Without a language model a tiny transformer learns the rendered shapes; with one the numbers are the published ones.

    Args:
        tokenizer: The trained TokenFlow: folder, Hub id, or a file of the release as `tokenflow:FILE`.
        out: Run folder.
        data: `shapes`, or a folder of pictures, each with its caption in a .txt file of the same name.
        language_model: Folder or Hub id of the Llama to start from; the paper takes Llama-2 7B.
        steps: Updates; 0 takes two epochs with a language model, eight without.
        batch_size: Pictures per update over all processes; 0 takes 16 (the paper: 16 a GPU).
        lr: Learning rate; 0 takes the published 5e-4, or 1e-3 for the tiny one.
        warmup: Updates until it is reached; default 5,000, or 50 for the tiny one.
        precision: Of the forward pass; the tokenizer encodes in its own.
        checkpoint_every: Updates between checkpoints.
        seed: Of weights, order and captions.
        resume: Go on with the run.
    """
    if data != "shapes" and language_model is None:
        raise ValueError("--data FOLDER needs --language-model: the tiny one knows the words of the shapes only")
    torch.manual_seed(seed)
    coder = load_tokenizer(tokenizer).requires_grad_(False)
    if not isinstance(coder, TokenFlow):
        raise ValueError(f"{tokenizer} is a {type(coder).__name__}, not a TokenFlow")
    model = new_generator(coder, language_model)
    source: Captioned = (
        RenderedShapes(coder.preprocessing) if data == "shapes" else CaptionedFolder(Path(data), coder.preprocessing)
    )
    numbers = TINY if language_model is None else PUBLISHED
    batch_size = batch_size or numbers.batch_size
    # Norms and the like are not decayed.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": numbers.decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]

    def terms(model: NextScaleGenerator, batch: Prompted, _: torch.Generator) -> dict[str, Tensor]:
        coder.to(batch.images.device)
        with torch.no_grad(), torch.autocast(batch.images.device.type, enabled=False):
            codes = coder.encode(batch.images)
        return model.loss(Prompt(batch.ids, batch.real), codes, coder.quantizer)._asdict()

    fit(
        model,
        terms,
        torch.optim.AdamW(groups, lr=lr or numbers.lr),
        batches(PromptedPictures(source, model, seed=seed), batch_size, seed=seed, visits=True),
        steps=steps or numbers.epochs * len(source) // batch_size,
        out=out,
        resume=resume,
        seed=seed,
        schedule=Schedule(warmup=numbers.warmup if warmup is None else warmup),
        clip=numbers.clip,
        precision=precision,
        checkpoint_every=checkpoint_every,
        keep=1,
        settings={
            "tokenizer": tokenizer,
            "data": data,
            "language_model": language_model,
            "batch_size": batch_size,
        },
    )
    model.save_pretrained(out / "model")
    return 0


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"published": published, "enhanced": enhanced, "mini": mini, "generator": generator}
    )
