"""What tells two checkpoints in one folder apart."""

from collections.abc import Collection
from hashlib import file_digest, sha256
from pathlib import Path


def folder_fingerprint(folder: Path, *, kinds: Collection[str] = (".json", ".safetensors")) -> str:
    """Sixteen hexadecimal digits of what a model folder does: its JSON files and its weights, whole, by name.

    Every byte is read, as it is when the model is loaded: weights that were trained in part differ in the middle of the
    file only. Files of other kinds, such as a README, do not count.

    Args:
        folder: The model's folder; folders in it do not count.
        kinds: Endings of the names of the files that do.
    """
    digest = sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in kinds):
        with path.open("rb") as file:
            digest.update(f"{path.name} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
