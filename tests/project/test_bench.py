"""The benchmark runs, compares the same text, and tells what it measured. That it is fast is not for a test."""

import json

import bench
import engines
import models
import pytest
from click.testing import CliRunner


@pytest.mark.slow
def test_one_benchmark_as_json(monkeypatch):
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    line = ["--only", "judge", "--model", str(models.folder("llama")), "--rows", "3", "--rounds", "2", "--json"]
    done = CliRunner().invoke(bench.main, line)
    assert done.exit_code == 0, done.output
    table = json.loads(done.stdout)
    assert [name.partition(": ")[2] for name in table] == ["generate 4 tokens and parse", "one forward pass a question"]
    for value in table.values():
        assert 0 < value["min"] <= value["median"] <= value["max"]


@pytest.mark.slow
def test_text_steps_against_the_pipelines_and_their_overhead(monkeypatch):
    """On a random model, whose greedy text is the same in all three."""
    one = bench.Bench(str(models.folder("llama")), "small", 3, 1, "cpu")
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)
    for name in ("text", "share"):
        bench.BENCHES[name](one)
    assert len(one.figures) == 3 and all(value > 0 for [value] in one.figures.values())
    assert one.figures["small text steps: share of time in the forward pass"][0] < 1


def test_another_text_ends_the_benchmark():
    one = bench.Bench("tiny", "tiny", 3, 1, "cpu")
    with pytest.raises(SystemExit, match="slow made something else"):
        one.race("words", lambda: "a", {"slow": lambda: "b"}, lambda ours, theirs: ours == theirs)


@pytest.mark.slow
def test_engines_are_measured_in_turn(tmp_path, monkeypatch):
    """Without vLLM; in float32 the pipeline and our engine write the same."""
    rows = [
        {"id": str(n), "prompt": "Why? " * (n + 1), "chosen": f"Because {n}", "rejected": "Ask again later"}
        for n in range(4)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("CAI_QUALIFICATION", "off")
    sizes = ["--prompts", "4", "--judged", "2", "--steps", "2", "--new-tokens", "6", "--rounds", "1"]
    line = [str(file), "--model", str(models.folder("llama")), "--dtypes", "float32", *sizes, "--json"]
    done = CliRunner().invoke(engines.main, [*line, "--works", "generate,judge,forward"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    figures = {(row["work"], row["engine"], row["figure"]): row["median"] for row in report["figures"]}
    pipeline = "pipeline(batch_size=32)"
    assert figures["generate, float32", pipeline, "share of texts as ours"] == 1
    ratio = figures["generate, float32", f"ours / {pipeline}", "ratio"]
    seconds = [figures["generate, float32", name, "seconds"] for name in ("ours", pipeline)]
    assert ratio == pytest.approx(seconds[0] / seconds[1])
    assert 0 < figures["generate, float32", "ours", "share in the forward pass"] < 1
    assert ("judge, float32", "ours", "seconds") in figures
    assert {"vLLM: not measured, no --vllm", "ours in float32: fast path True"} <= set(report["notes"])
