"""judge.py --verdicts: verdicts of others matched to the pairs, combined, audited; bad files are refused."""

import json
import random

import pytest

from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.stats import agreement


def pairs(n=120):
    rng = random.Random(1)
    return [
        {
            "id": f"g{i}",
            "prompt": f"How {i}?",
            "response_a": f"So {i}.",
            "response_b": f"Not so {i}.",
            "gold": rng.choice("ab"),
        }
        for i in range(n)
    ]


def right(pair, rng, accuracy):
    return pair["gold"] if rng.random() < accuracy else "ab"["ba".index(pair["gold"])]


@pytest.fixture
def files(tmp_path):
    """Five annotators of the same pairs, each in a form of its own: three good ones, one constant, one inverted."""
    rng, rows = random.Random(2), pairs()
    sides = {"a": "response_a", "b": "response_b"}
    other = {"a": "b", "b": "a"}
    alice = [{"id": row["id"], "verdict": right(row, rng, 0.9).upper()} for row in rows]
    bob = [(row, right(row, rng, 0.85)) for row in rows]
    bob = [{"prompt": row["prompt"], "chosen": row[sides[s]], "rejected": row[sides[other[s]]]} for row, s in bob]
    # Shown in the other order, and without ids: matched by their texts.
    carol = [(row, right(row, rng, 0.8)) for row in rows]
    carol = [
        {
            "prompt": row["prompt"],
            "response_a": row["response_b"],
            "response_b": row["response_a"],
            "p_a": float(s == "b"),
        }
        for row, s in carol
    ]
    always = [{"id": row["id"], "label": "A"} for row in rows]
    inverted = [{"id": row["id"], "winner": f"model_{other[right(row, rng, 0.9)]}"} for row in rows]
    rng.shuffle(carol)
    for name, content in (
        ("pairs", rows),
        ("alice", alice),
        ("bob", bob),
        ("carol", carol),
        ("always", always),
        ("inverted", inverted),
    ):
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    return tmp_path


