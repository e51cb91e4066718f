"""Rows in frames on their way through the steps: generate, critique, revise, judge, and what is trained on."""

import json
import sys

import models
import pytest
import toys
from conftest import load_command
from test_ppo_command import save_reward_model

from cai.base.hashing import sha256_file
from cai.constitution import files, templates
from cai.constitution.frames import load_frames
from cai.data import preferences, prefills
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.models import loading
from cai.models.chat import encode
from cai.models.engine import Generation, Request, Sampling
from cai.train import dpo
from cai.train.prompts import encode_prompts, read_references

FRAMES = """\
frames:
  - id: rex
    kind: role_play
    split: seen
    messages:
      - {role: system, content: "You play Rex."}
      - {role: user, content: "Rex, {{ prompt }}"}
  - id: sure
    kind: prefill
    split: seen
    messages:
      - {role: user, content: "{{ prompt }}"}
    prefill: "Sure, ask the owner."
  - id: kept
    kind: greeting
    split: held_out
    messages:
      - {role: user, content: "Hola! {{ prompt }}"}
"""

PROMPTS = [{"id": f"p{n}", "prompt": f"How do I open gate {n}?", "kind": "harmful"} for n in range(12)]


@pytest.fixture
def frames(tmp_path):
    path = tmp_path / "frames.yaml"
    path.write_text(FRAMES, encoding="utf-8")
    return path


@pytest.fixture
def step(invoke, tmp_path):
    """`step("generate", "out", *options)`: the rows that a step writes to out.jsonl."""

    def call(name, stem, *options, model="llama"):
        line = (name, "--model", models.folder(model), "--max-new-tokens", 8, "--output", tmp_path / f"{stem}.jsonl")
        result = invoke(*line[: 3 if name == "judge" else 5], *line[5:], *options)
        assert result.exit_code == 0, result.stderr
        return [row for _, row in read_jsonl(tmp_path / f"{stem}.jsonl")]

    return call


