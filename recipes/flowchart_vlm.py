"""Train a vision-language model on generated flowcharts, from random weights, on one CPU core.

    headrace flowlearn generate --count 2400 --first 100000 --variant char --split train --out charts
    python recipes/flowchart_vlm.py --stage language --out run
    python recipes/flowchart_vlm.py --stage stem --data charts --out run
    python recipes/flowchart_vlm.py --stage encoder --data charts --out run
    python recipes/flowchart_vlm.py --stage joint --data charts --out run
    headrace vqa run --task flowlearn/sim-char --data test --model run/model --prompts short-1 --out eval

`language` teaches a small Llama to answer from rows that state facts about boxes (label, neighbours, counts, noisy);
graphs are drawn at random, no picture is needed. `stem` teaches the convolutions in front of the ViT to read letters
and to see which sides of a patch lines cross, on windows of four patches, which cost a twentieth of a chart. `encoder`
teaches them and the ViT to know those facts at each box's patch and to follow each arrow's line. `language` can run
beside these two. `joint` puts a projector between them: its rows should state the facts that the picture shows, and the
answers should be right. Pictures are cropped to their cells for most steps, so that no time goes into empty canvas. The
heads and the table of facts are not saved.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.datasets.flowlearn.drawn import LETTERS, DrawnChart, along, cells_of, letter_pictures, read_drawn, varied
from headrace.datasets.flowlearn.generate import make_chart
from headrace.datasets.flowlearn.prompts import PROMPT_SETS
from headrace.datasets.flowlearn.targets import CONCEPTS, MOST_NODES, node_facts, patch_targets
from headrace.training.batches import seed_of
from headrace.training.loop import fit
from headrace.training.schedule import Schedule
from headrace.vlm.chart_heads import ChartHeads, Facts, LookupHeads, concept_rows, gathered
from headrace.vlm.chart_questions import Packed, block_mask, chart_tokenizer, pack, training_questions
from headrace.vlm.conv_stem import ChannelNorm, ConvStem, StemConfig
from headrace.vlm.video_language_model import PromptTemplate, VideoLanguageConfig, VideoLanguageModel
from headrace.vlm.visual_encoder import VisualEncoderConfig

PROMPTS = PROMPT_SETS["short-1"]
TEMPLATE = PromptTemplate(before="", picture_before="", picture_after="\n", after="\n")
WINDOW = 2  # patches on a side of what the stage `stem` sees
Stage = Literal["language", "stem", "encoder", "joint"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train.

    Attributes:
        stage: Which part, see above.
        out: Run folder; each stage has a folder in it, the finished model is `out/model`.
        data: Generated folders of the `char` variant; `language` needs none.
        start: `weights.safetensors` of an earlier run of any stage, to train on from it in place of random weights;
            `language` then leaves the table of facts as it is.
        size: Side of the canvas [px].
        stem, stem_blocks: Convolutions before the ViT; 2 ** stages is its patch.
        frozen: Stages of the stem, from the pixels on, that are not trained further; three save two fifths of an
            encoder update once `stem` has taught them.
        full_share: Share of steps on the whole canvas; the others take the smallest one that holds the batch.
        framed_share: Share of the pictures with a red frame around one box.
        statements: Rounds of the four statement tasks per chart, and of the letter in the frame.
        long_share: Chance that a chart is asked for Mermaid code; half of it for a description.
    """

    stage: Stage
    out: Path
    data: tuple[Path, ...] = ()
    start: Path | None = None
    size: int = 512
    stem: tuple[int, ...] = (24, 32, 48, 96, 192)
    stem_blocks: tuple[int, ...] = (0, 0, 1, 1, 0)
    frozen: int = 0
    width: int = 192
    vision_layers: int = 6
    text_width: int = 144
    text_layers: int = 4
    steps: int = 1000
    batch_size: int = 32
    lr: float = 1e-3
    full_share: float = 0.1
    framed_share: float = 0.5
    statements: int = 3
    long_share: float = 0.5
    seed: int = 0
    threads: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_every: int = 200
    resume: bool = False


