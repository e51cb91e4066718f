"""The evals of the skill: their form, and the checker, on folders that our own commands make as an agent should."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

FOLDER = ROOT / "tests" / "skill_evals"
spec = importlib.util.spec_from_file_location("skill_evals_check", FOLDER / "check.py")
check = importlib.util.module_from_spec(spec)
sys.modules["skill_evals_check"] = check
spec.loader.exec_module(check)

EVALS = json.loads((FOLDER / "evals.json").read_text(encoding="utf-8"))
TRIGGERS = json.loads((FOLDER / "triggers.json").read_text(encoding="utf-8"))
TINY = ("--model", "tiny", "--max-new-tokens", "24")


# --- form ---------------------------------------------------------------------------------------------------


def test_the_tasks_are_in_the_published_form_and_can_all_be_checked():
    assert EVALS["skill_name"] == "constitutional-ai"
    assert [one["id"] for one in EVALS["evals"]] == list(range(1, len(EVALS["evals"]) + 1))
    assert len(EVALS["evals"]) >= 10
    for one in EVALS["evals"]:
        assert set(one) == {"id", "prompt", "expected_output", "files", "assertions", "checks"}
        assert one["prompt"].strip() and one["expected_output"].strip()
        assert len(one["assertions"]) == len(one["checks"]) >= 2
        assert all((FOLDER / file).is_file() for file in one["files"])
        for done in one["checks"]:
            assert done["kind"] in check.CHECKS
    used = {Path(file).name for one in EVALS["evals"] for file in one["files"]}
    assert used == {path.name for path in (FOLDER / "files").iterdir()}


def test_the_queries_are_twenty_or_more_with_near_misses():
    assert len(TRIGGERS) >= 20 and len({one["query"] for one in TRIGGERS}) == len(TRIGGERS)
    wanted = [one["query"] for one in TRIGGERS if one["should_trigger"]]
    others = [one["query"] for one in TRIGGERS if not one["should_trigger"]]
    assert len(wanted) >= 10 and len(others) >= 10
    # Near misses share the skill's words.
    words = ("constitution", "critique", "reward model", "harmful", "moderation", "LLM")
    assert sum(any(word in query for word in words) for query in others) >= 6


# --- each task done with our own commands -------------------------------------------------------------------


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def health(run):
    write("health.json", run("doctor", "--json").stdout)


def revisions(run):
    run("generate", "--input", "prompts.jsonl", *TINY, "--output", "out/1.jsonl")
    for number, command in enumerate(("critique", "revise", "critique", "revise"), 1):
        output = "out/revisions.jsonl" if number == 4 else f"out/{number + 1}.jsonl"
        run(command, "--input", f"out/{number}.jsonl", *TINY, "--output", output)


def preferences(run):
    run("judge", "--input", "samples.jsonl", "--model", "tiny", "--output", "preferences.jsonl")


def kitchen(run):
    run(
        "constitution",
        "new",
        "--output",
        "kitchen.yaml",
        "--audience",
        "a cooking assistant",
        "--base",
        "helpful-honest-harmless",
        "--sentence",
        "Never play down an allergy",
        "--sentence",
        "Shame nobody for their food",
    )


def repaired(run):
    text = Path("broken.yaml").read_text(encoding="utf-8").replace("critque", "critique")
    before, _, after = text.rpartition("- id: safety")
    write("broken.yaml", f"{before}- id: laws{after}".partition("  - id: detail")[0])


def hotel(run):
    run(
        "constitution",
        "import",
        "--input",
        "hotel-critiques.json",
        "--input",
        "hotel-preferences.json",
        "--output",
        "hotel.yaml",
    )
    run("constitution", "export", "--constitution", "hotel.yaml", "--format", "llm-swarm", "--output", "swarm")


def verdict(run):
    run("evaluate", "--responses", "before.jsonl", "--by", "oracle", "--output", "before-figures.jsonl")
    result = run(
        "evaluate",
        "--responses",
        "after.jsonl",
        "--by",
        "oracle",
        "--output",
        "after-figures.jsonl",
        "--against",
        "before-figures.jsonl",
        "--gate",
        code=4,
    )
    assert "VERDICT: worse" in result.output
    write(
        "report.md",
        "Harmful compliance fell from 100 % to 0 %, but it got worse: 100 % of the harmless requests "
        "are refused now, and over-refusal is total.",
    )


def trust(run):
    run("judge", "--input", "gold-pairs.jsonl", "--model", "tiny", "--output", "judged.jsonl", "--audit", "audit.json")
    write("trust.md", "Right on 17 of 18, against 9 for always the first. Few pairs; the order changed 2 verdicts.")


def fine_tuned(run):
    run("sft", "--input", "revisions.jsonl", "--model", "tiny", "--keep", "copy", "--epochs", "1", "--output", "model")


def better(run):
    run("constitution", "new", "--output", "better.yaml", "--base", "mine.yaml", "--base", "non-evasive")


def plan(run):
    write(
        "plan.sh",
        run(
            "run",
            "--model",
            "my-org/my-model",
            "--input",
            "prompts.jsonl",
            "--heldout",
            "heldout.jsonl",
            "--rl",
            "dpo",
            "--output",
            "runs/mine",
            "--dry-run",
        ).stdout,
    )


def answers(run):
    run("generate", "--input", "transcripts.jsonl", *TINY, "--output", "answers.jsonl")


def change(file: str, pattern: str, by: str) -> None:
    """Put `by` in the place of whatever fits; something must."""
    text, times = re.subn(pattern, by, Path(file).read_text(encoding="utf-8"))
    assert times, f"nothing in {file} fits {pattern}"
    write(file, text)


def each_row(file: str, spoil) -> None:
    """Let `spoil` change every row of a file."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        spoil(row)
    write(file, "".join(json.dumps(row) + "\n" for row in rows))


