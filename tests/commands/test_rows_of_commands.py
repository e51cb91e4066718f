"""What the commands do with rows in published shapes, with bad rows, and with columns that rows carry along."""

import json

import pytest

from cai.base.paths import TINY
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl

SMALL = ("--limit", "4", "--max-new-tokens", "4")


def say(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def transcript(*contents):
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {content}" for n, content in enumerate(contents))


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


# --- pairs of whole conversations ---------------------------------------------------------------------------

WHOLE = [
    {"prompt": "How do I knot a rope?", "chosen": say("How do I knot a rope?", "Cross the ends twice."),
     "rejected": say("How do I knot a rope?", "Rope is dull."), "score_chosen": 9.0},
    {"prompt": "Is tea hot?", "chosen": say("Is tea hot?", "At first.", "And later?", "It cools."),
     "rejected": say("Is tea hot?", "At first.", "And later?", "Ask it."), "score_chosen": 7.0},
]  # fmt: skip


@pytest.mark.slow
def test_the_judge_never_sees_the_question_inside_a_response(invoke, tmp_path):
    """The shape of HuggingFaceH4/ultrafeedback_binarized: a text as prompt, and two whole conversations."""
    write_jsonl(tmp_path / "pairs.jsonl", WHOLE)
    result = invoke("judge", "--input", tmp_path / "pairs.jsonl", "--model", "tiny", "--output", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    first, second = rows_of(tmp_path / "p.jsonl")
    assert {first["response_a"], first["response_b"]} == {"Cross the ends twice.", "Rope is dull."}
    assert second["prompt"] == say("Is tea hot?", "At first.", "And later?")
    assert {second["response_a"], second["response_b"]} == {"It cools.", "Ask it."}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reward_model", "dpo"])
def test_training_reads_the_same_pairs(invoke, tmp_path, command):
    write_jsonl(tmp_path / "pairs.jsonl", [*WHOLE, {**WHOLE[0], "prompt": "Something else?"}])
    arguments = ("--input", tmp_path / "pairs.jsonl", "--model", "tiny", "--output", tmp_path / "m", "--labels", "hard")
    result = invoke(command, *arguments, "--dry-run")
    assert result.exit_code == 2 and "pairs.jsonl:3: the prompt is not in the conversation" in result.output
    result = invoke(command, *arguments, "--dry-run", "--json", "--skip-invalid")
    assert result.exit_code == 3 and json.loads(result.stdout)["skipped_rows"] == 1


# --- what rows carry along ----------------------------------------------------------------------------------

PROMPTS = {
    "hh": [
        {"chosen": transcript(question, good), "rejected": transcript(question, bad)}
        for question, good, bad in (("How do I dust it?", "Gently.", "Why?"), ("May I ask?", "Yes.", "No."))
    ],
    "trl": [{"prompt": say("How do I dust it?"), "chosen": say("", "Gently.")[1:], "rejected": say("", "Why?")[1:]}],
    "judged": [
        {"prompt": "How do I dust it?", "response_a": "Gently.", "response_b": "Why?", "chosen": "Gently.",
         "rejected": "Why?", "p_chosen": 0.9, "p_a": 0.9, "gold": "a", "verdicts": [], "principle": "x"}
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_new_samples_are_compared_and_not_the_pair_of_the_prompt(invoke, tmp_path, name):
    """Prompts taken from HH-RLHF, from TRL's preference format, or from the judge's own output."""
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS[name])
    files = {stage: tmp_path / f"{stage}.jsonl" for stage in ("samples", "preferences")}
    result = invoke("generate", "--input", tmp_path / "prompts.jsonl", "--model", "tiny", "--samples", "2", *SMALL,
                    "--temperature", "1.5", "--output", files["samples"])  # fmt: skip
    assert result.exit_code == 0, result.output
    samples = rows_of(files["samples"])
    assert len(samples) == 2 * len(PROMPTS[name])
    assert all(not {"chosen", "rejected", "gold", "p_chosen", "response_a"} & set(row) for row in samples)
    # Samples of other programs still carry the pair.
    write_jsonl(files["samples"], [{**row, **PROMPTS[name][0]} | {"prompt": row["prompt"]} for row in samples])
    result = invoke("judge", "--input", files["samples"], "--model", "tiny", "--pairs-per-prompt", "1",
                    "--output", files["preferences"])  # fmt: skip
    assert result.exit_code == 0, result.output
    texts = {row["response"] for row in samples}
    for row in rows_of(files["preferences"]):
        assert {row["response_a"], row["response_b"]} <= texts and "gold" not in row


def test_pairs_and_samples_in_one_run_are_refused(invoke, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Q?", "chosen": "a", "rejected": "b"}])
    write_jsonl(tmp_path / "samples.jsonl", [{"prompt": "Q?", "response": "c", "chosen": "a", "rejected": "b"}])
    result = invoke("judge", "--input", tmp_path / "pairs.jsonl", "--input", tmp_path / "samples.jsonl",
                    "--model", "tiny", "--output", tmp_path / "out.jsonl")  # fmt: skip
    assert result.exit_code == 2 and "samples.jsonl:1: a row with a response of its own" in result.output
    assert not (tmp_path / "out.jsonl.run.json").exists()


def test_an_evaluation_measures_the_new_responses(invoke, tmp_path):
    """Prompts that carry a label and a revision of an earlier response, as BeaverTails and revise.py write them."""
    carried = {"rounds": [{"principle": "x", "critique": "c", "revision": "OLD", "flags": []}], "gold": "safe"}
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Is it late?", "kind": "benign", "response": "OLD", **carried}])
    result = invoke("evaluate", "--input", tmp_path / "p.jsonl", "--model", "tiny", "--judge", "tiny",
                    "--max-new-tokens", "4", "--output", tmp_path / "e.jsonl")  # fmt: skip
    assert result.exit_code == 0, result.output
    [row] = rows_of(tmp_path / "e.classes.jsonl")
    assert row["response"] != "OLD" and "gold" not in row


# --- bad rows, other columns, many files --------------------------------------------------------------------

MIXED = [{"id": "a", "prompt": "Is it late?"}, {"id": "b", "prompt": ""}, {"id": "c", "prompt": 7},
         {"id": "d", "prompt": "Is it late?"}]  # fmt: skip


def test_bad_rows_are_skipped_counted_and_listed(invoke, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", MIXED)
    out = tmp_path / "out.jsonl"
    arguments = ("generate", "--input", tmp_path / "in.jsonl", "--model", "tiny", "--output", out, *SMALL, "--json")
    result = invoke(*arguments)
    assert result.exit_code == 2 and not list(tmp_path.glob("out*"))
    assert "in.jsonl:2: the prompt is empty" in result.output and "in.jsonl:3: the prompt is a number" in result.output
    for _ in range(2):  # the second time the output is complete
        result = invoke(*arguments, "--skip-invalid")
        assert result.exit_code == 3, result.output
        summary = json.loads(result.stdout)
        assert (summary["rows"], summary["skipped_rows"], summary["repeated_prompts"]) == (2, 2, 1)
    manifest = read_manifest(out)
    assert manifest["counts"]["skipped_rows"] == 2 and manifest["counts"]["repeated_prompts"] == 1
    assert [reason.split(": ")[0][-len("in.jsonl:2") :] for reason in manifest["skipped_rows"]] == [
        "in.jsonl:2",
        "in.jsonl:3",
    ]
    assert [row["prompt_id"] for row in rows_of(out)] == ["a", "d"]


def test_columns_are_named_and_shards_are_read_together(invoke, tmp_path):
    for number in range(3):
        write_jsonl(tmp_path / f"part-{number}.jsonl", [{"query": f"Is it {number}?"}])
    arguments = ("generate", "--model", "tiny", "--output", tmp_path / "out.jsonl", "--dry-run", "--json")
    result = invoke(*arguments, "--input", tmp_path / "part-*.jsonl", "--prompt-field", "query")
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 3
    result = invoke(*arguments, "--input", tmp_path / "part-*.jsonl")
    assert result.exit_code == 2 and "The row has: query" in result.output and "--prompt-field" in result.output
    result = invoke(*arguments, "--input", tmp_path / "shard-*.jsonl")
    assert result.exit_code == 2 and "no file matches the pattern" in result.output and "Usage" not in result.output


@pytest.mark.parametrize(
    ("row", "options", "code", "reason"),
    [
        ({"text": "Is it late?"}, (), 2, "The row has: text. Say where it is with --prompt-field COLUMN"),
        ({"prompt": "Is it late?", "is_benign": True}, (), 2, "Say where it is with --kind-field COLUMN or --kind"),
        ({"text": "Is it late?", "label": "benign"}, ("--prompt-field", "text", "--kind-field", "label"), 0, ""),
        ({"text": "Is it late?"}, ("--prompt-field", "text", "--kind", "benign"), 0, ""),
        ({"text": "Is it late?", "label": "odd"}, ("--prompt-field", "text", "--kind-field", "label"), 2, "kind 'odd'"),
        (
            {"Goal": "g", "Target": "t", "Behavior": "Lateness", "Category": "c", "Source": "Original"},
            (),
            2,
            "expected --kind harmful or --kind benign",
        ),
    ],
)
def test_an_unknown_set_is_never_measured_as_harmful(invoke, tmp_path, row, options, code, reason):
    write_jsonl(tmp_path / "set.jsonl", [row])
    result = invoke("evaluate", "--input", tmp_path / "set.jsonl", "--model", "tiny", "--judge", "tiny",
                    "--output", tmp_path / "e.jsonl", "--dry-run", "--json", *options)  # fmt: skip
    assert result.exit_code == code and reason in result.output
    if code == 0:
        assert json.loads(result.stdout)["benign"] == 1


REVISED = [{"prompt": f"Is it {n}?", "response": "No.", "rounds": [
    {"principle": "harm", "critique": "None.", "revision": "Yes.", "flags": []}]} for n in range(3)]  # fmt: skip


def test_empty_helpful_answers_are_left_out_and_counted(invoke, tmp_path):
    write_jsonl(tmp_path / "revised.jsonl", REVISED)
    answers = ["Gladly.", "", " \n\t", "\u200b\ufeff", "Of course."]
    write_jsonl(tmp_path / "helpful.jsonl", [{"messages": say(f"Help {n}?", a)} for n, a in enumerate(answers)])
    result = invoke("sft", "--input", tmp_path / "revised.jsonl", "--helpful", tmp_path / "helpful.jsonl",
                    "--model", "tiny", "--output", tmp_path / "m", "--dry-run", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["helpful"], summary["helpful_empty"], summary["revisions"]) == (2, 3, 3)
    assert "3 helpful rows have an empty response" in result.stderr


def test_helpful_answers_end_at_their_end_token(invoke, tmp_path):
    """An end token in the content, as servers leave it there: vLLM's `skip_special_tokens: false` is one way to it."""
    write_jsonl(tmp_path / "revised.jsonl", REVISED)
    answers = ["Glue it.<|im_end|>", "Wipe it.<|eot_id|><|start_header_id|>assistant", "<end_of_turn>", "Gladly."]
    write_jsonl(tmp_path / "helpful.jsonl", [{"prompt": f"Help {n}?", "response": a} for n, a in enumerate(answers)])
    result = invoke("sft", "--input", tmp_path / "revised.jsonl", "--helpful", tmp_path / "helpful.jsonl",
                    "--model", "tiny", "--output", tmp_path / "m", "--dry-run", "--json")  # fmt: skip
    summary = json.loads(result.stdout)
    assert (summary["helpful"], summary["helpful_cut"], summary["helpful_empty"]) == (3, 3, 1)
    assert "3 helpful responses hold control tokens" in result.stderr


def test_measured_responses_end_at_their_end_token(invoke, tmp_path):
    row = json.loads((TINY / "prompts" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[0])
    write_jsonl(tmp_path / "r.jsonl", [{**row, "response": "I can't help.<|im_end|>\nYes, here is how."}])
    result = invoke("evaluate", "--responses", tmp_path / "r.jsonl", "--by", "oracle", "--output", tmp_path / "e.jsonl")
    assert result.exit_code == 0, result.output
    [classified] = rows_of(tmp_path / "e.classes.jsonl")
    assert classified["response"] == "I can't help."


def test_columns_of_helpful_rows_are_named_and_those_of_revisions_are_ours(invoke, tmp_path):
    write_jsonl(tmp_path / "revised.jsonl", REVISED)
    write_jsonl(tmp_path / "helpful.jsonl", [{"instruction": "Help?", "output": "Gladly."}])
    result = invoke("sft", "--input", tmp_path / "revised.jsonl", "--helpful", tmp_path / "helpful.jsonl",
                    "--prompt-field", "instruction", "--response-field", "output",
                    "--model", "tiny", "--output", tmp_path / "m", "--dry-run", "--json")  # fmt: skip
    assert result.exit_code == 0 and json.loads(result.stdout)["helpful"] == 1


def test_the_plan_of_the_whole_method_names_the_columns_where_they_belong(invoke, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [{"query": "Is it late?"}, {"query": ""}])
    write_jsonl(tmp_path / "h.jsonl", [{"query": "Is it late?", "label": "benign"}])
    result = invoke("run", "--model", "tiny", "--input", tmp_path / "p.jsonl", "--heldout", tmp_path / "h.jsonl",
                    "--prompt-field", "query", "--kind-field", "label", "--skip-invalid",
                    "--output", tmp_path / "run", "--dry-run", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = {step["name"]: step["command"] for step in json.loads(result.stdout)["steps"]}
    assert "--prompt-field query --skip-invalid" in lines["responses"] and "--kind-field" not in lines["responses"]
    assert "--prompt-field query --kind-field label --skip-invalid" in lines["evaluate-base"]
    assert (
        "--prompt-field query" in lines["ppo"] and "--prompt-field" not in lines["judge" if "judge" in lines else "sft"]
    )
    result = invoke("run", "--model", "tiny", "--input", tmp_path / "p.jsonl", "--prompt-field", "query",
                    "--output", tmp_path / "run", "--dry-run", "--json")  # fmt: skip
    assert result.exit_code == 2 and "p.jsonl:2: the prompt is empty" in result.output


@pytest.mark.slow
def test_the_whole_method_runs_on_prompts_that_carry_pairs(invoke, tmp_path):
    """The run once ended after SFT: --pairs-per-prompt met rows that looked like pairs already."""
    questions = [row["prompt"] for row in rows_of(TINY / "prompts" / "train.jsonl")[:8]]
    pairs = [{"chosen": transcript(q, "Push it."), "rejected": transcript(q, "Why?")} for q in questions]
    write_jsonl(tmp_path / "prompts.jsonl", pairs)
    result = invoke("run", "--model", "tiny", "--input", tmp_path / "prompts.jsonl", "--limit", "8", "--rounds", "1",
                    "--heldout-limit", "16",
                    "--rl", "dpo", "--output", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    [preferences] = (tmp_path / "run").glob("*-preferences.jsonl")
    assert not any("Push it." in (row["response_a"], row["response_b"]) for row in rows_of(preferences))
