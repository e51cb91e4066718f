"""Evals of the skill: give an agent a task, then check its working folder against the task's assertions.

    python tests/skill_evals/check.py prepare --task 2 --folder work/2
    python tests/skill_evals/check.py grade --task 2 --folder work/2 --output work/2-grading.json
    python tests/skill_evals/check.py triggers --answers answers.json

`prepare` copies the task's files and prints its prompt; the agent, with the skill installed, works in the folder.
`grade` writes the result of each assertion in the published form of a grading (text, passed, evidence). `evals.json`
is in the published form too; its `checks` define, for each assertion, how a program decides it. `triggers.json` has
queries which should and should not trigger the skill: ANSWERS is a list of {"query", "triggered": true, false, or
the share of runs}.

The folder is only read: nothing in it is executed, and no link is followed out of it. Folders whose name begins with a
dot are not the agent's work: the skill itself may be installed there. Leaves out running agents, and whatever only a
reader can decide (`expected_output` is for that reader).
"""

import json
import re
import shutil
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

from cai.base import cli
from cai.base.errors import CaiError, InputError
from cai.constitution.files import load_constitution
from cai.constitution.lint import lint

MOST_BYTES = 20_000_000
TYPES = {
    "str": str,
    "bool": bool,
    "list": list,
    "dict": dict,
    "number": (int, float),
    "number or null": (int, float, type(None)),
}


class NotMet(Exception):
    """Why an assertion does not hold."""


# --- reading ------------------------------------------------------------------------------------------------


