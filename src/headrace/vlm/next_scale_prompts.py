"""Captions as prompts of a next-scale generator: first id, text, and the ids of "<img>", after which the codes come.

Source: the training scripts of TokenFlow (arXiv 2412.03069).
"""

import re
from typing import Any

import numpy as np

IMAGE_START, IMAGE_END = "<img>", "</img>"
LONGEST = 128


def prompt_ids(tokenizer: Any, text: str, *, longest: int = LONGEST) -> list[int]:
    """Ids of a caption and of "<img>"; an empty text gives the prompt that guidance leads away from.

    Args:
        tokenizer: Text tokenizer of transformers.
        text: The caption.
        longest: Ids of the caption that are kept, the first id of a sequence included.
    """
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return (first + _ids(tokenizer, text))[:longest] + _ids(tokenizer, IMAGE_START)


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an image, for `NextScaleConfig.end`: those of "</img>" and the end of a sequence."""
    last = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return (*_ids(tokenizer, IMAGE_END), *last)


def training_caption(text: str, rng: np.random.Generator, *, empty: float = 0.1, first_sentence: float = 0.2) -> str:
    """A caption as one visit of training sees it.

    Args:
        text: The whole caption.
        rng: Source of chance.
        empty: Probability of no caption at all, without which nothing guides.
        first_sentence: Probability of the first sentence only, because users write short prompts.
    """
    without, shortened = rng.random(2)
    if without < empty:
        return ""
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0] if shortened < first_sentence else text


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
