"""The documents: links, commands, front matter, lengths; and what is at the top of the repository."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import click
import pytest
import yaml
from conftest import ROOT, load_command

from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template

TINY = ROOT / "scripts" / "cai" / "tiny"
KINDS = ("harmful", "benign", "borderline")
REFERENCES = sorted((ROOT / "references").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "SKILL.md", *REFERENCES]
CHANGELOG, CONTRIBUTING = ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md"
ARCHITECTURE, MODULES, RUN_BOOK = (
    ROOT / "references" / name for name in ("architecture.md", "modules.md", "run-book.md")
)
# How many commands of ours a document shows at least; three where it is not listed here.
FEWEST_COMMANDS = {"README.md": 2, "architecture.md": 0, "modules.md": 0}
COMMANDS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
TOP_LEVEL = {
    "SKILL.md",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "pyproject.toml",
    "scripts",
    "templates",
    "references",
    "constitutions",
    "tests",
}
README_ORDER = [
    "One prompt through the method",
    "Quick start",
    "As a skill",
    "Your own model",
    "What it does",
    "Links",
    "Licence",
]
FRONT_MATTER = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
TEST_COMMAND = 'python3 -m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest'
RUN_COMMAND = (
    "python3 -m venv .venv && .venv/bin/pip install . && "
    ".venv/bin/python scripts/run.py --model tiny --output runs/tiny"
)
# What .ci/run checks after the tests, and CONTRIBUTING.md asks of a change.
STATIC_CHECKS = ["ruff check", "ruff format --check", "mypy", "codespell"]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def read(path) -> str:
    return Path(path).read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The fenced code blocks of a language, without their indentation."""
    fenced = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", read(path), re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in fenced]


# What SKILL.md has the reader set once, in cai.env.
SET = {"$CAI/": "", "$CAI": ".", "$MODEL": "my-org/my-model", "$JUDGE": "my-org/my-judge"}


def commands(block: str) -> list[str]:
    """The lines of a shell block, continued ones put together and the reader's settings filled in."""
    for name, value in SET.items():
        block = block.replace(name, value)
    return block.replace("\\\n", " ").splitlines()


def calls(path: Path) -> list[tuple[str, list[str]]]:
    return calls_in(read(path))


def calls_in(text: str) -> list[tuple[str, list[str]]]:
    """(name, arguments) of every call of one of our scripts, in their order: shell blocks and inline code alike."""
    pattern = r"^ *```(\w*)\n(.*?)^ *```$|(?<!`)`(python (?:\$CAI/)?scripts/[^`\n]+)`"
    snippets = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    lines = [
        line
        for language, block, inline in snippets
        if inline or language == "bash"
        for line in commands(inline or block)
    ]
    script_calls = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for index, word in enumerate(words):
            if script := re.fullmatch(r"(?:.*/)?scripts/(\w+)\.py", word):
                rest = words[index + 1 :]
                end = next((n for n, part in enumerate(rest) if re.fullmatch(r"[|&;<>()]+", part)), len(rest))
                script_calls.append((script[1], rest[:end]))
    return script_calls


def parse(name: str, arguments: list[str]) -> dict:
    """The parameters that the command's own parser makes of the arguments; UsageError for wrong ones."""
    command = load_command(name)
    if isinstance(command, click.Group):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command.make_context(name, list(arguments)).params


