"""A headrace or Hugging Face model as an lmms-eval chat model. Imported by lmms-eval through the entry point."""

from typing import Any

from lmms_eval.api.model import lmms

from headrace.vlm.vqa_model import opener, pruning_of


class HeadraceModel(lmms):
    """Answers all questions on one picture in one call, whatever order lmms-eval asks in.

    Args:
        source: Folder or Hub id.
        prune, keep: Pruning method and budget; part of the arguments, so that the response cache tells runs apart.
        device: Where the model runs.
        batch_size: Given by lmms-eval; pictures are asked about one by one.
        model: An open model instead of `source`.
    """

    is_simple = False

    def __init__(
        self,
        source: str = "",
        prune: str | None = None,
        keep: float | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        model: Any = None,
    ) -> None:
        super().__init__()
        if not source and model is None:
            raise ValueError("the headrace model needs model_args source=FOLDER_OR_ID")
        pruning = pruning_of(prune, None if keep is None else float(keep))
        self.source, self.batch_size = source, batch_size
        self.answerer = model if model is not None else opener(source, device=device or "cpu", pruning=pruning)()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """One answer per request, in their order. Pictures are opened when their questions' turn comes."""
        groups: dict[str, list[tuple[int, Any, Any, int]]] = {}
        for index, request in enumerate(requests):
            messages_of, settings, doc_id, task, split = request.args[-5:]
            doc = self.task_dict[task][split][doc_id]
            key = doc.get("image_path", f"{task}/{split}/{doc_id}") if isinstance(doc, dict) else f"{task}/{doc_id}"
            limit = int(settings.get("max_new_tokens", 128))
            groups.setdefault(key, []).append((index, messages_of, doc, limit))
        answers = [""] * len(requests)
        for members in groups.values():
            parts = [_parts(messages_of(doc)) for _, messages_of, doc, _ in members]
            limits = [limit for *_, limit in members]
            given = self.answerer.answer(parts[0][0], [text for _, text in parts], max_new_tokens=limits)
            for (index, *_), answer in zip(members, given, strict=True):
                answers[index] = answer
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not what these models offer.

        Raises:
            ValueError: Always; names what to use.
        """
        raise ValueError("the headrace model answers in words; use tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not what these models offer.

        Raises:
            ValueError: Always; names what to use.
        """
        raise ValueError("the headrace model answers one turn; use tasks with output_type generate_until")


def _parts(messages: list[dict[str, Any]]) -> tuple[list[Any], str]:
    """Pictures and text of a conversation's turns, in order."""
    contents = [part for message in messages for part in message["content"]]
    pictures = [part["url"] for part in contents if part["type"] == "image"]
    return pictures, "\n".join(part["text"] for part in contents if part["type"] == "text")
