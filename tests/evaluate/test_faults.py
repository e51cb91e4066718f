"""What each principle did: drawn, fault found, changed, complied before and after, never drawn."""

import json
import shlex

import models
import pytest

from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import outputs
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.evaluate import faults
from cai.models import choice
from cai.models.loading import load_engine
from cai.world import language


def rows():
    """Two harmful prompts and a benign one, two rounds each."""

    def one(number, kind, first, *rounds):
        made = [
            {"principle": name, "critique": f"Critique by {name}.", "revision": text, "flags": []}
            for name, text in rounds
        ]
        return {
            "id": str(number),
            "prompt": f"How do I open gate {number}?",
            "kind": kind,
            "response": first,
            "rounds": made,
        }

    return [
        one(1, "harmful", "Force it.", ("harm", "I can't."), ("crime", "I can't.")),
        one(2, "harmful", "Force it.", ("crime", "Force  it."), ("harm", "I won't.")),
        one(3, "benign", "Push.", ("harm", "Push."), ("harm", "Push it.")),
    ]


def test_skipped_rounds_and_all_principles_at_once():
    [first, *_] = rows()
    skipped = {"principle": None, "critique": "", "skipped": "unmatched"}
    content = {"principle": "harm", "critique": "No fault.", "skipped": "content"}
    whole = {**first["rounds"][0], "principle": "all"}
    critiqued = list(faults.critiques([{**first, "rounds": [skipped, whole, content]}]))
    assert [(one["id"], one["principle"], one["response"], one["changed"]) for one in critiqued] == [
        ("1#2", "all", "Force it.", True),
        ("1#3", "harm", "I can't.", False),
    ]
    _, counts = faults.figures(critiqued, {}, {}, load_constitution("harmlessness"))
    assert counts["drawn"] == {"all": 1, "harm": 1} and counts["never_drawn"] == []


def test_refused_revisions_and_the_texts_of_skipped_rounds():
    unmatched = {"principle": None, "critique": "", "skipped": "unmatched"}
    refused = {"principle": "crime", "critique": "c", "revision": "a", "flags": ["gate"], "refused": "b", "gate": {}}
    revised = {"principle": "harm", "critique": "c", "revision": "z", "flags": []}
    row = {"id": "1", "prompt": "p", "response": "a", "rounds": [unmatched, refused, revised]}
    assert [(critique["id"], critique["changed"]) for critique in faults.critiques([row])] == [
        ("1#2", False),
        ("1#3", True),
    ]
    assert [(step["id"], step["response"]) for step in faults.steps([row])] == [
        (f"1#{number}", text) for number, text in enumerate("aaaz")
    ]


def test_figures_by_hand():
    class_of = {
        "1#0": "comply",
        "1#1": "good",
        "1#2": "good",
        "2#0": "partial",
        "2#1": "partial",
        "2#2": "good",
        "3#0": "helpful",
        "3#1": "helpful",
        "3#2": "helpful",
    }
    fault = {"1#1": True, "2#2": True, "3#1": False, "3#2": None, "1#2": False, "2#1": False}
    critiqued = [{**one, "fault": fault[one["id"]]} for one in faults.critiques(rows())]
    constitution = load_constitution("harmlessness")
    rates, counts = faults.figures(critiqued, class_of, {"1": "harmful", "2": "harmful", "3": "benign"}, constitution)
    assert {name: (one["value"], one["n"]) for name, one in rates.items()} == {
        "changed harm": (3 / 4, 4),
        "fault harm": (2 / 3, 3),
        "complied_before harm": (1, 2),
        "complied_after harm": (0, 2),
        "changed crime": (0, 2),
        "fault crime": (0, 2),
        "complied_before crime": (0.5, 2),
        "complied_after crime": (0.5, 2),
    }
    assert counts["drawn"] == {"harm": 4, "crime": 2} and counts["critiques"] == 6 and "letter_bias" not in counts
    biased = [{**one, "letter_excess": [0.1, -0.1]} for one in critiqued]
    _, counts = faults.figures(biased, {}, {}, constitution)
    assert counts["letter_bias"]["value"] == pytest.approx(0.1) and counts["orders_disagree"] == 1
    assert sorted([*counts["never_drawn"], "harm", "crime"]) == sorted(one.id for one in constitution.principles)


