"""Evals of the skill: hand an agent a task, then check the folder it leaves against the task's assertions.

    python tests/skill_evals/check.py prepare --task 2 --folder work/2
    python tests/skill_evals/check.py grade --task 2 --folder work/2 --output work/2-grading.json
    python tests/skill_evals/check.py triggers --answers answers.json

`prepare` copies the task's files and prints its prompt; the agent, with the skill installed, works in the folder.
`grade` writes what each assertion came to, in the published form of a grading (text, passed, evidence). `evals.json`
is in the published form too; its `checks` say, assertion by assertion, how a program can tell. `triggers.json` has
queries which should and should not bring the skill up: ANSWERS is a list of {"query", "triggered": true, false, or
the share of runs}.

Only reads: nothing in the folder is executed, and no link is followed out of it. What lies in folders that begin with
a dot is not the agent's work: the skill itself may be installed there. Leaves out running agents, and whatever only a
reader can tell (`expected_output` is for that reader).
"""

import json
import re
import shutil
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))

from cai import cli  # noqa: E402
from cai.constitution import load_constitution  # noqa: E402
from cai.errors import CaiError, InputError  # noqa: E402
from cai.lint import lint  # noqa: E402

MOST_BYTES = 20_000_000
TYPES = {"str": str, "bool": bool, "list": list, "dict": dict, "number": (int, float),
         "number or null": (int, float, type(None))}


class NotMet(Exception):
    """Why an assertion does not hold."""


# --- reading ------------------------------------------------------------------------------------------------


