"""Importing a large library without the packages that it would take along and that nothing here uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """While this lasts, these packages seem not to be installed, unless they are imported already.

    For optional parts of a library that are imported wherever they are found: timm's training log takes wandb along
    and transformers' assisted generation scikit-learn, a third of the time that a policy's imports take.
    """
    hidden = [package for package in packages if package not in sys.modules]
    modules: dict[str, Any] = dict.fromkeys(hidden)  # None stops an import
    sys.modules.update(modules)
    try:
        yield
    finally:
        for package in hidden:
            if sys.modules.get(package) is None:
                sys.modules.pop(package, None)
