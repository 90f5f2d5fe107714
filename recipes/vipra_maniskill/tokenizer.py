"""A TokenFlow small enough for two cores: 64 px, an 8x8 grid, 85 ids a frame of 256."""

from pathlib import Path

import torch

from headrace.cli.tokenizer_pictures import open_pictures
from headrace.nn.perceptual import EfficientNetLite0
from headrace.nn.quantizers.code_restart import CodeRestart
from headrace.nn.quantizers.multi_scale import MultiScaleConfig
from headrace.tokenizers.tokenflow import TokenFlow, TokenFlowConfig
from headrace.tokenizers.tokenflow_critic import PatchCritic
from headrace.tokenizers.tokenflow_loss import TokenFlowLossConfig, TokenFlowTraining, build_optimizer
from headrace.tokenizers.tokenflow_semantic import SemanticDecoderConfig, TowerConfig
from headrace.tokenizers.tokenflow_teacher import EfficientNetTeacher
from headrace.tokenizers.vqgan import VQGANConfig
from headrace.training.batches import batches
from headrace.training.loop import fit

PIXELS = VQGANConfig(width=32, multipliers=(1, 1, 2, 2), blocks=1, latent=64)
CONFIG = TokenFlowConfig(
    size=64,
    tower=TowerConfig(size=64, patch=8, width=128, depth=2, heads=4, hidden=256),
    semantic_decoder=SemanticDecoderConfig(width=128, depth=1, heads=4, grid=8, teacher=EfficientNetTeacher.width),
    pixel_encoder=PIXELS,
    pixel_decoder=PIXELS,
    quantizer=MultiScaleConfig(scales=(1, 2, 4, 8), dims=(16, 8), codes=256),
)


def train_tokenizer(pictures: Path, out: Path, *, steps: int, seed: int = 0, batch_size: int = 16) -> None:
    """Train on a folder of pictures into OUT/model; goes on where it was cut off, does nothing when it is done."""
    if (out / "model" / "config.json").exists():
        return
    torch.manual_seed(seed)
    model = TokenFlow(CONFIG)
    training = TokenFlowTraining(
        model,
        teacher=EfficientNetTeacher(EfficientNetLite0.from_package(side=64), grid=8),
        perceptual=EfficientNetLite0.from_package(side=64),
        critic=PatchCritic(width=16, layers=2),
        config=TokenFlowLossConfig(adversarial_start=10**9),  # a critic needs longer than this run
        restart=CodeRestart(CONFIG.quantizer.codes, every=10, seed=seed),
    )
    optimizer = build_optimizer(training, lr=3e-4)
    source = open_pictures(str(pictures), model.preprocessing, part="training", seed=seed)
    fit(
        training,
        lambda module, images, generator: module(images, generator),
        optimizer,
        batches(source, batch_size, seed=seed, visits=True),
        steps=steps,
        out=out,
        resume=(out / "run.json").is_file(),
        seed=seed,
        clip=None,  # each network is clipped by the optimizer's hook
        precision="auto",
        checkpoint_every=200,
        keep=1,
        find_unused=True,  # the critic has no gradient
    )
    model.save_pretrained(out / "model")
