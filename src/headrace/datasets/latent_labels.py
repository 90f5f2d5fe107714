"""Latent-action labels on disk: Parquet parts with one row per frame, and one JSON file that says what made them.

A folder holds `labels.json` (`LabelHeader`) and `part-00000.parquet` and following. Each part repeats the header in its
schema's metadata, so that a part that strayed from its folder still says which model wrote it.
"""
# Shape letters: R rows, H transitions of a chunk, N codes of a transition.

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.nn.pretrained import config_from_dict, void, write_atomically

FORMAT = 2
HEADER_FILE = "labels.json"
METADATA_KEY = b"headrace.labels"
_AGAIN = "label again into a new folder"

ROW_SCHEMA = pa.schema(
    [
        pa.field("source", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("video", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("instruction", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("frame", pa.int32(), nullable=False),
        pa.field("stride", pa.int32(), nullable=False),
        pa.field("past", pa.int32(), nullable=False),
        pa.field("future", pa.int32(), nullable=False),
        pa.field("transitions", pa.int32(), nullable=False),
        pa.field("codes", pa.list_(pa.int16()), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """One source of the labelled corpus.

    Attributes:
        name: As in the rows' column `source`.
        videos: Videos in it.
        frames: Frames in them.
        rate: Frames a second after the stride [Hz], the time between `frame` and `frame + stride`; None where the
            source's videos differ.
    """

    name: str
    videos: int
    frames: int
    rate: float | None


@dataclass(frozen=True, kw_only=True)
class LabelHeader:
    """What wrote the labels, and how they are to be read.

    Attributes:
        lam: Name of the latent action model, for people.
        lam_hash: Hash of its config and weights, for programs (`headrace.robot.label_clips.model_hash`).
        codes: Size of the codebook, K; codes lie in 0 .. K-1.
        tokens: Codes per transition, N.
        horizon: Transitions per row, H.
        history: Frames before the present one that the labelling window began with, in steps of the stride; column
            `past` is that frame.
        image_size: Side of the frames that the model saw [px].
        corpus: From `VideoClips.fingerprint`.
        parts: Number of Parquet files in the whole.
        rows_per_part: Frames per file that were asked for; decides which videos lie in which part.
        every: Frames whose number this divides have a row.
        sources: What was labelled.
        format: Version of this layout.
    """

    lam: str
    lam_hash: str
    codes: int
    tokens: int
    horizon: int
    history: int
    image_size: int
    corpus: str
    parts: int
    rows_per_part: int
    every: int
    sources: tuple[LabelledSource, ...]
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("codes", "tokens", "horizon", "image_size", "parts", "rows_per_part", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.history < 0:
            raise ValueError(f"history must be at least 0, got {self.history}")
        if self.format != FORMAT:
            raise ValueError(f"these labels have layout {self.format}, this headrace reads {FORMAT}; {_AGAIN}")

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Each source's rate [Hz]; tells labels of all videos of a mixed source from those of one rate alone."""
        return tuple(source.rate for source in self.sources)

    def save(self, folder: Path) -> None:
        """Write `labels.json` atomically."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(folder / HEADER_FILE, lambda path: void(path.write_text(text)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `labels.json`.

        Raises:
            FileNotFoundError: It is not a folder of labels.
            ValueError: Broken, or of another layout.
        """
        path = folder / HEADER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {HEADER_FILE}: it is not a folder that `headrace label` wrote")
        try:
            data = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise ValueError(
                f"{path} has layout {data.get('format')}, this headrace reads {FORMAT}: the older one says neither how "
                f"frames were shared out nor which were left out; {_AGAIN}"
            )
        return config_from_dict(cls, data)

    def require_model(self, lam_hash: str, *, name: str) -> None:
        """Refuse labels of another model.

        Raises:
            ValueError: The hashes differ.
        """
        if self.lam_hash != lam_hash:
            raise ValueError(
                f"these labels were made by {self.lam} ({self.lam_hash}), not by {name} ({lam_hash}); "
                "name the model that made them, or label again"
            )


def part_path(folder: Path, part: int) -> Path:
    """File of part `part`, counted from 0."""
    return folder / f"part-{part:05d}.parquet"


def write_part(
    folder: Path, part: int, header: LabelHeader, rows: Mapping[str, Sequence[Any]], codes: np.ndarray
) -> None:
    """Write one part atomically.

    Args:
        folder: Of the labels.
        part: Number of the part.
        header: Repeated in the file.
        rows: The columns of `ROW_SCHEMA` other than `codes`, R values each.
        codes: Shape (R, H, N).

    Raises:
        ValueError: Shapes do not fit or a code lies outside the codebook.
    """
    count = len(rows["frame"])
    if codes.shape != (count, header.horizon, header.tokens):
        raise ValueError(f"codes must have shape {(count, header.horizon, header.tokens)}, got {codes.shape}")
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < header.codes:
        raise ValueError(f"codes must lie in 0..{header.codes - 1}, got {codes.min()}..{codes.max()}")
    width = header.horizon * header.tokens
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * width)
    lists = pa.ListArray.from_arrays(offsets, pa.array(codes.astype(np.int16).reshape(-1)))
    columns = [lists if f.name == "codes" else pa.array(rows[f.name], type=f.type) for f in ROW_SCHEMA]
    schema = ROW_SCHEMA.with_metadata({METADATA_KEY: json.dumps(asdict(header)).encode()})
    table = pa.Table.from_arrays(columns, schema=schema)
    write_atomically(part_path(folder, part), lambda path: pq.write_table(table, path, compression="zstd"))


class LatentLabels:
    """All labels of a folder, held in memory; row r belongs to one frame of one video.

    Attributes:
        header: What wrote them.
        codes: int16, shape (R, H, N); entry h is the transition from frame + h * stride to frame + (h + 1) * stride.
        frame: The present frame's number in its video, int32, shape (R,).
        stride: Frames of the video between neighbouring frames of the window, int32, shape (R,).
        past: Frame number of the context frame before the present one, 0 at the start of a video, int32, shape (R,).
        future: Frame number at the end of the chunk, at most the video's last, int32, shape (R,).
        transitions: How many of the H transitions lie within the video, at least 1, int32, shape (R,); the codes of
            the others are those of a picture that stands still.
        source, video, instruction: Strings, object arrays of shape (R,). `source` and `video` are the names under which
            `headrace.datasets.video_clips.VideoClips.read` gives the frames.

    Args:
        folder: Written by `headrace label`.
        lam_hash: The model whose labels are wanted; None takes any.
        partial: Whether a folder is read of which parts are still missing, with a warning.

    Raises:
        FileNotFoundError: No labels there.
        ValueError: Labels of another model, parts missing, a truncated part, or one written by another run.
    """

    def __init__(self, folder: str | Path, *, lam_hash: str | None = None, partial: bool = False) -> None:
        folder = Path(folder)
        self.header = LabelHeader.load(folder)
        if lam_hash is not None:
            self.header.require_model(lam_hash, name="the model named in the config")
        paths = [part_path(folder, part) for part in range(self.header.parts)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            text = f"{folder} lacks {len(missing)} of {self.header.parts} parts ({', '.join(missing[:3])}); "
            if not partial or len(missing) == len(paths):
                raise ValueError(text + "run `headrace label` again to go on")
            warnings.warn(text + "reading those that are there", stacklevel=2)
        tables = [_read_part(path, self.header) for path in paths if path.is_file()]
        table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        self.codes = np.concatenate([_codes_of(part, self.header) for part in tables])
        self.frame, self.stride, self.past, self.future, self.transitions = (
            table.column(name).to_numpy() for name in ("frame", "stride", "past", "future", "transitions")
        )
        self.source, self.video, self.instruction = (
            np.asarray(table.column(name).cast(pa.string()).to_pylist(), dtype=object)
            for name in ("source", "video", "instruction")
        )

    def __len__(self) -> int:
        return len(self.frame)


def _read_part(path: Path, header: LabelHeader) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); delete it and label again") from error
    written = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    written["rates"] = tuple(source["rate"] for source in written.get("sources", ()))
    for name in ("lam_hash", "corpus", "codes", "tokens", "horizon", "history", "rows_per_part", "every", "rates"):
        if written.get(name) != getattr(header, name):
            raise ValueError(
                f"{path} was written by another run: {name} is {written.get(name)!r} in it and "
                f"{getattr(header, name)!r} in {HEADER_FILE}; delete it and label again"
            )
    return table.replace_schema_metadata(None)


def _codes_of(table: pa.Table, header: LabelHeader) -> np.ndarray:
    flat = table.column("codes").combine_chunks()
    values = flat.flatten() if isinstance(flat, pa.ListArray) else pa.concat_arrays(flat.chunks).flatten()
    return values.to_numpy().reshape(table.num_rows, header.horizon, header.tokens)
