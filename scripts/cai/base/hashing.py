"""Hashes of texts, files and models, and the seeds that are drawn from them.

    seed = hashed_seed("generate", 0, row["id"])

Leaves out Python's own `hash`, which differs from process to process.
"""

import hashlib
import os
from functools import cache
from pathlib import Path

from cai.base.paths import gguf_file, model_path, named_base


def sha256_text(text: str) -> str:
    """Hex digest of the text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Hex digest of the bytes of a file, or of its first `size` bytes."""
    digest, remaining = hashlib.sha256(), os.stat(path).st_size if size is None else size
    with open(path, "rb") as file:
        while remaining > 0 and (part := file.read(min(remaining, 1 << 20))):
            digest.update(part)
            remaining -= len(part)
    return digest.hexdigest()


def identity(model: str) -> str:
    """What identifies a model in a fingerprint: a hash of its folder's content (of an adapter, also of its base's), of
    a GGUF file's (`gguf_digest`), or a hub id itself.

    The same folder with other weights is another model. Of a large file 64 samples of 64 KiB are hashed:
    training changes weights everywhere, and hashing seventy billion of them would take minutes.
    """
    if (whole := gguf_file(model)) is not None:
        return gguf_digest(whole)
    folder = Path(model_path(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    suffixes = (".safetensors", ".json", ".jinja", ".model", ".txt")
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name}\x1f{size}\x1f".encode())
        with open(path, "rb") as file:
            for offset in range(0, size, max(1 << 16, size // 64)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    if (base := named_base(folder)) is not None and Path(base).resolve() != folder.resolve():
        digest.update(identity(base).encode())
    return digest.hexdigest()


def gguf_digest(file: Path) -> str:
    """SHA-256 of a GGUF file; with the chat_template.jinja beside it, if there is one, which it is read with."""
    template = file.parent / "chat_template.jinja"
    digest = _file_digest(str(file.resolve()), *_state(file))
    if not template.is_file():
        return digest
    return sha256_text(digest + _file_digest(str(template.resolve()), *_state(template)))


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _file_digest(path: str, _size: int, _changed: int) -> str:
    """`sha256_file`, once in this process until the file changes: a model's takes seconds per 5 GB."""
    return sha256_file(path)


def hashed_seed(*parts: object) -> int:
    """A 63-bit integer that depends on the parts and on nothing else.

    Every draw for a record (its principle, its sampled text) is seeded with it, from the record's id:
    order, batch and resumption cannot change it.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
