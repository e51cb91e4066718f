"""The tests with the lowest versions of the stated ranges, or with the highest, in a new virtual environment.

    python tests/lowest.py                         # lowest of pyproject.toml's ranges
    python tests/lowest.py --highest               # the newest that the ranges allow
    python tests/lowest.py --dry-run               # say what would be installed and run

Runs the canary (tests/test_dependencies.py) and a share of the suite that touches every library. Leaves out the
browser's tests, and versions of what the dependencies themselves need: pip chooses those.
"""

import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
SHARE = ["test_dependencies.py", "test_records.py", "test_engines.py", "test_textsteps.py", "test_judge.py",
         "test_sft.py", "test_reward_model.py", "test_dpo.py", "test_ppo.py", "test_grpo.py", "test_training.py",
         "test_help.py"]
# The lock is of the highest versions, and so is what they need.
LEFT_OUT = ["--deselect", f"{ROOT}/tests/test_dependencies.py::test_the_lock_is_closed"]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "packaging"]


def lowest(need: str) -> str:
    """`name==version` of the lowest version of a range such as `name>=1,<2`."""
    name, _, rest = need.partition(">=")
    return f"{name}=={rest.partition(',')[0]}"


@click.command()
@click.option("--highest", is_flag=True, help="The newest versions of the ranges instead.")
@click.option("--venv", metavar="FOLDER", default=None, help="Where to make the environment.  [default: a temporary "
              "folder]")
@click.option("--tests", multiple=True, metavar="FILE", help="Run these files of tests/ instead. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be installed and run, and do nothing.")
def main(highest, venv, tests, dry_run):
    """Install one end of the dependencies' ranges and run the tests with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["openai"]]
    wanted = needs if highest else [lowest(need) for need in needs]
    with tempfile.TemporaryDirectory() as temporary:
        python = Path(venv or temporary) / "bin" / "python"
        files = [str(ROOT / "tests" / name) for name in tests or SHARE]
        lines = [
            [sys.executable, "-m", "venv", str(python.parent.parent)],
            [str(python), "-m", "pip", "install", "--quiet", *(["--upgrade"] if highest else []), *wanted, *TOOLS],
            [str(python), "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *files,
             *([] if highest else LEFT_OUT)],
        ]
        for line in lines:
            click.echo(shlex.join(line))
            if not dry_run and (code := subprocess.run(line, cwd=ROOT).returncode):
                raise SystemExit(code)


if __name__ == "__main__":
    main()