def build(recipe: Recipe) -> VideoLanguageModel:
    """The model with random weights."""
    torch.manual_seed(recipe.seed)
    tokenizer = chart_tokenizer()
    language = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": recipe.text_width,
        "intermediate_size": 3 * recipe.text_width, "num_hidden_layers": recipe.text_layers,
        "num_attention_heads": recipe.text_width // 48, "num_key_value_heads": recipe.text_width // 48,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": tokenizer.bos_token_id,
        "rope_theta": 1e6, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    stem = StemConfig(widths=recipe.stem, blocks=recipe.stem_blocks)
    vit = {"img_size": recipe.size, "patch_size": stem.patch, "embed_dim": recipe.width, "depth": recipe.vision_layers,
           "num_heads": recipe.width // 64, "mlp_ratio": 3.0}  # fmt: skip
    encoder = VisualEncoderConfig(
        source="timm", name="vit_tiny_patch16_224", arguments=vit, size=recipe.size, fit="pad", stem=stem
    )
    config = VideoLanguageConfig(
        language=language, encoder=encoder, template=TEMPLATE, train_encoder=True,
        text_specials={"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
    )  # fmt: skip
    model = VideoLanguageModel(config)
    model.tokenizer = tokenizer
    with torch.no_grad():  # like looks at like from the first step on: a question's letter finds the box of that letter
        for layer in model.language.base_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight.mul_(3))
    return model


def _questions(graph: Any, boxed: str | None, rng: random.Random, recipe: Recipe) -> list[tuple[str, str]]:
    return training_questions(graph, boxed, PROMPTS, rng, statements=recipe.statements, long_share=recipe.long_share)


def _stacked(parts: list[Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([getattr(p, name) for p in parts])) for name in parts[0]._fields}


class GraphBatches:
    """Random graphs without pictures; batch k depends on (seed, k)."""

    def __init__(self, recipe: Recipe, tokenizer: Any, *, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.tokenizer, self.rank, self.world = recipe, tokenizer, rank, world

    def shard(self, rank: int, world: int) -> "GraphBatches":
        """The part of each batch for one process."""
        return GraphBatches(self.recipe, self.tokenizer, rank=rank, world=world)

    def at(self, step: int) -> dict[str, Tensor]:
        """Facts about the boxes, how many empty rows stand among them, and packed questions."""
        seed = seed_of(self.recipe.seed, 1, step)
        facts, asked = [], []
        for index in range(self.rank, self.recipe.batch_size, self.world):
            chart = make_chart(seed, index, variant="char")
            rng = random.Random(chart.seed)
            boxed = chart.boxed if rng.random() < 0.7 else None
            facts.append(node_facts(chart.graph, boxed))
            asked.append(_questions(chart.graph, boxed, rng, self.recipe))
        empty = random.Random(seed).randint(0, 40)
        packed = pack(asked, self.tokenizer, after=TEMPLATE.after)
        return {**_stacked(facts), **packed._asdict(), "empty": torch.tensor(empty), "seed": torch.tensor(seed)}


class ChartBatches:
    """Drawn charts, varied; batch k depends on (seed, k)."""

    def __init__(
        self, charts: list[DrawnChart], recipe: Recipe, tokenizer: Any, *, rank: int = 0, world: int = 1
    ) -> None:
        self.charts, self.recipe, self.tokenizer, self.rank, self.world = charts, recipe, tokenizer, rank, world
        self.patch = 2 ** len(recipe.stem)
        self.letters = letter_pictures(charts)
        self.cells = np.array([cells_of(chart, self.patch) for chart in charts])

    def shard(self, rank: int, world: int) -> "ChartBatches":
        """The part of each batch for one process."""
        return ChartBatches(self.charts, self.recipe, self.tokenizer, rank=rank, world=world)

    def at(self, step: int) -> dict[str, Tensor]:
        """Pictures on one canvas, where that canvas lies on the whole one, targets, and packed questions."""
        rng = random.Random(seed_of(self.recipe.seed, 2, step))
        grid = self.recipe.size // self.patch
        full = rng.random() < self.recipe.full_share
        chosen = self._alike(rng) if not full else rng.choices(range(len(self.charts)), k=self.recipe.batch_size)
        rows, columns = (grid, grid) if full else np.minimum(self.cells[chosen].max(axis=0) + 1, grid)
        images, facts, targets, asked = [], [], [], []
        for index in chosen[self.rank :: self.world]:
            chart = varied(self.charts[index], self.letters, rng, framed_share=self.recipe.framed_share)
            high, wide = chart.pixels.shape[:2]
            top, left = rng.randint(0, rows * self.patch - high), rng.randint(0, columns * self.patch - wide)
            canvas = np.full((rows * self.patch, columns * self.patch, 3), 128, np.uint8)
            canvas[top : top + high, left : left + wide] = chart.pixels
            images.append(canvas)
            facts.append(node_facts(chart.graph, chart.boxed))
            targets.append(patch_targets(chart, patch=self.patch, rows=rows, columns=columns, left=left, top=top))
            if self.recipe.stage == "joint":
                asked.append(_questions(chart.graph, chart.boxed, rng, self.recipe))
        corner = [(rng.randint(0, grid - rows), rng.randint(0, grid - columns)) for _ in images]
        batch = {"images": torch.from_numpy(np.stack(images)), "corner": torch.tensor(corner), **_stacked(facts),
                 **_stacked(targets)}  # fmt: skip
        if asked:
            batch |= pack(asked, self.tokenizer, after=TEMPLATE.after)._asdict()
            batch["kept"] = torch.tensor(rng.randint(min(28, rows * columns), rows * columns))
        return batch

    def _alike(self, rng: random.Random) -> list[int]:
        """Charts of about one size, so that a small canvas holds them."""
        anchor = self.cells[rng.randrange(len(self.charts))]
        far = np.abs(self.cells - anchor).sum(axis=1) + np.random.default_rng(rng.getrandbits(32)).random(
            len(self.cells)
        )
        nearest = np.argsort(far)[: 3 * self.recipe.batch_size].tolist()
        return rng.choices(nearest, k=self.recipe.batch_size)


class WindowBatches:
    """Windows at the boxes and lines of drawn charts, cut at any place; batch k depends on (seed, k)."""

    def __init__(self, charts: ChartBatches) -> None:
        self.charts = charts

    def shard(self, rank: int, world: int) -> "WindowBatches":
        """The part of each batch for one process."""
        return WindowBatches(self.charts.shard(rank, world))

    def at(self, step: int) -> dict[str, Tensor]:
        """Pictures (T, S, S, 3) and, per patch, what `window_targets` says."""
        source, recipe = self.charts, self.charts.recipe
        rng = random.Random(seed_of(recipe.seed, 3, step))
        side = WINDOW * source.patch
        windows = []
        for number in rng.choices(range(len(source.charts)), k=recipe.batch_size)[source.rank :: source.world]:
            chart = varied(source.charts[number], source.letters, rng, framed_share=recipe.framed_share)
            canvas = np.pad(chart.pixels, ((side, side), (side, side), (0, 0)), constant_values=128)
            lines = [along(edge, source.patch / 8) for edge in chart.graph.edges]
            middles = np.array([(n.box[0] + n.box[2], n.box[1] + n.box[3]) for n in chart.graph.nodes]) / 2
            for x, y in [*middles, *(line[rng.randrange(len(line))] for line in lines)]:
                left, top = int(x) - rng.randrange(side), int(y) - rng.randrange(side)
                across, down = (min(max(v + side, 0), canvas.shape[a] - side) for v, a in ((left, 1), (top, 0)))
                corner = np.array([across - side, down - side])
                inside = [(middle - corner) // source.patch for middle in middles]
                boxes = [
                    (cell, LETTERS.index(n.label), n.id == chart.boxed)
                    for cell, n in zip(inside, chart.graph.nodes, strict=True)
                ]
                targets = window_targets(boxes, [(line - corner) // source.patch for line in lines])
                windows.append({"images": canvas[down : down + side, across : across + side], **targets})
        return {name: torch.from_numpy(np.stack([w[name] for w in windows])) for name in windows[0]}


def window_targets(boxes: list[tuple[np.ndarray, int, bool]], lines: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What each patch of a window should know.

    Args:
        boxes: Cell (column, row) of each box's middle, its letter, and whether it has the red frame; cells outside of
            the window count for nothing.
        lines: Cells (P, 2) that each arrow passes, from its beginning to its head.

    Returns:
        `letter` int64 (N,), -100 where no box has its middle; `framed` float32 (N,), 1 where it is a framed box's;
        `sides` float32 (N, 4), 1 where a line crosses the patch's left, right, top or bottom side; `head` float32
        (N,), 1 where an arrow ends.
    """
    letter, sides = np.full(WINDOW**2, -100), np.zeros((WINDOW**2, 4), np.float32)
    framed, head = np.zeros((2, WINDOW**2), np.float32)

    def number(cell: np.ndarray) -> int | None:
        return int(cell[1]) * WINDOW + int(cell[0]) if ((cell >= 0) & (cell < WINDOW)).all() else None

    for cell, index, red in boxes:
        if (here := number(cell)) is not None:
            letter[here], framed[here] = index, red
    for line in lines:
        step = np.diff(line, axis=0)
        near = ((line >= -1) & (line <= WINDOW)).all(1)
        for index in np.flatnonzero((abs(step).sum(1) == 1) & near[:-1]):
            crossed = 2 * int(step[index, 1] != 0) + int(step[index].sum() > 0)
            for cell, side in ((line[index], crossed), (line[index + 1], crossed ^ 1)):
                if (here := number(cell)) is not None:
                    sides[here, side] = 1
        if (here := number(line[-1])) is not None:
            head[here] = 1
    return {"letter": letter.astype(np.int64), "framed": framed, "sides": sides, "head": head}


class Training(nn.Module):
    """The model with what is there for training only."""

    def __init__(self, model: VideoLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.heads = ChartHeads(model.encoder.width)
        self.reader = nn.Linear(model.encoder.width, 7 + len(LETTERS))
        self.lookup = LookupHeads(model.language.config.hidden_size)
        self.concepts = nn.Linear(CONCEPTS, model.language.config.hidden_size)
        nn.init.normal_(self.concepts.weight, std=0.3)
        letters = model.tokenizer.convert_tokens_to_ids(list(LETTERS))
        self.letter_of = torch.full((len(model.tokenizer),), -1)
        self.letter_of[letters] = torch.arange(len(LETTERS))
        with torch.no_grad():  # a box's letter looks like the letter in a question; its neighbours' are turned copies
            written = 30 * model.language.get_input_embeddings().weight[letters].T
            for part in range(3):
                turn = torch.linalg.qr(torch.randn(len(written), len(written)))[0] if part else torch.eye(len(written))
                self.concepts.weight[:, part * len(LETTERS) : (part + 1) * len(LETTERS)] = turn @ written

    def language_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of answers from stated facts."""
        generator = torch.Generator().manual_seed(int(batch["seed"]))
        clean = concept_rows(_facts(batch))
        rows = _doubted(clean, generator)
        empty = int(batch["empty"]) + 1
        rows = torch.cat([rows, rows.new_zeros(len(rows), empty, CONCEPTS)], dim=1)
        order = torch.rand(rows.shape[:2], generator=generator).argsort(1)
        rows = rows.gather(1, order[..., None].expand_as(rows))
        stated = self.concepts(rows)
        stated = stated + 0.1 * torch.randn(stated.shape, generator=generator)
        return self._answers(stated, batch)

    def stem_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whether a box's middle lies in a patch, its letter and frame, sides that lines cross, heads of arrows."""
        told = self.reader(self.model.encoder.inner.patch_embed(_pixels(batch["images"]))).float()
        letter, real, bce = batch["letter"], batch["letter"] >= 0, F.binary_cross_entropy_with_logits
        centre = bce(told[..., 0], real.float())
        sides, head = bce(told[..., 1:5], batch["sides"]), bce(told[..., 5], batch["head"])
        reads = F.cross_entropy(told[real][:, 7:], letter[real])
        right = (told[real][:, 7:].argmax(-1) == letter[real]).float().mean()
        framed = bce(told[real][:, 6], batch["framed"][real])
        total = centre + reads + 2 * sides + head + 2 * framed
        return {"total": total, "centre": centre, "letter": reads, "framed": framed, "sides": sides, "head": head,
                "letter_right": right}  # fmt: skip

    def encoder_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each patch should know."""
        terms = self._seen(batch)[1]
        return {"total": torch.stack(list(terms.values())).sum(), **terms}

    def joint_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Answers from pictures, rows that state what the picture shows, and what each patch should know."""
        rows, terms = self._seen(batch)
        told = self.model.projector(rows)
        with torch.no_grad():
            truth = self.concepts.bias.expand_as(told).clone().float()
            stated = self.concepts(concept_rows(_facts(batch))).float()
            for chart, node in enumerate(batch["node"]):
                truth[chart, node[node >= 0]] = stated[chart, node >= 0]
        node = batch["node"]
        error = (told.float() - truth).square().mean(-1)
        boxes = gathered(error[..., None], node)[..., 0][node >= 0].mean()
        answers = self._answers(self._subset(told, batch), batch)
        total = answers.pop("total") + 0.3 * torch.stack(list(terms.values())).sum() + 3 * (boxes + error.mean())
        return {"total": total, **answers, **terms, "stated": boxes}

    def _subset(self, rows: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Some rows, in order: those of the boxes and others by chance, so that answers do not hang on their number."""
        kept = int(batch["kept"])
        score = torch.rand(rows.shape[:2])
        real = batch["node"] >= 0
        score.scatter_add_(1, batch["node"].clamp(min=0), real.float())
        chosen = score.topk(kept, dim=1).indices.sort(1).values
        return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[-1]))

    def _seen(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows, cls, middle = self.encode(batch["images"], batch["corner"])
        terms = self.heads.losses(rows, cls, middle, _facts(batch), batch["node"], batch["leads"], batch["comes"])
        return rows, terms

    def encode(self, images: Tensor, corner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As timm's ViT, for a canvas (B, H, W, 3) that lies at `corner` (row, column) of the whole one.

        Returns:
            Last rows (B, N, D), the CLS token's (B, D), and rows two blocks earlier (B, N, D).
        """
        vit = self.model.encoder.inner
        patch = self.model.config.encoder.stem.patch
        x = vit.patch_embed(_pixels(images))
        high, wide = images.shape[1] // patch, images.shape[2] // patch
        place = vit.pos_embed[0, 1:].unflatten(0, vit.patch_embed.grid_size)
        row = corner[:, :1] + torch.arange(high, device=corner.device)
        column = corner[:, 1:] + torch.arange(wide, device=corner.device)
        x = x + place[row[:, :, None], column[:, None]].flatten(1, 2)
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=1)
        middle = x
        for number, block in enumerate(vit.blocks):
            x = block(x)
            if number == len(vit.blocks) - 3:
                middle = x
        x = vit.norm(x)
        return x[:, 1:], x[:, 0], middle[:, 1:]

    def _answers(self, rows: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = Packed(*(batch[name] for name in Packed._fields))
        language, tokenizer = self.model.language, self.model.tokenizer
        embed = language.get_input_embeddings()
        around = embed(torch.tensor([tokenizer.bos_token_id, *self.model.encode_text(TEMPLATE.picture_after)]))
        start, end = (part.expand(len(rows), -1, -1) for part in (around[:1], around[1:]))
        text = embed(packed.ids)
        inputs = torch.cat([start.to(rows.dtype), rows, end.to(rows.dtype), text.to(rows.dtype)], dim=1)
        prefix = inputs.shape[1] - packed.ids.shape[1]
        position = torch.cat([torch.arange(prefix).expand(len(rows), -1), prefix + packed.offset], dim=1)
        mask = block_mask(packed.block, prefix)
        states = language.base_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=position, use_cache=False, output_hidden_states=True
        )
        hidden, middle = states.last_hidden_state[:, prefix:], language.config.num_hidden_layers // 2
        looked_up, compared = (states.hidden_states[layer][:, prefix:] for layer in (middle, middle + 1))
        lookup = self.lookup.losses(looked_up, compared, self.letter_of[packed.ids], packed.block, _facts(batch))
        here = packed.target != -100
        logits, target = language.get_output_embeddings()(hidden[here]).float(), packed.target[here]
        entropy = F.cross_entropy(logits, target, reduction="none")
        weight = packed.weight[here]
        judged = torch.isin(target, torch.tensor(self.model.encode_text("truefalse")))
        right = (logits.argmax(-1) == target).float()
        total = (entropy * weight).sum() / weight.sum() + 0.1 * lookup["known"] + lookup["pair"]
        return {"total": total, "answers": entropy.mean().detach(), "judged": right[judged].mean(),
                "token_right": right.mean(), **lookup}  # fmt: skip


def _pixels(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _facts(batch: dict[str, Tensor]) -> Facts:
    return Facts(*(batch[name] for name in Facts._fields))


def _doubted(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Facts as an encoder in training would state them: probabilities near 0 and 1, a few of them wrong."""
    doubt = torch.randn(rows.shape, generator=generator) * 1.5
    wrong = torch.rand(rows.shape, generator=generator) < 0.005
    sure = torch.where(rows > 0.5, 3.5, -5.0) * torch.where(wrong, -0.5, 1.0)
    exists = rows.amax(-1, keepdim=True)
    return torch.sigmoid(sure + doubt) * exists


def _parameters(training: Training, stage: Stage) -> list[nn.Module]:
    model = training.model
    return {
        "language": [model.language, training.concepts, training.lookup],
        "stem": [model.encoder.inner.patch_embed, training.reader],
        "encoder": [model.encoder, training.heads],
        "joint": [model.language, model.encoder, model.projector, training.heads, training.lookup],
    }[stage]


def _optimizer(training: Training, recipe: Recipe) -> torch.optim.Optimizer:
    parts = nn.ModuleList(_parameters(training, recipe.stage))
    decayed = [p for p in parts.parameters() if p.ndim > 1]
    rest = [p for p in parts.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def _take_over(training: Training, recipe: Recipe, *stages: Stage) -> None:
    """What earlier stages taught."""
    for stage in stages:
        file = recipe.out / stage / "weights.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there; run --stage {stage} first")
        source = Training(build(recipe))
        load_model(source, file)
        for mine, theirs in zip(_parameters(training, stage), _parameters(source, stage), strict=True):
            mine.load_state_dict(theirs.state_dict())


def freeze(stem: ConvStem, stages: int) -> None:
    """Take the first stages of a stem out of training; the gradient stops behind them."""
    passed = 0
    for module in stem.stages:
        passed += isinstance(module, nn.Conv2d)
        if passed > stages or (passed == stages and isinstance(module, ChannelNorm)):
            return
        module.requires_grad_(False)


def main(recipe: Recipe) -> Path:
    """Train one stage; returns the folder of its result."""
    if not 0 <= recipe.frozen <= len(recipe.stem):
        raise ValueError(f"--frozen must be 0 to {len(recipe.stem)}, the stages of the stem, got {recipe.frozen}")
    if recipe.frozen and recipe.stage in ("language", "stem"):
        raise ValueError(f"--frozen is for the stages encoder and joint, not {recipe.stage}")
    torch.set_num_threads(recipe.threads)
    model = build(recipe)
    training = Training(model)
    before: dict[Stage, tuple[Stage, ...]] = {"encoder": ("stem",), "joint": ("language", "encoder")}
    if recipe.start is not None:
        load_model(training, recipe.start)
    else:
        _take_over(training, recipe, *before.get(recipe.stage, ()))
    if recipe.stage == "language":
        batches: Any = GraphBatches(recipe, model.tokenizer)
    else:
        charts = [chart for folder in recipe.data for chart in read_drawn(folder, longest=recipe.size)]
        batches = ChartBatches([c for c in charts if len(c.graph.nodes) <= MOST_NODES], recipe, model.tokenizer)
        batches = WindowBatches(batches) if recipe.stage == "stem" else batches
    freeze(model.encoder.inner.patch_embed, recipe.frozen)
    if recipe.stage == "language" and recipe.start is not None:
        training.concepts.requires_grad_(False)  # a projector may have learned to state facts by this table
    loss = {
        "language": Training.language_loss,
        "stem": Training.stem_loss,
        "encoder": Training.encoder_loss,
        "joint": Training.joint_loss,
    }
    settings = {k: str(v) for k, v in recipe.__dict__.items() if k not in ("out", "resume", "threads")}
    folder = recipe.out / recipe.stage
    fit(
        training, lambda m, batch, _: loss[recipe.stage](m, batch), _optimizer(training, recipe), batches,
        steps=recipe.steps, out=folder, resume=recipe.resume, precision=recipe.precision,
        schedule=Schedule(kind="cosine", warmup=max(1, recipe.steps // 20), steps=recipe.steps, floor=0.02),
        checkpoint_every=recipe.checkpoint_every, settings=settings, find_unused=True,
    )  # fmt: skip
    save_model(training, folder / "weights.safetensors")
    if recipe.stage != "joint":
        return folder
    model.save_pretrained(recipe.out / "model")
    return recipe.out / "model"


if __name__ == "__main__":
    print(main(tyro.cli(Recipe)))
