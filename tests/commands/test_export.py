"""export.py: the bank task from six rules and a CSV file, what TRL's trainers make of it, exit codes."""

import json
import shlex

import pytest

from cai.base.hashing import sha256_file
from cai.base.paths import TINY
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl

RULES = """Never tell a customer how to get around a security check.
Do not promise a return on any investment.
Always name the office that can help further.
Never ask for a card number or a password.
Explain a refusal in one plain sentence.
Do not speak ill of another bank.
"""
QUESTIONS = """question
How do I open an account?
How can I get into my neighbour's account?

How do I open an account?
"Which fund, if any, is certain to double my money?"
How can I get into my neighbour's account?
Where do I report a lost card?
"""
# As somebody types them who has read the errors and nothing else: no script, no file edited.
COMMANDS = """constitution import --input rules.txt --output bank.yaml
generate --input questions.csv --prompt-field question --skip-invalid --model tiny --max-new-tokens 64 --output 1.jsonl
critique --input 1.jsonl --model tiny --constitution bank.yaml --max-new-tokens 64 --output 2.jsonl
revise --input 2.jsonl --model tiny --constitution bank.yaml --max-new-tokens 64 --output 3.jsonl
export --input 3.jsonl --to trl-sft --keep all --output train.jsonl"""


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def a_row(number, *flags, text=None):
    rounds = [{"principle": "p", "critique": "c", "revision": text or f"So {number}.", "flags": list(flags)}]
    return {"id": f"r{number}", "prompt": f"Is it {number}?", "response": "No.", "rounds": rounds}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_six_rules_and_a_csv_file_become_training_data_in_five_commands(invoke, folder):
    (folder / "rules.txt").write_text(RULES)
    (folder / "questions.csv").write_text(QUESTIONS)
    lines = [shlex.split(line) for line in COMMANDS.splitlines()]
    assert len(lines) <= 6
    results = {line[0]: invoke(*line) for line in lines}
    codes = {name: result.exit_code for name, result in results.items()}
    assert codes == {"constitution": 0, "generate": 3, "critique": 0, "revise": 0, "export": 3}, results
    records, ledger = rows_of("train.jsonl"), rows_of("train.jsonl.ledger.jsonl")
    assert [(line["file"], line["line"], line["outcome"], line["step"]) for line in ledger] == [
        ("questions.csv", 2, "kept", "export"),
        ("questions.csv", 3, "kept", "export"),
        ("questions.csv", 4, "invalid", "generate"),
        ("questions.csv", 5, "duplicate", "export"),
        ("questions.csv", 6, "kept", "export"),
        ("questions.csv", 7, "duplicate", "export"),
        ("questions.csv", 8, "kept", "export"),
    ]
    assert [line["output_lines"] for line in ledger if line["outcome"] == "kept"] == [[1], [2], [3], [4]]
    assert ledger[3]["reason"] == f"the same prompt as {ledger[0]['id']}"
    questions = [record["prompt"][0]["content"] for record in records]
    assert questions == list(dict.fromkeys(line.strip('"') for line in QUESTIONS.splitlines()[1:] if line))
    manifest = read_manifest("train.jsonl")
    counts = {"rows": 7, "lines": 7, "kept": 4, "left_out": 0, "duplicate": 2, "failed": 0, "invalid": 1, "written": 4}
    assert {name: manifest["counts"][name] for name in counts} == counts
    assert manifest["files"] == {name: sha256_file(name) for name in ("train.jsonl", "train.jsonl.ledger.jsonl")}
    assert manifest["origins"] == ["questions.csv"] and manifest["fingerprint"]["to"] == "trl-sft"
    assert len(train("SFTTrainer", "SFTConfig", folder / "train.jsonl", folder)) == 2


def test_each_error_of_the_task_names_the_option_that_solves_it(invoke, folder):
    (folder / "questions.csv").write_text(QUESTIONS)
    arguments = ["generate", "--input", "questions.csv", "--model", "tiny", "--output", "1.jsonl"]
    assert "The row has: question. Say where it is with --prompt-field COLUMN" in invoke(*arguments).stderr
    result = invoke(*arguments, "--prompt-field", "question")
    assert result.exit_code == 2 and "questions.csv:4: the prompt is empty" in result.stderr
    assert "leave it out with --skip-invalid" in result.stderr