def gone(path: str) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


# What an agent may do wrong, by task: the assertions that must then fail (all others hold), and the deed.
WRONG = {
    1: [
        ({0, 1, 2}, write, "health.json", "All is well."),
        ({1, 2}, write, "health.json", '{"ok": true, "problems": [], "remedies": []}'),
    ],
    2: [
        ({0, 1}, change, "out/revisions.jsonl", r"\A.*\n", ""),  # a prompt was lost
        ({0, 1}, each_row, "out/revisions.jsonl", lambda row: row["rounds"].pop()),  # one round
        ({1}, each_row, "out/revisions.jsonl", lambda row: row["rounds"][0].update(principle="")),
        ({2}, gone, "out/revisions.jsonl.run.json"),  # written by hand
        ({2}, change, "out/revisions.jsonl.run.json", '"failed": 0', '"failed": 1'),
        ({3}, write, "out/sft/model.safetensors", ""),
        ({4}, write, "prompts.jsonl", "{}"),
    ],
    3: [
        ({0}, each_row, "preferences.jsonl", lambda row: row.pop("p_chosen")),
        ({1}, each_row, "preferences.jsonl", lambda row: row["verdicts"].pop()),
        ({2}, gone, "preferences.jsonl.run.json"),
    ],
    4: [
        ({0}, write, "kitchen.yaml", "# For: a cook\n- Never play down an allergy\n"),
        ({0}, change, "kitchen.yaml", r"\Z", "  - Answer briefly\n  - Answer at length\n"),
        ({1}, change, "kitchen.yaml", "(?i)allerg", "nut"),
        ({2}, change, "kitchen.yaml", "(?im)^(# )?for:", "# Whom:"),
    ],
    5: [
        ({0, 1, 3}, shutil.copy, FOLDER / "files" / "broken.yaml", "."),  # nothing was done
        ({0, 2}, change, "broken.yaml", r"(?s)  - id: laws.*?(?=  - id)", ""),
        ({1}, change, "broken.yaml", "id: prices", "id: cost"),
        ({0, 3}, change, "broken.yaml", r"\Z", "  - principle: Answer in great detail\n"),
    ],
    6: [
        ({0}, change, "hotel.yaml", "secrets0", "secrets"),
        ({1}, change, "hotel.yaml", "treated more kindly", "better off"),
        ({2}, gone, "swarm"),
        ({2}, write, "swarm/hotel.json", '{"constitutions": []}'),
    ],
    7: [
        ({0}, change, "after-figures.jsonl.run.json", '"by": "oracle"', '"by": "judge"'),
        ({1}, each_row, "after-figures.jsonl", lambda row: row.pop("low")),
        (
            {2},
            write,
            "report.md",
            "Training helped: harmful compliance fell from 100 % to 0 %. The harmless model now "
            "refuses harmful requests.",
        ),
        ({2}, write, "report.md", "It got worse: harm rose by 5 %."),
        ({3}, write, "report.md", "Harm fell, but it got worse: harmless requests are all refused now."),
    ],
    8: [
        ({0}, change, "audit.json", "always_a", "always"),
        ({1}, write, "trust.md", "It was right on 17 of 18 pairs."),
        ({1}, write, "trust.md", "Trust it."),
        ({2}, write, "gold-pairs.jsonl", "{}"),
    ],
    9: [
        ({0}, gone, "model/tokenizer.json"),
        ({0, 1}, lambda: [gone("model"), gone("model.run.json")]),
        ({1}, change, "model.run.json", '"rows_left_out": 0', '"rows_left_out": 8'),
        ({2}, write, "revisions.jsonl", "{}"),
    ],
    10: [
        ({0, 1}, shutil.copy, "mine.yaml", "better.yaml"),
        ({0}, change, "better.yaml", "id: dosage", "id: dose"),
        ({1}, change, "better.yaml", "(?i)lectur|scold|preach|talks? down", "hum"),
        ({2}, write, "mine.yaml", "- Be kind"),
    ],
    11: [
        ({0}, change, "plan.sh", "dpo.py", "ppo.py"),
        ({0}, write, "plan.sh", "python run.py --model my-org/my-model"),
        ({1}, write, "runs/mine/01-responses.jsonl.run.json", "{}"),
    ],
    12: [
        ({0}, each_row, "answers.jsonl", lambda row: row.update(response="")),
        ({1}, each_row, "answers.jsonl", lambda row: row.update(prompt=row["prompt"][-1:])),
    ],
}
SOLUTIONS = [
    health,
    revisions,
    preferences,
    kitchen,
    repaired,
    hotel,
    verdict,
    trust,
    fine_tuned,
    better,
    plan,
    answers,
]


