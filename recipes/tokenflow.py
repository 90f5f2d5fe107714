"""Train TokenFlow: the published recipe, or the small one that two CPU cores finish. Every number is here.

    python recipes/tokenflow.py mini --out runs/mini
    accelerate launch recipes/tokenflow.py published --data pictures/ --vgg vgg16-397923af.pth --out runs/b
    accelerate launch recipes/tokenflow.py enhanced --data pictures/ --vgg vgg16-397923af.pth --start runs/b/model \
        --out runs/b_enhanced

Source: TokenFlow (arXiv 2412.03069), appendix, and the scripts of ByteVisionLab/TokenFlow: Adam (0.9, 0.95), constant
1e-4, batch 256, 1,000,000 updates for B and 500,000 for L and XL, critic from update 20,000, gradient norm 1 for each
network, no weight decay, no restart of codes, no averaged weights.
"""

from pathlib import Path
from typing import Literal

import tyro

from headrace.cli.tokenizer_train import train


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


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"published": published, "enhanced": enhanced, "mini": mini})