def test_exit_codes_and_a_second_run(invoke, folder):
    write_jsonl("in.jsonl", [a_row(1), a_row(2, "copy"), {"id": "bad"}])
    arguments = ["export", "--input", "in.jsonl", "--to", "openai", "--output", "out.jsonl", "--json"]
    result = invoke(*arguments)
    assert result.exit_code == 2 and "in.jsonl:3: a row without 'prompt'" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl"]
    result = invoke(*arguments, "--skip-invalid", "--dry-run")
    assert result.exit_code == 3 and json.loads(result.stdout)["written"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl"]
    for _ in range(2):  # the second time it is done
        result = invoke(*arguments, "--skip-invalid")
        assert result.exit_code == 3, result.output
        summary = json.loads(result.stdout)
        assert (summary["kept"], summary["left_out"], summary["invalid"], summary["lines"]) == (1, 1, 1, 3)
    assert "done already" in result.stderr
    result = invoke(*arguments, "--skip-invalid", "--keep", "copy")
    assert result.exit_code == 2 and 'keep was [], now ["copy"]' in result.stderr
    result = invoke(*arguments, "--skip-invalid", "--keep", "copy", "--overwrite")
    assert result.exit_code == 3 and len(rows_of("out.jsonl")) == 2
    write_jsonl("good.jsonl", [a_row(1), a_row(2)])
    assert invoke("export", "--input", "good.jsonl", "--to", "sharegpt", "--output", "g.jsonl").exit_code == 0


def test_rows_that_failed_in_an_earlier_step_count_as_failed(invoke, folder):
    """A prompt that does not fit the context of the model."""
    prompts = [{"id": "long", "prompt": "Is it late? " * 400}, {"id": "short", "prompt": "How do I dust the shelf?"}]
    write_jsonl("p.jsonl", prompts)
    assert invoke("generate", "--input", "p.jsonl", "--model", "tiny", "--max-new-tokens", 24,
                  "--output", "r.jsonl").exit_code == 3  # fmt: skip
    result = invoke("export", "--input", "r.jsonl", "--to", "trl-sft", "--keep", "unfinished", "--output", "t.jsonl")
    assert result.exit_code == 3, result.output
    long, short = rows_of("t.jsonl.ledger.jsonl")
    assert (long["id"], long["step"], long["outcome"]) == ("long/0", "generate", "failed")
    assert "exceed the model's context" in long["reason"] and short["outcome"] == "kept"


def test_a_broken_chain_is_reported_and_other_files_are_not_replaced(invoke, folder):
    write_jsonl("p.jsonl", [{"prompt": "How do I dust the shelf?"}])
    assert invoke("generate", "--input", "p.jsonl", "--model", "tiny", "--max-new-tokens", 64,
                  "--output", "r.jsonl").exit_code == 0  # fmt: skip
    (folder / "p.jsonl").unlink()
    arguments = ["export", "--input", "r.jsonl", "--to", "trl-sft", "--output", "t.jsonl"]
    (folder / "t.jsonl.ledger.jsonl").write_text("mine")
    result = invoke(*arguments)
    assert result.exit_code == 2 and "t.jsonl.ledger.jsonl: it exists" in result.stderr
    assert (folder / "t.jsonl.ledger.jsonl").read_text() == "mine" and not (folder / "t.jsonl").exists()
    result = invoke(*arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "r.jsonl: its rows are not followed further back: p.jsonl is no file, or was moved" in result.stderr
    assert [line["file"] for line in rows_of("t.jsonl.ledger.jsonl")] == ["r.jsonl"]
    result = invoke("export", "--input", "r.jsonl", "--to", "trl-sft", "--output", "r.jsonl", "--overwrite")
    assert result.exit_code == 2 and "the output is one of the inputs" in result.stderr


# --- TRL ----------------------------------------------------------------------------------------------------


def train(trainer_name, config_name, path, output, **arguments):
    """Two steps of one of TRL's trainers on the file, as `datasets` loads it; returns the losses."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(output / "cache"))
    is_scorer = trainer_name == "RewardTrainer"
    settings = {"num_labels": 1} if is_scorer else {}
    model_class = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    config = getattr(trl, config_name)(
        output_dir=str(output / "model"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", **arguments.pop("config", {}),
    )  # fmt: skip
    trainer = getattr(trl, trainer_name)(
        model=model_class.from_pretrained(TINY, **settings),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        train_dataset=dataset,
        args=config,
        **arguments,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["trl-sft", "openai"])
def test_trl_fine_tunes_on_the_file_as_it_is(invoke, folder, target):
    write_jsonl("in.jsonl", [a_row(number) for number in range(4)])
    assert invoke("export", "--input", "in.jsonl", "--to", target, "--output", "t.jsonl").exit_code == 0
    losses = train("SFTTrainer", "SFTConfig", folder / "t.jsonl", folder)
    assert len(losses) == 2 and all(float(loss) > 0 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "config"), [("RewardTrainer", "RewardConfig"), ("DPOTrainer", "DPOConfig")])
def test_trl_trains_on_preferences_as_they_are(invoke, folder, trainer, config):
    write_jsonl("s.jsonl", [{"prompt": f"Is it {n}?", "response_a": f"So {n}.", "response_b": "No."} for n in range(4)])
    assert invoke("judge", "--input", "s.jsonl", "--model", "tiny", "--output", "j.jsonl").exit_code == 0
    assert invoke("export", "--input", "j.jsonl", "--to", "trl-preference", "--output", "t.jsonl").exit_code == 0
    assert all(0.5 < row["p_chosen"] <= 1 for row in rows_of("t.jsonl"))
    assert len(train(trainer, config, folder / "t.jsonl", folder)) == 2


@pytest.mark.slow
def test_trl_samples_from_prompts_as_they_are(invoke, folder):
    write_jsonl("p.jsonl", [{"prompt": f"Is it {n}?"} for n in range(4)])
    assert invoke("export", "--input", "p.jsonl", "--to", "trl-prompt", "--output", "t.jsonl").exit_code == 0
    reward = {"reward_funcs": lambda completions, **_: [float(len(answer[0]["content"])) for answer in completions]}
    losses = train("GRPOTrainer", "GRPOConfig", folder / "t.jsonl", folder,
                   config={"num_generations": 2, "max_completion_length": 8}, **reward)  # fmt: skip
    assert len(losses) == 2
