"""Labels on disk come back as written, and those of another model, run or corpus are refused."""

import dataclasses
import json

import numpy as np
import pytest

from headrace.datasets.latent_labels import LabelHeader, LabelledSource, LatentLabels, part_path, write_part

HEADER = LabelHeader(
    lam="lam",
    lam_hash="0123456789abcdef",
    codes=8,
    tokens=4,
    horizon=3,
    history=1,
    image_size=64,
    corpus="fedcba9876543210",
    parts=2,
    rows_per_part=5,
    every=1,
    sources=(LabelledSource(name="pick", videos=2, frames=9, rate=20.0),),
)


def rows(count: int, video: str) -> dict:
    frame = list(range(count))
    return {
        "source": ["pick"] * count,
        "video": [video] * count,
        "instruction": ["pick it up"] * count,
        "frame": frame,
        "stride": [1] * count,
        "past": [max(0, f - 1) for f in frame],
        "future": [f + 3 for f in frame],
        "transitions": [3] * count,
    }


@pytest.fixture
def written(tmp_path):
    HEADER.save(tmp_path)
    codes = np.random.default_rng(0).integers(0, 8, (9, 3, 4))
    write_part(tmp_path, 0, HEADER, rows(5, "a"), codes[:5])
    write_part(tmp_path, 1, HEADER, rows(4, "b"), codes[5:])
    return tmp_path, codes


def test_rows_come_back_in_order(written):
    folder, codes = written
    labels = LatentLabels(folder, lam_hash=HEADER.lam_hash)
    assert labels.header == HEADER
    np.testing.assert_array_equal(labels.codes, codes)
    assert labels.video.tolist() == ["a"] * 5 + ["b"] * 4
    assert labels.frame.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert labels.instruction[8] == "pick it up"


def test_labels_of_another_model_are_refused(written):
    with pytest.raises(ValueError, match=r"made by lam .0123456789abcdef., not by .*ffff"):
        LatentLabels(written[0], lam_hash="ffff")


def test_labels_of_the_layout_before_are_refused(written):
    path = written[0] / "labels.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("rows_per_part", "every")}
    path.write_text(json.dumps(old | {"format": 1}))
    with pytest.raises(ValueError, match=r"has layout 1, this headrace reads 2: .* label again"):
        LatentLabels(written[0])


def test_part_of_another_run_is_refused(written):
    other = dataclasses.replace(HEADER, lam_hash="ffffffffffffffff")
    write_part(written[0], 1, other, rows(4, "b"), np.zeros((4, 3, 4), int))
    with pytest.raises(ValueError, match="another run: lam_hash is 'ffff"):
        LatentLabels(written[0])


def test_missing_and_truncated_parts(written):
    folder, codes = written
    path = part_path(folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        LatentLabels(folder)
    path.unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 parts"):
        LatentLabels(folder)
    with pytest.warns(UserWarning, match="lacks 1 of 2"):
        np.testing.assert_array_equal(LatentLabels(folder, partial=True).codes, codes[:5])


def test_codes_outside_the_codebook_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"0\.\.7"):
        write_part(tmp_path, 0, HEADER, rows(2, "a"), np.full((2, 3, 4), 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        write_part(tmp_path, 0, HEADER, rows(2, "a"), np.zeros((2, 4, 3), int))


def test_no_labels_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="headrace label"):
        LatentLabels(tmp_path)