def judge(invoke, folder, *names, flags=(), **options):
    words = [word for name in names for word in ("--verdicts", folder / f"{name}.jsonl")]
    words += [
        word for name, value in {"output": folder / "out.jsonl", **options}.items() for word in (f"--{name}", value)
    ]
    return invoke("judge", *words, *flags, "--json")


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def test_every_form_is_matched_and_bad_annotators_are_named(invoke, files):
    names = ("alice", "bob", "carol", "always", "inverted")
    paths = [str(files / f"{name}.jsonl") for name in names]
    options = {"input": files / "pairs.jsonl", "combine": "dawid-skene"}
    # The pairs have gold labels; without them the others tell the same.
    without = [{name: value for name, value in row.items() if name != "gold"} for row in pairs()]
    write_jsonl(files / "bare.jsonl", without)
    result = judge(invoke, files, *names, **{**options, "input": files / "bare.jsonl"})
    assert result.exit_code == 0, result.output
    alone = json.loads(result.stdout)
    result = judge(invoke, files, *names, **options, flags=["--overwrite"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    for printed in (alone, summary):
        assert [printed["judges"][path]["finding"] for path in paths] == [None, None, None, "constant", "inverted"]
        assert [finding.split(":")[0].rsplit("/", 1)[1] for finding in printed["findings"]] == [
            "always.jsonl is constant",
            "inverted.jsonl is inverted",
        ]
        assert all(printed["judges"][path]["missing"] == 0 for path in paths)
    assert all(finding in result.stderr for finding in summary["findings"])
    assert summary["pairs"] == 120 and summary["accuracy"]["value"] > 0.93
    rows = rows_of(files / "out.jsonl")
    for row, pair, alice in zip(rows, pairs(), rows_of(files / "alice.jsonl"), strict=True):
        assert row["id"] == pair["id"] and row["verdicts"] == [] and row["principle"] is None
        assert list(row["judges"]) == paths and row["judges"][paths[0]] == float(alice["verdict"] == "A")
        assert row["chosen"] == row["response_a" if row["p_a"] > 0.5 else "response_b"]


@pytest.mark.slow
def test_the_audit_measures_every_annotator(invoke, files):
    names = ("alice", "carol", "inverted")
    result = judge(invoke, files, *names, input=files / "pairs.jsonl", audit=files / "audit.json")
    assert result.exit_code == 0, result.output
    audited = json.loads((files / "audit.json").read_text())
    accuracy = [audited["judges"][str(files / f"{name}.jsonl")]["accuracy"]["value"] for name in names]
    assert accuracy == pytest.approx([0.9, 0.8, 0.1], abs=0.1), "carol saw the sides exchanged"
    assert audited["accuracy"]["value"] == pytest.approx(json.loads(result.stdout)["accuracy"]["value"])
    assert audited["same_position"]["n"] == 0 and audited["agreement"]["n"] == 120


@pytest.mark.parametrize("way", ["mean", "majority"])
def test_mean_and_majority_count_everybody(invoke, files, way):
    result = judge(invoke, files, "alice", "bob", "always", input=files / "pairs.jsonl", combine=way)
    assert result.exit_code == 0, result.output
    combine = agreement.combiner(way, lambda: (), 3)
    for row in rows_of(files / "out.jsonl"):
        assert row["p_a"] == pytest.approx(combine(list(row["judges"].values())))
    [finding] = json.loads(result.stdout)["findings"]
    assert finding.endswith(f"it counts in full with --combine {way}")
    again = judge(invoke, files, "alice", "bob", "always", input=files / "pairs.jsonl", combine=way)
    assert json.loads(again.stdout)["findings"] == [finding]


def test_the_pairs_may_be_those_of_the_first_file(invoke, files):
    """What bob has chosen is his verdict, and not the truth."""
    result = judge(invoke, files, "bob", "carol")
    assert result.exit_code == 0, result.output
    summary, rows = json.loads(result.stdout), rows_of(files / "out.jsonl")
    assert "accuracy" not in summary and not any("gold" in row for row in rows) and summary["agreement"]["n"] == 120
    for row, bob in zip(rows, rows_of(files / "bob.jsonl"), strict=True):
        assert row["judges"][str(files / "bob.jsonl")] == float(bob["chosen"] == row["response_a"])


def test_columns_are_annotators(invoke, files):
    rows = [{**row, "x": "A", "y": 0.25, "z": None} for row in pairs(4)]
    rows[3]["response_b"] = rows[3]["response_a"]
    write_jsonl(files / "table.jsonl", rows)
    words = ["--verdicts", files / "table.jsonl", "--output", files / "out.jsonl", "--json"]
    result = invoke("judge", *words, "--verdict-field", "x", "--verdict-field", "y", "--verdict-field", "z")
    assert result.exit_code == 0, result.output
    table = files / "table.jsonl"
    first, *_, tie = rows_of(files / "out.jsonl")
    assert first["judges"] == {f"{table}:x": 1.0, f"{table}:y": 0.25, f"{table}:z": None} and first["p_a"] == 0.625
    assert tie["tie"] and json.loads(result.stdout)["identical"] == 1
    result = invoke("judge", *words, "--overwrite", "--verdict-field", "w")
    assert result.exit_code == 2 and "no column 'w'" in result.stderr


def test_rows_that_belong_to_no_pair_are_counted(invoke, files):
    write_jsonl(files / "few.jsonl", [*rows_of(files / "alice.jsonl")[:30], {"id": "elsewhere", "verdict": "A"}])
    result = judge(invoke, files, "few", "bob", input=files / "pairs.jsonl")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)["judges"][str(files / "few.jsonl")]
    assert (numbers["missing"], numbers["unmatched"], numbers["votes"]) == (90, 1, 30)
    assert "few.jsonl: 1 rows belong to none of the pairs" in result.stderr
    planned = judge(invoke, files, "few", input=files / "pairs.jsonl", output=files / "new.jsonl", flags=["--dry-run"])
    assert json.loads(planned.stdout)["unmatched"] == {str(files / "few.jsonl"): 1}
    assert not (files / "new.jsonl").exists()
    assert set(read_manifest(files / "out.jsonl")["fingerprint"]["verdicts"]) == {
        str(files / "few.jsonl"),
        str(files / "bob.jsonl"),
    }


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [{**pairs(1)[0], "gold": "a", "chosen": "Not so 0.", "rejected": "So 0."}],
            "bad.jsonl:1: the fields contradict each other: for response_a gold; for response_b chosen",
        ),
        ([{"id": "g0", "verdict": "A"}, {"id": "g1", "verdict": "C"}], "bad.jsonl:2: verdict is 'C'"),
        ([{"id": "g0", "verdict": "A"}] * 2, "bad.jsonl:2: the id 'g0' again"),
        ([{"id": "nowhere", "verdict": "A"}], "bad.jsonl: no row belongs to any of the pairs"),
        (
            [{**pairs(2)[1], "id": "g0", "verdict": "A"}],
            "bad.jsonl:1: the id 'g0' has another prompt or other responses",
        ),
        (
            [{**pairs(1)[0], "id": None, "verdict": v} for v in "AB"],
            "bad.jsonl:2: a second verdict on the pair 'g0', the first is on line 1",
        ),
        ([{"id": "g0"}], "bad.jsonl:1: no verdict; the row has: id"),
    ],
)
def test_what_contradicts_itself_is_refused_and_nothing_written(invoke, files, rows, error):
    write_jsonl(files / "bad.jsonl", rows)
    result = judge(invoke, files, "bad", input=files / "pairs.jsonl")
    assert result.exit_code == 2 and error in result.stderr, result.output
    assert not list(files.glob("out*"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--model", "tiny"], "--model would have no effect: --verdicts asks no judge"),
        (["--cot"], "--cot would have no effect"),
        (["--prefer-input"], "--prefer-input would have no effect"),
        (["--clamp", "0.1", "0.5"], "--clamp 0.1 0.5"),
    ],
)
def test_options_without_an_effect_are_refused(invoke, files, words, error):
    result = invoke("judge", "--verdicts", files / "bob.jsonl", "--output", files / "out.jsonl", *words)
    assert result.exit_code == 2 and error in result.output


def test_input_or_verdicts(invoke, files):
    result = invoke("judge", "--model", "tiny", "--output", files / "out.jsonl")
    assert result.exit_code == 2 and "--input is missing" in result.output
    words = ["--input", files / "pairs.jsonl", "--output", files / "out.jsonl", "--verdict-field", "x"]
    result = invoke("judge", "--model", "tiny", *words)
    assert result.exit_code == 2 and "without --verdicts there is no column" in result.output