def matching(folder: Path, pattern: str) -> list[Path]:
    """The paths that fit the pattern, except those in folders whose name begins with a dot."""
    return [
        path
        for path in sorted(folder.glob(pattern))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def find(folder: Path, pattern: str) -> Path:
    """The first file of the folder that fits the pattern. NotMet if there is none, or it leads out of the folder."""
    files = [path for path in matching(folder, pattern) if path.is_file()]
    if not files:
        raise NotMet(f"no file {pattern}")
    if not files[0].resolve().is_relative_to(folder.resolve()):
        raise NotMet(f"{pattern} leads out of the folder")
    if files[0].stat().st_size > MOST_BYTES:
        raise NotMet(f"{pattern} is larger than {MOST_BYTES // 1_000_000} MB")
    return files[0]


def text_of(folder: Path, pattern: str) -> str:
    return find(folder, pattern).read_text(encoding="utf-8", errors="replace")


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotMet(f"{where} is not JSON: {error}") from error


def at(tree, path: str):
    """The value at `a.0.b`. NotMet if there is none."""
    for part in path.split("."):
        try:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise NotMet(f"no {path}") from None
    return tree


def require(tree, where: list[dict], name: str) -> None:
    """NotMet unless every condition {path, test, value} holds in the tree."""
    for condition in where:
        actual, test, value = at(tree, condition["path"]), condition["test"], condition["value"]
        if test == "type":
            holds = isinstance(actual, TYPES[value]) and not (value.startswith("number") and isinstance(actual, bool))
            holds = holds and not (value == "str" and not actual.strip())
        elif test == "length":
            holds = isinstance(actual, str | list | dict) and len(actual) == value
        elif test == "in":
            holds = actual in value
        elif test == "is":
            holds = actual == value and type(actual) is type(value)
        else:
            is_number = isinstance(actual, int | float) and not isinstance(actual, bool)
            holds = is_number and (actual >= value if test == "least" else actual <= value)
        if not holds:
            raise NotMet(f"{name}: {condition['path']} is {str(actual)[:80]!r}, expected {test} {value}")


# --- the kinds of check: each returns its evidence, or raises NotMet ----------------------------------------


def check_json(folder: Path, file: str, where: list[dict]) -> str:
    require(parse(text_of(folder, file), file), where, file)
    return f"{file}: {len(where)} values are as expected"


def check_rows(folder: Path, file: str, count: list[int], where: list[dict]) -> str:
    lines = [line for line in text_of(folder, file).splitlines() if line.strip()]
    if not count[0] <= len(lines) <= count[1]:
        raise NotMet(f"{file} has {len(lines)} rows, expected {count[0]} to {count[1]}")
    for number, line in enumerate(lines, 1):
        require(parse(line, f"{file}:{number}"), where, f"{file}:{number}")
    return f"{file}: {len(lines)} rows are as expected"


def check_constitution(
    folder: Path, file: str, least: int = 1, most: int = 500, ids: list[str] = (), clean: bool = False
) -> str:
    try:
        constitution = load_constitution(str(find(folder, file)))
    except InputError as error:
        raise NotMet(str(error)) from error
    if not least <= len(constitution.principles) <= most:
        raise NotMet(f"{file} has {len(constitution.principles)} principles")
    if missing := [name for name in ids if name not in constitution]:
        raise NotMet(f"{file} has no principle {', '.join(missing)}")
    if clean and (faults := lint(constitution)):
        raise NotMet(f"{file}:{faults[0].line}: {faults[0].message}")
    return f"{file}: {len(constitution.principles)} principles"


def check_text(folder: Path, file: str, all: list[str] = (), none: list[str] = ()) -> str:
    text = text_of(folder, file)
    if lacking := [pattern for pattern in all if not re.search(pattern, text)]:
        raise NotMet(f"{file} has nothing that fits {lacking[0]!r}")
    if unwanted := [pattern for pattern in none if re.search(pattern, text)]:
        raise NotMet(f"{file} has {unwanted[0]!r}")
    return f"{file}: has what it should"


def check_same(folder: Path, files: list[str], paths: list[str]) -> str:
    trees = [parse(text_of(folder, file), file) for file in files]
    for path in paths:
        values = [at(tree, path) for tree in trees]
        if any(value != values[0] for value in values):
            raise NotMet(f"{path} differs: {', '.join(str(value)[:40] for value in values)}")
    return f"{' and '.join(files)} agree in {', '.join(paths)}"


def check_model(folder: Path, folder_name: str) -> str:
    for file in ("config.json", "tokenizer.json", "*.safetensors"):
        find(folder, f"{folder_name}/{file}")
    return f"{folder_name} has configuration, tokenizer and weights"


def check_absent(folder: Path, glob: str) -> str:
    if paths := matching(folder, glob):
        raise NotMet(f"there is {paths[0].relative_to(folder)}")
    return f"no {glob}"


def check_unchanged(folder: Path, file: str) -> str:
    if find(folder, file).read_bytes() != (HERE / "files" / file).read_bytes():
        raise NotMet(f"{file} was changed")
    return f"{file} is as it was"


CHECKS = {
    "json": check_json,
    "rows": check_rows,
    "constitution": check_constitution,
    "text": check_text,
    "same": check_same,
    "model": check_model,
    "absent": check_absent,
    "unchanged": check_unchanged,
}


# --- tasks --------------------------------------------------------------------------------------------------


def tasks() -> dict[int, dict]:
    return {task["id"]: task for task in json.loads((HERE / "evals.json").read_text(encoding="utf-8"))["evals"]}


def graded(task: dict, folder: Path) -> dict:
    """{assertion_results: [{text, passed, evidence}], summary}: the result of each assertion."""
    results = []
    for text, check in zip(task["assertions"], task["checks"], strict=True):
        arguments = {name: value for name, value in check.items() if name != "kind"}
        try:
            passed, evidence = True, CHECKS[check["kind"]](folder, **arguments)
        except NotMet as error:
            passed, evidence = False, str(error)
        results.append({"text": text, "passed": passed, "evidence": evidence})
    count = sum(result["passed"] for result in results)
    return {
        "assertion_results": results,
        "summary": {
            "passed": count,
            "failed": len(results) - count,
            "total": len(results),
            "pass_rate": count / len(results),
        },
    }


def triggered(queries: list[dict], answers: list[dict]) -> dict:
    """{should, should_not, wrong}: how often the skill was triggered where it should be, and where it should not.

    An answer is right if the skill was triggered in half of its runs or more where it should be, in fewer elsewhere.
    Raises InputError for a query without an answer.
    """
    shares = {answer["query"]: float(answer["triggered"]) for answer in answers}
    if missing := [query["query"] for query in queries if query["query"] not in shares]:
        raise InputError(f"no answer to {missing[0]!r}", expected=f"all {len(queries)} queries of triggers.json")
    summary = {}
    for name, wanted in (("should", True), ("should_not", False)):
        rates = [shares[query["query"]] for query in queries if query["should_trigger"] == wanted]
        summary[name] = sum(rates) / len(rates)
    summary["wrong"] = [
        query["query"] for query in queries if (shares[query["query"]] >= 0.5) != query["should_trigger"]
    ]
    return summary


@click.group()
def main():
    """Give tasks to an agent, and check its results."""


TASK = click.option(
    "--task", type=click.Choice([str(number) for number in tasks()]), required=True, help="Its id in evals.json."
)
FOLDER = click.option("--folder", required=True, metavar="FOLDER", help="Where the agent works.")


@main.command(cls=cli.Command)
@TASK
@FOLDER
def prepare(task, folder):
    """Copy the files of a task into an empty folder, and print its prompt."""
    chosen, folder = tasks()[int(task)], Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError("it is not empty", where=folder, remedy="Name a new --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in chosen["files"]:
        shutil.copy(HERE / file, folder)
    click.echo(chosen["prompt"])


@main.command(cls=cli.Command)
@TASK
@FOLDER
@click.option("--output", metavar="FILE", help="Write the grading here as well.")
def grade(task, folder, output):
    """Check a folder against the assertions of its task; exit code 3 if one does not hold."""
    if not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    grading = graded(tasks()[int(task)], Path(folder))
    text = json.dumps(grading, indent=2, ensure_ascii=False)
    click.echo(text)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")
    if grading["summary"]["failed"]:
        click.get_current_context().exit(cli.SOME_FAILED)


@main.command(cls=cli.Command)
@click.option("--answers", required=True, metavar="FILE", help='A JSON list of {"query", "triggered"}.')
def triggers(answers):
    """Print how often the skill was triggered where it should be, and where not; exit code 3 if any is wrong."""
    try:
        queries = json.loads((HERE / "triggers.json").read_text(encoding="utf-8"))
        summary = triggered(queries, json.loads(Path(answers).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, CaiError):
            raise
        raise InputError(
            f"not a list of answers ({error})", where=answers, expected='[{"query": "...", "triggered": true}]'
        ) from error
    click.echo(json.dumps(summary, ensure_ascii=False))
    if summary["wrong"]:
        click.get_current_context().exit(cli.SOME_FAILED)


if __name__ == "__main__":
    main()