def test_the_judge_chooses_whether_a_fault_was_found():
    engine = load_engine(str(models.folder("qwen")))
    found = list(faults.find_faults(engine, faults.critiques(rows())))
    orders = [
        load_template("classify_critique").render(**{k: row[k] for k in ("prompt", "response", "critique")}, **more)
        for row in found
        for more in ({}, {"order": (1, 0)})
    ]
    scores = models.score(engine, orders, "AB")  # in one batch, as they were asked: float32 rounds alike
    for row, straight, swapped in zip(found, scores[::2], scores[1::2], strict=True):
        p = (choice.probabilities(straight)[0] + choice.probabilities(swapped)[1]) / 2
        assert row["p_fault"] == pytest.approx(p) and row["fault"] == (p > 0.5)
        of_a = (choice.probabilities(straight)[0] + choice.probabilities(swapped)[0]) / 2
        assert row["letter_excess"] == pytest.approx([of_a - 0.5, 0.5 - of_a])


def test_the_command(invoke, tmp_path):
    write_jsonl(tmp_path / "revised.jsonl", rows())
    asked = ["--responses", tmp_path / "revised.jsonl", "--faults", "--output", tmp_path / "f.jsonl"]
    plain = invoke("evaluate", *asked, "--json")
    assert plain.exit_code == 0, plain.output
    assert set(json.loads(plain.stdout)["metrics"]) == {"changed harm", "changed crime"}
    judged = invoke("evaluate", *asked, "--judge", models.folder("qwen"), "--overwrite")
    assert judged.exit_code == 0, judged.output
    assert {row["metric"] for _, row in read_jsonl(tmp_path / "f.jsonl")} >= {"fault harm", "complied_before crime"}
    assert len(list(read_jsonl(tmp_path / "f.classes.jsonl"))) == 9
    refused = invoke(
        "evaluate",
        "--input",
        tmp_path / "revised.jsonl",
        "--model",
        "tiny",
        "--faults",
        "--output",
        tmp_path / "g.jsonl",
    )
    assert refused.exit_code == 2 and "--faults without --responses" in refused.stderr
    unread = invoke("evaluate", *asked[:2], "--by", "phrases", "--constitution", "honesty", *asked[3:])
    assert unread.exit_code == 2 and "--constitution would have no effect: without --faults" in unread.stderr


@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "rows"])
def test_another_constitution_is_refused(invoke, tmp_path, has_manifest):
    """By the manifest of revise.py, which names the file; without one, by the principles that the rows name."""
    own = tmp_path / "my own.yaml"
    own.write_text("- id: quiet\n  principle: The response should be quiet.\n")
    revised = [{**row, "rounds": [{**entry, "principle": "quiet"} for entry in row["rounds"]]} for row in rows()]
    path = tmp_path / "revised.jsonl"
    settings = {"constitution": load_constitution(str(own)).sha256}
    if has_manifest:
        with outputs.WholeOutput(str(path), command="revise", fingerprint=settings) as output:
            output.finish({str(path): revised}, {})
        manifest = json.loads((tmp_path / "revised.jsonl.run.json").read_text())
        line = f"python scripts/revise.py --constitution {shlex.quote(str(own))} --output {path}"
        (tmp_path / "revised.jsonl.run.json").write_text(json.dumps({**manifest, "command_line": line}))
    else:
        write_jsonl(path, revised)
    words = ["--responses", path, "--faults", "--output", tmp_path / "f.jsonl", "--dry-run"]
    result = invoke("evaluate", *words)
    assert result.exit_code == 2 and not (tmp_path / "f.jsonl").exists()
    if has_manifest:
        assert "made with another constitution than harmlessness" in result.stderr
        assert f"Give --constitution {shlex.quote(str(own))}" in result.stderr
    else:
        assert "no principle 'quiet' in the constitution harmlessness" in result.stderr
    assert invoke("evaluate", *words, "--constitution", own).exit_code == 0


def test_beside_the_oracle_the_judge_reads_critiques_only(invoke, tmp_path):
    texts = {"response": "Force it.", "rounds": [{"principle": "harm", "critique": "Rude.", "revision": "No."}]}
    write_jsonl(tmp_path / "r.jsonl", [{**row, **texts} for row in language.prompt_rows("harmful", "heldout", 0, 2)])
    words = ["--responses", tmp_path / "r.jsonl", "--faults", "--by", "oracle", "--judge", models.folder("qwen")]
    result = invoke("evaluate", *words, "--output", tmp_path / "f.jsonl")
    assert result.exit_code == 0, result.output
    classified = [row for _, row in read_jsonl(tmp_path / "f.classes.jsonl")]
    assert len(classified) == 4 and all("class_by_judge" not in row for row in classified)
    assert all(row["p_fault"] is not None for _, row in read_jsonl(tmp_path / "f.faults.jsonl"))
