"""The tests with the lowest versions of the stated ranges, or with the highest, in a new virtual environment.

    python tests/benchmarks/lowest.py                         # lowest of pyproject.toml's ranges
    python tests/benchmarks/lowest.py --highest               # the newest that the ranges allow
    python tests/benchmarks/lowest.py --dry-run               # say what would be installed and run

Runs the canary (tests/project/test_dependencies.py) and a share of the suite that touches every library. Leaves out the
browser's tests, and versions of what the dependencies themselves need: pip chooses those. Releases beyond the ranges
are newest.py's.
"""

import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
SHARE = [
    "project/test_dependencies.py",
    "data/test_sources.py",
    "models/test_engines.py",
    "steps/test_text.py",
    "commands/test_judge.py",
    "commands/test_sft.py",
    "commands/test_reward_model.py",
    "commands/test_dpo.py",
    "train/test_ppo.py",
    "commands/test_grpo.py",
    "train/test_common.py",
    "commands/test_help.py",
]
# The lock is of the highest versions, and so is what they need.
LEFT_OUT = ["--deselect", "tests/project/test_dependencies.py::test_the_lock_is_closed"]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "packaging"]


def lowest(need: str) -> str:
    """`name==version` of the lowest version of a range such as `name>=1,<2`."""
    name, _, rest = need.partition(">=")
    return f"{name}=={rest.partition(',')[0]}"


def run(line: list[str], *, dry_run: bool = False) -> int:
    """Print a command and run it in the project's folder; its exit code."""
    click.echo(shlex.join(line))
    return 0 if dry_run else subprocess.run(line, cwd=ROOT).returncode


@contextmanager
def environment(venv: str | None, wanted: list[str], *, upgrade: bool = False, dry_run: bool = False) -> Iterator[str]:
    """The Python of a virtual environment with the packages `wanted`; ends the program if they can't be installed.

    venv: where to make it; None takes a temporary folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(venv or temporary)
        python = str(folder / "bin" / "python")
        for line in (
            [sys.executable, "-m", "venv", str(folder)],
            [python, "-m", "pip", "install", "--quiet", *(["--upgrade"] if upgrade else []), *wanted],
        ):
            if code := run(line, dry_run=dry_run):
                raise SystemExit(code)
        yield python


@click.command()
@click.option("--highest", is_flag=True, help="The newest versions of the ranges instead.")
@click.option(
    "--venv", metavar="FOLDER", default=None, help="Where to make the environment.  [default: a temporary folder]"
)
@click.option("--tests", multiple=True, metavar="FILE", help="Run these files of tests/ instead. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be installed and run, and do nothing.")
def main(highest, venv, tests, dry_run):
    """Install one end of the dependencies' ranges and run the tests with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["openai"]]
    wanted = [*(needs if highest else map(lowest, needs)), *TOOLS]
    with environment(venv, wanted, upgrade=highest, dry_run=dry_run) as python:
        files = [str(ROOT / "tests" / name) for name in tests or SHARE]
        code = run(
            [python, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *files, *([] if highest else LEFT_OUT)],
            dry_run=dry_run,
        )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
