"""Questions per second: all questions on a chart in one `answer` call against a loop over `model.generate`.

    python benchmarks/vqa_questions.py --charts 6 --out results.json

A LLaVA-shaped model with random weights; both ways are greedy and must give the same answers. Times are processor time
beside wall-clock time, because a shared machine disturbs the latter. Prints JSON.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from headrace.datasets.flowlearn.prompts import find_prompts
from headrace.datasets.flowlearn.write import GenerateConfig, write_dataset
from headrace.vlm.chart_questions import chart_tokenizer
from headrace.vlm.huggingface import HuggingFaceVLM
from headrace.vlm.vqa_data import load_task

CHAT = (
    "{{ '<s>' }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{{ '\n' }}"
)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How much to measure.

    Attributes:
        charts: Charts; each is asked `questions` questions both ways, in turn.
        width, vision_layers, text_layers, size: Shape of the model.
        new_tokens: Length of every answer.
    """

    charts: int = 6
    questions: int = 8
    size: int = 336
    patch: int = 14
    width: int = 512
    vision_layers: int = 12
    text_layers: int = 12
    new_tokens: int = 8
    threads: int = 2
    out: Path | None = None


def build(benchmark: Benchmark) -> HuggingFaceVLM:
    """A LLaVA with random weights and a tokenizer of characters."""
    torch.manual_seed(0)
    tokenizer = chart_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token, heads = "<image>", benchmark.width // 64
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=benchmark.width, intermediate_size=4 * benchmark.width,
        num_attention_heads=heads, num_hidden_layers=benchmark.text_layers, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=benchmark.width, intermediate_size=4 * benchmark.width, num_attention_heads=heads,
        num_hidden_layers=benchmark.vision_layers, image_size=benchmark.size, patch_size=benchmark.patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_id, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(benchmark.size // benchmark.patch) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    sides = {"height": benchmark.size, "width": benchmark.size}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=sides, do_center_crop=False), tokenizer, patch_size=benchmark.patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
        chat_template=CHAT,
    )  # fmt: skip
    return HuggingFaceVLM(model, processor)


def loop(model: HuggingFaceVLM, picture: Path, texts: list[str], new_tokens: int) -> list[str]:
    """Transformers as most scripts use it: one `generate` per question."""
    answers = []
    for text in texts:
        inputs = model.processor(
            text=[model._text(text, 1, video=False)], images=[Image.open(picture)], return_tensors="pt"
        )
        ids = model.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        answers.append(
            model.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return [answer.strip() for answer in answers]


def speeds(times: list[tuple[float, float]]) -> dict[str, object]:
    """Questions per second of both ways, and how many times faster the first is, chart by chart."""
    ratios = [b / a for a, b in times]
    return {
        "answer_per_second": round(1 / statistics.mean(a for a, _ in times), 3),
        "loop_per_second": round(1 / statistics.mean(b for _, b in times), 3),
        "times_faster_median": round(statistics.median(ratios), 3),
        "times_faster_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main(benchmark: Benchmark) -> None:
    """Measure both ways on the same charts, alternating."""
    torch.set_num_threads(benchmark.threads)
    model = build(benchmark)
    prompts = find_prompts("short-1")
    wall: list[tuple[float, float]] = []
    used: list[tuple[float, float]] = []
    same = total = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_dataset(GenerateConfig(count=benchmark.charts + 1, renderer="pillow"), data)
        questions = [q for q in load_task("flowlearn/sim-word", data).questions if q.task != "ocr"]
        for chart, image in enumerate(dict.fromkeys(q.image for q in questions)):
            texts = [prompts.ask(q) for q in questions if q.image == image][: benchmark.questions]
            ways = (lambda t, p: model.answer(p, t, max_new_tokens=benchmark.new_tokens),
                    lambda t, p: loop(model, p, t, benchmark.new_tokens))  # fmt: skip
            answers, walls, useds = [], [], []
            for way in ways:
                started, busy = time.perf_counter(), time.process_time()
                answers.append(way(texts, data / image))
                walls.append((time.perf_counter() - started) / len(texts))
                useds.append((time.process_time() - busy) / len(texts))
            if chart == 0:  # warm-up
                continue
            same += sum(a == b for a, b in zip(*answers, strict=True))
            total += len(texts)
            wall.append((walls[0], walls[1]))
            used.append((useds[0], useds[1]))
    result = {
        "wall": speeds(wall), "processor": speeds(used), "same_answers": f"{same}/{total}",
        "settings": {k: str(v) for k, v in benchmark.__dict__.items() if k != "out"},
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if benchmark.out:
        benchmark.out.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
