"""The signs of life, on rows made by hand, and on checkpoints that are whole, wrong or missing."""

import json

import models
import pytest

from cai.data.outputs import write_jsonl
from cai.evaluate import smoke
from cai.models import loading


def row(n, **more):
    return {"id": f"r{n}", "prompt": f"How do I open gate {n}?", "response": f"Lift the iron bar {n}.", **more}


def turn(n, critique="It tells of the iron bar.", revision="Ask the owner.", flags=()):
    one = {"principle": "p", "critique": f"{critique} {n}"}
    if revision is not None:
        one |= {"revision": revision and f"{revision} {n}", "flags": list(flags)}
    return row(n, rounds=[one])


def verdicts(p_ab, p_ba, mass=0.9):
    """Of one pair: P(first letter) in each order."""
    return {"verdicts": [{"order": "ab", "p_a": p_ab, "mass": mass}, {"order": "ba", "p_a": 1 - p_ba, "mass": mass}]}


def seen(command, rows, tmp_path):
    """{name: alive} of a step's rows."""
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return {sign.name: sign.alive for sign in smoke.look([(command, str(tmp_path / "rows.jsonl"))])}


@pytest.mark.parametrize(
    ("command", "rows", "expected"),
    [
        ("generate", [row(1), row(2)], {"responses": True}),
        ("generate", [row(1, response="No."), row(2, response="No.")], {"responses": False}),
        ("generate", [row(1), row(2, response=" "), row(3, response="")], {"responses": False}),
        (
            "critique",
            [turn(1, revision=None), turn(2, revision=None)],
            {"critiques": True, "critiques name something": True},
        ),
        (
            "critique",
            [turn(n, "What would they have about that", None) for n in (1, 2)],
            {"critiques": True, "critiques name something": False},
        ),
        ("revise", [turn(1), turn(2)], {"revisions differ": True, "revisions in form": True}),
        (
            "revise",
            [turn(n, revision="Lift the iron bar", flags=["copy"]) for n in (1, 2)],
            {"revisions differ": True, "revisions in form": True},
        ),
        (
            "revise",
            [turn(1, flags=["preamble"]), turn(2, flags=["unfinished", "preamble"]), turn(3)],
            {"revisions differ": True, "revisions in form": False},
        ),
        (
            "revise",
            [
                row(n, rounds=[{"critique": "c", "revision": f"Lift the  iron bar {n}.", "flags": ["copy"]}])
                for n in (1, 2)
            ],
            {"revisions differ": False, "revisions in form": True},
        ),
        (
            "revise",  # refused by the gate: what the model wrote counts; and a round that was skipped
            [
                *(
                    row(n, rounds=[{"critique": "c", "revision": "So.", "flags": ["gate"], "refused": f"No {n}."}])
                    for n in (1, 2)
                ),
                row(3, rounds=[{"principle": "harm", "critique": "No fault.", "skipped": "content"}]),
            ],
            {"revisions differ": True, "revisions in form": True},
        ),
        (
            "revise",
            [row(n, rounds=[{"critique": "c", "revision": "No.", "flags": []}]) for n in (1, 2)],
            {"revisions differ": False, "revisions in form": True},
        ),
        # A both times, whatever stands there; then the same response both times.
        ("judge", [verdicts(0.9, 0.8)], {"judge not stuck on a letter": False, "labels expected": True}),
        ("judge", [verdicts(0.9, 0.2)], {"judge not stuck on a letter": True, "labels expected": True}),
        ("judge", [verdicts(0.9, 0.2, 0.01)], {"judge not stuck on a letter": True, "labels expected": False}),
        ("judge", [], {"rows": False}),
    ],
)
def test_rows(command, rows, expected, tmp_path):
    assert seen(command, rows, tmp_path) == expected


def logged(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_losses(tmp_path):
    assert smoke.losses(logged(tmp_path / "a", {"step": 1, "loss": 2.5}))[1:] == (True, "1 of them, the last 2.5")
    for broken in ({"step": 1, "loss": float("nan")}, {"step": 1, "loss": 1.0, "grad_norm": float("inf")}):
        _, alive, what = smoke.losses(logged(tmp_path / "b", {"step": 0, "loss": 1.0}, broken))
        assert not alive and what.startswith("not finite: ")
    assert not smoke.losses(logged(tmp_path / "c", {"step": 1}))[1]
    assert not smoke.losses(tmp_path / "none")[1]


def test_checkpoints(tmp_path):
    whole = logged(models.copy("llama", tmp_path / "whole"), {"step": 1, "loss": 1.0})
    signs = smoke.look([("sft", str(whole)), ("run", "nothing is known of it")], "cpu")
    assert [(sign.step, sign.alive) for sign in signs] == [("sft", True)] * 2
    (whole / "model.safetensors").write_bytes(b"torn")
    _, alive, what = smoke.speaks(whole, "cpu")
    assert not alive and "can't be loaded" in what


def test_reward_models(tmp_path):
    import torch

    folder = models.copy("llama", tmp_path / "rm")
    torch.manual_seed(0)
    loading.load_reward_model(str(folder), "cpu").save_pretrained(folder)
    _, alive, what = smoke.scores(folder, "cpu")
    assert alive, what
    model = loading.load_reward_model(str(folder), "cpu")
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(folder)
    assert smoke.scores(folder, "cpu")[1:] == (False, "scores 0 and 0")
