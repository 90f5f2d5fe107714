"""Models that read text keep their tokenizer in the folder of their weights."""

import os
from pathlib import Path
from typing import Any, Self

from headrace.nn.pretrained import Pretrained, resolve_folder

TOKENIZER_FOLDER = "text_tokenizer"


class WithTextTokenizer(Pretrained):
    """A model whose text tokenizer is saved and loaded with it.

    Attributes:
        tokenizer: Text tokenizer of transformers; None until one is set or loaded.
    """

    tokenizer: Any = None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As `Pretrained`, with the text tokenizer beside."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(folder) / TOKENIZER_FOLDER)
        super().save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """As `Pretrained`, with the text tokenizer where the folder holds one."""
        folder = resolve_folder(source, revision=revision)
        model = super().from_pretrained(folder)
        if (folder / TOKENIZER_FOLDER).is_dir():
            from transformers import AutoTokenizer

            model.tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER_FOLDER)
        return model
