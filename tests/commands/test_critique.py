"""critique.py: the first half of a round."""

import json

import models
import pytest

from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl


def row(n, **more):
    return {"id": f"r{n}", "prompt": f"How {n}?", "response": f"So {n}.", "kind": "harmful", **more}


@pytest.fixture
def critique(invoke, tmp_path):
    def call(rows, *more, output="out.jsonl"):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = invoke(
            "critique",
            "--input",
            source,
            "--output",
            tmp_path / output,
            "--model",
            models.folder("llama"),
            "--max-new-tokens",
            8,
            *more,
        )
        return result, [row for _, row in read_jsonl(tmp_path / output)] if result.exit_code == 0 else None

    return call


def test_a_round_is_begun_with_the_drawn_principle(critique):
    result, rows = critique([row(n) for n in range(8)], "--json")
    constitution = load_constitution("harmlessness")
    for before, after in zip([row(n) for n in range(8)], rows, strict=True):
        (one,) = after.pop("rounds")
        assert after == before
        assert set(one) == {"principle", "critique"} and isinstance(one["critique"], str)
        assert one["principle"] == constitution.draw(0, before["id"], 0).id
    assert json.loads(result.stdout)["rows"] == 8
    assert json.loads(result.stdout)["next"].startswith("python scripts/revise.py --input ")


def test_the_principle_depends_on_seed_and_round(critique):
    done = {"principle": "x", "critique": "c", "revision": "r"}
    names = {}
    for name, rows, seed in [
        ("first", [row(n) for n in range(20)], 0),
        ("seed", [row(n) for n in range(20)], 1),
        ("second", [row(n, rounds=[done]) for n in range(20)], 0),
    ]:
        _, made = critique(rows, "--seed", seed, "--max-new-tokens", 1, output=f"{name}.jsonl")
        names[name] = [row["rounds"][-1]["principle"] for row in made]
        assert [row["rounds"][:-1] for row in made] == [row.get("rounds", []) for row in rows]
    assert names["first"] != names["seed"] and names["first"] != names["second"]


def test_what_the_model_is_asked(critique, monkeypatch):
    """The last revision and not the first response, through the template that was named."""
    from cai.models.local import LocalEngine

    asked = []
    generate = LocalEngine.generate

    def listening(self, requests, *others):
        requests = list(requests)
        asked.extend(request.conversation for request in requests)
        return generate(self, requests, *others)

    monkeypatch.setattr(LocalEngine, "generate", listening)
    done = {"principle": "x", "critique": "c", "revision": "the REVISED one {{ 7 * 7 }}"}
    critique([row(0, rounds=[done])])
    critique([row(0, rounds=[done])], "--cot", output="cot.jsonl")
    plain, cot = (messages[-1]["content"] for messages in asked)
    assert "the REVISED one {{ 7 * 7 }}" in plain and "So 0." not in plain and "How 0?" in plain
    principle = load_constitution("harmlessness").draw(0, "r0", 1)
    assert principle.critique in plain and principle.critique in cot and plain != cot


def test_options_that_exclude_each_other(critique):
    result, _ = critique([row(0)], "--cot", "--template", "critique")
    assert result.exit_code == 2 and "not both" in result.stderr


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (
            row(1, rounds=[{"principle": "x", "critique": "c"}]),
            ":2: round 1 has a critique and no revision; expected rows whose rounds are complete. Run revise.py",
        ),
        (row(1, response=None), ":2: a row without 'response'"),
        (row(1, response=["x"]), ":2: 'response' is a list"),
        (row(1, rounds="x"), ":2: `rounds` is 'x'"),
    ],
)
def test_rows_that_are_not_to_be_critiqued(critique, tmp_path, bad, part):
    result, _ = critique([row(0), bad])
    assert result.exit_code == 2 and part in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_another_constitution_or_template_is_another_run(critique, tmp_path):
    critique([row(0)])
    result, _ = critique([row(0)], "--constitution", "property-only")
    assert result.exit_code == 2 and "constitution was" in result.stderr
    result, _ = critique([row(0)], "--cot")
    assert result.exit_code == 2 and "template was" in result.stderr and "constitution was" not in result.stderr
    result, rows = critique([row(0)], "--constitution", "property-only", "--overwrite", "--json")
    assert rows[0]["rounds"][0]["principle"] in load_constitution("property-only")
    assert "--constitution property-only" in json.loads(result.stdout)["next"]
    assert read_manifest(tmp_path / "out.jsonl")["fingerprint"]["constitution"]
