"""From a name to a vision-language model that answers questions about pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from headrace.vlm.picture import Picture
from headrace.vlm.pruning.auto import PruningConfig
from headrace.vlm.pruning.reading import AnswerRecord


class VisionLanguageModel(Protocol):
    """What evaluation needs of a model; `record` describes what the last `answer` encoded and kept."""

    pruning: PruningConfig | None
    record: AnswerRecord

    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 64,
        video: bool = False,
    ) -> list[str]:
        """One greedy answer per question about the same pictures (or frames, with `video`), encoded once."""


def load_vlm(
    source: str | os.PathLike[str], *, pruning: PruningConfig | None = None, device: str = "cpu"
) -> VisionLanguageModel:
    """A folder or Hub id of a headrace VideoLanguageModel or of any Hugging Face vision-language model.

    Args:
        source: Folder or Hub id.
        pruning: Method and budget for visual tokens, such as `pruning_config("flowcut", Budget(tokens=64))`.
        device: Where to run.

    Raises:
        FileNotFoundError, OSError: Nothing there.
        ValueError: The folder holds another kind of model.
    """
    config = Path(source) / "config.json"
    if config.is_file() and "model" in (written := json.loads(config.read_text())):
        from headrace.vlm.video_language_model import VideoLanguageModel

        if written["model"] != VideoLanguageModel.__name__:
            raise ValueError(f"{os.fspath(source)} holds a {written['model']}, which answers no questions")
        model = VideoLanguageModel.from_pretrained(source).to(device)
        model.pruning = pruning
        return model
    from headrace.vlm.huggingface import HuggingFaceVLM

    return HuggingFaceVLM.from_pretrained(source, device=device, pruning=pruning)