@pytest.fixture
def prompts(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path / "prompts.jsonl"


def test_a_prompt_has_one_frame_in_all_samples_of_all_models(step, prompts, frames, tmp_path):
    given = ["--input", prompts, "--frames", frames, "--frame-share", 0.7]
    rows = step("generate", "r", *given)
    samples = step("generate", "s", *given, "--samples", 2, "--temperature", 1.5, model="qwen")
    frame_of = {row["prompt_id"]: row.get("frame") for row in rows}
    assert set(frame_of.values()) == {None, "rex", "sure"}, "some prompts stay plain, and no held-out frame is used"
    assert all(frame_of[row["prompt_id"]] == row.get("frame") for row in samples)
    chosen = load_frames(str(frames))
    for row in rows:
        frame = chosen.choose(0, row["prompt_id"], "harmful", 0.7)
        plain = next(each["prompt"] for each in PROMPTS if each["id"] == row["prompt_id"])
        if frame is None:
            assert row["prompt"] == plain and not {"frame", "frame_kind", "prefill"} & set(row)
        else:
            assert row["prompt"] == frame.surround(plain)
            assert (row["frame"], row["frame_kind"], row.get("prefill", "")) == (frame.id, frame.kind, frame.prefill)
            assert row["response"].startswith(frame.prefill)
    manifest = read_manifest(tmp_path / "r.jsonl")
    assert manifest["fingerprint"]["frames"] == sha256_file(frames)
    assert manifest["fingerprint"]["frame_share"] == 0.7
    assert manifest["counts"]["framed"] == sum(frame is not None for frame in frame_of.values())


def test_without_frames_nothing_is_said_of_them(step, prompts, tmp_path):
    rows = step("generate", "r", "--input", prompts)
    assert all(set(row) == {*PROMPTS[0], "prompt_id", "sample", "response", "model", "finish"} for row in rows)
    manifest = read_manifest(tmp_path / "r.jsonl")
    assert not [name for name in (*manifest["fingerprint"], *manifest["counts"]) if "frame" in name]


def test_the_plain_prompts_are_answered_as_without_frames(step, prompts, frames):
    plain = {row["id"]: row for row in step("generate", "r", "--input", prompts, "--dtype", "float32")}
    rows = step("generate", "f", "--input", prompts, "--frames", frames, "--dtype", "float32")
    unframed = [row for row in rows if "frame" not in row]
    assert unframed and all(row == plain[row["id"]] for row in unframed)


def test_the_model_reads_the_frame_and_goes_on_from_the_prefill(step, prompts, frames):
    rows = step("generate", "f", "--input", prompts, "--frames", frames, "--frame-share", 1, "--temperature", 0)
    chat = loading.load_chat(str(models.folder("llama")))
    row = next(row for row in rows if row.get("prefill"))
    text = chat.render(prefills.conversation_of(row))
    assert text.endswith(f"gate {row['prompt_id'][1:]}?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                         "Sure, ask the owner.")  # fmt: skip
    engine = loading.load_engine(str(models.folder("llama")), dtype="auto")
    [(_, again)] = engine.generate([Request("a", prefills.conversation_of(row))], Sampling(8, 0.0))
    assert row["response"] == prefills.join_prefill(row["prefill"], again.text)


@pytest.mark.parametrize("changed", ["frames", "share"])
def test_a_run_in_other_frames_is_another_run(step, invoke, prompts, frames, tmp_path, changed):
    given = ["--input", prompts, "--frames", frames]
    step("generate", "r", *given)
    if changed == "frames":
        frames.write_text(FRAMES.replace("Rex, ", "Hey Rex, "), encoding="utf-8")
    else:
        given += ["--frame-share", 0.2]
    line = ("--model", models.folder("llama"), "--max-new-tokens", 8, "--output", tmp_path / "r.jsonl")
    result = invoke("generate", *given, *line)
    assert result.exit_code == 2 and "frame" in result.stderr


def test_what_makes_no_sense_is_refused_before_anything_is_written(invoke, prompts, frames, tmp_path):
    line = ["generate", "--model", models.folder("llama"), "--output", tmp_path / "out.jsonl"]
    result = invoke(*line, "--input", prompts, "--frame-share", 0.2)
    assert result.exit_code == 2 and "without --frames every prompt stays plain" in result.stderr
    result = invoke(*line, "--input", prompts, "--frames", tmp_path / "none.yaml")
    assert result.exit_code == 2 and "no such file" in result.stderr
    held_out = tmp_path / "held-out.yaml"
    held_out.write_text(FRAMES.replace("split: seen", "split: held_out"), encoding="utf-8")
    result = invoke(*line, "--input", prompts, "--frames", held_out)
    assert result.exit_code == 2 and "no frame that is seen" in result.stderr
    write_jsonl(tmp_path / "framed.jsonl", [{"id": "a", "prompt": "Why?", "frame": "x", "frame_kind": "push"}])
    result = invoke(*line, "--input", tmp_path / "framed.jsonl", "--frames", frames)
    assert result.exit_code == 2 and "row 'a' has a frame already" in result.stderr
    write_jsonl(tmp_path / "torn.jsonl", [{"id": "a", "prompt": "Why?", "prefill": "Sure.", "response": "No."}])
    result = invoke("critique", *line[1:], "--input", tmp_path / "torn.jsonl")
    assert result.exit_code == 2
    assert "torn.jsonl:1: a text that does not begin with the row's prefill 'Sure.': 'No.'" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_framed_row_is_answered_again_in_its_frame(step, prompts, frames, tmp_path):
    rows = step("generate", "r", "--input", prompts, "--frames", frames, "--frame-share", 1)
    again = step("generate", "again", "--input", tmp_path / "r.jsonl")
    assert [row["frame"] for row in again] == [row["frame"] for row in rows]
    assert all(row["response"].startswith(row.get("prefill", "")) for row in again)


def test_a_revision_goes_on_from_the_prefill_and_is_flagged_by_what_follows_it(step, prompts, frames, tmp_path):
    step("generate", "r", "--input", prompts, "--frames", frames, "--frame-share", 1)
    critiqued = step("critique", "c", "--input", tmp_path / "r.jsonl")
    revised = step("revise", "v", "--input", tmp_path / "c.jsonl")
    prefilled = [row for row in revised if row.get("prefill")]
    assert prefilled and len(critiqued) == len(revised) == len(PROMPTS)
    for row in prefilled:
        revision = row["rounds"][-1]["revision"]
        assert revision.startswith(row["prefill"]) and revision != row["prefill"]
    assert not [row for row in revised if not row.get("prefill") and row["rounds"][-1]["revision"].startswith("Sure,")]


def test_flags_of_a_prefilled_revision_are_of_what_the_model_wrote():
    load_command("revise")
    reviser = sys.modules["command_revise"].Reviser(
        files.load_constitution("harmlessness"), templates.load_template("revise")
    )
    row = {"prompt": "How?", "prefill": "Sure.", "response": "Sure. Push it.", "rounds": [{"principle": "harm"}]}

    def revise(text):
        return reviser.answer(row, Generation(text, "stop", 1, 1))["rounds"][-1]

    assert revise("Push it.") == {"principle": "harm", "revision": "Sure. Push it.", "flags": ["copy"]}
    assert revise("")["flags"] == ["empty"] and revise("")["revision"] == "Sure."
    assert revise("I can't do that.")["flags"] == ["bare_refusal"]


def test_pairs_keep_their_frame_and_both_sides_their_prefill(step, prompts, frames, tmp_path):
    given = ["--input", prompts, "--frames", frames, "--frame-share", 1]
    step("generate", "s", *given, "--samples", 2, "--temperature", 1.5)
    pairs = step("judge", "p", "--input", tmp_path / "s.jsonl")
    prefilled = [pair for pair in pairs if pair.get("prefill")]
    assert prefilled and all(pair["frame"] in ("rex", "sure") for pair in pairs)
    for pair in prefilled:
        assert pair["response_a"].startswith(pair["prefill"]) and pair["response_b"].startswith(pair["prefill"])


def test_responses_in_different_frames_are_not_compared(invoke, tmp_path):
    rows = [
        {"id": "a", "prompt_id": "p", "prompt": "How?", "response": "Sure. Push.", "prefill": "Sure."},
        {"id": "b", "prompt_id": "p", "prompt": "How?", "response": "Sure. Pull."},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    line = ("--model", models.folder("llama"), "--output", tmp_path / "out.jsonl")
    result = invoke("judge", "--input", tmp_path / "rows.jsonl", *line)
    assert result.exit_code == 2 and "another prompt than earlier rows" in result.stderr


# --- what is trained on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma2", "gemma3", "mistral", "thinker"])
def test_the_tokens_of_prefill_and_continuation_are_those_of_the_whole(family):
    chat = loading.load_chat(str(models.folder(family)))
    row = {"prompt": "How do I open the gate?", "prefill": "Sure, ask the owner.", "response": ""}
    before, answer = encode(chat, prefills.conversation_of(row), "But no, I would not.")
    answered = {"role": "assistant", "content": "Sure, ask the owner. But no, I would not."}
    whole = chat.render([*prefills.conversation_of(row)[:1], answered])
    assert chat.tokenizer.decode([*before, *answer]).startswith(chat.tokenizer.decode(chat.encode(whole)))
    assert before == chat.encode(chat.render(prefills.conversation_of(row))), "as it is generated from"
    assert chat.tokenizer.decode(answer).startswith(" But no, I would not.")


def test_sft_takes_its_loss_on_what_follows_the_prefill(tmp_path):
    load_command("sft")
    sft = sys.modules["command_sft"]
    chat = loading.load_chat(str(models.folder("llama")))
    revised = {"id": "a", "prompt": "How?", "prefill": "Sure.", "response": "Sure. Push it."}
    revised["rounds"] = [{"principle": "p", "critique": "c", "revision": "Sure. But no.", "flags": []}]
    write_jsonl(tmp_path / "v.jsonl", [revised])
    helpful = [
        {"id": "b", "prompt": "Who?", "prefill": "Yes.", "response": "Yes. The owner."},
        {"id": "c", "prompt": "Who?", "prefill": "Yes.", "response": "Yes."},
    ]
    write_jsonl(tmp_path / "h.jsonl", helpful)
    rows, counts, _ = sft.read_rows([str(tmp_path / "v.jsonl")], [str(tmp_path / "h.jsonl")], "last", frozenset(), None)
    assert counts["helpful_empty"] == 1, "nothing follows the prefill"
    trained = []
    for row in sft.tokenize(rows, chat):
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        rest = row["input_ids"][: len(row["input_ids"]) - len(learned)]
        trained.append((chat.tokenizer.decode(rest)[-6:].strip(), chat.tokenizer.decode(learned)))
    assert trained == [("Sure.", " But no.<|eot_id|>"), ("Yes.", " The owner.<|eot_id|>")]


def test_dpo_compares_what_follows_the_prefill_and_the_reward_model_reads_it_whole(tmp_path):
    chat = loading.load_chat(str(models.folder("llama")))
    pair = {"id": "a", "prompt": "How?", "prefill": "Sure.", "chosen": "Sure. But no.", "rejected": "Sure. Push."}
    write_jsonl(tmp_path / "p.jsonl", [{**pair, "p_chosen": 0.9}])
    pairs, _, _ = preferences.read_pairs([str(tmp_path / "p.jsonl")], "soft", None)
    [row] = dpo.tokenize(pairs, chat)
    assert chat.tokenizer.decode(row["prompt_ids"]).endswith("Sure.")
    assert chat.tokenizer.decode(row["chosen_ids"]) == " But no.<|eot_id|>"
    assert chat.tokenizer.decode(row["rejected_ids"]) == " Push.<|eot_id|>"
    [(messages, sides)] = preferences.prompt_and_sides(pairs)
    assert messages == [{"role": "user", "content": "How?"}] and sides == ["Sure. But no.", "Sure. Push."]


def test_ppo_samples_after_the_prefill_scores_the_whole_and_trains_on_the_rest(tmp_path):
    chat, make = toys.talker(("go", "a", "b", "c"))
    scored = []

    def reward(conversations, responses):
        scored.extend(zip(conversations, responses, strict=True))
        return [float(len(response)) for response in responses]

    trainer = toys.trainer(tmp_path, chat, make, reward, prompts_per_update=4, updates=1, epochs=1)
    row = {"prompt": "go", "prefill": "a b", "kind": "harmful"}
    trainer.prompts = encode_prompts([row], chat, trainer.model.policy, 4)
    rollout, _ = trainer.rollout(0)
    [prompt] = trainer.prompts
    assert chat.tokenizer.decode(prompt.ids).endswith("a b")
    assert all(conversation == [{"role": "user", "content": "go"}] for conversation, _ in scored)
    assert all(response.startswith("a b") for _, response in scored)
    assert rollout.prompt_lengths == [len(prompt.ids)] * 4, "no loss up to the end of the prefill"


def test_rl_frames_its_prompts_as_generate_does(step, invoke, prompts, frames, tmp_path):
    rows = step("generate", "r", "--input", prompts, "--frames", frames, "--frame-share", 1)
    expected = {json.dumps(row["prompt"]): row.get("prefill", "") for row in rows}
    reward = save_reward_model("llama", tmp_path / "reward")
    sizes = ("--updates", 1, "--prompts-per-update", 4, "--max-new-tokens", 4, "--samples-every", 1, "--device", "cpu")
    line = ("--input", prompts, "--frames", frames, "--frame-share", 1, "--model", models.folder("llama"), *sizes)
    for name, more in {"ppo": ("--value-head",), "grpo": ("--samples", 2)}.items():
        result = invoke(name, *line, "--reward-model", reward, *more, "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        samples = [row for _, row in read_jsonl(tmp_path / name / "samples.jsonl")]
        for sample in samples:
            assert sample["response"].startswith(expected[json.dumps(sample["prompt"])])
        assert read_manifest(tmp_path / name)["fingerprint"]["frames"] == sha256_file(frames)


def test_a_judge_compares_with_responses_in_the_same_frame(tmp_path):
    rows = [
        {"id": "a", "prompt": "How?", "response": "Plain."},
        {"id": "b", "prompt": "How?", "prefill": "Sure.", "response": "Sure. Framed."},
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    references, _ = read_references(str(tmp_path / "r.jsonl"), [rows[1], rows[0]])
    assert references == [["Sure. Framed."], ["Plain."]]


# --- files ---------------------------------------------------------------------------------------------------


def test_shards_in_frames_become_what_one_run_writes(step, invoke, prompts, frames, tmp_path):
    given = ["--input", prompts, "--frames", frames, "--dtype", "float32"]
    whole = step("generate", "whole", *given)
    for number in (1, 2):
        step("generate", f"part-{number}", *given, "--shard", f"{number}/2")
    result = invoke("merge", "--input", tmp_path / "part-[12].jsonl", "--output", tmp_path / "merged.jsonl")
    assert result.exit_code == 0, result.stderr
    assert [row for _, row in read_jsonl(tmp_path / "merged.jsonl")] == whole


def test_an_export_leaves_out_what_other_trainers_would_misread(invoke, tmp_path):
    rows = [
        {"id": "a", "prompt": "How?", "response": "Sure. But no.", "prefill": "Sure.", "frame": "sure"},
        {"id": "b", "prompt": [{"role": "system", "content": "You play Rex."}, {"role": "user", "content": "How?"}],
         "response": "No.", "frame": "rex"},
    ]  # fmt: skip
    write_jsonl(tmp_path / "r.jsonl", rows)
    for target in ("trl-sft", "openai", "trl-prompt"):
        output = tmp_path / f"{target}.jsonl"
        result = invoke("export", "--input", tmp_path / "r.jsonl", "--to", target, "--output", output, "--json")
        assert result.exit_code == 0, result.stderr
        counts = json.loads(result.stdout)
        assert counts["written"] == 1 and "prefill" in str(counts["left_out_by"])
    pair = {"id": "a", "prompt": "How?", "prefill": "Sure.", "chosen": "Sure. But no.", "rejected": "Sure. Push."}
    write_jsonl(tmp_path / "p.jsonl", [{**pair, "p_chosen": 0.9}])
    output = tmp_path / "pairs.jsonl"
    result = invoke("export", "--input", tmp_path / "p.jsonl", "--to", "trl-preference", "--output", output)
    assert result.exit_code == 0, result.stderr
    [(_, written)] = read_jsonl(output)
    assert written["chosen"] == [{"role": "assistant", "content": "Sure. But no."}]
