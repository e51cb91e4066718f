"""A model that writes the same text for every prompt: flagged at the end of a step, and stopped before training."""

import json
import os

import models
import pytest
from canned_server import CannedServer

from cai.data.kinds import KINDS
from cai.data.outputs import Output, read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.data.selection import choose_revisions
from cai.steps.duplicates import Duplicates, NotPassedError, check_revisions
from cai.world import language

NO = "I can't help with that."


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def reply(text_of):
    """A server's choice: the text for the user's last message."""

    def choice(body):
        text = text_of(next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user"))
        return {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}

    return choice


@pytest.fixture
def prompts(tmp_path):
    rows = [{"id": f"p{n}", "prompt": f"How do I grow plant {n}?", "kind": "benign"} for n in range(8)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path / "prompts.jsonl"


def ask(invoke, command, source, text_of, *more):
    output = source.with_name(f"{command}.jsonl")
    with CannedServer(reply(text_of)) as server:
        model = ["--model", "openai:m", "--endpoint", server.address]
        result = invoke(command, "--input", source, "--output", output, *model, "--json", *more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), output, result.stderr


def test_one_refusal_for_everything_is_flagged_in_every_step(invoke, prompts):
    summary, responses, stderr = ask(invoke, "generate", prompts, lambda _: NO)
    assert summary["duplicate"] == 8 and [row["flags"] for row in rows_of(responses)] == [["duplicate"]] * 8
    assert (
        f"8 rows have the flag duplicate, the same text for many prompts; most often, for 8 prompts: {NO!r}" in stderr
    )
    assert read_manifest(responses)["most_repeated"] == {"text": NO, "prompts": 8}
    summary, critiques, stderr = ask(invoke, "critique", responses, lambda _: "No fault.")
    assert summary["duplicate"] == 8 and "flag" not in stderr, "the critiques of good answers are alike"
    assert read_manifest(critiques)["most_repeated"]["text"] == "No fault."
    summary, revisions, _ = ask(invoke, "revise", critiques, lambda _: NO)
    assert summary["duplicate"] == summary["flags"]["duplicate"] == summary["flagged"] == 8
    for row in rows_of(revisions):
        # A copy of what was the same for all is no better than the first: --keep copy alone does not keep it.
        assert row["rounds"][-1]["flags"] == ["copy", "bare_refusal", "duplicate"]
        selection = choose_revisions(row, "last", {"copy", "bare_refusal"})
        assert (selection.texts, selection.left_out) == ({}, ["duplicate"])
        assert choose_revisions(row, "last", {"copy", "bare_refusal", "duplicate"}).texts == {1: NO}


def test_answers_that_differ_have_no_flag(invoke, prompts):
    summary, responses, stderr = ask(invoke, "generate", prompts, lambda prompt: f"Water it. {prompt}")
    assert "duplicate" not in summary and "flags" not in rows_of(responses)[0] and "duplicate" not in stderr
    summary, critiques, _ = ask(invoke, "critique", responses, lambda text: f"About {hash(text)}.")
    summary, revisions, _ = ask(invoke, "revise", critiques, lambda text: f"Plant it in spring, {hash(text)}.")
    assert summary["flags"]["duplicate"] == 0 and "most_repeated" not in read_manifest(revisions)
    check_revisions(str(revisions), "revision-1")


def test_flags_of_an_earlier_response_do_not_stay(invoke, prompts):
    _, responses, _ = ask(invoke, "generate", prompts, lambda _: NO)
    again = responses.with_name("again.jsonl")
    os.rename(responses, again)
    _, responses, _ = ask(invoke, "generate", again, lambda prompt: f"Water it. {prompt}", "--overwrite")
    assert not any("flags" in row for row in rows_of(responses))


def test_a_run_stopped_while_finishing_ends_with_the_same_rows(tmp_path):
    """The journal keeps the rows as they were written: what is flagged is decided again from all of them."""

    def flag(row):
        return {**row, "flags": ["duplicate"]}

    def finish(path, stop_at=None):
        with Output(path, command="generate", fingerprint={}) as output:
            for n in range(7):
                if f"p{n}" not in output.done and n != stop_at:
                    output.write({"id": f"p{n}", "prompt": f"{n}?", "response": "No." if n < 5 else f"Yes, {n}."})
            if stop_at is not None:
                raise KeyboardInterrupt
            rows = Duplicates(rows_of(output.journal), lambda row: row["response"], flag)
            output.finish([f"p{n}" for n in range(7)], rows.report()[0], amend=rows.amend)

    finish(tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "stopped.jsonl", stop_at=2)
    finish(tmp_path / "stopped.jsonl")
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert ["flags" in row for row in rows_of(tmp_path / "whole.jsonl")] == [True] * 5 + [False] * 2
    assert read_manifest(tmp_path / "whole.jsonl")["counts"] == {"duplicate": 5}


@pytest.mark.parametrize(
    ("duplicates", "skipped", "stops"), [(5, 0, False), (6, 0, True), (5, 1, True), (0, 25, False)]
)
def test_more_than_a_fifth_of_the_revisions_stops(tmp_path, duplicates, skipped, stops):
    path = tmp_path / "revised.jsonl"
    counts = {"rows": 25, "duplicate": duplicates, "skipped": {"content": skipped}}
    manifest = {"fingerprint": {}, "counts": counts, "most_repeated": {"text": NO, "prompts": duplicates}}
    path.with_name("revised.jsonl.run.json").write_text(json.dumps(manifest))
    if not stops:
        return check_revisions(str(path), "revision-1")
    with pytest.raises(NotPassedError, match=f"revision-1: {duplicates} of {25 - skipped} revisions .*{NO}") as error:
        check_revisions(str(path), "revision-1")
    assert error.value.exit_code == 4


def constant_model(folder):
    """A model whose next token is always the same: every layer adds nothing, and all embeddings are equal."""
    import torch
    from transformers import AutoModelForCausalLM

    models.build("llama", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[40] = 10.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_run_stops_before_training(invoke, tmp_path):
    for split in ("train", "heldout"):
        write_jsonl(tmp_path / f"{split}.jsonl", [r for kind in KINDS for r in language.prompt_rows(kind, split, 3, 2)])
    model = constant_model(tmp_path / "model")
    files = ["--input", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl", "--preset", "tiny"]
    for _ in range(2):  # the same command again stops at the same place
        result = invoke("run", "--model", model, "--output", tmp_path / "out", *files)
        assert result.exit_code == 4, result.output
        assert "(revision-1): 6 of 6 revisions are the same text for many prompts" in result.stderr
        assert "Nothing was trained" in result.stderr
    assert not (tmp_path / "out" / "sft").exists()
    assert all("duplicate" in row["rounds"][-1]["flags"] for row in rows_of(tmp_path / "out" / "03-revision-1.jsonl"))
