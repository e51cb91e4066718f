"""Rows followed back through manifests: samples, failures, pairs, bad rows, and chains that are broken."""

import json
from pathlib import Path

import click
import pytest

from cai.base.errors import InputError
from cai.base.hashing import sha256_file
from cai.data import lineage
from cai.data.outputs import Output, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.reading import Reading
from cai.data.sources import Source

QUESTIONS = Reading(prompt_field="question", skip_invalid=True)
ANSWERED = ("prompt", "response")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_step(command, source, output, rows, **info):
    """An output with the manifest that the command writes; `source` gives a `Source`."""
    with click.Context(click.Command(command)).scope():
        digest = source().digest
        with Output(output, command=command, fingerprint={"input": digest, "samples": 2}) as journal:
            for row in rows:
                journal.write(row)
            journal.finish([row["id"] for row in rows], {}, **info)


def sample(source):
    """Two responses to each prompt, with ids as generate.py makes them."""
    return [
        {**row, "id": f"{row['id']}/{n}", "prompt_id": row["id"], "response": f"So {n}."}
        for row in source
        for n in range(2)
    ]


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def outcomes(traced):
    return [(entry.file, entry.line, entry.id, entry.step, entry.outcome) for entry in traced.entries]


def write_samples(output="run/1.jsonl", keep=lambda row: True, **info):
    """The samples of three prompts with the ids a, b and c; there is an empty prompt between a and b."""
    Path("p.csv").write_text("id,question\na,One?\nx,\nb,Two?\nc,Three?\n")
    rows = [row for row in sample(Source(["p.csv"], reading=QUESTIONS)) if keep(row)]
    write_step("generate", lambda: Source(["p.csv"], reading=QUESTIONS), output, rows, **info)
    return rows


def test_every_sample_has_a_line_and_every_lost_row_the_step_that_lost_it():
    rows = write_samples(keep=lambda row: row["id"] not in ("a/1", "b/0"), failed_rows={"b/0": "no answer"})
    kept = [row for row in rows if row["id"] != "c/0"]
    write_step("critique", lambda: Source(["run/1.jsonl"], require=ANSWERED), "run/2.jsonl", kept,
               failed_rows={"c/0": "too long"})  # fmt: skip
    traced = lineage.trace(Source(["run/2.jsonl"]), "export")
    assert traced.origins == ["p.csv"] and not traced.notes
    assert outcomes(traced) == [
        ("p.csv", 2, "a/0", None, None),
        ("p.csv", 2, "a/1", "generate", "left_out"),
        ("p.csv", 3, None, "generate", "invalid"),
        ("p.csv", 4, "b/0", "generate", "failed"),
        ("p.csv", 4, "b/1", None, None),
        ("p.csv", 5, "c/0", "critique", "failed"),
        ("p.csv", 5, "c/1", None, None),
    ]
    reasons = {entry.id: entry.reason for entry in traced.entries}
    assert (reasons["b/0"], reasons["c/0"]) == ("no answer", "too long")
    assert reasons[None].startswith("the prompt is empty") and reasons["a/1"].startswith("not in run/1.jsonl")
    assert {row_id: [entry.line for entry in entries] for row_id, entries in traced.by_id.items()} == {
        "a/0": [2],
        "b/1": [4],
        "c/1": [5],
    }


def test_the_folder_may_be_moved_and_called_from_elsewhere(monkeypatch):
    write_samples()
    Path("moved").mkdir()
    for name in ("p.csv", "run"):
        Path(name).rename(Path("moved") / name)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    traced = lineage.trace(Source(["../moved/run/1.jsonl"]), "export")
    assert traced.origins == ["../moved/p.csv"] and len(traced.entries) == 7


def test_pairs_name_the_rows_of_both_samples():
    """Three samples of one prompt in two pairs, a row of two files in one, a sample in none, a pair that failed."""
    answers = [{"id": name, "prompt": "Q?", "response": name} for name in ("a", "b", "c vs d")]
    write_jsonl("r.jsonl", [*answers, {"id": "e", "prompt": "Alone?", "response": "e"}])
    pairs = [{"id": name, "prompt": "Q?", "chosen": "x", "rejected": "y"} for name in ("a vs b", "a vs c vs d")]
    write_step("judge", lambda: Source(["r.jsonl"], require=ANSWERED), "j.jsonl", pairs,
               failed_rows={"b vs c vs d": "no answer"})  # fmt: skip
    traced = lineage.trace(Source(["j.jsonl"]), "export")
    assert outcomes(traced) == [
        ("r.jsonl", 1, "a vs b", None, None),
        ("r.jsonl", 1, "a vs c vs d", None, None),
        ("r.jsonl", 2, "a vs b", None, None),
        ("r.jsonl", 2, "b vs c vs d", "judge", "failed"),
        ("r.jsonl", 3, "a vs c vs d", None, None),
        ("r.jsonl", 3, "b vs c vs d", "judge", "failed"),
        ("r.jsonl", 4, "e", "judge", "left_out"),
    ]
    write_samples()
    rows = [{"id": f"{name}/0 vs {name}/1", "prompt": "Q?", "chosen": "x", "rejected": "y"} for name in "abc"]
    write_step("judge", lambda: Source(["run/1.jsonl"], require=ANSWERED), "k.jsonl", rows)
    traced = lineage.trace(Source(["k.jsonl"]), "export")
    assert [(entry.line, entry.id) for entry in traced.entries] == [
        (2, "a/0 vs a/1"), (3, None), (4, "b/0 vs b/1"), (5, "c/0 vs c/1")
    ]  # fmt: skip


