"""Any Hugging Face vision-language model behind one small interface: encode pictures once, answer many questions.

Nothing in transformers is patched: features come from the model's own `get_image_features`, its decoder reads them as
`inputs_embeds`, and positions come from the model where it has its own rule (multimodal RoPE).
"""
# Shape letters in this file: L prompt length, K visual tokens, D width, A position axes.

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.vlm.picture import Picture, Worked, as_pictures, worked_of
from headrace.vlm.prefill import GreedyConfig
from headrace.vlm.prompt import Prompt, require_room
from headrace.vlm.pruning.auto import PruningConfig
from headrace.vlm.pruning.reading import AnswerRecord, marked_pruning, pruned_greedy

PLAIN_TEMPLATE = "USER: {media}\n{question} ASSISTANT:"  # the LLaVA-1.5 form, for processors that bring none


def pictures_seen(inputs: Mapping[str, Tensor]) -> int:
    """How many pictures (crops, groups of frames) the encoder sees of a processor's output.

    Crops of nothing but zeros fill up a batch and do not count.
    """
    for name in ("image_grid_thw", "video_grid_thw"):
        if name in inputs:
            return int(inputs[name][:, 0].sum())
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
    return int(pixels.flatten(0, -4).flatten(1).any(1).sum())


def _turn(role: str, kinds: Sequence[str], text: str) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}


