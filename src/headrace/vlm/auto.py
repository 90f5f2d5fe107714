"""From a name to a vision-language model that answers questions about pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace.vlm.picture import Picture, Worked
from headrace.vlm.pruning.auto import PruningConfig, encoder_policy
from headrace.vlm.pruning.reading import AnswerRecord, prunes_encoder
from headrace.vlm.pruning.towers import find_tower


class VisionLanguageModel(Protocol):
    """What evaluation needs of a model; `record` describes what the last `answer` encoded and kept."""

    pruning: PruningConfig | None
    record: AnswerRecord

    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        video: bool = False,
        worked: Sequence[Worked] = (),
    ) -> list[str]:
        """One greedy answer per question about the same pictures (or frames, with `video`), encoded once.

        `worked` makes every picture but the last an example with question and answer, for each question its own.
        """


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
        ValueError: The folder holds another kind of model, or one that `pruning` cannot act on.
    """
    model = _opened(source, device)
    require_prunable(model, pruning)
    model.pruning = pruning
    return model


def require_prunable(model: Any, pruning: PruningConfig | None) -> None:
    """Find out before the first picture whether a model's encoder can be pruned.

    Raises:
        ValueError: It has no attention to score, or the settings do not fit it.
    """
    encoder = getattr(model, "encoder", None)
    if pruning is not None and prunes_encoder(pruning):
        encoder_policy(pruning, encoder.tower() if encoder is not None else find_tower(model.model))


def _opened(source: str | os.PathLike[str], device: str) -> VisionLanguageModel:
    config = Path(source) / "config.json"
    if config.is_file() and "model" in (written := json.loads(config.read_text())):
        from headrace.vlm.video_language_model import VideoLanguageModel

        if written["model"] != VideoLanguageModel.__name__:
            raise ValueError(f"{os.fspath(source)} holds a {written['model']}, which answers no questions")
        return VideoLanguageModel.from_pretrained(source).to(device)
    from headrace.vlm.huggingface import HuggingFaceVLM

    return HuggingFaceVLM.from_pretrained(source, device=device)
