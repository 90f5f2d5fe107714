"""Find a tokenizer by name, folder or Hub id. The table is the whole mechanism; a new family is one more row."""

import difflib
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from headrace.nn.pretrained import read_config, resolve_folder
from headrace.tokenizers.base import Tokenizer

# family: "module:Class"
TOKENIZERS = {
    "tokenflow": "headrace.tokenizers.tokenflow:TokenFlow",
    "uniflow": "headrace.tokenizers.uniflow:UniFlow",
    "flowtok": "headrace.tokenizers.flowtok:FlowTok",
    "lwm-vqgan": "headrace.tokenizers.lwm_vqgan:LwmVQGAN",
}

# family: the function that reads its release, `importer(file, ...) -> Tokenizer`
RELEASE_FILES = {
    "tokenflow": "headrace.tokenizers.tokenflow_import:load_official",
    "uniflow": "headrace.tokenizers.uniflow_import:load_official",
    "flowtok": "headrace.tokenizers.flowtok_import:load_official",
}


def tokenizer_class(family: str) -> type[Tokenizer]:
    """The class of a family.

    Raises:
        ValueError: No such family; names a near match and all families.
    """
    if family not in TOKENIZERS:
        raise ValueError(_unknown("tokenizer", family, list(TOKENIZERS)))
    module, attribute = TOKENIZERS[family].split(":")
    return getattr(import_module(module), attribute)


def tokenizer_config(name: str) -> Any:
    """The configuration that a name stands for, without building the model.

    Args:
        name: `family` or `family:variant`, such as `tokenflow:tiny`; without a variant the family's first is taken.

    Raises:
        ValueError: No such family or variant; names a near match.
    """
    family, _, variant = name.partition(":")
    cls = tokenizer_class(family)
    variant = variant or cls.VARIANTS[0]
    if variant not in cls.VARIANTS:
        raise ValueError(_unknown(f"variant of {family}", variant, list(cls.VARIANTS)))
    return getattr(cls.Config, variant)()


def new_tokenizer(name: str) -> Tokenizer:
    """Build an untrained tokenizer of a name as in `tokenizer_config`: freshly drawn weights, in eval mode."""
    return tokenizer_class(name.partition(":")[0])(tokenizer_config(name)).eval()


def load_tokenizer(source: str | os.PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """Load a trained tokenizer of any family, or build an untrained one.

    Args:
        source: A folder written by `save_pretrained`, a Hub id `owner/name`, a release's weights file with its family
            in front, such as `tokenflow:tokenflow_clipb_32k_enhanced.pt` (FlowTok's two files with a comma between), a
            release's folder or Hub id likewise, such as `uniflow:yuezhengrong/UniFlow`, or a name such as
            `tokenflow:tiny`. A name carries no weights: the model is built with random ones, and a warning says so. A
            folder of the same name wins. Files are read without running code in them.
        revision: Branch, tag or commit for a Hub id without a family in front.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: Unknown name (a near match is named), a folder of something that is no tokenizer, broken files, a
            file without a family in front, a revision for a release.
        FileNotFoundError: No such folder or Hub id.
    """
    text = os.fspath(source)
    family, _, file = text.partition(":")
    files = [file] if os.path.isfile(file) or family != "flowtok" else file.split(",")
    if len(files) > 1:
        absent = [path for path in files if not os.path.isfile(path)]
        if absent:
            raise FileNotFoundError(f"{text} names files that are not here: {', '.join(absent)}")
        if len(files) != 2:
            raise ValueError(f"FlowTok's release has two files, the tokenizer's and the flow's, got {len(files)}")
    if all(map(os.path.isfile, files)) or (
        family in RELEASE_FILES and ("/" in file or os.path.isdir(file)) and not os.path.isdir(text)
    ):
        if revision is not None:
            raise ValueError(f"{text} is read by its release's importer, which takes no revision")
        return _importer(family)(*files)
    if os.path.isfile(text):
        raise ValueError(
            f"{text} is a file, and a folder was wanted. For a release's weights say whose they are: "
            + " or ".join(f"{name}:{text}" for name in RELEASE_FILES)
        )
    if not os.path.isdir(text) and "/" not in text and os.sep not in text:
        model = new_tokenizer(text)
        warnings.warn(
            f"{text!r} names a configuration, not a checkpoint: the weights are random. "
            "Give a folder or a Hub id to load trained ones.",
            stacklevel=2,
        )
        return model
    folder = resolve_folder(source, revision=revision)
    written_by = read_config(folder).get("model")
    classes = {path.split(":")[1]: family for family, path in TOKENIZERS.items()}
    if written_by not in classes:
        raise ValueError(f"{folder} holds a {written_by}, not one of the tokenizers {', '.join(classes)}")
    return tokenizer_class(classes[written_by]).from_pretrained(folder)


def _importer(family: str) -> Callable[..., Tokenizer]:
    if family not in RELEASE_FILES:
        raise ValueError(_unknown("reader of release files", family, list(RELEASE_FILES)))
    module, attribute = RELEASE_FILES[family].split(":")
    return getattr(import_module(module), attribute)


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {what} is called {name!r}{hint} (known: {', '.join(known)})"