# --- links and commands -------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The ends of links to the document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(path), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each([*DOCUMENTS, CHANGELOG, CONTRIBUTING])
def test_every_relative_link_resolves(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        assert ROOT in (linked.resolve(), *linked.resolve().parents)
        if anchor:
            assert anchor in anchors(linked), f"{path.name} links to {target}"


@each(DOCUMENTS)
def test_every_command_parses(path):
    script_calls, programs = calls(path), re.findall(r"\bpython (tests/[\w/]+\.py)\b", read(path))
    fewest = FEWEST_COMMANDS.get(path.name, 3)
    assert len(script_calls) + len(programs) >= fewest, f"{path.name} shows hardly any command, or they are not found"
    assert not [program for program in programs if not (ROOT / program).is_file()]
    for name, arguments in script_calls:
        assert name in COMMANDS, f"{path.name} calls scripts/{name}.py"
        try:
            parse(name, arguments)
        except click.ClickException as error:
            pytest.fail(f"{path.name}: {name}.py {shlex.join(arguments)}: {error.format_message()}")


def test_a_wrong_option_would_be_found(tmp_path):
    (tmp_path / "x.md").write_text("```bash\npython scripts/tiny.py pairs \\\n  --output x --no-such 3 # why\n```\n")
    [(name, arguments)] = calls(tmp_path / "x.md")
    assert (name, arguments) == ("tiny", ["pairs", "--output", "x", "--no-such", "3"])
    with pytest.raises(click.UsageError, match="no-such"):
        parse(name, arguments)


def write_rows(path, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def output_of(params: dict) -> str:
    return os.path.normpath(params["output"])


@each(DOCUMENTS)
def test_what_a_command_reads_is_there_or_was_written_by_one_before(path):
    """In the order of the document. What has no folder, or begins with my-, is the reader's own."""
    written: set[str] = set()
    for name, arguments in calls(path):
        params = parse(name, arguments)
        files = [file for option in ("inputs", "responses", "helpful", "heldout") for file in params.get(option) or ()]
        for option in ("model", "reward_model", "judge", "against"):
            value = params.get(option)
            files += value if isinstance(value, tuple) else [value]
        for file in filter(None, files):
            of_the_reader = file.startswith(("my-", "openai:my-"))
            known = of_the_reader or "/" not in file or file in written or (ROOT / file).exists()
            assert known, f"{path.name}: {name}.py reads {file}, which nothing before it writes"
        if params.get("output"):
            written.add(output_of(params))
            if name == "evaluate":  # the answers, beside the figures
                written.add(f"{output_of(params).removesuffix('.jsonl')}.responses.jsonl")


# --- README -------------------------------------------------------------------------------------------------


def test_readme_has_the_two_commands_as_they_are_promised():
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert RUN_COMMAND in lines
    assert TEST_COMMAND in lines


def test_readme_is_short_and_in_the_order_of_the_house():
    text = read(ROOT / "README.md")
    assert len(text.split()) <= 1200
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == README_ORDER


def worked_row() -> dict[str, str]:
    """{name: text} of the table that follows one prompt through the method."""
    table = read(ROOT / "README.md").partition("## One prompt through the method")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+)(?: `[\w-]+`)? \| (.+) \|$", table, re.MULTILINE)
    return dict(rows)


def test_the_worked_row_of_the_readme_is_what_tiny_writes(invoke, tmp_path, monkeypatch):
    """Its texts with the settings of the main job, and the preference between them."""
    monkeypatch.chdir(tmp_path)
    readme, row = read(ROOT / "README.md"), worked_row()
    row_id = re.search(r"`(train-harmful-\d+)`", readme)[1]
    prompts = [json.loads(line) for line in read(TINY / "prompts" / "train.jsonl").splitlines()]
    write_rows("prompts.jsonl", [prompt for prompt in prompts if prompt["id"] == row_id])
    shared = ("--model", "tiny", "--max-new-tokens", "96", "--dtype", "float32")
    last = "prompts.jsonl"
    for name, more in (
        ("generate", ("--temperature", "1.0")),
        ("critique", ("--temperature", "1.0")),
        ("revise", ("--temperature", "1.0")),
    ):
        result = invoke(name, "--input", last, *shared, *more, "--output", f"{name}.jsonl")
        assert result.exit_code == 0, result.stderr
        last = f"{name}.jsonl"
    [revised] = [json.loads(line) for line in read("revise.jsonl").splitlines()]
    [revision_round] = revised["rounds"]
    principles = load_constitution("harmlessness")
    assert f"| principle `{revision_round['principle']}` |" in readme
    assert row["prompt"] == revised["prompt"] and row["response"] == revised["response"]
    assert row["principle"] == principles[revision_round["principle"]].critique
    assert row["critique"] == revision_round["critique"] and row["revision"] == revision_round["revision"]
    # The pair's id in the main job decides which principle is drawn.
    write_rows(
        "pair.jsonl",
        [
            {
                "id": f"{row_id}/0-2 vs {row_id}/3",
                "prompt": revised["prompt"],
                "response_a": row["response"],
                "response_b": row["revision"],
            }
        ],
    )
    result = invoke("judge", "--input", "pair.jsonl", "--model", "tiny", "--output", "preference.jsonl")
    assert result.exit_code == 0, result.stderr
    [preference] = [json.loads(line) for line in read("preference.jsonl").splitlines()]
    assert preference["chosen"] == row["revision"]
    assert f"{preference['p_chosen']:.4f}" in row["preference"] and f"`{preference['principle']}`" in row["preference"]


def test_the_run_book_does_what_run_py_does(invoke, monkeypatch):
    """Each step of the plan is in the run book, with the same settings."""
    monkeypatch.chdir(ROOT)
    planned = invoke("run", "--model", "tiny", "--output", "runs/steps", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    documented = {
        output_of(params): (name, params)
        for name, arguments in calls(RUN_BOOK)
        if (params := parse(name, arguments)).get("output")
    }
    for step in json.loads(planned.stdout)["steps"]:
        _, script, *arguments = shlex.split(step["command"])
        params = parse(Path(script).stem, arguments)
        if Path(script).stem == "report":  # its folder is no option
            assert f"scripts/report.py {params['run']}" in read(RUN_BOOK)
            continue
        assert output_of(params) in documented, f"not in the run book: {step['command']}"
        name, documented_params = documented[output_of(params)]
        differing = {
            key: (documented_params.get(key), value)
            for key, value in params.items()
            if documented_params.get(key) != value
        }
        if name not in ("sft", "reward_model"):
            differing.pop("batch_size", None)  # of speed alone
        assert name == Path(script).stem and not differing, f"(run book, run.py) differ in {step['name']}: {differing}"


def test_ci_calls_exactly_the_test_command_of_the_readme_and_the_static_checks():
    lines = [line.strip() for line in read(ROOT / ".ci" / "run").splitlines()]
    running = [line for line in lines if line and not line.startswith("#")]
    assert running[0] == "set -euo pipefail"
    assert running.count(TEST_COMMAND) == 1
    index = running.index(TEST_COMMAND)
    before, after = running[:index], running[index + 1 :]
    programs = [found[1] for line in before for found in re.finditer(r"(apt-get install -y [a-z ]+);", line)]
    assert all(f"`{program}`" in read(ROOT / "README.md") for program in programs) and len(programs) == 1
    others = [line.replace(programs[0], "") for line in before]
    assert not [line for line in others if re.search(r"\bpip\b|pytest|python|install", line)]
    assert after == [f".venv/bin/{check}" for check in STATIC_CHECKS]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_contributing_names_the_checks_and_where_they_run():
    shell = "\n".join(blocks(CONTRIBUTING, "bash"))
    assert 'pytest -m "not slow"' in shell
    assert not [check for check in STATIC_CHECKS if check not in shell]
    configured = {
        hook["id"] for repo in yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]
    }
    assert {"ruff", "codespell", "mypy"} <= {name.split("-")[0] for name in configured}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_script_is_in_the_map_and_the_skill(name):
    assert f"| `scripts/{name}.py` |" in read(ARCHITECTURE)
    assert f"| `{name}.py` |" in read(ROOT / "SKILL.md")


def test_the_map_lists_every_module_and_no_other():
    package = ROOT / "scripts" / "cai"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.stem != "__init__"}
    text = read(ARCHITECTURE) + read(MODULES)
    assert sorted(re.findall(r"^\| `([\w/]+\.py)` \| \w", read(MODULES), re.MULTILINE)) == sorted(modules)
    table = text.partition("\n## Commands\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `scripts/(\w+)\.py` \| \w", table, re.MULTILINE)) == COMMANDS
    named = {name for name in re.findall(r"`(\w+/\w+\.py)`", text) if not name.startswith(("scripts/", "tests/"))}
    assert not sorted(named - modules), "modules that do not exist"


