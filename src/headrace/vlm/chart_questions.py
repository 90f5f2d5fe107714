"""Flowchart questions as training sequences: many questions about one chart, packed behind its picture.

A chart of the `char` variant is written with its letters as Mermaid ids (`A(A)`, `A ==> B`): the picture shows no other
ids, and scores compare labels.
"""
# Shape letters in this file: B charts, L packed length, P prefix length.

import random
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from headrace.datasets.flowlearn.drawn import LETTERS
from headrace.datasets.flowlearn.generate import Chart, describe, exists_between, points_to, sample_statements
from headrace.datasets.flowlearn.mermaid import format_mermaid
from headrace.datasets.flowlearn.prompts import PromptSet
from headrace.datasets.flowlearn.records import Edge, Graph, Node, Question

WORDS = (
    "```mermaid\nflowchart ", "\n```", "entity", " points to ", "true", "false", "nodes?", "arrows?", "red?",
    "mermaid:", "describe:", "caption:", "Arrow points from node '", "Arrow exists between node '",
    "' to node '", "' and node '", "'.", ". ", " -..-> ", " --> ", " ==> ", "TB", "BT", "RL", "LR", "TD",
    *(str(number) for number in range(10, 21)),
)  # fmt: skip


def chart_tokenizer() -> Any:
    """Characters, and the words of the questions and answer formats as one token each."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *WORDS, *characters]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join(_escaped(word) for word in sorted(WORDS, key=len, reverse=True)) + r"|[\s\S]"
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _escaped(word: str) -> str:
    return "".join("\\" + c if c in "?.-`:" else c for c in word)


def canonical(graph: Graph) -> Graph:
    """The chart as it is to be written: boxes by label, arrows by their ends' labels, letters as ids, TB for TD."""
    nodes = sorted(graph.nodes, key=lambda node: node.label)
    new = {n.id: n.label if n.label in LETTERS else f"entity{i}" for i, n in enumerate(nodes)}
    label = graph.label
    edges = sorted(graph.edges, key=lambda e: (label[e.source], label[e.target]))
    return replace(
        graph,
        nodes=tuple(Node(new[n.id], n.label) for n in nodes),
        edges=tuple(Edge(new[e.source], new[e.target], e.style) for e in edges),
        direction="TB" if graph.direction == "TD" else graph.direction,
    )


def training_questions(
    graph: Graph, boxed: str | None, prompts: PromptSet, rng: random.Random, *, statements: int, long_share: float
) -> list[tuple[str, str]]:
    """Prompts and answers of one chart.

    Args:
        graph: The chart. `boxed`: id of the framed node, None asks no OCR.
        prompts: Wording.
        rng: Draws the statements.
        statements: Rounds of the four statement tasks, with the clean protocol, and of the letter in the frame.
        long_share: Chance that Mermaid code is asked for; half of it for a description.

    Returns:
        The benchmark's questions, and as an exercise where the arrows of every box lead.
    """
    asked = [("num_nodes", "", str(len(graph.nodes))), ("num_arrows", "", str(len(graph.edges)))]
    for _ in range(statements):
        if boxed is not None:  # as often as the statements: asked once, it was the last thing to be learned
            asked.append(("ocr", "", graph.label[boxed]))
        chart = Chart(name="", variant="char", graph=graph, background="", boxed="", seed=rng.getrandbits(64))
        for task, (a, b) in sample_statements(chart, "clean").items():
            text = (points_to if task.endswith("a_to_b") else exists_between)(a, b)
            asked.append((task, text, task.split("_")[0]))
    written = canonical(graph)
    if rng.random() < long_share:
        asked.append(("mermaid", "", format_mermaid(written)))
    if rng.random() < long_share / 2:
        asked.append(("description", "", describe(written).strip()))
    made = [Question(uid="", dataset="", variant="", split="", image="", task=t, question=q, answer=a)
            for t, q, a in asked]  # fmt: skip
    return [(prompts.ask(question), question.answer) for question in made] + _neighbours(written)


def _neighbours(graph: Graph) -> list[tuple[str, str]]:
    """An exercise that no benchmark asks: where the arrows of a box lead."""
    label = graph.label
    found = []
    for node in graph.nodes:
        reached = [label[edge.target] for edge in graph.edges if edge.source == node.id]
        found.append((f"{node.label}?", " ".join(reached) or "-"))
    return found


class Packed(NamedTuple):
    """Questions of several charts, one row per chart.

    Attributes:
        ids: int64 (B, L). offset: int64 (B, L), distance of each place from the end of the prefix.
        block: int64 (B, L), number of the question; -1 for padding.
        target: int64 (B, L), the next id; -100 where nothing is scored.
        weight: float32 (B, L), of each target; an answer of n tokens weighs sqrt(n).
    """

    ids: Tensor
    offset: Tensor
    block: Tensor
    target: Tensor
    weight: Tensor


def pack(charts: list[list[tuple[str, str]]], tokenizer: Any, *, after: str) -> Packed:
    """Lay out each chart's questions one after another; `after` stands between question and answer.

    Ids are those of `VideoLanguageModel.example`: an answer begins with a space.
    """
    rows = [_row(questions, tokenizer, after) for questions in charts]
    length = max(len(row[0]) for row in rows)
    fills = (0, 0, -1, -100, 0.0)
    columns = [
        torch.stack([F.pad(torch.tensor(row[i]), (0, length - len(row[i])), value=fill) for row in rows])
        for i, fill in enumerate(fills)
    ]
    return Packed(*columns)


def _row(questions: list[tuple[str, str]], tokenizer: Any, after: str) -> tuple[list[Any], ...]:
    ids: list[int] = []
    offset: list[int] = []
    block: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    texts = [part for prompt, answer in questions for part in (prompt, f" {answer}")]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    between = tokenizer(after, add_special_tokens=False).input_ids
    for number in range(len(questions)):
        asked, said = encoded[2 * number] + between, [*encoded[2 * number + 1], tokenizer.eos_token_id]
        whole = (asked + said)[:-1]
        ids += whole
        offset += range(len(whole))
        block += [number] * len(whole)
        target += [-100] * (len(asked) - 1) + said
        weight += [0.0] * (len(asked) - 1) + [len(said) ** -0.5] * len(said)
    return ids, offset, block, target, weight


def block_mask(block: Tensor, prefix: int) -> Tensor:
    """Who sees whom: bool (B, 1, P + L, P + L). The prefix is causal; a question sees the prefix and itself."""
    charts, length = block.shape
    whole = torch.cat([block.new_full((charts, prefix), -2), block], dim=1)
    causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool, device=block.device).tril()
    same = whole[:, :, None] == whole[:, None, :]
    shared = (whole == -2)[:, None, :]
    own = torch.eye(prefix + length, dtype=torch.bool, device=block.device)
    return ((same | shared) & causal | own)[:, None]
