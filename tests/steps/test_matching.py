"""The file of matches: what is asked, in which order it is taken, added to, resumed and refused."""

import json

import models
import pytest

from cai.base.errors import InputError
from cai.constitution.files import Constitution, Principle
from cai.constitution.templates import load_template
from cai.data.outputs import read_manifest
from cai.data.processes import Team
from cai.data.readers import read_jsonl
from cai.models import choice
from cai.models.loading import load_engine
from cai.steps.matching import Matches, cover, key_of


def constitution(*names) -> Constitution:
    return Constitution(
        "rules", "", "".join(names), tuple(Principle(name, f"Look for {name}.", "r", "q") for name in names)
    )


RULES = constitution("theft", "lies", "noise")


def rows(*numbers):
    return [{"id": f"r{n}", "prompt": f"How do I open gate {n}?"} for n in numbers]


def load():
    return load_engine(str(models.folder("llama")), device="cpu", batch_size=2)


@pytest.fixture
def matches(tmp_path):
    return lambda rules=RULES, **more: Matches(str(tmp_path / "m.jsonl"), str(models.folder("llama")), rules, **more)


def refuse_to_load():
    raise AssertionError("nothing is left to ask")


def test_the_probability_is_the_mean_of_both_orders():
    [covered] = cover(load(), rows(7), RULES)
    template, engine = load_template("coverage"), load()
    for principle in RULES.principles:
        questions = [
            template.render(principle=principle, prompt=rows(7)[0]["prompt"], order=o) for o in ((0, 1), (1, 0))
        ]
        plain, swapped = (choice.probabilities(p) for p in models.score(engine, questions, ["A", "B"]))
        assert covered["by"][principle.id] == pytest.approx((plain[0] + swapped[1]) / 2, abs=2e-4)
    assert list(covered["by"].values()) == sorted(covered["by"].values(), reverse=True)
    assert 0 <= covered["same_letter"] <= 1 and 0 < covered["label_mass"] < 1


def test_each_prompt_is_asked_about_once_and_new_ones_are_added(matches, tmp_path):
    first = matches()
    assert first.best("x") is None and first.count_calls(rows(0, 1, 1)) == 2 * 3 * 2
    first.fill(Team(), load, [*rows(0, 1), {"id": "again", "prompt": "How do I open gate 0?"}])
    before = list(read_jsonl(tmp_path / "m.jsonl"))
    assert [row["id"] for _, row in before] == [key_of(row["prompt"]) for row in rows(0, 1)]
    matches().fill(Team(), refuse_to_load, rows(1, 0))
    more = matches()
    assert more.count_calls(rows(0, 1, 2)) == 2 * 3
    more.fill(Team(), load, rows(2, 0))
    after = [row for _, row in read_jsonl(tmp_path / "m.jsonl")]
    assert {row["prompt"] for row in after} == {row["prompt"] for row in rows(0, 1, 2)}
    assert all(row in after for _, row in before)
    assert read_manifest(tmp_path / "m.jsonl")["counts"]["prompts"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl", "m.jsonl.run.json"]


def test_the_best_is_the_likeliest_that_is_not_used(matches, tmp_path):
    matches().fill(Team(), load, rows(*range(8)))
    answered = matches()
    answered.fill(Team(), refuse_to_load, rows(*range(8)))
    for _, row in read_jsonl(tmp_path / "m.jsonl"):
        speaking = [(name, p) for name, p in row["by"].items() if p >= 0.5]
        assert answered.best(row["prompt"]) == (speaking[0] if speaking else None)
        assert answered.best(row["prompt"], [name for name, _ in speaking[:1]]) == (speaking[1:] or [None])[0]
        assert answered.best(row["prompt"], ["theft", "lies", "noise"]) is None


def test_a_stopped_run_asks_about_the_rest(matches, tmp_path, monkeypatch):
    matches().fill(Team(), load, rows(*range(3)))
    whole = (tmp_path / "m.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "m.jsonl.partial").write_bytes(lines[0] + lines[1][:30])
    (tmp_path / "m.jsonl").unlink()
    manifest = read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl.run.json").write_text(json.dumps({**manifest, "status": "running"}))
    asked = []

    def watch():
        engine = load()
        score = engine.score

        def record(requests, labels):
            listed = list(requests)
            asked.extend(listed)
            return score(listed, labels)

        monkeypatch.setattr(engine, "score", record)
        return engine

    matches().fill(Team(), watch, rows(*range(3)))
    assert len(asked) == 2 * 2 * 3 and (tmp_path / "m.jsonl").read_bytes() == whole


def test_a_killed_extension_loses_nothing(matches, tmp_path):
    matches().fill(Team(), load, rows(0, 1))

    def stop():
        engine = load()
        engine.score = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        return engine

    from cai.models.loading import release_engines

    with pytest.raises(KeyboardInterrupt):
        matches().fill(Team(), stop, rows(0, 1, 2))
    release_engines()
    assert read_manifest(tmp_path / "m.jsonl")["status"] == "running"
    resumed = matches()
    resumed.fill(Team(), load, rows(0, 1, 2))
    assert len(list(read_jsonl(tmp_path / "m.jsonl"))) == 3


def test_matches_of_another_constitution_are_refused_or_replaced(matches, tmp_path):
    matches().fill(Team(), load, rows(0))
    other = constitution("theft", "lies")
    with pytest.raises(InputError, match="constitution was"):
        matches(other)
    replaced = matches(other, overwrite=True)
    replaced.fill(Team(), load, rows(0))
    [(_, row)] = read_jsonl(tmp_path / "m.jsonl")
    assert set(row["by"]) == {"theft", "lies"}
    kept = matches(other, overwrite=True)  # as it is valid, --overwrite of the command keeps it
    kept.fill(Team(), refuse_to_load, rows(0))


def test_a_damaged_file_is_named(matches, tmp_path):
    matches().fill(Team(), load, rows(0))
    (tmp_path / "m.jsonl").write_text('{"id": "x", "by": ["theft"]}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:1: `by` is .* Delete the file and its manifest"):
        matches().fill(Team(), refuse_to_load, rows(0))


def test_a_prompt_that_is_not_answered_is_named_and_not_kept(matches, tmp_path, capsys):
    long = {"id": "long", "prompt": "word " * 3000}
    matches().fill(Team(), load, [*rows(0), long])
    assert [row["prompt"] for _, row in read_jsonl(tmp_path / "m.jsonl")] == ["How do I open gate 0?"]
    assert read_manifest(tmp_path / "m.jsonl")["counts"]["unanswered"] == 1
    assert "no principle is known to speak to 1 prompts" in capsys.readouterr().err