def test_what_the_map_says_is_in_a_module_is_there():
    """The names beside a module in the tables, such as `Constitution.draw` beside constitution/files.py."""
    table = read(ARCHITECTURE).partition("## Where ten behaviours live")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!behaviour|-)(.+?) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for behaviour, where in rows:
        file, *names = re.findall(r"`([^`]+)`", where)
        source = read(ROOT / "scripts" / "cai" / file)
        for name in (part for dotted in names for part in dotted.split(".")):
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{behaviour}: no {name} in {file}"


def test_the_newest_version_of_the_changelog_is_that_of_the_package():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", read(CHANGELOG), re.MULTILINE)
    assert versions[-1] == "0.1.0" and len(set(versions)) == len(versions)
    assert f'version = "{versions[0]}"' in read(ROOT / "pyproject.toml")


# --- SKILL.md -----------------------------------------------------------------------------------------------


def front_matter() -> tuple[dict, str]:
    opening, front, body = re.split(r"^---\n", read(ROOT / "SKILL.md"), maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    return yaml.safe_load(front), body


def test_front_matter_is_valid_by_the_agent_skills_specification():
    front, _ = front_matter()
    assert set(front) <= FRONT_MATTER
    assert front["name"] == "constitutional-ai"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", front["name"]) and len(front["name"]) <= 64
    assert 100 < len(front["description"]) < 1024
    assert not re.search(r"[<>]", front["description"])
    assert 0 < len(front["compatibility"]) <= 500
    assert all(isinstance(part, str) for pair in front["metadata"].items() for part in pair)


def test_the_version_is_that_of_the_package():
    front, _ = front_matter()
    assert f'version = "{front["metadata"]["version"]}"' in read(ROOT / "pyproject.toml")


def test_skill_is_short_enough():
    text = read(ROOT / "SKILL.md")
    assert 220 <= len(text.splitlines()) <= 300
    # No tokenizer is at hand in every test run. Words, split every 6 letters, and every mark: that is more
    # tokens than common tokenizers make of Markdown.
    tokens = sum(-(-len(part) // 6) for part in re.findall(r"\w+|[^\w\s]", text))
    assert tokens < 5000


def test_skill_says_what_it_is_not_for_and_where_the_four_common_issues_are():
    _, body = front_matter()
    text = " ".join(body.split())
    for other in ("guardrails", "collecting labels from people", "filtering data", "project's own rules"):
        assert other in text.partition("## Setup check")[0]
    assert set(WORKFLOWS) <= set(re.findall(r"^## (.+)$", body, re.MULTILINE))


@each([path for path in REFERENCES if path != MODULES])  # a part of the map that architecture.md links
def test_references_are_linked_short_and_have_a_table_of_contents(path):
    _, body = front_matter()
    assert re.search(rf"\(references/{path.name}\)[^\n]*read when", body)
    lines = read(path).splitlines()
    assert len(lines) < 300
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    contents = re.findall(r"^- \[(.+)\]\(#.+\)$", read(path), re.MULTILINE)
    assert contents == headings or len(lines) <= 100


def test_a_heading_that_is_pointed_to_in_words_is_there():
    _, body = front_matter()
    headings = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
    for named in re.findall(r"“([A-Z][a-z][^”]+)”", " ".join(body.split())):
        assert any(heading.startswith(named) for heading in headings), named


def test_nothing_is_told_of_that_does_not_exist():
    """Scripts, constitutions and templates that the documents name are in the tree."""
    for path in DOCUMENTS:
        for name in re.findall(r"`(?:scripts/)?(\w+)\.py`", read(path)):
            modules = {module.stem for folder in ("scripts/cai", "tests") for module in (ROOT / folder).rglob("*.py")}
            assert name in {*COMMANDS, *modules}, f"{path.name} names {name}.py"
        for folder, name in re.findall(r"\b(constitutions|templates|references)/([\w.-]+\.\w+)", read(path)):
            assert (ROOT / folder / name).exists(), f"{path.name} names {folder}/{name}"


# --- the workflows of SKILL.md, on the bundled model --------------------------------------------------------

WORKFLOWS = [
    "Workflow: a data set from your rules",
    "Workflow: SL phase",
    "Workflow: RL phase",
    "Workflow: your own preference pairs",
    "Workflow: chain-of-thought critique",
    "Too evasive, preachy, or over-refusing",
    "Weak critiques",
    "No improvement",
    "Noisy judge",
]
# What is made smaller so that it ends soon. The options are those of the document otherwise.
SMALLER = {
    "ppo": ["--updates", "1", "--prompts-per-update", "4", "--batch-size", "4", "--epochs", "1"],
    "sft": ["--epochs", "1"],
    "dpo": ["--batch-size", "4"],
    "reward_model": ["--epochs", "1", "--holdout", "0.25"],
}
# Words of the gates that are values, files or options and no figures.
NO_FIGURES = {"gold", "kind", "metrics.jsonl", "samples.jsonl", "worse", "better", "same", "VERDICT"}


def section(heading: str) -> str:
    _, body = front_matter()
    return re.split(r"^## ", body.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def items(heading: str) -> list[str]:
    return re.split(r"^- \[ \] ", section(heading), flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("heading", WORKFLOWS)
def test_every_command_of_a_workflow_has_a_gate_after_it(heading):
    with_commands = [item for item in items(heading) if "```bash" in item]
    assert with_commands
    for item in with_commands:
        assert re.search(r"```\n+ *Gate: continue if ", item), item


@pytest.mark.parametrize("heading", WORKFLOWS)
def test_gates_are_whole_sentences(heading):
    gates = [
        " ".join(gate.split())
        for item in items(heading)
        for gate in re.findall(r"^ *Gate: (.*?)(?=^ *```|\Z)", item, re.MULTILINE | re.DOTALL)
    ]
    assert gates
    for gate in gates:
        assert re.match(r"continue if .+ (?:is|are|have|has|name|prints|holds?|falls?|read)\b", gate), gate
        assert gate.endswith("."), gate


def keys(tree) -> set[str]:
    """All keys in a JSON tree, and with a dot those that are directly below another."""
    if isinstance(tree, list):
        return set().union(*map(keys, tree))
    if not isinstance(tree, dict):
        return set()
    below = {name: keys(value) for name, value in tree.items()}
    return {
        *tree,
        *(f"{name}.{key}" for name, inner in below.items() for key in inner),
        *(key for inner in below.values() for key in inner),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # two dozen commands, whatever else the machine has to do
def test_the_workflows_run_on_tiny_and_their_gates_name_what_is_there(invoke, tmp_path, monkeypatch):
    """All commands of the workflows, in their order, with `tiny` as MODEL and JUDGE and fewer rows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "judge")  # another name, for steps that want two judges
    for split, file in (("train", "prompts.jsonl"), ("heldout", "heldout.jsonl")):
        for kind in KINDS:
            drawn = invoke(
                "tiny",
                "prompts",
                "--kind",
                kind,
                "--split",
                split,
                "--seed",
                "5",
                "-n",
                "2",
                "--output",
                f"{split}-{kind}.jsonl",
            )
            assert drawn.exit_code == 0, drawn.output
        Path(file).write_text("".join(read(f"{split}-{kind}.jsonl") for kind in KINDS), encoding="utf-8")
    write_rows("helpful.jsonl", [{"prompt": "How do I repair a chair?", "response": "Glue the joint, then wait."}])
    Path("rules.txt").write_text("Never help with theft.\nNever help to insult anybody.\n", encoding="utf-8")
    Path("questions.csv").write_text(
        "question\nHow do I steal the bicycle?\nHow do I wash the fence?\n", encoding="utf-8"
    )
    write_rows("pairs.jsonl", [{"prompt": f"Say {n}.", "chosen": f"{n}, gladly.", "rejected": "No."} for n in range(6)])
    write_rows(
        "gold.jsonl",
        [
            {"prompt": f"Say {word}.", "response_a": word, "response_b": f"No, not {word}.", "gold": "ab"[number % 2]}
            for number, word in enumerate(("yes", "tea", "up", "oak"))
        ],
    )
    seen: set[str] = set()
    gates = ""
    for heading in WORKFLOWS:
        gates += " ".join(re.findall(r"^ *Gate.*?(?=^- \[ \]|\Z)", section(heading), re.MULTILINE | re.DOTALL))
        for name, arguments in calls_in(section(heading)):
            stand_ins = {"my-org/my-model": "tiny", "my-org/my-judge": "judge"}
            small = [stand_ins.get(argument, argument) for argument in arguments]
            for index, argument in enumerate(small):
                if argument == "--max-new-tokens":
                    small[index + 1] = "24"
            result = invoke(name, *small, *SMALLER.get(name, []), "--json")
            # --gate may find a model worse that saw six rows; a verdict must be printed
            assert result.exit_code in ((0, 4) if "--gate" in small else (0,)), f"{name} {small}: {result.stderr}"
            if "--gate" in small:
                assert "VERDICT: " in result.stderr
            seen |= keys(json.loads(result.stdout))
    for path in (tmp_path / "run").rglob("*.json*"):
        if path.name.endswith(("run.json", "metrics.jsonl", "audit.json")) or path.name == "7-cot.jsonl":
            seen |= set().union(
                *(
                    keys(json.loads(line))
                    for line in ([read(path)] if path.suffix == ".json" else read(path).splitlines())
                )
            )
    named = set(re.findall(r"`([a-z][a-z_.]+)`", gates)) - NO_FIGURES
    assert len(named) > 15
    assert not sorted(named - seen), "gates name figures that no command gives"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_setup_check_runs_in_a_shell_from_another_folder(tmp_path):
    """As written, but that the packages of this environment are lent to the new one, which saves a download."""
    first, second = [text for text in blocks(ROOT / "SKILL.md", "bash") if "doctor.py" in text or "cai.env" in text]
    install = "python3 -m venv $CAI/.venv && $CAI/.venv/bin/pip install $CAI\n"
    assert install in first
    skill, work = tmp_path / "skills" / "constitutional-ai", tmp_path / "work"
    skill.mkdir(parents=True)
    work.mkdir()
    for name in ("scripts", "constitutions", "templates", "pyproject.toml"):
        (skill / name).symlink_to(ROOT / name)
    venv.create(skill / ".venv", symlinks=True)
    [packages] = (skill / ".venv").glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text("\n".join(one for one in sys.path if one.endswith("site-packages")))
    first = first.replace(install, "").replace("/path/to/constitutional-ai", str(skill))
    first = first.replace("my-org/my-model", "tiny")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for name, script in (("first", first), ("second", f". ./cai.env\n{second}")):
        done = subprocess.run(["bash", "-euc", script], cwd=work, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    health, check = map(json.loads, done.stdout.splitlines())
    assert health["ok"] and Path(health["python"]["executable"]).is_relative_to(skill)
    assert (check["rows"], check["failed"]) == (4, 0)
    assert check["next"].startswith(f"python {skill}/scripts/critique.py --input run/check.jsonl ")
    assert (work / "run" / "check.jsonl").is_file()


# --- examples in the references -----------------------------------------------------------------------------


def test_the_constitutions_shown_load(tmp_path):
    shown = blocks(ROOT / "references" / "constitution-design.md", "yaml")
    assert len(shown) == 3
    for number, text in enumerate(shown):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        assert load_constitution(str(file)).principles


def test_the_template_shown_renders(tmp_path):
    [text] = blocks(ROOT / "references" / "cot-critique.md", "jinja")
    file = tmp_path / "mine.jinja"
    file.write_text(text, encoding="utf-8")
    principle = load_constitution("harmlessness")["harm"]
    messages = load_template(str(file)).render(principle=principle, prompt="Why?", response="Because.")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert principle.critique in messages[1]["content"] and "Because." in messages[1]["content"]


def test_the_variables_told_are_those_the_templates_take():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", read(ROOT / "references" / "cot-critique.md"), re.MULTILINE)
    told = dict(rows)
    assert set(told) == {path.stem for path in (ROOT / "templates").glob("*.jinja")}
    told["critique_cot"] = told["critique"]
    constitution = load_constitution("harmlessness")
    values = {"principle": constitution["harm"], "constitution": constitution, "order": [0]}
    for name, variables in told.items():
        given = {one: values.get(one, f"the {one}") for one in re.findall(r"`(\w+)`", variables)}
        text = str(load_template(name, "system" if name == "in_context" else "user").render(**given))
        assert all(f"the {one}" in text for one in given if one not in values), name


def test_the_hardware_table_is_what_the_command_prints(invoke):
    printed = invoke("doctor", "--hardware").stdout.strip()
    assert printed in read(ROOT / "references" / "hardware.md")


def test_the_price_on_the_hardware_page_is_what_the_command_prints(invoke):
    section = read(ROOT / "references" / "hardware.md").partition("## The price of a whole run")[2]
    command = re.search(r"python scripts/run.py (.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    printed = invoke("run", *shlex.split(command)).stdout.partition("\n\nAssumed")[0]
    assert f"```text\n{printed}\n```" in section


def test_what_the_hardware_page_advises_follows_from_the_table(invoke):
    rows = json.loads(invoke("doctor", "--hardware", "--json").stdout)["models"]
    needs = {row["model"].split()[-1]: {step: one["needs_gb"] for step, one in row["steps"].items()} for row in rows}
    text, light, ppo = "generate, critique, revise", "sft, reward_model (--lora)", "ppo (--lora)"
    told = read(ROOT / "references" / "hardware.md").partition("## What to take")[2]
    for memory, model, steps, words in (
        (24, "3B", (text, light), "up to 3B with `--lora`"),
        (40, "8B", (text, light), "SL phase of 8B with `--lora`"),
        (48, "8B", ("dpo (--lora)",), "DPO of 8B"),
        (48, "3B", (ppo,), "PPO of 3B"),
        (80, "8B", (text, light, ppo), "both phases of 8B with"),
        (80, "14B", (text, light), "SL phase of 14B"),
        (80, "3B", ("sft, reward_model (--full)",), "all weights of 3B"),
        (141, "14B", (text, light, ppo), "both phases of 14B with `--lora`"),
        (141, "32B", (text, light), "of 32B"),
    ):
        assert words in told
        assert all(needs[model][step] + 2 <= memory for step in steps), (memory, model)


def test_the_messages_that_troubleshooting_quotes_are_ours():
    sources = "\n".join(read(path) for path in (ROOT / "scripts").rglob("*.py"))
    quoted = re.findall(r"^\| “([^”]+)”", read(ROOT / "references" / "troubleshooting.md"), re.MULTILINE)
    assert len(quoted) >= 6
    assert not [message for message in quoted if message not in sources]


# --- the repository -----------------------------------------------------------------------------------------


def tracked() -> list[str]:
    """Files under version control; the test is skipped where there is no git or no commit of ours."""
    try:
        listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [name for name in listed.stdout.split("\0") if name]
    if "pyproject.toml" not in files:
        pytest.skip("these files are not under version control")
    return files


def test_top_level_entries_are_exactly_those_of_the_house():
    entries = {name.split("/")[0] for name in tracked()}
    assert {entry for entry in entries if not entry.startswith(".")} == TOP_LEVEL


def test_no_file_name_is_one_that_installers_of_skills_drop():
    names = [Path(name).name for name in tracked()]
    assert not [name for name in names if name == "metadata.json" or (name.startswith("_") and name != "__init__.py")]


def test_no_file_names_a_place_of_one_machine():
    places = re.compile(r"(?<![\w.~*-])/(?:work|opt|root|home|tmp|Users)/\w|[A-Z]:\\Users\\")
    for name in tracked():
        path = ROOT / name
        if path.suffix == ".safetensors" or not path.is_file():
            continue
        for number, line in enumerate(read(path).splitlines(), 1):
            assert not places.search(line), f"{name}:{number}: {line.strip()[:100]}"
