"""revise.py: the second half of a round, and the loop of two rounds."""

import json
import re
import shlex
from collections import Counter

import models
import pytest

from cai.constitution.files import load_constitution
from cai.data.readers import read_jsonl
from cai.steps.flags import REASONS, flags


def row(n, **more):
    rounds = [{"principle": "property", "critique": f"Bad {n}."}]
    return {"id": f"r{n}", "prompt": f"How {n}?", "response": f"So {n}.", "rounds": rounds, **more}


@pytest.fixture
def revise(invoke, tmp_path):
    constitution = tmp_path / "rules.yaml"
    constitution.write_text("- id: property\n  principle: Respect property.\n")

    def call(rows, *more, output="out.jsonl"):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = invoke(
            "revise",
            "--input",
            source,
            "--output",
            tmp_path / output,
            "--model",
            models.folder("llama"),
            "--constitution",
            constitution,
            "--max-new-tokens",
            8,
            *more,
        )
        return result, [row for _, row in read_jsonl(tmp_path / output)] if result.exit_code == 0 else None

    return call


def test_the_round_is_completed_and_flagged(revise):
    result, rows = revise([row(n) for n in range(8)], "--json")
    counts = Counter()
    for n, after in enumerate(rows):
        (one,) = after["rounds"]
        assert {**after, "rounds": None} == {**row(n), "rounds": None}
        assert (one["principle"], one["critique"]) == ("property", f"Bad {n}.")
        assert one["flags"] in (flags(f"So {n}.", one["revision"], finish) for finish in ("stop", "length"))
        counts.update(one["flags"])
    summary = json.loads(result.stdout)
    assert summary["flags"] == {reason: counts[reason] for reason in REASONS}
    assert summary["flagged"] == sum(bool(row["rounds"][-1]["flags"]) for row in rows) > 0
    assert summary["next"].startswith("python scripts/critique.py --input ")
    assert summary["or"].startswith("python scripts/sft.py --input ")


def test_what_the_model_is_asked(revise, monkeypatch):
    from cai.models.local import LocalEngine

    asked = []
    generate = LocalEngine.generate

    def listening(self, requests, *others):
        requests = list(requests)
        asked.extend(request.conversation for request in requests)
        return generate(self, requests, *others)

    monkeypatch.setattr(LocalEngine, "generate", listening)
    done = {"principle": "gone", "critique": "c", "revision": "the REVISED one", "flags": ["copy"]}
    _, rows = revise([row(0, rounds=[done, {"principle": "property", "critique": "Still {{ bad }}."}])])
    (text,) = (messages[-1]["content"] for messages in asked)
    assert "the REVISED one" in text and "So 0." not in text and "Still {{ bad }}." in text
    assert "Respect property" in text
    assert rows[0]["rounds"][0] == done and set(rows[0]["rounds"][1]) == {*done}


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (row(1, rounds=[]), ":2: no critique that awaits its revision; expected rows of critique.py. Run critique.py"),
        (row(1, rounds=[{"principle": "property", "critique": "c", "revision": "r"}]), ":2: no critique that awaits"),
        (row(1, rounds=None), ":2: a row without 'rounds'"),
        (
            row(1, rounds=[{"principle": "harmony", "critique": "c"}]),
            ":2: no principle 'harmony' in the constitution rules; expected the constitution of the critique. Give the",
        ),
    ],
)
def test_rows_that_are_not_to_be_revised(revise, tmp_path, bad, part):
    result, _ = revise([row(0), bad])
    assert result.exit_code == 2 and part in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "rules.yaml"}