class HuggingFaceVLM:
    """A vision-language model of transformers with its processor.

    Attributes:
        model: `...ForConditionalGeneration`, in eval mode.
        processor: Its processor.
        pruning: Method and budget for visual tokens, None keeps all. May be set between calls.
        record: What the last `answer` encoded and kept.
    """

    def __init__(self, model: Any, processor: Any, *, pruning: PruningConfig | None = None) -> None:
        self.model = model.eval()
        self.processor = processor
        self.pruning = pruning
        self.record = AnswerRecord()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
        pruning: PruningConfig | None = None,
    ) -> "HuggingFaceVLM":
        """Load a model id or folder.

        Raises:
            OSError: Nothing there, with transformers' explanation.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        return cls(model.to(device), AutoProcessor.from_pretrained(source), pruning=pruning)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @torch.no_grad()
    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        video: bool = False,
        worked: Sequence[Worked] = (),
    ) -> list[str]:
        """Greedy answers to several questions about the same pictures, which are encoded and read once.

        Args:
            images: One picture or several, each a PIL image, an array (H, W, 3) uint8 or a path; shown in order, before
                the question. With `video` they are the frames of one clip.
            questions: At least one.
            max_new_tokens: Most tokens per answer; one number, or one per question.
            worked: Worked examples for few-shot prompts, one list per question: an example's question and answer for
                each picture but the last, in order.

        Returns:
            One answer per question, as `model.generate(do_sample=False)` gives it for that question alone.

        Raises:
            ValueError: No picture or no question, or examples that do not fit the pictures or make the prompt too long.
            FileNotFoundError: A path without a file.
        """
        prompts = self.prompts(images, questions, video=video, worked=worked)
        written = pruned_greedy(
            self.model,
            self.model.get_input_embeddings(),
            prompts,
            self._greedy_config(max_new_tokens),
            self.pruning,
            self.record,
        )
        return [self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def prompts(
        self,
        images: Picture | Sequence[Picture],
        questions: Sequence[str],
        *,
        video: bool = False,
        worked: Sequence[Worked] = (),
    ) -> list[Prompt]:
        """The prompts of `answer`: ids expanded by the processor, features of one pass of the encoder."""
        pictures = as_pictures(images)
        if not questions:
            raise ValueError("answer needs at least one question")
        turns = worked_of(worked, questions=len(questions), pictures=len(pictures))
        texts = [self._text(question, len(pictures), video=video, worked=one)
                 for question, one in zip(questions, turns, strict=True)]  # fmt: skip
        inputs = self._process(texts[0], pictures, video=video)
        media = self.media_id(video=video)
        features = self._timed_features(inputs, video=video)
        rows: dict[int, Tensor] = {}
        for one in dict.fromkeys(turns):  # questions behind the same examples share all ids between the pictures
            alike = [i for i, other in enumerate(turns) if other == one]
            same = inputs if alike[0] == 0 else self._process(texts[alike[0]], pictures, video=video)
            found = self._expanded([texts[i] for i in alike], same["input_ids"][0], media, pictures, video=video)
            rows |= zip(alike, found, strict=True)
        made = [self._prompt(rows[i].to(self.device), features, inputs, media, video=video) for i in range(len(texts))]
        if any(turns):
            require_room(made, getattr(self.model.config.get_text_config(), "max_position_embeddings", None))
        return made

    def require_worked(self, count: int) -> None:
        """Find out before the first picture whether the model can be shown `count` worked examples.

        Raises:
            ValueError: Its chat template shows one picture at a time.
        """
        from jinja2 import TemplateError

        def shown(examples: int) -> int:
            text = self._text("?", examples + 1, video=False, worked=(("?", "?"),) * examples)
            return int((self.processor.tokenizer(text, return_tensors="pt").input_ids == self.media_id()).sum())

        try:
            found, wanted = shown(count), (count + 1) * shown(0)
        except TemplateError as error:
            raise ValueError(f"the chat template of {type(self.model).__name__} takes no examples ({error})") from error
        if found != wanted:
            raise ValueError(
                f"the chat template of {type(self.model).__name__} shows {found} of {wanted} pictures: it takes no "
                "worked examples; run without --shots"
            )

    def media_id(self, *, video: bool = False) -> int:
        """Id of the placeholder that features replace."""
        config = self.model.config
        name = "video_token_id" if video else "image_token_id"
        found = getattr(config, name, None)
        if found is None:
            kind = "video" if video else "pictures"
            raise ValueError(f"{type(self.model).__name__} has no {name}: it takes no {kind}")
        return int(found)

    def _greedy_config(self, max_new_tokens: int | Sequence[int]) -> GreedyConfig:
        settings = self.model.generation_config
        stops = settings.eos_token_id
        stop_ids = tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (int(stops),)
        return GreedyConfig(
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            repetition_penalty=settings.repetition_penalty or 1.0,
        )

    def _text(self, question: str, count: int, *, video: bool, worked: Worked = ()) -> str:
        kinds = ["video"] if video else ["image"] * (1 if worked else count)
        if getattr(self.processor, "chat_template", None):
            messages: list[dict[str, Any]] = []
            for asked, said in worked:
                messages.append(_turn("user", ["image"], asked))
                messages.append(_turn("assistant", [], said))
            messages.append(_turn("user", kinds, question))
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        token = getattr(self.processor, "video_token" if video else "image_token")
        end = self.processor.tokenizer.eos_token or ""
        before = [f"{PLAIN_TEMPLATE.format(media=token, question=asked)} {said}{end}" for asked, said in worked]
        return "".join([*before, PLAIN_TEMPLATE.format(media=token * len(kinds), question=question)])

    def _process(self, text: str, pictures: list[Any], *, video: bool) -> dict[str, Tensor]:
        media = {"videos": [pictures]} if video else {"images": pictures}
        inputs = self.processor(text=[text], **media, return_tensors="pt")
        floating = self.model.dtype
        return {k: v.to(self.device, floating if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def _timed_features(self, inputs: dict[str, Tensor], *, video: bool) -> Tensor:
        """Features under the pruning method, with NaN rows for what it dropped; fills `record`."""
        start = time.perf_counter()
        with marked_pruning(self.model, self.pruning, video=video) as cut:
            features = self._features(inputs, video=video)
        newline = getattr(self.model.model, "image_newline", None)
        if newline is not None and bool(features.isnan().any()):  # LLaVA-NeXT: scattered tokens have no row ends
            features = features.masked_fill((features == newline).all(-1, keepdim=True), torch.nan)
        kept = int((~features[:, 0].isnan()).sum())
        self.record = AnswerRecord(
            visual_before=len(features), visual_after=kept, encode_seconds=time.perf_counter() - start,
            pictures=pictures_seen(inputs), kept=cut.report.kept if cut is not None else [],
            units=cut.report.units if cut is not None else [], grids=cut.report.grids if cut is not None else [],
        )  # fmt: skip
        return features

    def _features(self, inputs: dict[str, Tensor], *, video: bool) -> Tensor:
        """Projected features of all pictures in order, (K, D)."""
        extract = self.model.model.get_video_features if video else self.model.model.get_image_features
        known = inspect.signature(extract).parameters
        output = extract(**{name: value for name, value in inputs.items() if name in known})
        found = output.pooler_output
        parts = list(found) if isinstance(found, list | tuple) else [found]
        return torch.cat([part.flatten(0, -2) for part in parts])

    def _expanded(
        self, texts: list[str], first: Tensor, media: int, pictures: list[Any], *, video: bool
    ) -> list[Tensor]:
        """Ids of every text with its placeholders expanded as in the first, whose ids the processor made.

        Tokenizers split at special tokens, so the ids between the first and the last placeholder do not depend on the
        question; where that does not hold for the first text, the processor does all of them.
        """
        plain = [self.processor.tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
        first = first.cpu()
        places = [torch.nonzero(ids == media)[:, 0] for ids in plain]
        if all(len(place) for place in places):
            head, tail = int(places[0][0]), len(plain[0]) - 1 - int(places[0][-1])
            same = torch.equal(first[:head], plain[0][:head])
            if same and torch.equal(first[len(first) - tail :], plain[0][len(plain[0]) - tail :]):
                middle = first[head : len(first) - tail]
                return [
                    torch.cat([ids[: place[0]], middle, ids[place[-1] + 1 :]])
                    for ids, place in zip(plain, places, strict=True)
                ]
        return [first] + [self._process(text, pictures, video=video)["input_ids"][0].cpu() for text in texts[1:]]

    def _prompt(self, ids: Tensor, features: Tensor, inputs: dict[str, Tensor], media: int, *, video: bool) -> Prompt:
        visual = ids == media
        if int(visual.sum()) != len(features):
            raise ValueError(
                f"the prompt has {int(visual.sum())} placeholders and the encoder gave {len(features)} features; "
                "processor and model are not of one checkpoint"
            )
        text = self.model.get_input_embeddings()(ids.masked_fill(visual, 0))
        embeds = text.masked_scatter(visual[:, None], features.to(text.dtype))
        prompt = Prompt(ids, embeds, self._positions(ids, visual, embeds, inputs, video=video), visual)
        gone = features[:, 0].isnan()
        if not bool(gone.any()):
            return prompt
        shorter = prompt.keep(~visual.masked_scatter(visual, gone))
        if len(prompt.positions) == 1:  # plain positions close up, as when the encoder had given fewer features
            shorter = shorter._replace(positions=torch.arange(len(shorter.ids), device=ids.device)[None])
        return shorter

    def _positions(
        self, ids: Tensor, visual: Tensor, embeds: Tensor, inputs: dict[str, Tensor], *, video: bool
    ) -> Tensor:
        """Rotary positions (A, L): the model's own rule where it has one, else 0, 1, 2, ..."""
        rule = getattr(self.model.model, "compute_3d_position_ids", None)
        if rule is None:
            return torch.arange(len(ids), device=ids.device)[None]
        known = inspect.signature(rule).parameters
        given = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        found = rule(
            input_ids=ids[None],
            inputs_embeds=embeds[None],
            attention_mask=None,
            past_key_values=None,
            mm_token_type_ids=(visual * (2 if video else 1)).int()[None],
            **{name: value for name, value in given.items() if name in known},
        )
        return found[:, 0]