def test_two_outputs_of_one_file_and_a_limit():
    write_samples("run/1.jsonl")
    write_samples("run/2.jsonl")
    traced = lineage.trace(Source(["run/1.jsonl", "run/2.jsonl"], limit=7), "export")
    assert len(traced.entries) == 13 and [entry.id for entry in traced.entries].count(None) == 1
    beyond = [entry.id for entry in traced.entries if entry.reason == "beyond --limit 7"]
    assert sorted(beyond) == ["a/1", "b/0", "b/1", "c/0", "c/1"] and "a/0-2" in traced.by_id


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda manifest: Path("p.csv").write_text("id,question\na,Other?\n"), "changed since generate.py read it"),
        (lambda manifest: Path("p.csv").unlink(), "p.csv is no file, or was moved"),
        (lambda manifest: manifest.pop("inputs"), "its manifest does not name its inputs"),
        (lambda manifest: manifest.update(inputs=[{"files": ["p.csv"]}]), "its manifest does not name its inputs"),
        (
            lambda manifest: manifest["inputs"][0].update(files={"1.jsonl": sha256_file("run/1.jsonl")}),
            "it is its own input",
        ),
        (lambda manifest: manifest["inputs"][0].update(reading={"no_such": 1}), "its manifest does not name"),
    ],
)
def test_where_the_chain_is_broken_it_begins_again(spoil, note):
    write_samples()
    path = Path("run/1.jsonl.run.json")
    manifest = json.loads(path.read_text())
    spoil(manifest)
    path.write_text(json.dumps(manifest))
    traced = lineage.trace(Source(["run/1.jsonl"]), "export")
    assert traced.origins == ["run/1.jsonl"] and len(traced.entries) == 6
    assert [entry.line for entry in traced.entries] == [1, 2, 3, 4, 5, 6]
    assert len(traced.notes) == 1 and note in traced.notes[0] and traced.notes[0].startswith("run/1.jsonl: ")


def test_a_row_that_two_models_could_not_answer_is_listed_for_each():
    for output in ("run/1.jsonl", "run/2.jsonl"):
        write_samples(output, keep=lambda row: row["id"] != "a/0", failed_rows={"a/0": "too long"})
    traced = lineage.trace(Source(["run/1.jsonl", "run/2.jsonl"]), "export")
    assert [entry.id for entry in traced.entries if entry.outcome == "failed"] == ["a/0", "a/0"]


def test_a_row_that_was_added_to_an_output_begins_there():
    rows = write_samples()
    write_jsonl("run/1.jsonl", [*rows, {"id": "new", "prompt": "Four?", "response": "4"}])
    traced = lineage.trace(Source(["run/1.jsonl"]), "export")
    assert ("run/1.jsonl", 7, "new", None, None) in outcomes(traced) and len(traced.entries) == 8


def test_a_row_that_a_command_itself_refused_is_invalid():
    write_jsonl("r.jsonl", [{"id": name, "prompt": "Q?", "response": name} for name in "ab"])
    skipped = ["data/r.jsonl:2: round 1 has a critique and no revision"]
    write_step("critique", lambda: Source(["r.jsonl"], require=ANSWERED), "c.jsonl", rows_of("r.jsonl")[:1],
               skipped_rows=skipped)  # fmt: skip
    traced = lineage.trace(Source(["c.jsonl"]), "export")
    assert outcomes(traced)[1] == ("r.jsonl", 2, "b", "critique", "invalid")
    assert traced.entries[1].reason == "round 1 has a critique and no revision"


def test_a_damaged_manifest_is_refused():
    write_samples()
    Path("run/1.jsonl.run.json").write_text("{")
    with pytest.raises(InputError, match="not a manifest"):
        lineage.trace(Source(["run/1.jsonl"]), "export")
