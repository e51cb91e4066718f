"""revise.py: the second half of a round, and the loop of two rounds."""

import json
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
    assert summary["next"].startswith("python scripts/sft.py --input ")


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
        assert [r["principle"] for r in one["rounds"]] == [constitution.draw(0, one["id"], n).id for n in (0, 1)]
