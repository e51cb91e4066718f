"""Models in llama.cpp's format, GGUF: read once, and kept as an ordinary folder in the cache directory.

    resolve("model.Q4_K_M.gguf")       # "~/.cache/constitutional-ai/gguf/<hash of the file>"

The weights are stored as dequantisation gives them, in float32, so that nothing is lost a second time: 4 bytes per
parameter on the disk. The folder can be deleted at any time and is made again. Leaves out files split into parts, and
architectures that transformers does not read from GGUF (llama.cpp's own server takes them: references/engines.md).
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai.base import cli, paths
from cai.base.errors import CaiError, InputError, shorten
from cai.base.hashing import gguf_digest
from cai.base.paths import gguf_file, model_path

TEMPLATE_REMEDY = (
    "Take the instruction-tuned model, or put its chat template beside it as chat_template.jinja "
    "(a Jinja file over `messages`, each with role and content)"
)

BYTES_PER_PARAMETER = 4


def resolve(model: str) -> str:
    """The folder or hub id that a name stands for; of a GGUF file the folder that it is kept in, made on first use.

    Raises:
        InputError: no such file, no `gguf` package, no chat template, or a file that transformers does not read.
        CaiError: too little memory or disk.
    """
    file = gguf_file(model)
    if file is None:
        if model.lower().endswith(paths.GGUF) and not model.startswith("openai:"):
            raise InputError("no such GGUF file", where=model, remedy="Check the path")
        return model_path(model)
    if part := re.search(r"-(\d{5})-of-(\d{5})$", file.stem):
        raise InputError(
            f"part {int(part[1])} of {int(part[2])} of a model, and parts are not read",
            where=file,
            remedy="Join them (llama-gguf-split --merge), or serve them with llama.cpp and use openai:NAME",
        )
    folder = paths.cache_folder("gguf") / gguf_digest(file)
    if not folder.is_dir():
        _make_folder(file, folder)
    return str(folder)


def _make_folder(file: Path, folder: Path) -> None:
    """Convert the file into `folder`, which appears complete or not at all; another process that converts it is
    waited for."""
    from filelock import FileLock

    if find_spec("gguf") is None:
        raise InputError(
            "the gguf package, which reads this file, is not installed",
            where=file,
            remedy='Install it: pip install ".[gguf]"',
        )
    with _explain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    try:
        for remains in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(remains, ignore_errors=True)
        if not folder.is_dir():  # another process may have made it meanwhile
            _convert(file, folder)
    finally:
        lock.release()


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a CaiError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CaiError(
            f"{folder.parent}, where GGUF files are kept as folders, can't be written: {shorten(error, 200)}. "
            "Make room there, or set XDG_CACHE_HOME to another place"
        ) from error


def _convert(file: Path, folder: Path) -> None:
    """Read the file, and write `folder`: weights, config.json, tokenizer, chat template, and source.json."""
    with tempfile.TemporaryDirectory() as alone, _explain_errors(file):
        source = _place_alone(file, Path(alone))
        tokenizer = _read_tokenizer(file, source)
        size = BYTES_PER_PARAMETER * _count_parameters(source)
        _check_room(file, folder, size)
        cli.note(f"{file}: reading it once, as {size / 1e9:.1g} GB of float32 weights kept in {folder}")
        model = _read_model(file, source)
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        with _explain_disk_errors(folder):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            about = {"file": file.name, "bytes": file.stat().st_size, "sha256": folder.name}
            (temporary / "source.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _explain_errors(file: Path) -> Iterator[None]:
    """Turn what reading a damaged or unknown file raises into an InputError."""
    try:
        yield
    except CaiError:
        raise
    except MemoryError as error:
        raise CaiError(f"{file} does not fit the memory of this machine") from error
    except Exception as error:  # a damaged file makes the reader raise whatever its bytes lead to
        raise InputError(
            f"the GGUF file can't be read: {type(error).__name__}: {shorten(error, 300)}",
            where=file,
            expected="a complete file, of an architecture that transformers reads from GGUF",
            remedy="Compare its size and hash with the original's, or serve it with llama.cpp and use openai:NAME",
        ) from error


def _place_alone(file: Path, folder: Path) -> Path:
    """The file in a folder of its own, so that nothing beside it is read too: the cache is named after its hash."""
    source = folder / "model.gguf"
    try:
        source.symlink_to(file.resolve())
    except OSError:  # a system without links for everybody
        return file
    return source


def _read_tokenizer(file: Path, source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    template = file.parent / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template", where=file, remedy=TEMPLATE_REMEDY)
    return tokenizer


def _count_parameters(source: Path) -> int:
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(source).tensors)


def _check_room(file: Path, folder: Path, size: int) -> None:
    """Raise CaiError unless the disk has room for `size` bytes."""
    free = shutil.disk_usage(folder.parent).free
    if free < size * 1.01:
        raise CaiError(
            f"{file}: its weights take {size / 1e9:.3g} GB in float32, and {folder.parent} has {free / 1e9:.3g} GB "
            "free. Make room there, or set XDG_CACHE_HOME to another place"
        )


def _read_model(file: Path, source: Path) -> Any:
    """The model with plain weights in float32: the one that transformers reads refuses to be saved, as quantised."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    quantised, info = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them",
            where=file,
            expected="a complete model of its architecture",
        )
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # the weights are taken over, not copied
        model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    return model
