"""A finished output on the Hugging Face Hub, where --push-to-hub asks for it: private, and with its card.

    @hub.option                                                    # on a command
    cli.finish({"output": output, **counts, **hub.push(output)}, as_json=as_json)

The same command pushes again what is done without doing it again. The token is huggingface_hub's to find (HF_TOKEN, or
`hf auth login`). Leaves out making anything public: a repository that is public is refused.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path

import click

from cai.base import cli
from cai.base.errors import CaiError, shorten
from cai.report import cards
from cai.report.escaping import MARK

_KEPT = "push_to_hub"  # where click's context keeps what the option says

# States to resume from, and the card that peft writes with its adapters: a form with the gaps left open.
_LEFT_OUT = ["checkpoints/*", "adapter/README.md"]

_GAPS = "[More Information Needed]"


def _check(ctx, _param, repo: str | None) -> None:
    """Refuses before hours of work what can be known not to work after them."""
    ctx.meta[_KEPT] = repo
    if repo is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise click.BadParameter(
            f"{shorten(repo)!r} is no name of a repository; expected NAME or ORGANISATION/NAME, "
            "of letters, digits, '-', '_' and '.'."
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise click.BadParameter("HF_HUB_OFFLINE is set. Unset it, or leave this option out.")
    if get_token() is None:
        raise click.BadParameter("there is no token of the Hub. Log in with `hf auth login`, or set HF_TOKEN.")


option = click.option(
    "--push-to-hub",
    metavar="REPO",
    expose_value=False,
    callback=_check,
    help="When all is done, upload the output and its card to this private repository of the Hugging Face Hub. The "
    "same command uploads again what is done.",
)


def _asked() -> str | None:
    return click.get_current_context().meta.get(_KEPT)


def planned() -> dict:
    """What --dry-run says of it."""
    return {"push_to_hub": f"{_asked()}, private"} if _asked() else {}


def push(output: str | Path) -> dict:
    """Upload a finished output, if that was asked for: what the summary says of it.

    Args:
        output: a model's folder, or a file of preferences; its card becomes README.md.

    Returns {"pushed": address}, or {"not_pushed": why}, with which `cli.finish` ends the command with exit code 1: the
    output is complete all the same. {} without the option, and in all processes but the first.
    """
    if _asked() is None or int(os.environ.get("RANK", "0")):
        return {}
    try:
        return {"pushed": _upload(Path(output), _asked())}
    except Exception as error:  # whatever the libraries and the network raise: the work is done, and is not to be lost
        if click.get_current_context().meta.get("debug"):
            traceback.print_exc()
        folder, why = Path(output).is_dir(), shorten(error, 300) or type(error).__name__
        by_hand = [
            "hf",
            "upload",
            _asked(),
            str(output),
            "." if folder else Path(output).name,
            "--repo-type",
            "model" if folder else "dataset",
            "--private",
        ]
        said = (
            f"{output} is complete, but was not pushed to {_asked()}: {why.rstrip('.')}. The same command pushes "
            f"it without making it again: {cli.command_line(again=True)} ; or by hand: {shlex.join(by_hand)}"
        )
        cli.note(f"error: {said}")
        return {"not_pushed": said}


def _upload(path: Path, repo: str) -> str:
    """Make the private repository where there is none, and upload. Returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    kind, api = "model" if path.is_dir() else "dataset", HfApi()
    card = cards.of(path)
    if kind == "model":
        readme = path / "README.md"
        if not readme.exists() or any(mark in readme.read_text(encoding="utf-8") for mark in (MARK, _GAPS)):
            readme.write_text(card, encoding="utf-8")
    address = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
    if api.repo_info(address.repo_id, repo_type=kind).private is not True:
        raise CaiError("that repository is public: make it private in its settings, or name another")
    what = {"repo_id": address.repo_id, "repo_type": kind, "commit_message": f"Upload {path.name}"}
    if kind == "model":
        api.upload_folder(folder_path=path, ignore_patterns=_LEFT_OUT, **what)
    else:
        api.create_commit(
            operations=[CommitOperationAdd(path.name, path), CommitOperationAdd("README.md", card.encode())], **what
        )
    return str(address)