def test_two_rounds_from_prompts(invoke, tmp_path):
    (tmp_path / "0.txt").write_text("How?\nWhy?\n")
    common = ("--model", models.folder("llama"), "--max-new-tokens", 8)
    steps = ["generate", "critique", "revise", "critique", "revise"]
    names = ["0.txt", *(f"{n}.jsonl" for n in range(1, 6))]
    for step, source, output in zip(steps, names, names[1:], strict=False):
        result = invoke(step, "--input", tmp_path / source, "--output", tmp_path / output, *common)
        assert result.exit_code == 0, result.stderr
    constitution = load_constitution("harmlessness")
    rows = [row for _, row in read_jsonl(tmp_path / "5.jsonl")]
    assert len(rows) == 2
    for one in rows:
        assert [set(r) for r in one["rounds"]] == [{"principle", "critique", "revision", "flags"}] * 2
        first = constitution.draw(0, one["id"], 0).id
        assert [r["principle"] for r in one["rounds"]] == [first, constitution.draw(0, one["id"], 1, [first]).id]


def words_of(line):
    """{option: its values} of a line such as `next`, after the command's name."""
    found, name = {}, None
    for word in shlex.split(line)[2:]:
        name = word if word.startswith("--") else name
        found.setdefault(name, []).extend([] if word.startswith("--") else [word])
    return found


def test_the_next_lines_lead_through_two_rounds_with_the_settings_of_the_first(invoke, tmp_path):
    """Each is run as it is printed, except for the name of its output."""
    source = tmp_path / "0.jsonl"
    source.write_text("".join(json.dumps({"id": f"r{n}", "prompt": f"How {n}?"}) + "\n" for n in range(3)))
    settings = {"--max-new-tokens": "8", "--batch-size": "2", "--device": "cpu"}
    model = {"--model": str(models.folder("llama"))}
    line = {"--input": source, **model, **settings, "--temperature": "0.9"}
    round_ = {"--constitution": "privacy", "--temperature": "0.5", "--examples": "0"}
    critic = {"--principles": "match", "--unmatched": "keep", "--template": "critique_thorough"}
    typed = [{}, {**round_, **critic}, {"--template": "revise_direct"}, {}, {}]
    commands, lines = ["generate"], []
    for number, more in enumerate(typed, 1):
        line = {**line, **more, "--output": tmp_path / f"{number}.jsonl"}
        flat = [word for option, value in line.items() for word in (option, value)]
        result = invoke(commands[-1], *flat, "--json")
        assert result.exit_code == 0, result.output
        lines.append(json.loads(result.stdout))
        words = words_of(lines[-1]["next"])
        commands.append(re.search(r"scripts/(\w+)\.py", lines[-1]["next"])[1])
        line = {option: " ".join(values) for option, values in words.items()}
    assert commands == ["generate", "critique", "revise", "critique", "revise", "sft"]
    assert ["or" in each for each in lines] == [False, False, True, False, False]
    critique, revise, second, last = (words_of(each["next"]) for each in lines[:4])
    plain = {name: [value] for name, value in settings.items()}
    assert critique == {"--input": [str(tmp_path / "1.jsonl")], **to_lists(model), **plain, "--output": ["CRITIQUES"]}
    of_a_round = {**plain, **to_lists(model), **to_lists(round_)}
    assert revise == {"--input": [str(tmp_path / "2.jsonl")], **of_a_round, "--output": ["REVISIONS"]}
    matches = ["--matches", str(tmp_path / "2.matches.jsonl")]
    expected = {**of_a_round, **to_lists(critic), matches[0]: matches[1:]}
    assert second == {"--input": [str(tmp_path / "3.jsonl")], **expected, "--output": ["CRITIQUES"]}
    own = {"--template": ["revise_direct"]}
    assert last == {"--input": [str(tmp_path / "4.jsonl")], **of_a_round, **own, "--output": ["REVISIONS"]}


def to_lists(options):
    return {name: [value] for name, value in options.items()}


@pytest.mark.parametrize("manifest", ["rubbish", '{"fingerprint": {}, "round_options": [1]}'])
def test_a_manifest_that_tells_nothing_of_the_round_is_passed_over(revise, tmp_path, manifest):
    (tmp_path / "in.jsonl.run.json").write_text(manifest)
    result, _ = revise([row(0)], "--json")
    assert result.exit_code == 0 and "--principles" not in json.loads(result.stdout)["next"]
