"""Upload a model folder or a file of preferences to the Hugging Face Hub, privately and with its card.

    python scripts/push.py runs/tiny/ppo my-org/my-model

The token is huggingface_hub's to find (HF_TOKEN, or `hf auth login`). Leaves out making anything public: a repository
that is public is refused.
"""

from pathlib import Path

import click

from cai.base import cli
from cai.report import hub


@click.command(cls=cli.Command)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@cli.options("json", "dry_run")
def main(path, repository, as_json, dry_run):
    """Upload a trained model, or the preferences of judge.py, to a private repository of the Hugging Face Hub.

    PATH is the folder or the file; its card, written from its manifest, becomes README.md. A missing repository is
    created. The same command uploads again what has changed.

    \b
    Example:
      python scripts/push.py runs/tiny/ppo my-org/my-model
    """
    summary = {"path": str(path), "push_to_hub": f"{repository}, private", "type": hub.check(path, repository)}
    if not dry_run:
        summary["pushed"] = hub.upload(path, repository)
    cli.finish(summary, as_json=as_json)


if __name__ == "__main__":
    main()
