"""Questions to a headrace video-language model: pictures encoded once, the shared prefix read once."""
# Shape letters in this file: B pictures, N rows per picture, L positions.

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.vlm.picture import Picture, Worked, as_pictures, worked_of
from headrace.vlm.prefill import GreedyConfig
from headrace.vlm.prompt import Prompt, require_room
from headrace.vlm.pruning.reading import AnswerRecord, marked_pruning, pruned_greedy, prunes_encoder


class AnswersPictures:
    """The `answer` of `VideoLanguageModel`, apart from how the model is built and trained."""

    record: AnswerRecord
    pruning: Any

    @torch.no_grad()
    def answer(
        self: Any,
        images: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        video: bool = False,
        worked: Sequence[Worked] = (),
    ) -> list[str]:
        """Greedy answers to several questions about the same pictures; a clip is its frames in order.

        Args:
            images: One picture or several, each a PIL image, an array (H, W, 3) uint8 or a path.
            questions: At least one.
            max_new_tokens: Most tokens per answer; one number, or one per question.
            video: Accepted for clips; frames are read as pictures in order.
            worked: Worked examples for few-shot prompts, one list per question: an example's question and answer for
                each picture but the last, in order.

        Raises:
            ValueError: No picture, no question, no text tokenizer, pruning that the encoder cannot do, or examples that
                do not fit the pictures or make the prompt too long.
            FileNotFoundError: A path without a file.
        """
        prompts = self.prompts(images, questions, worked=worked)
        stop = self.config.text_specials.get("eos")
        config = GreedyConfig(max_new_tokens=max_new_tokens, stop_ids=() if stop is None else (stop,))
        written = pruned_greedy(
            self.language,
            self.language.get_input_embeddings(),
            prompts,
            config,
            self.pruning,
            self.record,
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def prompts(
        self: Any, images: Picture | Sequence[Picture], questions: Sequence[str], *, worked: Sequence[Worked] = ()
    ) -> list[Prompt]:
        """The prompts of `answer`, visual rows in place; fills `record`."""
        pictures = as_pictures(images)
        if not questions:
            raise ValueError("answer needs at least one question")
        turns = worked_of(worked, questions=len(questions), pictures=len(pictures))
        rows = self._encoded(pictures)
        fields: dict[str, Any] = {f"picture_{i}": row for i, row in enumerate(rows)}
        vectors = None
        if self.encoder.codes is None:
            kept = [row[~row[:, 0].isnan()] for row in rows]
            vectors = {"picture": self.projector(torch.cat(kept))}
            fields = {f"picture_{i}": len(row) for i, row in enumerate(kept)}
        made = []
        for question, examples in zip(questions, turns, strict=True):
            layout = self.conversation(pictures=len(pictures), worked=bool(examples))
            text = {"question": question}
            for index, (asked, said) in enumerate(examples):
                text |= {f"question_{index}": asked, f"answer_{index}": f" {said}"}
            made.append(self._prompt(layout, fields | text, vectors))
        if any(turns):
            require_room(made, getattr(self.language.config, "max_position_embeddings", None))
        return made

    def _encoded(self: Any, pictures: list[Any]) -> Tensor:
        pixels = self.encoder.preprocessing(pictures).to(self.device)
        start = time.perf_counter()
        kept: list[list[int]] = []
        units: list[int] = []
        grids: list[tuple[int, int] | None] = []
        if not prunes_encoder(self.pruning):
            rows = self.encode(pixels)
        else:  # one by one: what a picture keeps does not depend on its neighbours
            tower, parts = self.encoder.tower(), []
            for one in pixels.split(1):
                with marked_pruning(self.encoder, self.pruning, tower=tower) as cut:
                    parts.append(self.encode(one))
                kept += cut.report.kept if cut is not None else []
                units += cut.report.units if cut is not None else []
                grids += cut.report.grids if cut is not None else []
            rows = torch.cat(parts)
        gone = int(rows[..., 0].isnan().sum()) if rows.is_floating_point() else 0
        before = rows.shape[0] * rows.shape[1]
        self.record = AnswerRecord(
            visual_before=before, visual_after=before - gone, encode_seconds=time.perf_counter() - start,
            pictures=rows.shape[0], kept=kept, units=units, grids=grids,
        )  # fmt: skip
        return rows

    def _prompt(self: Any, layout: Any, sample: dict[str, Any], vectors: dict[str, Tensor] | None) -> Prompt:
        built = layout.build(sample, encode_text=self.encode_text, until="answer")
        ids, modality = built.ids.to(self.device), built.modality.to(self.device)
        embeds = self.embed(ids, modality, vectors)
        visual = (modality != 0).to(self.device)
        return Prompt(ids.masked_fill(visual, 0), embeds, built.position[None].to(self.device), visual)
