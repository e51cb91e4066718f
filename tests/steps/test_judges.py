"""Judges at work, without a model: which judges there are, and how their outputs become one."""

import json

import pytest

from cai.base.errors import InputError
from cai.constitution.files import load_constitution
from cai.data.outputs import Output
from cai.data.readers import read_jsonl
from cai.steps import judges, judging, pairs
from cai.steps.principles import Chooser


def test_judges_and_their_servers():
    endpoints = ("http://a/v1", "http://b/v1")
    names = ["tiny", "openai:x", "openai:y@https://c/v1"]
    assert judges.read_judges(names, endpoints) == {"tiny": (), "openai:x": endpoints, "openai:y": ("https://c/v1",)}


@pytest.mark.parametrize(
    ("names", "endpoints", "error"),
    [
        ([], (), "no judge"),
        (["tiny", "tiny"], (), "twice"),
        (["tiny"], ("http://a/v1",), "no judge of the kind openai:NAME"),
        (["runs/no/such/model"], (), "no such model folder"),
    ],
)
def test_wrong_judges_are_refused(names, endpoints, error):
    with pytest.raises(InputError, match=error):
        judges.read_judges(names, endpoints)


@pytest.fixture
def task(tmp_path):
    rows = [
        {"id": f"c{n}", "prompt": f"Which is better, {n}?", "response_a": "Ask.", "response_b": f"Push {n}."}
        for n in range(4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparisons, digests = pairs.read_comparisons([str(path)], None, None, 0, None)
    return judges.Task(
        comparisons, None, Chooser(load_constitution("harmlessness"), "draw", 0), (0.0, 1.0), [str(path)], digests
    )


def judged(task, path, p_a: dict[str, float]):
    """A finished output of one judge, which failed for the comparisons that are not in `p_a`."""
    output = Output(path, command="judge", fingerprint=task.fingerprint)
    with output:
        for row in task.comparisons:
            if row["id"] in p_a:
                verdicts = [{"order": order, "p_a": p_a[row["id"]], "mass": 1.0} for order in ("ab", "ba")]
                output.write(judging.preference(row, "care", verdicts, p_a[row["id"]], task.limits))
        output.finish(task.comparisons.ids, {})
    return output


def test_each_comparison_is_decided_by_the_judges_that_could_be_asked(task, tmp_path):
    outputs = {
        "x": judged(task, tmp_path / "x.jsonl", {"c0": 0.9, "c1": 0.2}),
        "y": judged(task, tmp_path / "y.jsonl", {"c0": 0.5, "c3": 0.3}),
    }
    final = Output(tmp_path / "final.jsonl", command="judge", fingerprint={})
    judges.combine_judges(final, outputs, task, "mean")
    rows = {row["id"]: row for _, row in read_jsonl(tmp_path / "final.jsonl")}
    assert {name: (row["p_a"], row["judges"]) for name, row in rows.items()} == {
        "c0": (pytest.approx(0.7), {"x": 0.9, "y": 0.5}),
        "c1": (pytest.approx(0.2), {"x": 0.2, "y": None}),
        "c3": (pytest.approx(0.3), {"x": None, "y": 0.3}),
    }
    assert [verdict["judge"] for verdict in rows["c0"]["verdicts"]] == ["x", "x", "y", "y"]
    assert final.counts["failed"] == 1 and final.counts["pairs"] == 3
