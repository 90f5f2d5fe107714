"""Messages between policies and robots: msgpack with numpy arrays, as openpi packs them, checked before they are built.

Every size a message claims is compared with a limit before memory is taken for it; dtypes come from a short list; there
is no pickle and no object array. Source of the format: openpi_client/msgpack_numpy.py (openpi-client 0.1.2). Pictures
that vla-eval 0.8 sends as PNG or JPEG are understood too (vla_eval/protocol/image_codec.py).
"""

import io
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

from headrace.contracts import Observation

EARLIER = re.compile(r"(?:.*/)?past/([1-9][0-9]?)/[^/]+")  # pictures of earlier steps
DTYPES = frozenset(("|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8"))


LONGEST_PREFIX = 1024  # rows


class WireError(ValueError):
    """A message that is too large, malformed, or holds what may not travel."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one message may hold.

    Attributes:
        message_bytes: Size of the packed message [bytes].
        array_bytes: Size of one array or picture once decoded [bytes].
        text_bytes: Length of one string [bytes].
        entries: Entries of one map or list.
        dimensions: Dimensions of an array.
    """

    message_bytes: int = 32 << 20
    array_bytes: int = 16 << 20
    text_bytes: int = 16_384
    entries: int = 256
    dimensions: int = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def pack(message: Any) -> bytes:
    """Pack maps, lists, text, numbers and numpy arrays; `openpi_client` reads the result.

    Raises:
        WireError: An array holds objects, complex numbers or structures, or a value is of a type that cannot travel.
    """
    try:
        return msgpack.packb(message, default=_pack_array)
    except TypeError as error:
        raise WireError(f"this cannot be sent: {error}") from error


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str not in DTYPES:
        raise WireError(f"arrays of dtype {value.dtype} cannot be sent; allowed: {', '.join(sorted(DTYPES))}")
    if isinstance(value, np.ndarray):
        body = np.ascontiguousarray(value).tobytes()
        return {b"__ndarray__": True, b"data": body, b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} is not a number, text, list, map or numpy array")


def unpack(data: bytes, limits: Limits | None = None) -> Any:
    """Unpack a message of `pack` or of `openpi_client`; arrays are read-only views of `data`.

    Raises:
        WireError: For whatever is wrong with it; never another error, whatever the bytes.
    """
    limits = limits or Limits()
    if len(data) > limits.message_bytes:
        raise WireError(f"message of {len(data)} bytes exceeds the limit of {limits.message_bytes}")
    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda found: _unpack_map(found, limits),
            raw=False,
            strict_map_key=False,
            max_str_len=limits.text_bytes,
            max_bin_len=limits.array_bytes,
            max_array_len=limits.entries,
            max_map_len=limits.entries,
            max_ext_len=0,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not a valid message: {type(error).__name__}: {str(error)[:200]}") from error


def _unpack_map(found: dict, limits: Limits) -> Any:
    """Turn the maps that stand for arrays, numbers and pictures into these; keys may be text or bytes."""
    for key in ("__ndarray__", "__npgeneric__", "__image__"):
        if key in found or key.encode() in found:
            fields = {
                name.decode("ascii", "replace") if isinstance(name, bytes) else name: v for name, v in found.items()
            }
            return {"__ndarray__": _array, "__npgeneric__": _number, "__image__": _picture}[key](fields, limits)
    if any(not isinstance(key, str) for key in found):
        raise WireError("keys must be text")
    return found


def _dtype(fields: dict) -> np.dtype:
    name = fields.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"dtype {str(name)[:40]!r} is not allowed; allowed: {', '.join(sorted(DTYPES))}")
    return np.dtype(name)


def _shape(fields: dict, limits: Limits) -> tuple[int, ...]:
    shape = fields.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) > limits.dimensions:
        raise WireError(f"shape must be a list of at most {limits.dimensions} numbers, got {str(shape)[:60]}")
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
        raise WireError(f"shape must hold whole numbers from 0, got {str(shape)[:60]}")
    return tuple(shape)


def _array(fields: dict, limits: Limits) -> np.ndarray:
    dtype, shape, data = _dtype(fields), _shape(fields, limits), fields.get("data")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > limits.array_bytes:
        raise WireError(f"array {shape} of {dtype} is {wanted} bytes; the limit is {limits.array_bytes}")
    if not isinstance(data, bytes) or len(data) != wanted:
        got = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"array {shape} of {dtype} needs {wanted} bytes of data, got {got}")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _number(fields: dict, limits: Limits) -> np.generic:
    value = fields.get("data")
    if not isinstance(value, int | float):
        raise WireError(f"a number must be an int or a float, got {type(value).__name__}")
    return _dtype(fields).type(value)


def _picture(fields: dict, limits: Limits) -> np.ndarray:
    """A PNG or JPEG; its size is read from the header before it is decoded."""
    if fields.get("format") == "raw":
        return _array(fields, limits)
    data = fields.get("data")
    if fields.get("format") not in ("png", "jpeg") or not isinstance(data, bytes):
        raise WireError(f"pictures must be raw, png or jpeg with bytes of data, got {str(fields.get('format'))[:20]!r}")
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        size = picture.width * picture.height * len(picture.getbands())
        if size > limits.array_bytes:
            raise WireError(f"picture of {picture.width}x{picture.height} exceeds {limits.array_bytes} bytes")
        return np.asarray(picture.convert("RGB"))
    except WireError:
        raise
    except Exception as error:  # whatever the decoder makes of hostile bytes
        raise WireError(f"picture cannot be decoded: {type(error).__name__}") from error


