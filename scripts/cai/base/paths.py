"""Paths of the package's own files, found from this file and not from the caller's directory.

Leaves out outputs: those go where the caller says.
"""

import os
from pathlib import Path

from cai.base.errors import InputError

ROOT = Path(__file__).resolve().parents[3]

TEMPLATES = ROOT / "templates"

CONSTITUTIONS = ROOT / "constitutions"

SCRIPTS = ROOT / "scripts"

TINY = SCRIPTS / "cai" / "tiny"


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
    """`tiny` becomes the bundled folder; any other name (folder or hub id) is passed through."""
    return str(TINY) if name == "tiny" else name
