"""The one base class: a module built from a config that saves to and loads from a folder or a Hub id."""

import json
import os
import tempfile
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from headrace.nn.shards import whole

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def _rebuild(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if is_dataclass(hint) and isinstance(value, dict):
        return config_from_dict(typing.cast(type, hint), value)
    if origin is tuple and isinstance(value, list):
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None
        return tuple(_rebuild(inner or a, v) for a, v in zip(arguments if inner is None else value, value, strict=True))
    if origin in (Union, types.UnionType):
        for option in arguments:
            if is_dataclass(option) and isinstance(value, dict):
                names = {f.name for f in fields(option)}
                if set(value) <= names:
                    return config_from_dict(typing.cast(type, option), value)
            if typing.get_origin(option) is tuple and isinstance(value, list):
                return _rebuild(option, value)
    if origin is dict and isinstance(value, dict):
        return {key: _rebuild(arguments[1], item) for key, item in value.items()}
    return value


def config_from_dict[C](cls: type[C], data: dict[str, Any]) -> C:
    """Rebuild a (nested) config dataclass from JSON, turning lists back into tuples by the type hints.

    Raises:
        ValueError: `data` has keys that the config does not know, or lacks some that it needs; they are named.
    """
    known = {f.name for f in fields(typing.cast(Any, cls))}
    unknown = set(data) - known
    if unknown:
        raise ValueError(
            f"{cls.__name__} does not know {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))}); "
            "the file was written by another version or for another model"
        )
    required = {f.name for f in fields(typing.cast(Any, cls)) if f.default is MISSING and f.default_factory is MISSING}
    absent = required - set(data)
    if absent:
        raise ValueError(
            f"{cls.__name__} needs {', '.join(sorted(absent))}, the file does not say; copy or make it again"
        )
    hints = typing.get_type_hints(cls)
    return cls(**{key: _rebuild(hints[key], value) for key, value in data.items()})


def resolve_folder(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Turn a local folder or a Hub id into a local folder.

    Raises:
        FileNotFoundError: No such folder, and `source` is not a Hub id that could be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = os.fspath(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {text!r} here, and it is not a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision))
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {text!r} here, and the Hub did not give {text!r} ({type(error).__name__}: {error}). "
            "Give the path of a local folder, or check the name and the connection."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder; errors say what is missing or broken."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is not a headrace model folder")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the folder again") from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors file; a truncated or foreign file gives one clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy or download the checkpoint again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or another format. "
            "Copy or download the checkpoint again."
        ) from error


def write_atomically(path: Path, write: typing.Callable[[Path], None]) -> None:
    """Call `write` on a temporary name beside `path` and rename it into place; nothing half-written stays behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class MisfitError(ValueError):
    """Weights that do not fit the model they were read for."""


class Pretrained(nn.Module):
    """A module with a config dataclass, `save_pretrained` and `from_pretrained` (config.json + model.safetensors).

    Subclasses set `Config` and take the config as their only constructor argument.
    """

    Config: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__} takes a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors`, then `config.json`, each atomically; the config marks completeness."""
        folder = Path(folder)
        state = {key: whole(value.detach()).cpu().contiguous() for key, value in self.state_dict().items()}
        shared: dict[int, str] = {}
        unique = {}
        for key, value in state.items():
            if value.numel() and value.data_ptr() in shared:
                continue
            shared[value.data_ptr()] = key
            unique[key] = value
        # one entry of metadata: safetensors writes several in an order that differs from process to process, and equal
        # weights should be equal files
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(unique, path, {"format": "pt"}))
        config = {"model": type(self).__name__, **asdict(self.config)}
        write_atomically(folder / CONFIG_FILE, lambda path: void(path.write_text(json.dumps(config, indent=2) + "\n")))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> Self:
        """Load from a folder or Hub id and return the model in eval mode.

        Raises:
            FileNotFoundError: The folder or one of its files is missing.
            ValueError: Another model's folder, unknown config keys, a truncated file, or weights that do not fit.
        """
        folder = resolve_folder(source, revision=revision)
        data = read_config(folder)
        written_by = data.pop("model", cls.__name__)
        if written_by != cls.__name__:
            raise ValueError(f"{folder} holds a {written_by}, not a {cls.__name__}")
        model = cls(config_from_dict(cls.Config, data))
        load_strictly(model, read_weights(folder / WEIGHTS_FILE), what=str(folder))
        return model.eval()


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], *, what: str) -> None:
    """`load_state_dict` that tolerates only tied duplicates, and lists what is missing, left over or of another shape.

    Raises:
        MisfitError: A ValueError that names up to five keys of each kind.
    """
    own = model.state_dict()
    wrong = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own.keys() & state.keys()
             if state[k].shape != own[k].shape]  # fmt: skip
    given = {own[key].data_ptr() for key in own.keys() & state.keys() if own[key].numel()}
    missing = [key for key in own.keys() - state.keys() if not (own[key].numel() and own[key].data_ptr() in given)]
    surplus = list(state.keys() - own.keys())
    problems = []
    for label, keys in (("missing", missing), ("not known to the model", surplus), ("of another shape", wrong)):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (", ..." if len(keys) > 5 else "")
            problems.append(f"{len(keys)} {label}: {shown}")
    if problems:
        raise MisfitError(f"the weights in {what} do not fit {type(model).__name__}: " + "; ".join(problems))
    model.load_state_dict(state, strict=False)


def void(_: object) -> None:
    """Drop a value, so that a one-line lambda can be a procedure."""
