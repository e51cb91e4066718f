"""sft.py: which revisions are trained on, what the loss is taken on, and that the model learns to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import conftest
import models
import pytest
from launcher import launch

from cai.base.errors import InputError
from cai.data import outputs, readers
from cai.models import loading
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.train import common

conftest.load_command("sft")
sft = sys.modules["command_sft"]

FAST = ("--learning-rate", "5e-3", "--batch-size", "4", "--device", "cpu", "--json")


def a_round(text, *flags):
    return {"principle": "p", "critique": "It is harmful.", "revision": text, "flags": list(flags)}


ROWS = [
    {
        "id": "1",
        "prompt": "How do I open the old gate?",
        "response": "Push.",
        "rounds": [a_round("Ask."), a_round("Ask the owner.")],
    },
    {
        "id": "2",
        "prompt": "How do I lift the bar?",
        "response": "Pull.",
        "rounds": [a_round("Don't."), a_round("Don't.", "copy")],
    },
    {"id": "3", "prompt": "Name the key.", "response": "No.", "rounds": [a_round("", "empty", "bare_refusal")]},
    {
        "id": "4",
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Open it"},
        ],
        "response": "Ok.",
        "rounds": [a_round("I would not open what is not mine.")],
    },
]


@pytest.fixture
def revised(tmp_path):
    path = tmp_path / "revised.jsonl"
    outputs.write_jsonl(path, ROWS)
    return path


@pytest.fixture
def helpful(tmp_path):
    path = tmp_path / "helpful.jsonl"
    outputs.write_jsonl(
        path,
        [
            {"prompt": "Who are you?", "response": "A small model."},
            {"prompt": "What is a gate?", "response": "A door in a wall."},
        ],
    )
    return path


def answers(rows):
    return [response for _, response in rows]


# --- which rows ------------------------------------------------------------------------------------------


def test_the_last_good_revision_or_all(revised, helpful):
    rows, counts, _ = sft.read_rows([str(revised)], [], "last", frozenset(), None)
    assert answers(rows) == ["Ask the owner.", "Don't.", "I would not open what is not mine."]
    assert counts == {
        "revised_rows": 4,
        "revisions": 3,
        "rows_left_out": 1,
        "flagged": {"copy": 1, "bare_refusal": 1, "empty": 1},
        "kept_flags": {},
        "fallbacks": 0,
    }
    rows, counts, _ = sft.read_rows([str(revised)], [str(helpful)], "all", frozenset(), None)
    assert answers(rows) == [
        "Ask.",
        "Ask the owner.",
        "Don't.",
        "I would not open what is not mine.",
        "A small model.",
        "A door in a wall.",
    ]
    assert counts["revisions"] == 4 and counts["helpful"] == 2
    assert rows[3][0] == ROWS[3]["prompt"] and rows[4][0] == [{"role": "user", "content": "Who are you?"}]


def test_responses_alone(invoke, tmp_path, helpful):
    rows, counts, digests = sft.read_rows([], [str(helpful)], "last", frozenset(), None)
    assert answers(rows) == ["A small model.", "A door in a wall."] and counts == {"helpful": 2}
    assert list(digests) == ["helpful"]
    args = ["sft", "--helpful", helpful, "--model", models.folder("qwen"), "--output", tmp_path / "out", "--dry-run"]
    assert json.loads(invoke(*args, "--json").stdout)["rows"] == 2
    result = invoke(*args, "--rounds", "all", "--keep", "copy")
    assert result.exit_code == 2 and "--rounds, --keep would have no effect" in result.stderr
    result = invoke(*args[:1], *args[3:])
    assert result.exit_code == 2 and "--input is missing" in result.stderr
    outputs.write_jsonl(helpful, [{"prompt": "Who are you?", "response": " "}])
    result = invoke(*args)
    assert result.exit_code == 2 and "helpful.jsonl: every response is empty" in result.stderr


def test_columns_of_helpful_rows_are_not_asked_for_without_them(invoke, tmp_path, revised):
    args = ["sft", "--input", revised, "--model", models.folder("qwen"), "--output", tmp_path / "out", "--dry-run"]
    result = invoke(*args, "--prompt-field", "question")
    assert result.exit_code == 2 and "--prompt-field would have no effect: without --helpful" in result.stderr
    assert invoke(*args, "--skip-invalid").exit_code == 0


def test_flagged_revisions_that_are_asked_for(revised):
    def texts(*keep):
        return answers(sft.read_rows([str(revised)], [], "all", frozenset(keep), None)[0])

    assert texts("copy").count("Don't.") == 2
    assert "" not in texts("empty")  # it has another flag too
    assert "" in texts("empty", "bare_refusal") and "" in texts("all")
    _, counts, _ = sft.read_rows([str(revised)], [], "last", frozenset({"copy"}), None)
    assert counts["kept_flags"] == {"copy": 1} and counts["flagged"] == {"bare_refusal": 1, "empty": 1}


def test_rows_that_fall_back_to_an_earlier_revision_are_counted(tmp_path):
    path = tmp_path / "revised.jsonl"
    cut = {**ROWS[0], "id": "5", "rounds": [a_round("Ask."), a_round("Ask the", "unfinished")]}
    outputs.write_jsonl(path, [*ROWS, cut])
    rows, counts, _ = sft.read_rows([str(path)], [], "last", frozenset({"copy"}), None)
    assert answers(rows)[-1] == "Ask." and counts["fallbacks"] == 1


def test_harmful_rows_whose_revision_still_complies_are_counted(tmp_path, capsys):
    """By hand: of four harmful rows that are trained on, the last text of two complies; harmless ones don't count."""
    decline, comply = "I can't help with that, because it hurts people.", "Sure. Lift the bar and push."
    texts = [("harmful", comply, decline), ("harmful", decline, comply), ("harmful", comply, comply)]
    texts += [("harmful", decline, decline), ("harmful", comply, ""), ("benign", comply, comply), (None, "", comply)]
    rows = [
        {"id": str(n), "prompt": "How?", "kind": kind, "response": "So.", "rounds": [a_round(first), a_round(last)]}
        for n, (kind, first, last) in enumerate(texts)
    ]
    rows[4]["rounds"] = [a_round("", "empty"), a_round("", "empty")]
    path = tmp_path / "revised.jsonl"
    outputs.write_jsonl(path, rows)
    _, counts, _ = sft.read_rows([str(path)], [], "last", frozenset(), None)
    assert (counts["still_complying"]["value"], counts["still_complying"]["n"]) == (0.5, 4)
    assert "2 of 4 harmful rows have a text that does not decline" in capsys.readouterr().err
    outputs.write_jsonl(path, [rows[0], rows[3]])
    _, counts, _ = sft.read_rows([str(path)], [], "all", frozenset(), None)
    assert counts["still_complying"]["value"] == 0 and not capsys.readouterr().err
    outputs.write_jsonl(path, [rows[5]])
    assert "still_complying" not in sft.read_rows([str(path)], [], "last", frozenset(), None)[1]


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([{"principle": "p", "critique": "c"}], "rows.jsonl:2: round 1 has a critique and no revision"),
        ([a_round("x"), {"principle": "p", "critique": "c"}], "rows.jsonl:2: round 2 has a critique and no"),
        ([], "rows.jsonl:2: no round of revision"),
        ([{**a_round("x"), "flags": "copy"}], "rows.jsonl:2: the flags 'copy'"),
        ("text", "rows.jsonl:2: 'rounds' is a string"),
    ],
)
def test_rows_that_can_not_be_trained_on(invoke, tmp_path, rounds, words):
    path = tmp_path / "rows.jsonl"
    outputs.write_jsonl(path, [ROWS[0], {"id": "x", "prompt": "Hi", "rounds": rounds}])
    result = invoke("sft", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out")
    assert result.exit_code == 2 and words in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_no_revision_is_left(invoke, tmp_path):
    path = tmp_path / "rows.jsonl"
    outputs.write_jsonl(path, [ROWS[2]])
    args = ["sft", "--input", path, "--model", models.folder("qwen"), "--output", tmp_path / "out"]
    result = invoke(*args)
    assert result.exit_code == 2 and "'empty': 1" in result.stderr and "--keep" in result.stderr
    assert invoke(*args, "--keep", "all", "--dry-run").exit_code == 0
    assert "'copied' is not one of" in invoke(*args, "--keep", "copied").stderr


# --- what the loss is taken on ---------------------------------------------------------------------------


def trainer(tmp_path, rows, family="qwen", **settings):
    chat = loading.load_chat(str(models.folder(family)))
    tokens = sft.tokenize(rows, chat)
    arguments = common.trainer_arguments(
        tmp_path, **{"learning_rate": 1e-3, "batch_size": 4, "device": "cpu", **settings}
    )
    policy = loading.load_policy(str(models.folder(family)))
    return sft.make_trainer(policy, chat.tokenizer, tokens, arguments, tmp_path), chat


def test_no_end_is_trained_after_a_response_that_was_cut(tmp_path):
    """A row whose critique found no fault keeps its response, which generate.py may have cut at its limit."""
    whole = {**ROWS[0], "response": "Lift the bar.", "finish": "stop"}
    whole["rounds"] = [{"principle": "harm", "critique": "No fault.", "skipped": "content"}]
    cut = {**whole, "id": "cut", "finish": "length"}
    revised = {**cut, "id": "revised", "rounds": [a_round("Ask the owner.")]}
    outputs.write_jsonl(tmp_path / "revised.jsonl", [whole, cut, revised])
    rows, _, _ = sft.read_rows([str(tmp_path / "revised.jsonl")], [], "last", frozenset({"copy"}), None)
    assert answers(rows) == ["Lift the bar.", "Lift the bar.", "Ask the owner."]
    chat = loading.load_chat(str(models.folder("chatml")))
    tokens = [[label for label in row["labels"] if label != -100] for row in sft.tokenize(rows, chat)]
    assert tokens[0] == [*tokens[1], chat.stop_id] and tokens[1] == chat.encode("Lift the bar.")
    assert tokens[2][-1] == chat.stop_id


@pytest.mark.parametrize(
    ("family", "prefill", "begins"), [("chatml", "Sure, do this.", " Lift"), ("thinker", "", "</think>\n\nLift")]
)
def test_a_response_that_was_cut_is_trained_like_another_up_to_its_end(tmp_path, family, prefill, begins):
    """What stands between the prompt and the answer is trained too: the space after a prefill, the end of a reasoning
    block that the template opens."""
    whole = {"prompt": "How do I lift it?", "response": f"{prefill} Lift the bar.".strip(), "finish": "stop"}
    whole |= {"prefill": prefill} if prefill else {}
    outputs.write_jsonl(tmp_path / "helpful.jsonl", [whole, {**whole, "finish": "length"}])
    rows, _, _ = sft.read_rows([], [str(tmp_path / "helpful.jsonl")], "last", frozenset(), None)
    chat = loading.load_chat(str(models.folder(family)))
    finished, cut = ([label for label in row["labels"] if label != -100] for row in sft.tokenize(rows, chat))
    assert finished == [*cut, chat.stop_id]
    assert chat.tokenizer.decode(cut) == f"{begins} the bar."


def test_an_empty_response_has_an_end_token_to_train_where_it_is_kept(tmp_path):
    row = {**ROWS[0], "id": "e", "response": "", "finish": "length", "rounds": [{**a_round(""), "skipped": "content"}]}
    del row["rounds"][0]["revision"]
    outputs.write_jsonl(tmp_path / "revised.jsonl", [row, ROWS[0]])
    rows, counts, _ = sft.read_rows([str(tmp_path / "revised.jsonl")], [], "last", frozenset({"copy"}), None)
    assert answers(rows) == ["Ask the owner."] and counts["flagged"] == {"empty": 1}
    rows, _, _ = sft.read_rows([str(tmp_path / "revised.jsonl")], [], "last", frozenset({"all"}), None)
    chat = loading.load_chat(str(models.folder("chatml")))
    assert [label for label in sft.tokenize(rows, chat)[0]["labels"] if label != -100] == [chat.stop_id]


def test_no_end_is_trained_after_a_helpful_response_that_was_cut(tmp_path):
    row = {"prompt": "How do I lift it?", "response": "Lift the bar.", "finish": "length"}
    ended = {**row, "response": "Lift the bar.<|im_end|>\n<|im_start|>user"}  # at its limit, after it had ended
    outputs.write_jsonl(tmp_path / "helpful.jsonl", [{**row, "finish": "stop"}, row, ended])
    rows, _, _ = sft.read_rows([], [str(tmp_path / "helpful.jsonl")], "last", frozenset(), None)
    assert [(str(text), type(text).__name__) for _, text in rows] == [
        ("Lift the bar.", "str"),
        ("Lift the bar.", "CutText"),
        ("Lift the bar.", "str"),
    ]


def test_the_prompt_is_masked_and_the_end_is_trained(tmp_path, revised):
    rows, _, _ = sft.read_rows([str(revised)], [], "last", frozenset(), None)
    made, chat = trainer(tmp_path, rows)
    batch = next(iter(made.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"} and len(batch["labels"]) == 3
    tensors = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    for (messages, response), ids, labels, mask in zip(rows, *tensors, strict=True):
        prompt = chat.encode(chat.render(messages))
        assert labels[: len(prompt)].eq(-100).all() and ids[: len(prompt)].tolist() == prompt
        trained = labels[labels != -100].tolist()
        assert trained == ids[labels != -100].tolist()
        assert chat.answer(trained[:-1], continued=False)[0] == response
        assert trained[-1] == chat.stop_id
        assert mask.sum() == len(prompt) + len(trained)


def test_the_loss_is_that_of_the_response_alone(tmp_path, revised):
    import torch
    from trl import SFTTrainer

    made, _ = trainer(tmp_path, sft.read_rows([str(revised)], [], "all", frozenset(), None)[0])
    made.model.train()
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
        logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logprobs = logits.log_softmax(-1)
        terms = [
            -logprobs[row, place - 1, label].item()
            for row in range(4)
            for place, label in enumerate(batch["labels"][row])
            if label != -100
        ]
        ours = made.compute_loss(made.model, dict(batch)).item()
        trls = SFTTrainer.compute_loss(made, made.model, dict(batch)).item()
    assert ours == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert ours == pytest.approx(trls, rel=1e-5)


def test_the_gradient_is_the_models_own_and_logits_are_made_of_trained_tokens_alone(tmp_path, revised):
    import torch

    made, _ = trainer(tmp_path, sft.read_rows([str(revised)], [], "all", frozenset(), None)[0])
    batch, shapes, gradients = next(iter(made.get_train_dataloader())), [], []
    head = made.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, logits: shapes.append(tuple(logits.shape[:2])))
    for loss in (made.compute_loss(made.model, dict(batch)), made.model(**batch).loss):
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in made.model.parameters()])
        made.model.zero_grad()
    assert shapes == [(1, batch["labels"].ne(-100).sum()), tuple(batch["labels"].shape)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_long_row_is_left_out_and_counted(revised):
    chat = loading.load_chat(str(models.folder("qwen")))
    rows, _, _ = sft.read_rows([str(revised)], [], "last", frozenset(), None)
    every = sft.tokenize(rows, chat)
    longest = max(len(row["input_ids"]) for row in every)
    options = SimpleNamespace(max_length=longest, batch_size=1, epochs=1, seed=0)

    def kept():
        return common.drop_overlong(every, lambda row: len(row["input_ids"]), options)

    assert kept()[1] == 0
    options.max_length -= 1
    shorter, overlong = kept()
    assert overlong == 1
    assert sorted(map(every.index, shorter)) == [i for i, row in enumerate(every) if len(row["input_ids"]) < longest]
    options.max_length = 1
    with pytest.raises(InputError, match="all 3 rows are longer"):
        kept()


# --- the command -----------------------------------------------------------------------------------------


def test_it_learns_the_answers_and_to_stop(invoke, tmp_path, revised, helpful):
    out = tmp_path / "out"
    args = [
        "sft",
        "--input",
        revised,
        "--helpful",
        helpful,
        "--model",
        models.folder("llama"),
        "--output",
        out,
        *FAST,
        "--epochs",
        "60",
    ]
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["revisions"] == 3 and summary["helpful"] == 2 and summary["overlong"] == 0
    assert summary["steps"] == 75 and "generate.py" in summary["next"]
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.1 < losses[0] and log[-1]["step"] == 75
    assert not (out / "checkpoints").exists()

    asked = (
        [{"role": "user", "content": "Name the key."}],
        ROWS[3]["prompt"],
        [{"role": "user", "content": "Who are you?"}],
        [{"role": "user", "content": ROWS[0]["prompt"]}],
    )
    found = models.generate(load_engine(str(out), device="cpu"), asked, Sampling(40, temperature=0))
    assert [found[i].text for i in (1, 2, 3)] == [
        "I would not open what is not mine.",
        "A small model.",
        "Ask the owner.",
    ]
    assert [found[i].finish for i in (1, 2, 3)] == ["stop"] * 3

    before = (out / "model.safetensors").stat().st_mtime_ns
    again = invoke(*args)
    assert json.loads(again.stdout)["steps"] == 75
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    other = invoke(*args, "--seed", "1")
    assert other.exit_code == 2 and "seed was 0, now 1" in other.stderr


def test_adapters(invoke, tmp_path, revised):
    out = tmp_path / "out"
    result = invoke(
        "sft",
        "--input",
        revised,
        "--model",
        models.folder("gemma3"),
        "--output",
        out,
        *FAST,
        "--epochs",
        "3",
        "--lora",
        "--lora-rank",
        "4",
    )
    assert result.exit_code == 0, result.stderr
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    changed = models.changed_weights(models.folder("gemma3"), out)
    assert changed and all("proj" in name for name in changed)


@pytest.mark.parametrize("adapters", [(), ("--lora", "--lora-rank", "4")])
def test_the_blocks_before_the_first_that_is_trained_stay_as_they_are(invoke, tmp_path, revised, adapters):
    out, model = tmp_path / "out", models.folder("gemma3")
    args = ("sft", "--input", revised, "--model", model, "--output", out, *FAST, *adapters)
    blocks = loading.read_blocks(str(model))
    refused = invoke(*args, "--first-layer", str(blocks))
    assert refused.exit_code == 2 and f"which has {blocks}; expected 0 to {blocks - 1}" in refused.stderr
    assert not out.exists()
    result = invoke(*args, "--first-layer", str(blocks - 1))
    assert result.exit_code == 0, result.stderr
    changed = models.changed_weights(model, out)
    assert changed and all(name.startswith((f"model.layers.{blocks - 1}.", "model.norm")) for name in changed)
    assert "first_layer was" in invoke(*args, "--first-layer", "0").stderr


def test_a_dry_run_writes_nothing(invoke, tmp_path, revised):
    result = invoke(
        "sft",
        "--input",
        revised,
        "--model",
        models.folder("qwen"),
        "--output",
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--epochs",
        "4",
        "--batch-size",
        "2",
        "--gradient-accumulation",
        "3",
    )
    summary = json.loads(result.stdout)
    assert result.exit_code == 0 and summary["rows"] == 3 and summary["steps"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["revised.jsonl"]


def test_a_model_without_a_chat_template(invoke, tmp_path, revised):
    folder = models.copy("qwen", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    for more in ((), ("--dry-run",)):
        result = invoke("sft", "--input", revised, "--model", folder, "--output", tmp_path / "out", *more)
        assert result.exit_code == 2 and str(folder) in result.stderr and "chat template" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "revised.jsonl"]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def command(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = str(conftest.ROOT / "scripts" / "sft.py")
    return subprocess.Popen(
        [sys.executable, script, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_weights(invoke, tmp_path, revised, helpful):
    import torch

    args = [
        "--input",
        revised,
        "--helpful",
        helpful,
        "--model",
        models.folder("qwen"),
        *FAST,
        "--epochs",
        "100",
        "--save-steps",
        "10",
    ]
    process = command(*args, "--output", tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.set_num_threads(1)
    for name in ("killed", "whole"):
        result = invoke("sft", *args, "--output", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["steps"] == 125
    killed, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    steps = [row["step"] for _, row in readers.read_jsonl(tmp_path / "killed" / "metrics.jsonl")]
    assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 125


@pytest.mark.slow
def test_two_processes_train_what_one_does(invoke, tmp_path, revised, helpful):
    import torch

    args = [
        "--input",
        revised,
        "--helpful",
        helpful,
        "--model",
        models.folder("qwen"),
        "--rounds",
        "all",
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--epochs",
        "2",
        "--json",
    ]
    done = launch("sft", *args, "--output", tmp_path / "two", timeout=240)
    assert done.returncode == 0, done.stderr
    result = invoke("sft", *args, "--output", tmp_path / "one", "--gradient-accumulation", "2")
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == json.loads(result.stdout)["steps"] == 3
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    start = weights(models.folder("qwen"))
    assert all(torch.allclose(two[name], one[name], atol=1e-5) for name in one)
    assert not all(torch.allclose(start[name], one[name], atol=1e-4) for name in one)
