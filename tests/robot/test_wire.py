"""The wire format: openpi's client and ours agree, and no bytes whatever raise anything but WireError."""

import struct

import msgpack
import numpy as np
import pytest

from headrace.robot.wire import DTYPES, Limits, WireError, observation_from, pack, unpack

SMALL = Limits(message_bytes=1 << 16, array_bytes=1 << 14, text_bytes=64, entries=16)


def array(dtype="<f4", shape=(2,), data=b"\0" * 8) -> bytes:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_allowed_dtype_comes_back_bit_by_bit(dtype):
    values = np.frombuffer(np.random.default_rng(0).bytes(96), dtype="u1")
    sent = (values % 2).astype(bool) if dtype == "|b1" else values.view(dtype)
    for one in (sent, sent.reshape(2, -1), sent[:0], sent[::2]):
        got = unpack(pack({"a": one}))["a"]
        assert got.dtype == one.dtype and got.shape == one.shape
        assert got.tobytes() == np.ascontiguousarray(one).tobytes()


def test_openpis_codec_and_ours_read_each_other():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy")
    message = {"observation/image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "s": np.float32(2.5), "p": "go"}
    for packer, reader in ((theirs.packb, unpack), (pack, theirs.unpackb)):
        got = reader(packer(message))
        np.testing.assert_array_equal(got["observation/image"], message["observation/image"])
        assert got["s"] == 2.5 and got["p"] == "go"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (array(dtype="|O"), "dtype"),
        (array(dtype="<c8"), "dtype"),
        (array(dtype=[("a", "<f4")]), "dtype"),
        (array(shape=(3,)), "needs 12 bytes"),
        (array(shape=(-2,)), "whole numbers"),
        (array(shape=(1,) * 6), "at most 5"),
        (array(shape=(1 << 40, 1 << 40)), "limit"),
        (array(data="text"), "str"),
        (msgpack.packb({"a": b"\0" * (1 << 15)}), "max_bin_len"),
        (msgpack.packb({"a": "x" * 65}), "max_str_len"),
        (msgpack.packb(list(range(17))), "max_array_len"),
        (msgpack.packb(msgpack.ExtType(1, b"x")), "max_ext_len"),
        (b"\xdd\xff\xff\xff\xff", "max_array_len"),  # a list that claims four thousand million entries
        (b"\x81\x91\x01\x02", "TypeError"),  # a list as a key
        (b"\x91" * 60_000 + b"\x01", "not a valid message"),  # nested sixty thousand deep
        (b"\0" * (1 << 17), "exceeds the limit"),
        (b"", "not a valid message"),
        (msgpack.packb({1: 2}), "keys must be text"),
        (b"\xa2\xff\xfe", "not a valid message"),
    ],
)
def test_what_may_not_travel_is_refused_by_name(data, why):
    with pytest.raises(WireError, match=why):
        unpack(data, SMALL)


def test_objects_and_strangers_cannot_be_sent():
    for bad in (np.array([object()]), np.zeros(2, dtype=complex), {"f": lambda: 0}, {"s": {1, 2}}):
        with pytest.raises(WireError):
            pack({"bad": bad})


def test_ten_thousand_broken_messages_raise_nothing_else():
    rng = np.random.default_rng(7)
    image = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    good = pack({"images": {"cam": image}, "state": np.ones(7, np.float32), "prompt": "go", "slot": 1})
    refused = 0
    for turn in range(10_000):
        message = bytearray(good if turn % 2 else rng.bytes(int(rng.integers(1, 200))))
        for position in rng.integers(0, len(message), int(rng.integers(1, 6))):
            message[position] = rng.integers(0, 256)
        try:
            observation_from(unpack(bytes(message[: int(rng.integers(1, len(message) + 1))]), SMALL))
        except WireError:
            refused += 1
    assert refused > 7_000


def test_a_picture_that_claims_to_be_huge_is_not_decoded():
    import io
    import zlib

    from PIL import Image

    body = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(body, "PNG")
    honest = body.getvalue()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + honest[24:29]
    bomb = honest[:12] + header + struct.pack(">I", zlib.crc32(header)) + honest[33:]

    def sent(data):
        return msgpack.packb({"__image__": True, "format": "png", "data": data, "shape": [16, 16, 3]})

    assert unpack(sent(honest)).shape == (16, 16, 3)
    with pytest.raises(WireError, match=r"60000x60000|DecompressionBomb"):
        unpack(sent(bomb))
    with pytest.raises(WireError, match="cannot be decoded"):
        unpack(sent(honest[:45]))


def test_the_three_dialects_give_the_same_observation():
    image, state = np.full((16, 24, 3), 7, np.uint8), np.arange(3, dtype=np.float32)
    messages = (
        {"images": {"image": image}, "state": state, "prompt": "go"},
        {"observation/image": np.moveaxis(image, 2, 0), "observation/state": state, "prompt": "go"},
        {"images": {"image": image}, "states": [0, 1, 2], "task_description": "go"},
    )
    for message in messages:
        got = observation_from(message)
        np.testing.assert_array_equal(got.images["image"], image)
        np.testing.assert_array_equal(got.state, state)
        assert got.state.dtype == np.float32 and got.instruction == "go" and got.past == ()


def test_pictures_of_earlier_steps_stay_in_order():
    images = [{"image": np.full((16, 24, 3), step, np.uint8)} for step in range(12)]
    got = observation_from({"images": images[0], "past": {str(step): images[step] for step in range(1, 12)}})
    assert got.images["image"].max() == 0 and [past["image"].max() for past in got.past] == list(range(1, 12))
    with pytest.raises(WireError, match=r"without a gap, got \[2\]"):
        observation_from({"past": {"2": images[2]}})


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ([1], "must be a map"),
        ({"image": np.zeros((16, 16, 3), np.float32)}, "uint8"),
        ({"image": np.zeros((16, 16, 4), np.uint8)}, r"\(H, W, 3\)"),
        ({"image": np.zeros((2, 16, 3), np.uint8)}, "8 to 4096"),
        ({"state": np.array([1.0, np.nan])}, "finite"),
        ({"state": np.zeros((2, 2))}, r"\(2, 2\)"),
        ({"state": {"a": 1}, "prompt": 3}, "prompt must be text"),
        ({"mask": np.zeros((4, 4))}, "mask"),
    ],
)
def test_wrong_observations_are_named(message, why):
    with pytest.raises(WireError, match=why):
        observation_from(message)