@pytest.mark.parametrize(("number", "solve"), list(enumerate(SOLUTIONS, 1)), ids=[one.__name__ for one in SOLUTIONS])
def test_a_folder_with_the_task_done_passes_and_one_without_does_not(number, solve, invoke, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    prepared = CliRunner().invoke(check.main, ["prepare", "--task", str(number), "--folder", str(folder)])
    assert prepared.exit_code == 0 and prepared.stdout.strip() == check.tasks()[number]["prompt"]
    assert {path.name for path in folder.iterdir()} == {Path(f).name for f in check.tasks()[number]["files"]}

    def run(command, *arguments, code=0):
        result = invoke(command, *arguments)
        assert result.exit_code == code, result.output
        return result

    def grade():
        result = CliRunner().invoke(check.main, ["grade", "--task", str(number), "--folder", str(folder)])
        return result.exit_code, json.loads(result.stdout)["assertion_results"]

    code, found = grade()
    assert code == 3 and not all(one["passed"] for one in found)
    monkeypatch.chdir(folder)
    solve(run)
    # The skill may be installed in the project it works on; what it brings along is nobody's doing.
    skill = folder / ".claude" / "skills" / "constitutional-ai"
    skill.mkdir(parents=True)
    (skill / "model.safetensors").write_bytes(b"")
    (skill / "x.run.json").write_text("{}")
    code, found = grade()
    assert code == 0, [one for one in found if not one["passed"]]
    unseen = set(range(len(found)))
    for place, (failing, *deed) in enumerate(WRONG[number]):
        spoilt = tmp_path / f"wrong-{place}"
        shutil.copytree(folder, spoilt)
        monkeypatch.chdir(spoilt)
        deed[0](*deed[1:])
        results = check.graded(check.tasks()[number], spoilt)["assertion_results"]
        assert {i for i, one in enumerate(results) if not one["passed"]} == failing, (deed, results)
        unseen -= failing
    assert not unseen, "no wrong deed shows that these assertions can fail"


def test_every_task_has_a_solution_and_wrong_deeds_here():
    assert len(SOLUTIONS) == len(EVALS["evals"])
    assert sorted(WRONG) == list(check.tasks())


# --- what the checker refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "files", "said"),
    [
        ("json", {"file": "a.json", "where": [{"path": "x.1", "test": "is", "value": 2}]}, {"a.json": "{"}, "not JSON"),
        (
            "json",
            {"file": "a.json", "where": [{"path": "x.1", "test": "is", "value": 2}]},
            {"a.json": '{"x": [2]}'},
            "no x.1",
        ),
        (
            "json",
            {"file": "a.json", "where": [{"path": "x", "test": "is", "value": 1}]},
            {"a.json": '{"x": true}'},
            "x is 'True'",
        ),
        (
            "json",
            {"file": "a.json", "where": [{"path": "x", "test": "type", "value": "str"}]},
            {"a.json": '{"x": " "}'},
            "expected type str",
        ),
        (
            "json",
            {"file": "a.json", "where": [{"path": "x", "test": "least", "value": 2}]},
            {"a.json": '{"x": 1.9}'},
            "expected least 2",
        ),
        (
            "json",
            {"file": "a.json", "where": [{"path": "x", "test": "most", "value": 2}]},
            {"a.json": '{"x": "1"}'},
            "expected most 2",
        ),
        ("json", {"file": "a.json", "where": []}, {"a.json": "[" * 100_000}, "not JSON"),
        ("rows", {"file": "a.jsonl", "count": [2, 2], "where": []}, {"a.jsonl": "{}\n"}, "has 1 rows"),
        (
            "rows",
            {"file": "a.jsonl", "count": [1, 2], "where": [{"path": "p", "test": "length", "value": 2}]},
            {"a.jsonl": '{"p": [1, 2]}\n{"p": [1]}\n'},
            "a.jsonl:2: p is",
        ),
        ("constitution", {"file": "a.yaml"}, {"a.yaml": "- &a x\n- *a\n"}, "alias"),
        ("constitution", {"file": "a.yaml", "least": 2}, {"a.yaml": "- Be kind\n"}, "1 principles"),
        ("constitution", {"file": "a.yaml", "ids": ["kind"]}, {"a.yaml": "- Be kind\n"}, "no principle kind"),
        ("constitution", {"file": "a.yaml", "clean": True}, {"a.yaml": "- Be kind\n- Be kind\n"}, "are the same"),
        ("text", {"file": "a.md", "all": ["one", "two"]}, {"a.md": "one"}, "'two'"),
        ("text", {"file": "a.md", "none": ["one"]}, {"a.md": "one"}, "has 'one'"),
        ("same", {"files": ["a", "b"], "paths": ["x"]}, {"a": '{"x": 1}', "b": '{"x": 2}'}, "x differs: 1, 2"),
        ("model", {"folder_name": "m"}, {"m/config.json": "{}"}, "no file m/tokenizer.json"),
        ("absent", {"glob": "**/*.run.json"}, {"out/x.run.json": "{}"}, "there is out/x.run.json"),
        ("unchanged", {"file": "mine.yaml"}, {"mine.yaml": "- Be kind\n"}, "mine.yaml was changed"),
        ("text", {"file": "none.md"}, {}, "no file none.md"),
    ],
)
def test_what_does_not_hold_is_named(kind, arguments, files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(check.NotMet) as caught:
        check.CHECKS[kind](tmp_path, **arguments)
    assert said in str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.md").write_text("one")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(check.NotMet, match="leads out"):
        check.check_text(folder, "a.md", all=["one"])


def test_a_folder_that_is_not_empty_or_not_there(tmp_path):
    (tmp_path / "x").write_text("")
    runner = CliRunner()
    result = runner.invoke(check.main, ["prepare", "--task", "2", "--folder", str(tmp_path)])
    assert result.exit_code == 2 and "not empty" in result.stderr
    result = runner.invoke(check.main, ["grade", "--task", "2", "--folder", str(tmp_path / "none")])
    assert result.exit_code == 2 and "no such folder" in result.stderr


def test_triggers_by_hand(tmp_path):
    queries = [
        {"query": "a", "should_trigger": True},
        {"query": "b", "should_trigger": True},
        {"query": "c", "should_trigger": False},
    ]
    found = check.triggered(
        queries,
        [{"query": "a", "triggered": True}, {"query": "b", "triggered": 0.25}, {"query": "c", "triggered": 0.5}],
    )
    assert found == {"should": 0.625, "should_not": 0.5, "wrong": ["b", "c"]}
    right = [{"query": one["query"], "triggered": one["should_trigger"]} for one in TRIGGERS]
    (tmp_path / "a.json").write_text(json.dumps(right))
    result = CliRunner().invoke(check.main, ["triggers", "--answers", str(tmp_path / "a.json")])
    assert result.exit_code == 0 and json.loads(result.stdout) == {"should": 1.0, "should_not": 0.0, "wrong": []}
    (tmp_path / "a.json").write_text(json.dumps(right[1:]))
    result = CliRunner().invoke(check.main, ["triggers", "--answers", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "no answer to" in result.stderr
    (tmp_path / "a.json").write_text("{")
    result = CliRunner().invoke(check.main, ["triggers", "--answers", str(tmp_path / "a.json")])
    assert result.exit_code == 2 and "not a list of answers" in result.stderr


def test_the_checker_runs_by_itself_and_executes_nothing(tmp_path):
    """Called as its docstring says; a folder full of files that would act if they were run."""
    folder = tmp_path / "work"
    shutil.copytree(FOLDER / "files", folder)
    (folder / "conftest.py").write_text("raise SystemExit('executed')")
    done = subprocess.run(
        [
            sys.executable,
            FOLDER / "check.py",
            "grade",
            "--task",
            "3",
            "--folder",
            folder,
            "--output",
            tmp_path / "grading.json",
        ],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "grading.json").read_text(encoding="utf-8"))