def matching(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern, but for what is in a folder whose name begins with a dot."""
    return [path for path in sorted(folder.glob(pattern))
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def find(folder: Path, pattern: str) -> Path:
    """The first file of the folder that fits the pattern. NotMet if there is none, or it leads out of the folder."""
    found = [path for path in matching(folder, pattern) if path.is_file()]
    if not found:
        raise NotMet(f"no file {pattern}")
    if not found[0].resolve().is_relative_to(folder.resolve()):
        raise NotMet(f"{pattern} leads out of the folder")
    if found[0].stat().st_size > MOST_BYTES:
        raise NotMet(f"{pattern} is larger than {MOST_BYTES // 1_000_000} MB")
    return found[0]


def text_of(folder: Path, pattern: str) -> str:
    return find(folder, pattern).read_text(encoding="utf-8", errors="replace")


def parsed(text: str, where: str):
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


def hold(tree, where: list[dict], name: str) -> None:
    """NotMet unless every condition {path, test, value} holds in the tree."""
    for one in where:
        found, test, value = at(tree, one["path"]), one["test"], one["value"]
        if test == "type":
            held = isinstance(found, TYPES[value]) and not (value.startswith("number") and isinstance(found, bool))
            held = held and not (value == "str" and not found.strip())
        elif test == "length":
            held = isinstance(found, str | list | dict) and len(found) == value
        elif test == "in":
            held = found in value
        elif test == "is":
            held = found == value and type(found) is type(value)
        else:
            number = isinstance(found, int | float) and not isinstance(found, bool)
            held = number and (found >= value if test == "least" else found <= value)
        if not held:
            raise NotMet(f"{name}: {one['path']} is {str(found)[:80]!r}, expected {test} {value}")


# --- the kinds of check: each says what it saw, or raises NotMet --------------------------------------------


def check_json(folder: Path, file: str, where: list[dict]) -> str:
    hold(parsed(text_of(folder, file), file), where, file)
    return f"{file}: {len(where)} values are as expected"


def check_rows(folder: Path, file: str, count: list[int], where: list[dict]) -> str:
    lines = [line for line in text_of(folder, file).splitlines() if line.strip()]
    if not count[0] <= len(lines) <= count[1]:
        raise NotMet(f"{file} has {len(lines)} rows, expected {count[0]} to {count[1]}")
    for number, line in enumerate(lines, 1):
        hold(parsed(line, f"{file}:{number}"), where, f"{file}:{number}")
    return f"{file}: {len(lines)} rows are as expected"


def check_constitution(folder: Path, file: str, least: int = 1, most: int = 500, ids: list[str] = (),
                       clean: bool = False) -> str:
    try:
        found = load_constitution(str(find(folder, file)))
    except InputError as error:
        raise NotMet(str(error)) from error
    if not least <= len(found.principles) <= most:
        raise NotMet(f"{file} has {len(found.principles)} principles")
    if missing := [name for name in ids if name not in found]:
        raise NotMet(f"{file} has no principle {', '.join(missing)}")
    if clean and (faults := lint(found)):
        raise NotMet(f"{file}:{faults[0].line}: {faults[0].message}")
    return f"{file}: {len(found.principles)} principles"


def check_text(folder: Path, file: str, all: list[str] = (), none: list[str] = ()) -> str:
    text = text_of(folder, file)
    if lacking := [pattern for pattern in all if not re.search(pattern, text)]:
        raise NotMet(f"{file} has nothing that fits {lacking[0]!r}")
    if unwanted := [pattern for pattern in none if re.search(pattern, text)]:
        raise NotMet(f"{file} has {unwanted[0]!r}")
    return f"{file}: has what it should"


def check_same(folder: Path, files: list[str], paths: list[str]) -> str:
    trees = [parsed(text_of(folder, file), file) for file in files]
    for path in paths:
        found = [at(tree, path) for tree in trees]
        if any(one != found[0] for one in found):
            raise NotMet(f"{path} differs: {', '.join(str(one)[:40] for one in found)}")
    return f"{' and '.join(files)} agree in {', '.join(paths)}"


def check_model(folder: Path, folder_name: str) -> str:
    for file in ("config.json", "tokenizer.json", "*.safetensors"):
        find(folder, f"{folder_name}/{file}")
    return f"{folder_name} has configuration, tokenizer and weights"


def check_absent(folder: Path, glob: str) -> str:
    if found := matching(folder, glob):
        raise NotMet(f"there is {found[0].relative_to(folder)}")
    return f"no {glob}"


def check_unchanged(folder: Path, file: str) -> str:
    if find(folder, file).read_bytes() != (HERE / "files" / file).read_bytes():
        raise NotMet(f"{file} was changed")
    return f"{file} is as it was"


CHECKS = {"json": check_json, "rows": check_rows, "constitution": check_constitution, "text": check_text,
          "same": check_same, "model": check_model, "absent": check_absent, "unchanged": check_unchanged}


# --- tasks --------------------------------------------------------------------------------------------------


def tasks() -> dict[int, dict]:
    return {one["id"]: one for one in json.loads((HERE / "evals.json").read_text(encoding="utf-8"))["evals"]}


def graded(task: dict, folder: Path) -> dict:
    """{assertion_results: [{text, passed, evidence}], summary}: what each assertion came to."""
    results = []
    for text, check in zip(task["assertions"], task["checks"], strict=True):
        arguments = {name: value for name, value in check.items() if name != "kind"}
        try:
            passed, evidence = True, CHECKS[check["kind"]](folder, **arguments)
        except NotMet as error:
            passed, evidence = False, str(error)
        results.append({"text": text, "passed": passed, "evidence": evidence})
    count = sum(one["passed"] for one in results)
    return {"assertion_results": results, "summary": {"passed": count, "failed": len(results) - count,
                                                      "total": len(results), "pass_rate": count / len(results)}}


def triggered(queries: list[dict], answers: list[dict]) -> dict:
    """{should, should_not, wrong}: how often the skill came up where it should, and where it should not.

    An answer is right if it came up in half of its runs or more where it should, and in fewer elsewhere.
    Raises InputError for a query without an answer.
    """
    said = {one["query"]: float(one["triggered"]) for one in answers}
    if missing := [one["query"] for one in queries if one["query"] not in said]:
        raise InputError(f"no answer to {missing[0]!r}", expected=f"all {len(queries)} queries of triggers.json")
    found = {}
    for name, wanted in (("should", True), ("should_not", False)):
        rates = [said[one["query"]] for one in queries if one["should_trigger"] == wanted]
        found[name] = sum(rates) / len(rates)
    found["wrong"] = [one["query"] for one in queries if (said[one["query"]] >= 0.5) != one["should_trigger"]]
    return found


@click.group()
def main():
    """Hand tasks to an agent, and check what it leaves."""


TASK = click.option("--task", type=click.Choice([str(number) for number in tasks()]), required=True,
                    help="Its id in evals.json.")
FOLDER = click.option("--folder", required=True, metavar="FOLDER", help="Where the agent works.")


@main.command(cls=cli.Command)
@TASK
@FOLDER
def prepare(task, folder):
    """Copy the files of a task into an empty folder, and print its prompt."""
    one, folder = tasks()[int(task)], Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError("it is not empty", where=folder, remedy="Name a new --folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in one["files"]:
        shutil.copy(HERE / file, folder)
    click.echo(one["prompt"])


@main.command(cls=cli.Command)
@TASK
@FOLDER
@click.option("--output", metavar="FILE", help="Write the grading here as well.")
def grade(task, folder, output):
    """Check a folder against the assertions of its task; exit code 3 if one does not hold."""
    if not Path(folder).is_dir():
        raise InputError("no such folder", where=folder)
    found = graded(tasks()[int(task)], Path(folder))
    text = json.dumps(found, indent=2, ensure_ascii=False)
    click.echo(text)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")
    if found["summary"]["failed"]:
        click.get_current_context().exit(cli.SOME_FAILED)


@main.command(cls=cli.Command)
@click.option("--answers", required=True, metavar="FILE", help='A JSON list of {"query", "triggered"}.')
def triggers(answers):
    """Say how often the skill came up where it should, and where it should not; exit code 3 if any is wrong."""
    try:
        given = json.loads(Path(answers).read_text(encoding="utf-8"))
        found = triggered(json.loads((HERE / "triggers.json").read_text(encoding="utf-8")), given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, CaiError):
            raise
        raise InputError(f"not a list of answers ({error})", where=answers,
                         expected='[{"query": "...", "triggered": true}]') from error
    click.echo(json.dumps(found, ensure_ascii=False))
    if found["wrong"]:
        click.get_current_context().exit(cli.SOME_FAILED)


if __name__ == "__main__":
    main()
