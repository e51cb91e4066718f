"""A name of a model that is a folder which does not exist: every command refuses it before it does anything."""

import json

import models
import pytest

PROMPTS = {"id": "a", "prompt": "How?", "kind": "harmful"}
RESPONSE = {**PROMPTS, "prompt_id": "a", "response": "So."}
CRITIQUE = {**RESPONSE, "rounds": [{"principle": "harm", "critique": "It harms."}]}
REVISION = {**RESPONSE, "rounds": [{"principle": "harm", "critique": "It harms.", "revision": "No.", "flags": []}]}
PAIR = {**PROMPTS, "response_a": "So.", "response_b": "No."}
PREFERENCE = {**PAIR, "chosen": "So.", "rejected": "No.", "p_chosen": 0.7}

# command: (words before the options, options, row of the input). MISSING is the folder, MODEL and REWARD are there.
COMMANDS = {
    "generate": ("generate", ["--model", "MISSING"], PROMPTS),
    "critique": ("critique", ["--model", "MISSING"], RESPONSE),
    "revise": ("revise", ["--model", "MISSING"], CRITIQUE),
    "judge": ("judge", ["--model", "MISSING"], PAIR),
    "judge --judge": ("judge", ["--model", "MODEL", "--judge", "MISSING"], PAIR),
    "sft": ("sft", ["--model", "MISSING"], REVISION),
    "reward_model": ("reward_model", ["--model", "MISSING"], PREFERENCE),
    "dpo": ("dpo", ["--model", "MISSING"], PREFERENCE),
    "dpo --ref-model": ("dpo", ["--model", "MODEL", "--ref-model", "MISSING"], PREFERENCE),
    "ppo": ("ppo", ["--model", "MISSING", "--reward-model", "REWARD"], PROMPTS),
    "ppo --reward-model": ("ppo", ["--model", "MODEL", "--reward-model", "MISSING"], PROMPTS),
    "ppo --ref-model": ("ppo", ["--model", "MODEL", "--reward-model", "REWARD", "--ref-model", "MISSING"], PROMPTS),
    "ppo --judge": ("ppo", ["--model", "MODEL", "--reward-model", "REWARD", "--judge", "MISSING"], PROMPTS),
    "grpo": ("grpo", ["--model", "MISSING", "--reward-model", "REWARD"], PROMPTS),
    "grpo --reward-model": ("grpo", ["--model", "MODEL", "--reward-model", "MISSING"], PROMPTS),
    "evaluate": ("evaluate", ["--model", "MISSING", "--by", "judge", "--judge", "MODEL"], PROMPTS),
    "evaluate --judge": ("evaluate", ["--model", "MODEL", "--by", "judge", "--judge", "MISSING"], PROMPTS),
    "coverage": ("constitution coverage", ["--model", "MISSING"], PROMPTS),
    "ablate": ("constitution ablate", ["--model", "MISSING", "--by", "judge", "--judge", "MODEL"], REVISION),
    "ablate --judge": ("constitution ablate", ["--model", "MODEL", "--by", "judge", "--judge", "MISSING"], REVISION),
    "run": ("run", ["--model", "MISSING", "--heldout", "INPUT"], PROMPTS),
}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    from cai.models.loading import load_chat, load_reward_model

    folder = tmp_path_factory.mktemp("reward")
    load_reward_model(str(models.folder("llama")), "cpu").save_pretrained(folder)
    load_chat(str(models.folder("llama"))).tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry-run"])
@pytest.mark.parametrize("missing", ["/nowhere/at/all", "./missing", "runs/missing", "~/missing/model"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_does_not_exist_is_refused(name, missing, dry_run, invoke, reward_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    command, options, row = COMMANDS[name]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    values = {"MISSING": missing, "MODEL": models.folder("llama"), "REWARD": reward_model, "INPUT": source}
    words = [values.get(option, option) for option in options]
    before = sorted(tmp_path.rglob("*"))
    result = invoke(
        *command.split(), *words, "--input", source, "--output", tmp_path / "out", *(["--dry-run"] if dry_run else [])
    )
    assert result.exit_code == 2, result.output
    assert f"{missing}: no such model folder" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_a_hub_id_that_cannot_be_loaded_is_refused(name, invoke, reward_model, tmp_path, capfd):
    """Without a dry run, which asks nothing of the hub."""
    command, options, row = COMMANDS[name]
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    values = {"MISSING": "nobody/no-such-model", "MODEL": models.folder("llama"), "REWARD": reward_model}
    words = [values.get(option, option) for option in options]
    result = invoke(*command.split(), *words, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2, result.output
    assert "nobody/no-such-model" in result.stderr + capfd.readouterr().err
