"""The paper's figures from run folders: points by hand or by the models themselves, PNG and CSV, and refusals."""

import csv
import json
import math

import models
import pytest

from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.report import paper


def manifest(path, command, fingerprint=None, line=""):
    content = {
        "status": "done",
        "command": command,
        "command_line": line,
        "fingerprint": fingerprint or {},
        "counts": {},
        "started": "2026-01-01T00:00:00+00:00",
    }
    path.with_name(f"{path.name}.run.json").write_text(json.dumps(content))


def revised(folder, texts=("Force it.", "I can't.", "No, ask the owner."), n=4, principles=("harm",)):
    """A run folder with rows of two rounds; even ones are harmful."""
    folder.mkdir()
    rows = [
        {
            "id": str(i),
            "prompt": f"How do I open gate {i}?",
            "kind": "benign" if i % 2 else "harmful",
            "response": texts[0],
            "rounds": [
                {"principle": principles[i % len(principles)], "critique": "c", "revision": text, "flags": []}
                for text in texts[1:]
            ],
        }
        for i in range(n)
    ]
    write_jsonl(folder / "revision.jsonl", rows)
    manifest(folder / "revision.jsonl", "revise")
    return folder


@pytest.fixture
def scorer(tmp_path):
    """A random reward model's folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(models.folder("llama"), num_labels=1)
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(models.folder("llama")).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture
def figure(invoke, tmp_path):
    def make(number, *args):
        result = invoke("figures", "--figure", number, "--output", tmp_path / "f.jsonl", *args)
        if result.exit_code:
            return result, [], []
        assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "f.svg").read_text()
        with open(tmp_path / "f.csv", newline="") as file:
            return result, [row for _, row in read_jsonl(tmp_path / "f.jsonl")], list(csv.DictReader(file))

    return make


def test_figure_5_is_the_mean_score_of_every_round(figure, tmp_path, scorer):
    from cai.models.scorer import load_scorer

    result, rows, table = figure("5", "--run", revised(tmp_path / "run"), "--reward-model", scorer)
    assert result.exit_code == 0, result.output
    assert [(row["series"], row["x"], row["n"]) for row in rows] == [
        (kind, number, 2) for kind in ("harmful", "benign") for number in range(3)
    ]
    scores = load_scorer(str(scorer)).scores(
        [([{"role": "user", "content": f"How do I open gate {i}?"}], "I can't.") for i in (0, 2)]
    )
    [point] = [row for row in rows if (row["series"], row["x"]) == ("harmful", 1)]
    assert point["value"] == pytest.approx(sum(scores) / 2, abs=1e-4)
    assert [float(row["value"]) for row in table] == [row["value"] for row in rows]
    assert list(table[0]) == ["series", "x", "value", "low", "high", "n"]


def test_figures_6_and_7_compare_runs_on_harmful_prompts(figure, tmp_path, scorer):
    one = revised(tmp_path / "one")
    two = revised(tmp_path / "two", texts=("Force it.", "Why?", "No."), principles=("harm", "crime", "crime"))
    runs = ["--run", one, "--run", two, "--reward-model", scorer]
    _, rows, _ = figure("7", *runs)
    assert {row["series"]: row["n"] for row in rows} == {"one": 2, "two": 2}
    _, rows, _ = figure("6", *runs, "--overwrite")
    assert {row["series"] for row in rows} == {"1 principle (one)", "2 principles (two)"}
    result, *_ = figure("6", "--run", one, "--overwrite")
    assert result.exit_code == 2 and "1 run folders; expected 2 or more" in result.stderr


def test_figure_9_has_everything_whose_answer_is_known(figure, tmp_path):
    folder = revised(tmp_path / "run")
    pairs = [
        {"id": str(i), "prompt": "x", "response_a": "a", "response_b": "b", "gold": "a", "p_a": p}
        for i, p in enumerate([0.92, 0.98, 0.04, 0.5])
    ]
    write_jsonl(folder / "judged.jsonl", [*pairs, {"id": "n", "prompt": "x", "p_a": 0.9}])
    write_jsonl(folder / "e.choices.jsonl", [{"id": "1", "confidence": 0.75, "right": True}])
    _, rows, _ = figure("9", "--run", folder)
    found = {row["series"]: (row["x"], row["value"], row["n"]) for row in rows}
    assert found["judged"] == (pytest.approx((0.92 + 0.98 + 0.96) / 3), 2 / 3, 3), "0.04 is 0.96 for the wrong one"
    assert found["e.choices"] == (0.75, 1, 1)
    (folder / "judged.jsonl").unlink()
    (folder / "e.choices.jsonl").unlink()
    result, *_ = figure("9", "--run", folder, "--overwrite")
    assert result.exit_code == 2 and "nothing in it whose right answer is known" in result.stderr


def test_figure_2_is_the_plane_of_a_comparison(figure, tmp_path):
    folder = revised(tmp_path / "run")
    result, *_ = figure("2", "--run", folder)
    assert result.exit_code == 2 and "0 comparisons of policies in it" in result.stderr
    rates = {
        f"{axis}_elo {name}": {"value": value, "low": None, "high": value + 9, "n": 5}
        for name, values in {"base": (0, 0), "rl": (120, -30), "odd": (-50, -60)}.items()
        for axis, value in zip(("harmlessness", "helpfulness"), values, strict=True)
    }
    write_jsonl(folder / "elo.jsonl", [{"id": name, "metric": name, **one} for name, one in rates.items()])
    manifest(folder / "elo.jsonl", "compare")
    result, rows, table = figure("2", "--run", folder)
    assert result.exit_code == 0, result.output
    assert {row["series"]: (row["x"], row["value"]) for row in rows} == {
        "base": (0, 0),
        "rl": (-30, 120),
        "odd": (-60, -50),
    }
    assert "On the front (nothing is better in both): base, rl." in paper.figures.elo_plane("x", "x", rows).says
    assert {row["x_high"] for row in table} == {"9", "-21", "-51"}


def test_figure_10_is_the_mean_digit_by_probability(figure, tmp_path):
    from cai.constitution.templates import load_template
    from cai.models.loading import load_engine

    folder = revised(tmp_path / "run")
    given = [
        {"id": str(i), "prompt": f"Gate {i}?", "kind": "harmful", "response": "Push. " * (i + 1)} for i in range(3)
    ]
    rate = {"id": "good_refusal", "metric": "good_refusal", "value": 0, "low": 0, "high": 1, "n": 3}
    write_jsonl(folder / "evaluation-base.jsonl", [rate])
    manifest(folder / "evaluation-base.jsonl", "evaluate", {"model": "m", "input": "i", "by": "oracle"})
    write_jsonl(folder / "evaluation-base.responses.jsonl", given)
    judge = models.folder("qwen")
    result, rows, _ = figure("10", "--run", folder, "--judge", judge)
    assert result.exit_code == 0, result.output
    engine, template, scores = load_engine(str(judge)), load_template("classify_harm"), []
    for row in given:
        [logprobs] = models.score(engine, [template.render(prompt=row["prompt"], response=row["response"])], "01234")
        shares = [math.exp(one) for one in logprobs]
        scores.append(sum(i * one for i, one in enumerate(shares)) / sum(shares))
    assert [(row["series"], row["label"], row["n"]) for row in rows] == [("run", "before", 3)]
    assert rows[0]["value"] == pytest.approx(sum(scores) / 3, abs=1e-4)
    refused, *_ = figure("10", "--run", folder, "--overwrite")
    assert refused.exit_code == 2 and "--figure 10 without --judge" in refused.stderr


def test_the_expectation_by_hand():
    logprobs = [math.log(p) for p in (0.1, 0.1, 0.2, 0.0001, 0.2)]
    value, mass = paper.mean_digit(logprobs)
    assert mass == pytest.approx(0.6001) and value == pytest.approx((0.1 + 0.4 + 0.0003 + 0.8) / 0.6001)
    assert paper.mean_digit(None) == (None, 0.0) == paper.mean_digit([-math.inf] * 5)


def test_what_is_not_clear_is_refused(figure, tmp_path):
    folder = revised(tmp_path / "run")
    result, *_ = figure("5")
    assert result.exit_code == 2 and "Missing option '--run'" in result.stderr
    result, *_ = figure("5", "--run", folder, "--model", "tiny")
    assert result.exit_code == 2 and "No such option" in result.stderr
    result, *_ = figure("5", "--run", folder, "--run", folder)
    assert result.exit_code == 2 and "2 run folders; expected one" in result.stderr
    result, *_ = figure("5", "--run", folder)
    assert result.exit_code == 2 and "no reward model in it" in result.stderr
    assert not list(tmp_path.glob("f.*"))


def test_a_figure_is_planned_made_once_and_refused_for_another(figure, tmp_path, invoke, scorer):
    folder = revised(tmp_path / "run")
    line = ["--figure", "5", "--run", folder, "--reward-model", scorer, "--output", tmp_path / "f.jsonl", "--json"]
    plan = json.loads(invoke("figures", *line, "--dry-run").stdout)
    assert (plan["figure"], plan["runs"]) == ("5", 1) and not list(tmp_path.glob("f.*"))
    summary = json.loads(invoke("figures", *line).stdout)
    assert summary["points"] == 6 and len(summary["metrics"]) == 6
    assert summary["metrics"]["harmful 1"]["n"] == 2 and "metric" not in summary["metrics"]["harmful 1"]
    assert summary["files"] == [str(tmp_path / f"f.{ending}") for ending in ("png", "svg", "csv")]
    points = (tmp_path / "f.jsonl").stat().st_mtime_ns
    (tmp_path / "f.png").unlink()
    again = invoke("figures", *line[:-1])
    assert again.exit_code == 0 and "harmful 1" in again.stdout and "value (95 % interval)" in again.stdout
    assert (tmp_path / "f.jsonl").stat().st_mtime_ns == points and (tmp_path / "f.png").exists()
    other = invoke("figures", *line, "--limit", "1")
    assert other.exit_code == 2 and "made by a run that differs" in other.stderr
    assert invoke("figures", *line, "--limit", "1", "--overwrite").exit_code == 0
    manifest = json.loads((tmp_path / "f.jsonl.run.json").read_text())
    assert manifest["status"] == "done" and manifest["counts"] == {"points": 3}


def test_a_figure_is_continued(figure, tmp_path, invoke):
    """A run that was stopped after its first point ends with the same points."""
    folder = revised(tmp_path / "run")
    write_jsonl(folder / "a.choices.jsonl", [{"id": "1", "confidence": 0.75, "right": True}])
    write_jsonl(folder / "b.choices.jsonl", [{"id": "1", "confidence": 0.95, "right": False}])
    result, rows, _ = figure("9", "--run", folder)
    assert result.exit_code == 0 and len(rows) == 2
    manifest, output = tmp_path / "f.jsonl.run.json", tmp_path / "f.jsonl"
    expected = output.read_bytes()
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    (tmp_path / "f.jsonl.partial").write_bytes(expected.splitlines(True)[0])
    output.unlink()
    assert figure("9", "--run", folder)[0].exit_code == 0
    assert output.read_bytes() == expected
