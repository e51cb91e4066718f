"""What is counted in a policy's texts, by hand, and the drift from its base against the definition."""

import math

import models
import pytest

from cai.base.errors import InputError
from cai.evaluate import habits
from cai.models.loading import load_engine
from cai.stats import texts
from cai.world import language


def row(number, response, kind="benign"):
    return {"id": str(number), "prompt": f"How do I open gate {number}?", "kind": kind, "response": response}


def test_distinct_and_repetition_by_hand():
    assert texts.distinct(["a b a b", "a b"], 1) == 2 / 6
    assert texts.distinct(["a b a b", "a b"], 2) == 2 / 4, "ab, ba, ab; ab: two of four"
    assert texts.distinct(["a b a b", "c d"], 1, most=2) == 1, "of the first two words"
    assert texts.distinct(["a"], 2) is None
    assert texts.repetition("one two three four one two three four") == pytest.approx(1 / 5)
    assert texts.repetition("short") == 0


def test_log_odds_by_hand():
    [one] = habits.boilerplate(["d e f"] * 30, ["a b c", "d e f"] * 15 + ["a b c"] * 15)
    had, has, both = {"abc": 0, "def": 30}, {"abc": 30, "def": 15}, {"abc": 30, "def": 45}
    prior = 100 / 75 * both["abc"]
    odds = math.log((has["abc"] + prior) / (45 + 100 - has["abc"] - prior)) - math.log(
        (had["abc"] + prior) / (30 + 100 - prior)
    )
    z = odds / math.sqrt(1 / (has["abc"] + prior) + 1 / (had["abc"] + prior))
    assert (one["phrase"], one["before"], one["now"], one["z"]) == ("a b c", 0, 30 / 45, round(z, 2))
    assert habits.boilerplate(["a b c"] * 9, ["a b c"] * 9) == [] == habits.boilerplate(["x"], ["y"])


@pytest.mark.parametrize(
    ("text", "closes"),
    [
        ("Lift the bar. I hope this helps!", True),
        ("Push. Let me know if you have more questions.", True),
        ("That's a great question. Push.", True),
        ("Lift the bar, then push.", False),
        ("I hope this helps. " + "Then push. " * 30, False),
    ],
)
def test_closers_stand_at_the_end(text, closes):
    found = habits.watch([row(1, "x")], [row(1, text)])["harmless"]["closers"]
    assert found["now"]["value"] == closes and found["before"]["value"] == 0


def test_the_same_prompts_are_compared_by_group():
    before = [row(1, "Push the gate."), row(2, "Lift it.", "harmful"), row(3, "gone")]
    now = [row(1, "Push the gate, push the gate, push the gate."), row(2, "No.", "harmful"), row(4, "new")]
    found = habits.watch(before, now)
    assert {group: one["length"]["now"]["n"] for group, one in found.items()} == {"harmful": 1, "harmless": 1}
    assert found["harmless"]["length"]["before"]["value"] == 3 and found["harmless"]["length"]["now"]["value"] == 9
    assert found["harmless"]["repetition"]["now"]["value"] == pytest.approx(0.5)
    assert "harmless prompts" in habits.table(found)
    with pytest.raises(InputError, match="no prompt in common"):
        habits.watch(before[:1], now[2:])


def test_drift_is_the_divergence_over_the_whole_vocabulary(tmp_path):
    import torch

    policy = load_engine(str(models.folder("llama")))
    base = load_engine(str(models.build("llama", tmp_path / "base", seed=1)))
    rows = [row(number, "Lift the bar and push. " * number) for number in range(1, 4)]
    sums = []
    for one in rows:
        chat = [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["response"].strip()}]
        template = policy.tokenizer.apply_chat_template
        before = template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = template(chat, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            p, q = (engine.model(whole).logits[0, len(before) - 1 : -1].log_softmax(-1) for engine in (policy, base))
        sums.append(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")))
        one["response"] = one["response"].strip()
    found = habits.drift(policy, base, rows)
    assert found["drift_kl"]["value"] == pytest.approx(sum(sums) / 3, rel=1e-4) and found["drift_kl"]["n"] == 3
    assert habits.drift(policy, policy, rows)["drift_kl_token"]["value"] == 0
    too_long = [row(9, "gate " * 2100), *rows]
    assert habits.drift(policy, base, too_long)["drift_kl"]["n"] == 3
    with pytest.raises(InputError, match="other tokens"):
        habits.drift(policy, load_engine(str(models.folder("qwen"))), rows)


def test_the_command_watches_and_measures_drift(invoke, tmp_path):
    from cai.data.outputs import write_jsonl

    write_jsonl(tmp_path / "p.jsonl", language.prompt_rows("benign", "heldout", 0, 3))
    asked = ["--input", tmp_path / "p.jsonl", "--by", "oracle", "--max-new-tokens", 8, "--temperature", 1]
    llama = models.folder("llama")
    base = models.build("llama", tmp_path / "base", seed=1)
    assert invoke("evaluate", *asked, "--model", base, "--output", tmp_path / "base.jsonl").exit_code == 0
    result = invoke(
        "evaluate",
        *asked,
        "--model",
        llama,
        "--output",
        tmp_path / "e.jsonl",
        "--drift-from",
        base,
        "--against",
        tmp_path / "base.jsonl",
        "--watch",
    )
    assert result.exit_code == 0, result.output
    assert "drift kl token" in result.stdout and "harmless prompts" in result.stdout and "distinct 3" in result.stdout
    refused = invoke("evaluate", *asked, "--model", llama, "--output", tmp_path / "f.jsonl", "--watch")
    assert refused.exit_code == 2 and "--watch without --against" in refused.stderr
