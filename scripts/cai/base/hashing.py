"""Hashes: of texts, files and models, and the seeds that are drawn from them.

    seed = hashed_seed("generate", 0, row["id"])

Leaves out Python's own `hash`, which differs from process to process.
"""

import hashlib
from pathlib import Path

from cai.base.paths import model_path


def sha256_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path, size: int | None = None) -> str:
    """Hex digest of the bytes of a file, or of its first so many."""
    with open(path, "rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
        return digest.hexdigest()


def identity(model: str) -> str:
    """What tells one model from another in a fingerprint: what its folder holds, or a hub id itself.

    The same folder with other weights is another model. Of a large file 64 samples of 64 KiB are hashed:
    training changes weights everywhere, and seventy billion of them would take minutes.
    """
    folder = Path(model_path(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        size = path.stat().st_size
        digest.update(f"{path.name}\x1f{size}\x1f".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1 << 16, size // 64)):
                file.seek(place)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def hashed_seed(*parts) -> int:
    """A 63-bit integer that depends on the parts and on nothing else.

    Every draw for a record (its principle, its sampled text) is seeded so, from the record's id:
    order, batch and resumption cannot change it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
