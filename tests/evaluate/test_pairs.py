"""evaluate.py --pairs: log-probabilities against a direct computation, shapes of pairs, and the task of own pairs."""

import json

import models
import pytest

from cai.base.errors import InputError
from cai.data import outputs, sources
from cai.data.readers import read_jsonl
from cai.evaluate import pairs
from cai.models import loading
from cai.models.engine import Sampling

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


def pair(number, chosen="I can't help with that.", rejected="Push, then pull.", **more):
    return {
        "id": f"{number}",
        "prompt": f"How do I open gate {number}?",
        "chosen": chosen,
        "rejected": rejected,
        **more,
    }


@pytest.fixture
def write(tmp_path):
    def to(rows, name="pairs.jsonl"):
        outputs.write_jsonl(tmp_path / name, rows)
        return str(tmp_path / name)

    return to


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def score(source, family="llama", reference=None, samples=1, **loads):
    engine = loading.load_engine(str(models.folder(family)), device="cpu", **loads)
    return list(pairs.score(source, engine, source.first_ids, samples, GREEDY, 0, reference or {}))


def logp(folder, prompt, response):
    """Of a response and its end token after the prompt: by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    chat = loading.load_chat(str(folder))
    turns = [{"role": "user", "content": prompt}]
    before = chat.encode(chat.render(turns))
    answer = [*chat.encode(response), chat.stop_id]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([before + answer])).logits[0]
    logprobs = logits.log_softmax(-1)[len(before) - 1 : -1]
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item(), len(answer)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_log_probabilities_are_those_of_a_direct_computation(write, family):
    rows = [pair(n, chosen="Ask the owner. " * n + "No.") for n in range(4)]
    source = pairs.Pairs(write(rows), None)
    scored = score(source, family, batch_size=3)
    for row, written in zip(scored, rows, strict=True):
        for side in pairs.SIDES:
            expected, tokens = logp(models.folder(family), row["prompt"], written[side].strip())
            assert row["logps"][side] == pytest.approx(expected, abs=1e-3) and row["tokens"][side] == tokens
        assert row["outright"] == (row["logps"]["chosen"] > row["logps"]["rejected"]) and "relative" not in row


def test_pairs_in_any_shape_and_what_is_left_out(write, tmp_path):
    trl = pairs.Pairs(
        write([pair(1), pair(2, chosen=None, rejected=None), pair(3, chosen="No.", rejected="No. ")]), None
    )
    assert trl.counts == {"rows": 3, "undecided": 1, "identical": 1} and [row["id"] for row in trl] == ["1"]
    gold = [{"id": f"{n}", "prompt": "p", "response_a": "x", "response_b": "yy", "gold": g} for n, g in enumerate("ab")]
    gold.append({**gold[0], "id": "2", "gold": None})
    ab = pairs.Pairs(write(gold, "gold.jsonl"), None)
    assert [(row["chosen"], row["chosen_is_a"]) for row in ab] == [("x", True), ("yy", False)]
    assert ab.counts == {"rows": 3, "no_gold": 1} and ab.first_ids == {"0"}
    judged = pairs.Pairs(write([{**gold[1], "chosen": "yy", "rejected": "x", "gold": None}], "judged.jsonl"), None)
    assert [(row["chosen"], row["chosen_is_a"]) for row in judged] == [("yy", False)]
    turns = "\n\nHuman: A?\n\nAssistant: B.\n\nHuman: And C?\n\nAssistant: "
    hh = pairs.Pairs(write([{"chosen": turns + "No.", "rejected": turns + "Yes."}], "hh.jsonl"), None)
    assert [(len(row["prompt"]), row["chosen"]) for row in hh] == [(3, "No.")]
    with pytest.raises(InputError, match="no pair with a better response"):
        pairs.Pairs(write([pair(3, chosen="No.", rejected="No.")], "none.jsonl"), None)


def test_texts_are_of_the_prompt_and_the_same_for_the_same_model(write):
    rows = [pair(1), pair(2), pair(1, id="3", rejected="Lift it.")]
    source = pairs.Pairs(write(rows), None)
    assert source.first_ids == {"1", "2"}
    before = {row["id"]: row for row in score(source, samples=2)}
    rates, counts = pairs.figures(score(source, reference=before, samples=2, batch_size=1), source)
    assert [len(before[name]["texts"]) for name in ("1", "2", "3")] == [2, 2, 0]
    assert rates["text_same"]["value"] == 1 and rates["text_same"]["n"] == 4
    assert rates["logp_margin"]["value"] == pytest.approx(0, abs=1e-3) and rates["outright_change"]["value"] == 0
    assert counts["notes"][-1] == "Has its text changed? no: 0 of 4 texts differ"


def test_a_pair_too_long_for_either_model_is_counted(write, invoke, tmp_path):
    path = write([pair(1), pair(2, chosen="Push. " * 3000)])
    result = invoke(
        "evaluate", "--pairs", path, "--model", models.folder("llama"), "--reference", models.folder("llama"),
        "--output", tmp_path / "e.jsonl", "--samples", 0, "--json",
    )  # fmt: skip
    assert result.exit_code == 3, result.output
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["failed"], summary["metrics"]["relative"]["n"]) == (2, 1, 1)
    assert "text_same" not in summary["metrics"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pairs", "FILE"], "--pairs is not clear"),
        (["--pairs", "FILE", "--reward-model", "MODEL"], "--pairs is not clear"),
        (["--pairs", "FILE", "--model", "MODEL", "--input", "FILE"], "--pairs is not clear"),
        (["--pairs", "FILE", "--model", "openai:gate"], "is on a server"),
        (["--pairs", "FILE", "--model", "MODEL", "--reference", "no/such/model"], "no such model folder"),
        (["--choice", "FILE", "--model", "openai:gate"], "is on a server"),
        (["--input", "FILE", "--model", "MODEL", "--reference", "MODEL"], "--reference without --pairs"),
        (["--input", "FILE", "--model", "MODEL", "--samples", "2"], "--samples without --pairs"),
    ],
)
def test_what_is_refused_writes_nothing(invoke, write, tmp_path, arguments, expected):
    names = {"FILE": write([pair(1)]), "MODEL": str(models.folder("llama"))}
    result = invoke("evaluate", *(names.get(a, a) for a in arguments), "--output", tmp_path / "new" / "e.jsonl")
    assert result.exit_code == 2 and expected in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_dry_run_counts(invoke, write, tmp_path):
    path = write([pair(1), pair(2), pair(1, id="3", rejected="Lift it.")])
    result = invoke(
        "evaluate", "--pairs", path, "--model", models.folder("llama"), "--reference", models.folder("qwen"),
        "--output", tmp_path / "e.jsonl", "--max-new-tokens", 10, "--dry-run", "--json",
    )  # fmt: skip
    summary = json.loads(result.stdout)
    assert (summary["pairs"], summary["model_calls"], summary["new_tokens_at_most"]) == (3, 12, 40)
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_it_goes_on_where_it_was_stopped(invoke, write, tmp_path):
    args = ["evaluate", "--pairs", write([pair(n) for n in range(5)]), "--model", models.folder("qwen")]
    args += ["--reference", models.folder("llama"), "--output", tmp_path / "e.jsonl", "--max-new-tokens", 4]
    assert invoke(*args).exit_code == 0
    whole = (tmp_path / "e.pairs.jsonl").read_bytes()
    for name in ("e.jsonl", "e.jsonl.run.json", "e.pairs.jsonl"):
        (tmp_path / name).unlink()
    lines = whole.splitlines(keepends=True)
    kept = json.dumps({**json.loads(lines[0]), "kept": True}).encode() + b"\n"
    (tmp_path / "e.pairs.jsonl.partial").write_bytes(kept + lines[1][:20])
    manifest = tmp_path / "e.pairs.jsonl.run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "running"}))
    assert invoke(*args).exit_code == 0
    rows = rows_of(tmp_path / "e.pairs.jsonl")
    assert rows[0].pop("kept") and "kept" not in rows[1]
    for row, line in zip(rows, lines, strict=True):
        written = json.loads(line)
        assert row["logps"] == pytest.approx(written["logps"], abs=1e-3) and row["texts"] == written["texts"]


def longer_is_chosen(shared_data, n=120):
    """Rows in HH-RLHF's shape, from its short rows, in which the longer response is the chosen one.

    A small model can learn that on 110 pairs; what people preferred it can't.
    """
    file = shared_data / "hh-rlhf" / "harmless-base.test.first1500.jsonl.gz"
    rows = []
    for row in sources.Source([str(file)], require=("prompt", "chosen", "rejected")):
        rejected, chosen = sorted((row["chosen"], row["rejected"]), key=len)
        is_short = isinstance(row["prompt"], str) and len(row["prompt"]) < 120 and len(chosen) < 160
        if is_short and len(rejected) > 10 and len(chosen) > 1.3 * len(rejected):
            before = f"\n\nHuman: {row['prompt']}\n\nAssistant: "
            rows.append({"chosen": before + chosen, "rejected": before + rejected})
    return rows[:n]


@pytest.mark.slow
def test_own_pairs_in_two_commands(invoke, write, tmp_path, shared_data):
    """Does it now prefer the chosen ones? Relative to before: yes. Outright: no. And its text is nearly the same.

    Text at a near tie may flip with any change of weights, so the test holds the answer to the texts themselves.
    """
    path, policy = write(longer_is_chosen(shared_data)), tmp_path / "policy"
    trained = invoke(
        "dpo", "--input", path, "--labels", "hard", "--holdout", 0.1, "--model", "tiny", "--output", policy, "--json"
    )
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout)
    assert summary["train"] + summary["held_out"] == summary["rows"] == 120 and summary["held_out"] >= 8
    assert f"--pairs {policy}/holdout.jsonl --reference tiny" in summary["next"]
    train_prompts = {row["prompt"] for row in pairs.Pairs(path, None)}
    held_out = {row["prompt"] for row in pairs.Pairs(str(policy / "holdout.jsonl"), None)}
    assert held_out < train_prompts

    output = tmp_path / "e.jsonl"
    result = invoke(
        "evaluate", "--pairs", policy / "holdout.jsonl", "--model", policy, "--reference", "tiny", "--output", output,
        "--max-new-tokens", 64,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    notes = [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]
    rates = {row["metric"]: row for row in rows_of(output)}
    same = [row["texts"] == row["reference_texts"] for row in rows_of(tmp_path / "e.pairs.jsonl")]
    changed = "no" if all(same) else "yes"
    assert [note.partition("? ")[2].partition(":")[0] for note in notes] == ["yes", "no", changed], notes
    assert rates["relative"]["low"] > 0.5 > rates["outright"]["high"] and rates["baseline_longer"]["value"] == 1
    assert rates["text_same"]["value"] == sum(same) / len(same) >= 0.7
    assert rates["text_same"]["n"] == summary["held_out"]
    # Training measured the same figures itself.
    for name in ("relative", "outright", "outright_reference"):
        assert summary["holdout"][name]["value"] == rates[name]["value"]
    assert summary["holdout"]["logp_margin"]["value"] == pytest.approx(rates["logp_margin"]["value"], abs=0.01)
