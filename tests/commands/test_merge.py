"""merge.py: shards become what one run writes, or the reason why not."""

import json
import shutil

import models
import pytest
import shards as bench

from cai.data.outputs import read_manifest
from cai.data.readers import read_jsonl

COUNT = 3


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rewrite(path, change):
    """Change the lines of a shard as somebody might who edits it."""
    path.write_text("".join(change(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")


def edit_manifest(path, **changes):
    manifest = json.loads((text := path.with_name(f"{path.name}.run.json")).read_text())
    text.write_text(json.dumps({**manifest, **changes}))


@pytest.fixture
def run(invoke, tmp_path):
    """`run(name, stem, *options)`: a step over all rows into <stem>.jsonl, and over the shards; returns its merge."""

    def call(name, stem, *options, code=0):
        line = (name, "--model", models.folder("llama"), "--dtype", "float32", *options)
        assert invoke(*line, "--output", tmp_path / f"{stem}.jsonl").exit_code == code
        for number in range(1, COUNT + 1):
            output = tmp_path / f"{stem}-{number}.jsonl"
            result = invoke(*line, "--output", output, "--shard", f"{number}/{COUNT}", "--json")
            assert result.exit_code in (0, code), result.stderr
            assert "merge.py" in json.loads(result.stdout)["next"]
        return merge(stem)

    def merge(stem, output="merged"):
        return invoke("merge", "--input", tmp_path / f"{stem}-[0-9].jsonl", "--output", tmp_path / f"{output}.jsonl",
                      "--json")  # fmt: skip

    call.merge = merge
    return call


@pytest.fixture
def prompts(tmp_path):
    """Prompts with ids and without, one text twice, one that is too long, one that is no prompt."""
    rows = [{"id": f"r{n}", "prompt": f"How do I open gate {n}?"} for n in range(20)]
    rows[3:3] = [{"prompt": "Which gate?"}, {"prompt": ""}, {"prompt": "Which gate?"}]
    rows[9:9] = [{"id": "long", "prompt": "How do I open the gate? " * 700}]
    return write(tmp_path / "in.jsonl", rows)


@pytest.mark.slow
def test_merged_shards_are_the_output_of_one_run(run, prompts, tmp_path, invoke):
    options = ("--input", prompts, "--samples", 2, "--max-new-tokens", 8, "--skip-invalid")
    result = run("generate", "all", *options, code=3)
    assert result.exit_code == 3, result.stderr
    whole, merged = tmp_path / "all.jsonl", tmp_path / "merged.jsonl"
    assert merged.read_bytes() == whole.read_bytes()
    ours, theirs = read_manifest(merged), read_manifest(whole)
    for name in ("command", "fingerprint", "counts", "tokens", "failed_rows", "skipped_rows", "inputs", "status"):
        assert ours[name] == theirs[name], name
    assert ours["counts"]["failed"] == 2 and ours["counts"]["skipped_rows"] == 1
    # The run over all rows finds its output there.
    again = invoke("generate", "--model", models.folder("llama"), "--dtype", "float32", *options, "--output", merged)
    assert again.exit_code == 3 and "done already" in again.stderr
    # The next steps take it, shard by shard.
    critique = ("--input", merged, "--constitution", "harmlessness", "--max-new-tokens", 8)
    assert run("critique", "critiques", *critique).exit_code == 2, "another run's output is not replaced"
    assert run.merge("critiques", "critiqued").exit_code == 0
    assert (tmp_path / "critiqued.jsonl").read_bytes() == (tmp_path / "critiques.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["responses", "pairs"])
def test_merged_preferences_are_those_of_one_run(run, tmp_path, form):
    rows = [
        {"id": f"r{n}", "prompt_id": f"p{n % 12}", "prompt": f"Gate {n % 12}?", "response": f"Lift bar {n}."}
        if form == "responses"
        else {"id": f"r{n}", "prompt": f"Gate {n}?", "response_a": "Lift it.", "response_b": f"Push {n}.", "gold": "a"}
        for n in range(25)
    ]
    result = run("judge", "all", "--input", write(tmp_path / "in.jsonl", rows), "--constitution", "harmlessness")
    assert result.exit_code == 0, result.stderr
    whole, merged = ([row for _, row in read_jsonl(tmp_path / f"{name}.jsonl")] for name in ("all", "merged"))
    assert [row["id"] for row in merged] == [row["id"] for row in whole]
    assert [row["p_a"] for row in merged] == pytest.approx([row["p_a"] for row in whole], abs=1e-5)
    assert [row["principle"] for row in merged] == [row["principle"] for row in whole]
    ours, theirs = (read_manifest(tmp_path / f"{name}.jsonl") for name in ("merged", "all"))
    assert ours["counts"].keys() == theirs["counts"].keys() and ours["counts"]["pairs"] == theirs["counts"]["pairs"]
    assert ours["fingerprint"] == theirs["fingerprint"]


@pytest.fixture
def shards(invoke, tmp_path):
    """Three finished shards of 12 short answers."""
    source = write(tmp_path / "in.jsonl", [{"id": f"r{n}", "prompt": f"Gate {n}?"} for n in range(12)])
    for number in range(1, COUNT + 1):
        result = invoke("generate", "--input", source, "--model", "tiny", "--max-new-tokens", 2, "--shard",
                        f"{number}/{COUNT}", "--output", tmp_path / f"all-{number}.jsonl")  # fmt: skip
        assert result.exit_code == 0, result.stderr
    return [tmp_path / f"all-{number}.jsonl" for number in range(1, COUNT + 1)]


FAULTS = {
    "lost shard": (lambda paths: paths[1].unlink(), "1 of 3 shards are missing: 2"),
    "lost row": (lambda paths: rewrite(paths[1], lambda lines: lines[1:]), "is missing"),
    "lost last row": (lambda paths: rewrite(paths[1], lambda lines: lines[:-1]), "is missing"),
    "row twice": (lambda paths: rewrite(paths[1], lambda lines: [lines[0], *lines]), "there twice"),
    "last row twice": (lambda paths: rewrite(paths[1], lambda lines: [*lines, lines[-1]]), "there twice"),
    "other order": (lambda paths: rewrite(paths[1], lambda lines: lines[::-1]), "another order"),
    "no JSON": (lambda paths: rewrite(paths[1], lambda lines: ["{]\n", *lines]), "a row without an id, or no JSON"),
    "unfinished": (lambda paths: edit_manifest(paths[0], status="running"), "shard 1/3 is not finished"),
    "other command": (lambda paths: edit_manifest(paths[0], command="revise"), "the shards differ: command"),
    "no shard": (lambda paths: edit_manifest(paths[0], fingerprint={"seed": 0}), "names no shard"),
    "other input": (lambda paths: rewrite(paths[0].with_name("in.jsonl"), lambda lines: lines[:-1]), "it changed"),
    "no input": (lambda paths: paths[0].with_name("in.jsonl").unlink(), "is not here"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_and_leaves_nothing(run, shards, tmp_path, fault):
    break_it, message = FAULTS[fault]
    break_it(shards)
    result = run.merge("all")
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert not list(tmp_path.glob("merged.jsonl*"))


def test_shards_of_another_run_are_refused(run, shards, invoke, tmp_path):
    for path in shards[1:]:
        path.unlink()
    shutil.copy(shards[0], tmp_path / "all-4.jsonl")
    shutil.copy(f"{shards[0]}.run.json", tmp_path / "all-4.jsonl.run.json")
    assert "shard 1 of 3 twice" in run.merge("all").stderr
    edit_manifest(tmp_path / "all-4.jsonl", fingerprint={**read_manifest(shards[0])["fingerprint"], "seed": 7})
    assert "the shards differ: seed is 7, and 0 in" in run.merge("all").stderr


def test_several_judges_are_merged_one_by_one(invoke, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"id": "r", "prompt": "Gate?", "response_a": "a", "response_b": "b"}])
    result = invoke("judge", "--input", source, "--model", "tiny", "--judge", models.folder("llama"), "--shard", "1/2",
                    "--output", tmp_path / "out.jsonl")  # fmt: skip
    assert result.exit_code == 2 and "several judges over shards" in result.stderr


@pytest.mark.slow
def test_no_kill_and_no_order_changes_a_byte(tmp_path):
    """Some thousand rows over six shards, half of which are killed; the benchmark does it with millions."""
    digests = set()
    for seed in (0, 1):
        (folder := tmp_path / str(seed)).mkdir()
        result = bench.measure(folder, rows=4000, shards=6, processes=2, share=0.5, seed=seed)
        assert result["is_complete"] and result["merge_exit"] == 0
        digests.add(result["sha256"])
    assert len(digests) == 1
