"""A finished output on the Hugging Face Hub: in a private repository, and with its card.

    check(Path("runs/tiny/ppo"), "my-org/my-model")
    address = upload(Path("runs/tiny/ppo"), "my-org/my-model")

Leaves out making anything public: a repository that is public is refused.
"""

import shlex
import sys
from pathlib import Path

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.data.outputs import read_manifest
from cai.report import cards, escaping, run_folder

# States to resume from, and the card that peft writes with its adapters: a form whose gaps nobody has filled.
_EXCLUDED = ["checkpoints/*", "adapter/README.md"]

_GAPS = "[More Information Needed]"


def check(path: Path, repository: str) -> str:
    """InputError for what can be known not to work before anything is uploaded. Returns the kind of repository."""
    from huggingface_hub import constants, errors, get_token, utils

    if not path.exists():
        raise InputError("no such file or folder", where=path, remedy="Check the path")
    kind, commands = ("model", run_folder.TRAINING) if path.is_dir() else ("dataset", ("judge",))
    manifest = read_manifest(path) or {}
    if manifest.get("command") not in commands or manifest.get("status") != "done":
        raise InputError(
            "not a finished output",
            where=path,
            expected="the folder of a finished training, or the preferences of judge.py, with the manifest beside it",
        )
    try:
        utils.validate_repo_id(repository)
    except errors.HFValidationError as error:
        raise InputError(
            f"{shorten(repository)!r} is not a valid name of a repository",
            expected="NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'",
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set", remedy="Unset it")
    if get_token() is None:
        raise InputError("there is no token of the Hub", remedy="Log in with `hf auth login`, or set HF_TOKEN")
    return kind


def upload(path: Path, repository: str) -> str:
    """Upload a model's folder or a file of preferences; returns the address. CaiError if the Hub can't take it.

    The card becomes README.md; a model folder's README.md that somebody else wrote is kept.
    """
    kind = "model" if path.is_dir() else "dataset"
    try:
        return _upload(path, repository, kind)
    except Exception as error:  # whatever the libraries and the network raise: the output is complete all the same
        target = "." if kind == "model" else path.name
        command = ["hf", "upload", repository, str(path), target, "--repo-type", kind, "--private"]
        problem = (shorten(error, 300) or type(error).__name__).rstrip(".")
        raise CaiError(
            f"{path} was not pushed to {repository}: {problem}. The same command tries again: "
            f"{cli.command_line(again=True)} ; or without a card: {shlex.join(command)}"
        ) from error


def _upload(path: Path, repository: str, kind: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    api, card = HfApi(), cards.card_of(path)
    address = api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
    if api.repo_info(address.repo_id, repo_type=kind).private is not True:
        raise CaiError("that repository is public: make it private in its settings, or name another")
    target = {"repo_id": address.repo_id, "repo_type": kind, "commit_message": f"Upload {path.name}"}
    if kind == "model":
        readme = path / "README.md"
        if not readme.exists() or any(mark in readme.read_text(encoding="utf-8") for mark in (escaping.MARK, _GAPS)):
            readme.write_text(card, encoding="utf-8")
        api.upload_folder(folder_path=path, ignore_patterns=_EXCLUDED, **target)
    else:
        operations = [CommitOperationAdd(path.name, path), CommitOperationAdd("README.md", card.encode())]
        api.create_commit(operations=operations, **target)
    return str(address)
