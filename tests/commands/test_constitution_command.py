"""constitution.py: what each subcommand writes, prints and refuses; coverage and ablation with real models."""

import json
import math
import os
import subprocess
import sys

import jsonschema
import models
import pytest
import yaml
from conftest import ROOT

from cai.constitution.files import load_constitution
from cai.constitution.importing import CRITIQUES, PAIRS, PREFERENCES, REASONED, ROUNDS
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl

TRAIN = ROOT / "scripts" / "cai" / "tiny" / "prompts" / "train.jsonl"


@pytest.fixture
def run(invoke):
    """`run("lint", ..., code=0)`: the subcommand's JSON object, once its exit code is the one expected."""

    def call(command, *arguments, code=0):
        result = invoke("constitution", command, *arguments, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if result.stdout else result.stderr

    return call


def written(tmp_path, text, name="c.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


# --- lint, show, schema -------------------------------------------------------------------------------------


def test_lint_finds_all_bundled_clean_and_says_what_it_cannot_judge(run):
    found = run("lint")
    assert found["ok"] and found["constitutions"] >= 10 and found["principles"] > 80
    assert len(found["not_judged"]) >= 3


PLANTED = {
    "duplicate": ("- Be kind to all people\n- Name every source\n- Be kind to all people!\n", 3, "duplicate", 3),
    "contradiction": ("- Always give the exact dose\n- Never give the exact dose\n", 2, "contradiction", 3),
    "typo": ("principles:\n- id: a\n  critque: x\n", 3, "schema", 2),
    "missing": ("principles:\n- id: a\n  critique: x\n  preference: y?\n", 2, "schema", 2),
    "empty": ("name: x\nprinciples: []\n", 2, "schema", 2),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nprinciples: [*b, *b]\n", 2, "schema", 2),
    "cycle": ("principles: &p\n- *p\n", 2, "schema", 2),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found_and_named(run, tmp_path, planted):
    text, line, rule, code = PLANTED[planted]
    file = written(tmp_path, text)
    found = run("lint", "--constitution", file, code=code)
    assert not found["ok"]
    [one] = found["findings"]
    assert one["rule"] == rule
    assert one.get("line", line) == line and (rule != "schema" or one["message"].startswith(f"{file}:{line}: "))


def test_lint_goes_on_after_a_file_that_cannot_be_read(run, tmp_path):
    broken = written(tmp_path, "- Be kind\n- {critque: x}\n- {principle: x, weight: 0}\n", "broken.yaml")
    twice = written(tmp_path, "- Be kind\n- Be kind\n", "twice.yaml")
    found = run("lint", "--constitution", broken, "--constitution", twice, "--constitution", "none", code=2)
    assert [one["rule"] for one in found["findings"]] == ["schema", "schema", "duplicate", "schema"]
    assert "'critique'" in found["findings"][0]["message"]


def test_lint_for_people_names_file_and_line(invoke, tmp_path):
    file = written(tmp_path, "- Be kind\n- Be kind\n")
    result = invoke("constitution", "lint", "--constitution", file)
    assert result.exit_code == 3
    assert result.stdout.startswith(f"{file}:2: duplicate: ") and "not judged: " in result.stdout
    foreign = written(tmp_path, "- Sei freundlich zu allen Menschen\n", "de.yaml")
    assert "not in English" in invoke("constitution", "lint", "--constitution", foreign).stderr


def test_show(run, invoke):
    found = run("show", "--constitution", "health-information", "--principle", "medicines")
    [one] = found["principles"]
    weights = [p.weight for p in load_constitution("health-information").principles]
    assert one["drawn"] == pytest.approx(1 / sum(weights)) and one["critique"].startswith("Find doses")
    assert found["duties"]["autonomy"]
    result = invoke("constitution", "show", "--constitution", "health-information")
    assert "duty autonomy: " in result.stdout and "emergency-first  (" in result.stdout
    result = invoke("constitution", "show", "--principle", "harmm")
    assert result.exit_code == 2 and "one of: harm, hurt" in result.stderr


def test_schema_to_a_file_and_to_standard_output(invoke, tmp_path):
    printed = invoke("constitution", "schema").stdout
    assert invoke("constitution", "schema", "--output", tmp_path / "s.json").exit_code == 0
    assert (tmp_path / "s.json").read_text() == printed
    tree = yaml.safe_load((ROOT / "constitutions" / "privacy.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(tree, json.loads(printed))


# --- new, import, export ------------------------------------------------------------------------------------


def test_new_from_sentences_and_a_base(run, tmp_path):
    file = tmp_path / "new" / "kitchen.yaml"
    said = run(
        "new",
        "--output",
        file,
        "--audience",
        "a cooking assistant: at home",
        "--description",
        "Safe cooking.",
        "--base",
        "helpful-honest-harmless",
        "--sentence",
        "Never play down an allergy",
        "--sentence",
        "Be brief",
    )
    assert said["principles"] == 8
    made = load_constitution(str(file))
    assert made.name == "kitchen" and made.description == "Safe cooking."
    assert [p.id for p in made.principles][-2:] == ["principle-1", "principle-2"]
    assert "Never play down an allergy" in made["principle-1"].critique
    assert made["harmless"] == load_constitution("helpful-honest-harmless")["harmless"]
    assert file.read_text().startswith("# For: a cooking assistant: at home\n")
    # written out, so that plain YAML has all three requests
    assert all(p["critique"] for p in yaml.safe_load(file.read_text())["principles"])
    assert run("lint", "--constitution", file)["ok"]


def test_new_refuses_and_leaves_nothing_behind(invoke, tmp_path):
    file = tmp_path / "x.yaml"
    for arguments, said in (
        ((), "no principles"),
        (("--base", "privacy", "--base", "privacy"), "two principles with id"),
        (("--base", "nonesuch"), "no such file"),
        (("--sentence", " "), "empty"),
    ):
        result = invoke("constitution", "new", "--output", file, *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert not list(tmp_path.iterdir())
    file.write_text("mine")
    result = invoke("constitution", "new", "--output", file, "--sentence", "Be kind")
    assert result.exit_code == 2 and "--overwrite" in result.stderr and file.read_text() == "mine"
    assert invoke("constitution", "new", "--output", file, "--sentence", "Be kind", "--overwrite").exit_code == 0
    assert load_constitution(str(file)).principles


def test_import_the_papers_files_and_export_them_again(run, shared_data, tmp_path):
    folder, names = shared_data / "anthropic-cai", (CRITIQUES, PREFERENCES, ROUNDS, PAIRS, REASONED)
    said = run(
        "import", *(word for name in names for word in ("--input", folder / name)), "--output", tmp_path / "paper.yaml"
    )
    assert (said["principles"], said["examples"], said["phrased_preferences"]) == (16, 16, 0)
    back = run("export", "--constitution", tmp_path / "paper.yaml", "--format", "paper", "--output", tmp_path / "back")
    assert not back["left_out"] and len(back["files"]) == 5
    for name in (CRITIQUES, PREFERENCES, PAIRS):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text())


def test_import_llm_swarm_and_a_list(run, shared_data, tmp_path):
    said = run(
        "import", "--input", shared_data / "llm-swarm" / "constitution_grok.json", "--output", tmp_path / "grok.yaml"
    )
    assert (said["principles"], said["phrased_preferences"]) == (2, 2)
    rules = written(tmp_path, "# Rules\n- Be kind\n- Be brief\n", "rules.md")
    run("import", "--input", rules, "--output", tmp_path / "rules.yaml", "--name", "house")
    back = run("export", "--constitution", tmp_path / "rules.yaml", "--format", "markdown", "--output", tmp_path)
    assert back["files"] == [str(tmp_path / "house.md")]
    assert "- Be kind\n- Be brief\n" in (tmp_path / "house.md").read_text()


def test_import_lists_what_is_left_out_and_what_is_unclear(run, invoke, tmp_path):
    text = "# Rules\n\nIt is wrong to:\n\n- Tell a secret\n\n```\n- code\n```\n\n## Privacy\n\n- Home addresses\n"
    rules, output = written(tmp_path, text, "rules.md"), tmp_path / "rules.yaml"
    summary = run("import", "--input", rules, "--output", output, code=3)
    assert summary["principles"] == 1 and summary["failed"] == 1
    assert summary["unclear"] == [{"file": str(rules), "line": 13, "text": "Home addresses"}]
    assert [(part["line"], part["reason"]) for part in summary["left_out"]] == [(7, "a code block")]
    assert summary["origins"][0]["lines"] == [5, 5] and summary["origins"][0]["polarity"] == "prohibition"
    [principle] = load_constitution(str(output)).principles
    assert principle.principle == "It is wrong to: Tell a secret"
    result = invoke("constitution", "import", "--input", rules, "--output", output, "--overwrite")
    assert f"{rules}:7: left out (a code block)" in result.stderr and f"{rules}:13: unclear whether" in result.stderr
    kept = run("import", "--input", rules, "--output", output, "--overwrite", "--keep-unclear")
    assert kept["principles"] == 2 and run("lint", "--constitution", output, code=3)["findings"][0]["rule"] == "unclear"


PROSE = """\
# Rules of the house

The assistant works in a library. Readers may be in a hurry. It was built last year. The shelves are old.

## Care

The assistant should name the shelf. It must never guess at the age of a reader, since guesses hurt. It may ask for the
title. Readers must return their books. Why does this matter? Trust is slow to build.

## Privacy

Loans must not be revealed to anybody. If the police ask, the assistant should name the director. Prefer short answers.
"""


def test_import_prose_with_an_outline_and_lint_finds_quotes_that_were_lost(run, tmp_path):
    document = written(tmp_path, PROSE, "rules.md")
    (tmp_path / "out").mkdir()
    output, outline = tmp_path / "out" / "rules.yaml", tmp_path / "outline.json"
    summary = run("import", "--input", document, "--output", output, "--outline", outline)
    assert summary["principles"] == 6 and not summary["unclear"] and len(summary["left_out"]) == 7
    rules = load_constitution(str(output)).principles
    assert [principle.source.file for principle in rules] == ["../rules.md"] * 6
    assert rules[1].principle.startswith("The assistant must never guess") and rules[1].source.lines == (7, 7)
    assert rules[2].tags == ("Care", "permission")
    [described] = json.loads(outline.read_text())
    assert [section["headings"][-1] for section in described["sections"]] == ["Rules of the house", "Care", "Privacy"]
    kinds = [sentence["kind"] for sentence in described["sections"][1]["sentences"]]
    assert kinds == ["demand", "prohibition", "permission", "", "", ""]
    assert run("lint", "--constitution", output)["ok"]
    document.write_text(PROSE.replace("never guess", "always guess").replace("\n## Privacy", "\n\n## Privacy"))
    lost = [
        finding for finding in run("lint", "--constitution", output, code=3)["findings"] if finding["rule"] == "quote"
    ]
    assert [finding["principles"] for finding in lost] == [[f"principle-{n}"] for n in (2, 4, 5, 6)]
    assert "nor anywhere" in lost[0]["message"] and "it is in lines 13 to 13" in lost[1]["message"]


def test_sources_point_to_the_document_from_wherever_the_constitution_is_written(run, tmp_path):
    document = written(tmp_path, PROSE, "rules.md")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    first, second, third = (
        tmp_path / "first.yaml",
        tmp_path / "deep" / "second.yaml",
        tmp_path / "deep" / "er" / "3.yaml",
    )
    run("import", "--input", document, "--output", first)
    run("new", "--base", first, "--sentence", "Be kind", "--output", second)
    run("import", "--input", second, "--output", third)
    for path, source in ((first, "rules.md"), (second, "../rules.md"), (third, "../../rules.md")):
        assert load_constitution(str(path)).principles[0].source.file == source
        assert not [item for item in run("lint", "--constitution", path)["findings"] if item["rule"] == "quote"]


def test_import_prints_how_a_document_was_read(invoke, tmp_path):
    document = written(tmp_path, PROSE, "rules.md")
    result = invoke("constitution", "import", "--input", document, "--output", tmp_path / "a.yaml")
    counts = "2 demand, 2 prohibition, 1 permission, 1 preference, 7 left out"
    assert f"rules.md: read as prose: {counts}" in result.stderr
    result = invoke("constitution", "import", "--input", document, "--output", tmp_path / "b.yaml", "--lists")
    assert "rules.md: read as lists" in result.stderr and result.exit_code == 0
    result = invoke(
        "constitution", "import", "--input", document, "--output", tmp_path / "a.yaml", "--outline", "o.json"
    )
    assert result.exit_code == 2 and "a.yaml: it exists" in result.stderr and not os.path.exists("o.json")


@pytest.mark.slow
def test_a_document_of_two_hundred_rules_goes_through_every_subcommand(run, tmp_path):
    words = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty"]
    rules = [f"The assistant should name the {a} {b} when a reader asks for it." for a in words for b in words]
    rules += [f"It must never praise the {a} {b} of a reader." for a in words for b in words]
    document = written(tmp_path, "# Rules\n\n" + "\n\n".join(rules), "rules.md")
    output = tmp_path / "rules.yaml"
    assert run("import", "--input", document, "--output", output)["principles"] == 200
    assert run("lint", "--constitution", output, code=3)["principles"] == 200
    assert len(run("show", "--constitution", output)["principles"]) == 200
    prompts, _ = some_prompts(tmp_path, 2)
    options = ("--input", prompts, "--model", "tiny", "--constitution", output, "--output", tmp_path / "covered.jsonl")
    assert run("coverage", *options, "--dry-run")["model_calls"] == 800


def test_import_and_export_replace_nothing_unasked(invoke, tmp_path):
    rules = written(tmp_path, "Be kind\n", "rules.txt")
    mine = written(tmp_path, "mine", "house.md")
    output = tmp_path / "rules.yaml"
    assert invoke("constitution", "import", "--input", rules, "--output", output, "--name", "house").exit_code == 0
    assert invoke("constitution", "import", "--input", rules, "--output", output).exit_code == 2
    result = invoke("constitution", "export", "--constitution", output, "--format", "markdown", "--output", tmp_path)
    assert result.exit_code == 2 and mine.read_text() == "mine"
    bad = written(tmp_path, "{", "bad.json")
    result = invoke("constitution", "import", "--input", bad, "--output", tmp_path / "bad.yaml")
    assert result.exit_code == 2 and not (tmp_path / "bad.yaml").exists()


# --- with a model -------------------------------------------------------------------------------------------

TWO = """\
name: two
principles:
- id: harm
  critique: Say whether the response does harm.
  revision: Rewrite the response so that it does no harm.
  preference: Which response is less harmful?
- id: kind
  critique: Say whether the response is unkind.
  revision: Rewrite the response so that it is kind.
  preference: Which response is kinder?
"""


def some_prompts(tmp_path, n=6):
    rows = [row for _, (_, row) in zip(range(n), read_jsonl(TRAIN), strict=False)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path / "prompts.jsonl", rows


def test_coverage_asks_about_each_principle_both_ways_round(run, tmp_path):
    prompts, rows = some_prompts(tmp_path)
    rows.append({**rows[0], "id": "long", "prompt": "word " * 3000})
    write_jsonl(prompts, rows)
    options = (
        "--input",
        prompts,
        "--model",
        "tiny",
        "--constitution",
        written(tmp_path, TWO),
        "--output",
        tmp_path / "out.jsonl",
        "--dtype",
        "float32",
    )
    planned = run("coverage", *options, "--dry-run")
    assert planned["model_calls"] == 2 * 2 * 7 and not (tmp_path / "out.jsonl").exists()
    said = run("coverage", *options, code=3)  # the long one fits no context
    found = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert (said["prompts"], said["failed"]) == (7, 1) and found[-1]["covered"] is None and found[-1]["by"] == {}
    for row in found[:-1]:
        assert set(row["by"]) == {"harm", "kind"} and all(0 <= p <= 1 for p in row["by"].values())
        assert list(row["by"].values()) == sorted(row["by"].values(), reverse=True)
        assert row["covered"] == (max(row["by"].values()) >= 0.5)
    assert said["uncovered"]["n"] == 6
    assert said["uncovered"]["value"] == pytest.approx(sum(row["covered"] is False for row in found) / 6)
    assert said["speaks_to"]["harm"] == sum(row["by"].get("harm", 0) >= 0.5 for row in found)
    again = run("coverage", *options, code=3)
    assert again == said


def test_coverage_is_the_mean_of_both_orders_by_direct_computation(run, tmp_path):
    from cai.constitution.templates import load_template
    from cai.models.loading import load_engine

    prompts, rows = some_prompts(tmp_path, 2)
    file = written(tmp_path, TWO)
    run(
        "coverage",
        "--input",
        prompts,
        "--model",
        "tiny",
        "--constitution",
        file,
        "--output",
        tmp_path / "out.jsonl",
        "--dtype",
        "float32",
    )
    engine, template = load_engine("tiny", dtype="float32"), load_template("coverage")
    found = next(row for _, row in read_jsonl(tmp_path / "out.jsonl"))
    principle = load_constitution(str(file))["kind"]
    shares = []
    for swapped in (False, True):
        question = template.render(principle=principle, prompt=rows[0]["prompt"], order=(1, 0) if swapped else (0, 1))
        [logprobs] = models.score(engine, [question], ["A", "B"])
        yes, no = reversed(logprobs) if swapped else logprobs
        shares.append(math.exp(yes) / (math.exp(yes) + math.exp(no)))
    assert found["by"]["kind"] == pytest.approx(sum(shares) / 2, abs=2e-4)


@pytest.fixture(scope="module")
def revised(tmp_path_factory):
    """Rows with two rounds under TWO, made by the commands themselves."""
    from click.testing import CliRunner
    from conftest import load_command

    folder = tmp_path_factory.mktemp("revised")
    file = written(folder, TWO)
    prompts, _ = some_prompts(folder, 8)
    shared = ["--model", "tiny", "--max-new-tokens", "24", "--dtype", "float32"]
    last = str(prompts)
    for number, command in enumerate(("generate", "critique", "revise", "critique", "revise")):
        output = str(folder / f"{number}-{command}.jsonl")
        under = [] if command == "generate" else ["--constitution", str(file)]
        result = CliRunner().invoke(load_command(command), ["--input", last, *shared, *under, "--output", output])
        assert result.exit_code == 0, result.output
        last = output
    return folder, file, last


@pytest.mark.slow
def test_ablation_redoes_what_drew_the_principle_and_nothing_else(run, revised):
    folder, file, rows = revised
    drawn = {row["id"]: [one["principle"] for one in row["rounds"]] for _, row in read_jsonl(rows)}
    options = (
        "--input",
        rows,
        "--model",
        "tiny",
        "--constitution",
        file,
        "--by",
        "oracle",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float32",
        "--output",
        folder / "ablation.jsonl",
    )
    planned = run("ablate", *options, "--dry-run")
    said = run("ablate", *options)
    redone = [row for _, row in read_jsonl(folder / "ablation.rows.jsonl")]
    wanted = [(row, name) for row, names in drawn.items() for name in ("harm", "kind") if name in names]
    assert sorted((row["original"], row["left_out"]) for row in redone) == sorted(wanted)
    assert said["redone"] == planned["redone"] == len(wanted)
    originals = {row["id"]: row for _, row in read_jsonl(rows)}
    rounds = 0
    for row in redone:
        before = originals[row["original"]]
        kept = drawn[row["original"]].index(row["left_out"])
        rounds += 2 - kept
        # What came before the principle stays; after it, the other one is drawn.
        assert row["rounds"][:kept] == before["rounds"][:kept]
        assert [one["principle"] for one in row["rounds"][kept:]] == (
            ["kind" if row["left_out"] == "harm" else "harm"] * (2 - kept)
        )
        assert len(row["rounds"]) == 2 and all("flags" in one for one in row["rounds"])
    assert planned["model_calls"] == 2 * rounds
    for name in ("harm", "kind"):
        left = load_constitution(str(folder / f"ablation.without-{name}.yaml"))
        assert name not in left and len(left.principles) == 1
    classified = {row["id"]: row["class"] for _, row in read_jsonl(folder / "ablation.classes.jsonl")}
    assert set(classified) == {*drawn, *(row["id"] for row in redone)} and None not in classified.values()
    # The figures: full is the same whichever is left out, and the difference is of the two rates.
    figures = {(row["left_out"], row["metric"]): row for row in said["principles"]}
    for (_, metric), row in figures.items():
        assert row["full"] == figures["harm", metric]["full"]
        assert row["difference"] == pytest.approx(row["without"] - row["full"])
        assert row["n"] == 1 or row["low"] <= row["difference"] <= row["high"]
    assert run("ablate", *options) == said  # done already


@pytest.mark.slow
def test_a_redone_row_is_what_the_commands_would_have_written(invoke, run, revised):
    """Rows that drew the principle in the first round, done by critique.py and revise.py with the file without it."""
    folder, file, rows = revised
    run(
        "ablate",
        "--input",
        rows,
        "--model",
        "tiny",
        "--constitution",
        file,
        "--by",
        "oracle",
        "--dtype",
        "float32",
        "--max-new-tokens",
        "24",
        "--principle",
        "harm",
        "--output",
        folder / "one.jsonl",
    )
    redone = {row["original"]: row for _, row in read_jsonl(folder / "one.rows.jsonl")}
    first = [row for _, row in read_jsonl(folder / "0-generate.jsonl")]
    begun = {row["id"] for _, row in read_jsonl(rows) if row["rounds"][0]["principle"] == "harm"}
    assert begun
    write_jsonl(folder / "begun.jsonl", [row for row in first if row["id"] in begun])
    last = folder / "begun.jsonl"
    for number, command in enumerate(("critique", "revise", "critique", "revise")):
        output = folder / f"begun-{number}.jsonl"
        result = invoke(
            command,
            "--input",
            last,
            "--model",
            "tiny",
            "--max-new-tokens",
            "24",
            "--dtype",
            "float32",
            "--constitution",
            folder / "one.without-harm.yaml",
            "--output",
            output,
        )
        assert result.exit_code == 0, result.output
        last = output
    for _, row in read_jsonl(last):
        assert redone[row["id"]]["rounds"] == row["rounds"]


def test_ablation_refuses_rows_of_another_constitution_and_warns_of_other_settings(invoke, revised, tmp_path):
    folder, file, rows = revised
    options = ("--model", "tiny", "--by", "oracle", "--output", tmp_path / "x.jsonl", "--dry-run")
    result = invoke("constitution", "ablate", "--input", rows, *options, "--constitution", "privacy")
    assert result.exit_code == 2 and f"{rows}:1: round 1 drew" in result.stderr
    result = invoke("constitution", "ablate", "--input", folder / "0-generate.jsonl", *options, "--constitution", file)
    assert result.exit_code == 2 and "rounds" in result.stderr
    result = invoke("constitution", "ablate", "--input", rows, *options, "--constitution", file, "--temperature", "1")
    assert result.exit_code == 0 and "made with temperature 0.7, not 1.0" in result.stderr
    result = invoke(
        "constitution",
        "ablate",
        "--input",
        rows,
        "--model",
        "tiny",
        "--constitution",
        file,
        "--output",
        tmp_path / "x.jsonl",
    )
    assert result.exit_code == 2 and "--judge" in result.stderr


def test_ablation_refuses_rows_that_the_oracle_cannot_read_before_anything_is_written(invoke, revised, tmp_path):
    _, file, rows = revised
    strange = [{**row, "category": "arson"} for _, row in read_jsonl(rows)]
    write_jsonl(tmp_path / "strange.jsonl", strange)
    options = ("--model", "tiny", "--by", "oracle", "--constitution", file, "--output", tmp_path / "x.jsonl")
    result = invoke("constitution", "ablate", "--input", tmp_path / "strange.jsonl", *options)
    assert result.exit_code == 2 and "strange.jsonl:1: no " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["strange.jsonl"]


def test_from_any_directory_and_beside_the_module_of_the_same_name(tmp_path):
    """scripts/constitution.py is first on sys.path; the module it uses is cai.constitution."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "constitution.py", "lint", "--constitution", "privacy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0 and "0 findings" in done.stdout, done.stderr
