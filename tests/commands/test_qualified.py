"""What the commands do with a model that is unfit: `tiny` outside of its world, which it does not understand."""

import json
import os
import shutil

import pytest

from cai.base.paths import TINY
from cai.data.outputs import read_manifest, write_jsonl
from cai.evaluate import qualification
from cai.report import cards, pages, run_folder


@pytest.fixture(scope="module")
def unfit(tmp_path_factory):
    """`tiny` with a tokenizer file that is written in another way: so it is asked about plain English."""
    folder = tmp_path_factory.mktemp("models") / "unfit"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("prompts"))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    return str(folder)


@pytest.fixture
def switched_on(tmp_path_factory, monkeypatch):
    """Models are qualified; what one test has measured, the others find in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "qualifications"))
    monkeypatch.delenv("CAI_QUALIFICATION")


@pytest.fixture
def responses(tmp_path):
    """Six prompts in plain English with a response each."""
    kinds = ("harmful", "benign", "borderline")
    rows = [
        {"id": str(n), "kind": kinds[n % 3], "prompt": f"What about gate {n}?", "response": f"It is open, number {n}."}
        for n in range(6)
    ]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    return tmp_path / "responses.jsonl"


def test_unqualified_without_a_gate_is_refused(invoke, responses, tmp_path):
    result = invoke(
        "evaluate", "--responses", responses, "--by", "phrases", "--unqualified", "--output", tmp_path / "e.jsonl"
    )
    assert result.exit_code == 2 and "--unqualified without --gate" in result.output


@pytest.mark.slow
def test_a_run_stops_before_its_first_step_and_names_the_reason(invoke, unfit, switched_on, responses, tmp_path):
    line = ["--model", unfit, "--input", responses, "--heldout", responses, "--output", tmp_path / "run"]
    result = invoke("run", *line)
    assert result.exit_code == qualification.UNFIT_EXIT, result.output
    assert "error: nothing was run" in result.output and "is not above" in result.output
    for role in qualification.ROLES:
        assert f"is UNFIT as {role} (english)" in result.output
    assert "--unqualified" in result.output and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_model_of_a_run_is_qualified_in_its_role_and_named(invoke, unfit, switched_on, responses, tmp_path):
    """`tiny` criticises, the unfit model reads and judges; a smoke run then takes the kept verdicts."""
    line = ["--model", "tiny", "--reader", unfit, "--judge", unfit, "--output", tmp_path / "run"]
    for more in ([], ["--smoke"]):
        result = invoke("run", *line, *more)
        assert result.exit_code == qualification.UNFIT_EXIT, result.output
        for role in ("reader", "judge"):
            assert result.output.count(f"{unfit} is UNFIT as {role} (english)") == 2  # the verdict, and the error
        assert "tiny is fit as critic" in result.output and "tiny is fit as judge" not in result.output
        assert not (tmp_path / "run").exists()
    assert "qualifying" not in result.output


def test_only_what_is_kept_is_taken_where_nothing_may_be_measured(switched_on, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(qualification, "_results", {})
    with qualification.only_kept():
        assert qualification.qualify("tiny", qualification.Task("critic"), pytest.fail) is None
    assert "CAI_QUALIFICATION" not in os.environ
    monkeypatch.setenv("CAI_QUALIFICATION", "off")
    with qualification.only_kept():
        assert os.environ["CAI_QUALIFICATION"] == "off"
    assert os.environ["CAI_QUALIFICATION"] == "off"


@pytest.mark.slow
def test_the_rates_of_an_unfit_reader_are_unqualified_and_its_gate_refuses(
    invoke, unfit, switched_on, responses, tmp_path
):
    line = ["--responses", responses, "--judge", unfit]
    first = invoke("evaluate", *line, "--output", tmp_path / "a.jsonl")
    assert first.exit_code == 0 and "unqualified value (95 % interval)" in first.stdout, first.output
    assert first.stdout.startswith(f"reader: {unfit} is UNFIT as reader (english): accuracy")
    assert all(json.loads(row)["unqualified"] for row in (tmp_path / "a.jsonl").read_text().splitlines())
    assert next(iter(read_manifest(tmp_path / "a.jsonl")["counts"])) == "qualification"
    gate = [*line, "--output", tmp_path / "b.jsonl", "--against", tmp_path / "a.jsonl", "--gate"]
    refused = invoke("evaluate", *gate)
    assert refused.exit_code == 4 and "VERDICT: refused | " in refused.stdout and "UNFIT" in refused.stdout
    # What the output remembers is enough: nothing is measured again.
    printed = json.loads(invoke("evaluate", *gate, "--json").stdout)
    assert next(iter(printed)) == "qualification" and printed["against"]["verdict"] == "refused"
    allowed = invoke("evaluate", *gate, "--unqualified")
    assert "VERDICT: refused" not in allowed.stdout and "VERDICT: " in allowed.stdout
    run = run_folder.collect(tmp_path)
    assert list(run.qualifications.values()) == [False]
    first_line = next(line for line in pages.render_markdown(run, []).splitlines() if line.startswith("- "))
    assert "is UNFIT as reader" in first_line


@pytest.mark.slow
def test_an_unfit_judge_and_critic_are_named_first_and_no_next_step_is_recommended(
    invoke, unfit, switched_on, responses, tmp_path
):
    pairs = [{"id": "1", "prompt": "Is the gate open?", "response_a": "Yes, it is.", "response_b": "No, it is shut."}]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    judged = invoke("judge", "--input", tmp_path / "pairs.jsonl", "--model", unfit, "--output", tmp_path / "p.jsonl")
    assert judged.exit_code == 0, judged.output
    assert judged.stdout.startswith("qualification") and "is UNFIT as judge" in judged.stdout.splitlines()[0]
    assert "next" not in judged.stdout and "Nothing below can be believed" in judged.stderr
    critiqued = invoke("critique", "--input", responses, "--model", unfit, "--output", tmp_path / "c.jsonl")
    assert critiqued.exit_code == 0, critiqued.output
    assert "is UNFIT as critic" in critiqued.stdout.splitlines()[0] and "next" not in critiqued.stdout
    card = cards.card_of(tmp_path / "p.jsonl")
    assert "Not to be believed: " in card and card.index("| qualification |") < card.index("| command |")


@pytest.mark.slow
def test_a_fit_judge_is_named_first_and_the_next_step_is_recommended(invoke, switched_on, tmp_path):
    invoke("tiny", "pairs", "--split", "heldout", "-n", 2, "--output", tmp_path / "pairs.jsonl")
    line = ["--input", tmp_path / "pairs.jsonl", "--model", "tiny", "--output", tmp_path / "p.jsonl", "--json"]
    summary = json.loads(invoke("judge", *line).stdout)
    assert summary["qualification"].startswith("tiny is fit as judge (world)") and summary["qualified"]
    assert next(iter(summary)) == "qualification" and "next" in summary