def observation_from(message: Any) -> Observation:
    """Read an observation from a message in openpi's, vla-eval's or our own form.

    Pictures are arrays of shape (H, W, 3) or (3, H, W), uint8, under any of `images/NAME`, `observation/NAME`, `image`,
    nested or flat; the camera's name is the last part. Those of earlier steps are under `past/1/NAME` for the step
    before, `past/2/NAME` for the one before that. State is the vector under `state`, `states` or
    `observation/state`; the instruction the text under `prompt`, `task_description` or `instruction`.

    Raises:
        WireError: It is no map, or a part has the wrong type, shape or a number that is not finite.
    """
    if not isinstance(message, dict):
        raise WireError(f"an observation must be a map, got {type(message).__name__}")
    images: dict[str, np.ndarray] = {}
    past: dict[int, dict[str, np.ndarray]] = {}
    state, instruction = np.zeros(0, dtype=np.float32), ""
    for key, value in _flat(message).items():
        name = key.rsplit("/", 1)[-1]
        earlier = EARLIER.fullmatch(key)
        if earlier and isinstance(value, np.ndarray) and value.ndim == 3:
            past.setdefault(int(earlier[1]), {})[name] = _camera(key, value)
        elif isinstance(value, np.ndarray) and value.ndim == 3:
            images[name] = _camera(key, value)
        elif name in ("state", "states"):
            state = _state(key, value)
        elif name in ("prompt", "task_description", "instruction"):
            if not isinstance(value, str):
                raise WireError(f"{key} must be text, got {type(value).__name__}")
            instruction = value
        elif isinstance(value, np.ndarray):
            raise WireError(
                f"{key}: pictures have 3 dimensions and the state vector is called `state`; got {value.shape}"
            )
    if sorted(past) != list(range(1, len(past) + 1)):
        raise WireError(f"earlier pictures are numbered 1, 2, 3 ... without a gap, got {sorted(past)}")
    steps = tuple(past[step] for step in sorted(past))
    return Observation(images=images, state=state, instruction=instruction, past=steps)


class Continuation(NamedTuple):
    """The chunk that is being executed while the next one is thought out.

    Attributes:
        prefix: Its rows from the observation on, float32, shape (P, A), in the policy's units.
        delay: Rows of it that are executed in any case.
    """

    prefix: np.ndarray
    delay: int


def split_continuation(message: Any, dim: int) -> tuple[Any, Continuation | None]:
    """A message without its `continue` (`{"prefix": (P, A), "delay": n}`), and what that says; None if it has none.

    Args:
        message: As for `observation_from`.
        dim: Numbers of an action, A.

    Raises:
        WireError: A part is absent, or of the wrong type, shape or size, or holds a number that is not finite.
    """
    if not isinstance(message, dict) or "continue" not in message:
        return message, None
    told = message["continue"]
    if not isinstance(told, dict) or set(told) != {"prefix", "delay"}:
        raise WireError("continue: wanted a map of prefix, shape (rows, actions), and delay, a whole number")
    prefix, delay = told["prefix"], told["delay"]
    if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay <= LONGEST_PREFIX:
        raise WireError(f"continue/delay: wanted a whole number of rows in 0..{LONGEST_PREFIX}, got {str(delay)[:40]}")
    if not isinstance(prefix, np.ndarray) or prefix.dtype.kind != "f":
        got = getattr(prefix, "dtype", type(prefix).__name__)
        raise WireError(f"continue/prefix: wanted an array of floating-point numbers, got {got}")
    if prefix.ndim != 2 or prefix.shape[1] != dim or len(prefix) > LONGEST_PREFIX:
        raise WireError(f"continue/prefix: wanted (up to {LONGEST_PREFIX} rows, {dim}), got {prefix.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = prefix.astype(np.float32)
    if not np.isfinite(rows).all():
        raise WireError("continue/prefix: wanted finite numbers within float32's range")
    return {key: value for key, value in message.items() if key != "continue"}, Continuation(rows, delay)


def _flat(message: dict, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    if depth > 4:
        raise WireError("an observation may be nested 4 deep")
    found: dict[str, Any] = {}
    for key, value in message.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}/", depth + 1)
        else:
            found[f"{prefix}{key}"] = value
    return found


def _camera(key: str, value: np.ndarray) -> np.ndarray:
    if value.dtype != np.uint8:
        raise WireError(f"{key}: pictures are uint8 in 0..255, got {value.dtype}")
    if value.shape[2] != 3 and value.shape[0] == 3:
        value = np.moveaxis(value, 0, 2)
    if value.shape[2] != 3 or not 8 <= min(value.shape[:2]) <= max(value.shape[:2]) <= 4096:
        raise WireError(f"{key}: wanted (H, W, 3) or (3, H, W) with sides of 8 to 4096 pixels, got {value.shape}")
    return value


def _state(key: str, value: Any) -> np.ndarray:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            state = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise WireError(f"{key}: wanted a vector of numbers, got {type(value).__name__}") from error
    if state.ndim != 1 or state.size > 1024 or not np.isfinite(state).all():
        raise WireError(f"{key}: wanted at most 1024 finite numbers in one dimension, got shape {state.shape}")
    return state
