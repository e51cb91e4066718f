"""The whole suite with the newest releases of transformers, TRL and their like, whatever the upper bounds say.

    python tests/benchmarks/newest.py                         # raises the bounds in pyproject.toml where all tests pass
    python tests/benchmarks/newest.py --dry-run               # print what would be installed and run

Upper bounds stand at the newest tested minor version, so that `pip install .` takes tested versions on any day. This
command raises them. A failing test leaves pyproject.toml as it was; tests/project/test_dependencies.py names what was
renamed. The other packages, torch among them, stay within their ranges. The sibling of lowest.py.
"""

import json
import re
import subprocess
import tomllib

import click
from lowest import ROOT, environment, run

# Packages whose upper bound this command ignores, and raises.
RAISED = ("transformers", "trl", "datasets", "accelerate", "peft")
PYPROJECT = ROOT / "pyproject.toml"


def without_upper_bound(need: str) -> str:
    """`name>=1` of a range such as `name>=1,<2` if the package is one of RAISED; the range itself otherwise."""
    return need.partition(",<")[0] if re.split(r"[\[>]", need)[0] in RAISED else need


def raise_bounds(text: str, installed: dict[str, str]) -> tuple[str, list[str]]:
    """(the text of pyproject.toml, what was changed) with every version of `installed` within its bounds.

    A bound that the version reaches becomes the next minor version; others stay.
    """
    changes: list[str] = []

    def numbers(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version)[:2]]

    for name, version in installed.items():
        major, minor = (*numbers(version), 0)[:2]
        for start, bound in re.findall(rf'("{name}(?:\[\w+\])?>=[\d.]+,)<([\d.]+)"', text):
            if [major, minor] >= numbers(bound):
                text = text.replace(f'{start}<{bound}"', f'{start}<{major}.{minor + 1}"')
                changes.append(f"{name} {version}: <{bound} becomes <{major}.{minor + 1}")
    return text, list(dict.fromkeys(changes))


def installed_versions(python: str) -> dict[str, str]:
    """{name: version} of RAISED in the environment of a Python."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {RAISED}}}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


@click.command()
@click.option(
    "--venv", metavar="FOLDER", default=None, help="Where to make the environment.  [default: a temporary folder]"
)
@click.option(
    "--tests", multiple=True, metavar="FILE", help="Run these files of tests/ alone, and leave the bounds. Repeatable."
)
@click.option("--dry-run", is_flag=True, help="Print what would be installed and run, and do nothing.")
def main(venv, tests, dry_run):
    """Install the newest releases, run all tests with them, and raise the upper bounds if they pass."""
    before = PYPROJECT.read_text(encoding="utf-8")
    project = tomllib.loads(before)["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    line = ["-m", "pytest", "-c", str(PYPROJECT), *(str(ROOT / "tests" / name) for name in tests)]
    with environment(venv, [without_upper_bound(need) for need in needs], upgrade=True, dry_run=dry_run) as python:
        if dry_run:
            run([python, *line], dry_run=True)
            return
        versions = installed_versions(python)
        after, changes = raise_bounds(before, versions)
        code = 1
        try:
            PYPROJECT.write_text(after, encoding="utf-8")  # some tests compare the ranges with what is installed
            code = run([python, *line])
        finally:
            if code or tests:
                PYPROJECT.write_text(before, encoding="utf-8")
    click.echo(f"installed: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    if code:
        click.echo(f"the tests failed (pytest ended with {code}): pyproject.toml is as it was")
    elif tests:
        click.echo("these tests passed; pyproject.toml is as it was, because only the whole suite raises bounds")
    else:
        click.echo("\n".join(["the tests passed", *(changes or ["every version was within its bounds already"])]))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
