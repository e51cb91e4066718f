"""export.py --to ENGINE: the folder from a run folder, TRL's own parser and two steps on it, errors, atomicity."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from cai.base.hashing import sha256_file
from cai.base.paths import TINY
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.models.launch import VERSIONS


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A reward model on tiny's body."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward") / "reward"
    AutoModelForSequenceClassification.from_pretrained(TINY, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, scorer):
    """A run folder with preferences, responses and a reward model, as the commands leave them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"id": f"p{n}/0", "prompt_id": f"p{n}", "prompt": f"Is it {n}?", "response": f"So {n}."} for n in range(8)]
    pairs = [{"id": f"p{n}", "prompt": f"Is it {n}?", "chosen": f"So {n}.", "rejected": "No.", "p_chosen": 0.8,
              "response_a": f"So {n}.", "response_b": "No."} for n in range(8)]  # fmt: skip
    write_jsonl(folder / "1.jsonl", rows)
    write_jsonl(folder / "2.jsonl", pairs)
    shutil.copytree(scorer, folder / "reward")
    for name, command in {"1.jsonl": "generate", "2.jsonl": "judge", "reward": "reward_model"}.items():
        manifest = {"status": "done", "command": command, "fingerprint": {}, "finished": "2026-01-01",
                    "command_line": f"python scripts/{command}.py --model tiny"}  # fmt: skip
        (folder / f"{name}.run.json").write_text(json.dumps(manifest))
    return folder


def export(invoke, engine, stage, *more, output="out"):
    return invoke("export", "--input", "run", "--to", engine, "--stage", stage, "--output", output, *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "stage"),
    [("openrlhf", "ppo"), ("verl", "grpo"), ("nemo-rl", "ppo"), ("llamafactory", "dpo"), ("axolotl", "grpo")],
)
def test_a_run_folder_becomes_all_that_an_engine_needs(invoke, run, engine, stage):
    result = export(invoke, engine, stage, "--nodes", 2, "--gpus", 4, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written"] == 8
    folder = run.parent / "out"
    assert sorted(path.name for path in run.parent.iterdir()) == ["out", "out.run.json", "run"]
    launch = (folder / "launch.sh").read_text()
    assert "GPU-hours" in launch and "GB of weights" in launch and VERSIONS[engine] in launch
    assert subprocess.run(["bash", "-n", folder / "launch.sh"], check=False).returncode == 0
    readme = (folder / "README.md").read_text()
    assert "--gate" in readme and "## Resume" in readme and "launch.sh" in readme
    assert (folder / "reward" / "config.json").exists() == (stage != "dpo")
    shipped = (ROOT / "templates" / "launch" / "reward_function.py").read_bytes()
    if engine in ("openrlhf", "verl"):
        assert (folder / "reward_function.py").read_bytes() == shipped and "judge.py --serve" in readme
    else:
        assert not (folder / "reward_function.py").exists() and "--serve" not in readme
    assert len(list(read_jsonl(folder / "ledger.jsonl"))) == 8
    files = read_manifest(folder)["files"]
    assert files["launch.sh"] == sha256_file(folder / "launch.sh") and "rows.jsonl" in files
    before = files["rows.jsonl"]
    again = export(invoke, engine, stage, "--nodes", 2, "--gpus", 4)
    assert again.exit_code == 0 and "done already" in again.stderr
    assert sha256_file(folder / "rows.jsonl") == before


def test_errors_name_the_remedy_and_leave_nothing(invoke, run):
    result = export(invoke, "trl", "ppo")
    assert result.exit_code == 2 and "trl has no stage ppo" in result.stderr
    result = export(invoke, "verl", "ppo", "--device", "cpu")
    assert result.exit_code == 2 and "without --check no model is loaded" in result.stderr
    result = export(invoke, "openrlhf", "dpo", "--check", 4)
    assert result.exit_code == 2 and "--stage dpo scores nothing" in result.stderr
    result = export(invoke, "openrlhf", "sft")
    assert result.exit_code == 2 and "no finished output of revise.py" in result.stderr
    shutil.rmtree(run / "reward")
    result = export(invoke, "openrlhf", "ppo")
    assert result.exit_code == 2 and "--stage ppo needs a reward model" in result.stderr
    arguments = ["export", "--input", run / "1.jsonl", "--to", "trl-sft", "--nodes", 2, "--output", "rows"]
    assert "--nodes would have no effect" in invoke(*arguments).stderr
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.slow
def test_the_check_compares_scores_before_and_after(invoke, run):
    result = export(invoke, "verl", "ppo", "--check", 6, "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    assert scores["before"]["verl"]["causes"] == {"bos": 6} and scores["before"]["trl"]["beyond"] == 0
    assert all(figures["beyond"] == 0 and figures["compared"] == 6 for figures in scores["after"].values())
    assert 0 <= scores["prefers_chosen"] <= 1


@pytest.mark.slow
def test_an_engine_that_would_read_other_scores_is_refused(invoke, run):
    config = json.loads((run / "reward" / "config.json").read_text())
    (run / "reward" / "config.json").write_text(json.dumps({**config, "value_head_prefix": "value"}))
    assert export(invoke, "openrlhf", "ppo", "--check", 4).exit_code == 0  # written under the usual name
    template = (run / "reward" / "chat_template.jinja").read_text()
    (run / "reward" / "chat_template.jinja").write_text(template.replace("'<|end|>'", "'<|end|>\\n'"))
    (run / "reward" / "config.json").write_text(json.dumps({**config, "score_ending": "template"}))
    result = export(invoke, "openrlhf", "ppo", "--check", 4, output="other")
    assert result.exit_code == 2 and "openrlhf reads other scores from it" in result.stderr, result.output
    assert "missing token" in result.stderr and not (run.parent / "other").exists()


# --- TRL ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo", "grpo"])
def test_trl_accepts_the_configuration_and_reads_the_rows(invoke, run, stage, monkeypatch):
    from trl.scripts.utils import get_dataset

    assert export(invoke, "trl", stage, "--nodes", 1, "--gpus", 2).exit_code == 0
    monkeypatch.chdir(run.parent / "out")
    monkeypatch.setattr(sys, "argv", [stage, "--config", "trl.yaml", "--bf16", "false", "--use_cpu", "true"])
    parser = importlib.import_module(f"trl.scripts.{stage}").make_parser()
    script, training, _, data = parser.parse_args_and_config(fail_with_unknown_args=True)
    assert len(get_dataset(data)["train"]) == 8 and training.num_train_epochs == 1
    if stage == "grpo":
        assert script.reward_model_name_or_path == "reward" and training.vllm_mode == "colocate"


@pytest.mark.slow
def test_trl_grpo_runs_two_steps_on_the_exported_files(invoke, run):
    assert export(invoke, "trl", "grpo", "--gpus", 1, "--max-new-tokens", 8).exit_code == 0
    settings = ["--use_vllm", "false", "--bf16", "false", "--use_cpu", "true", "--gradient_checkpointing", "false",
                "--max_steps", "2", "--num_generations", "2", "--per_device_train_batch_size", "2",
                "--gradient_accumulation_steps", "1", "--save_strategy", "no"]  # fmt: skip
    command = [sys.executable, "-m", "trl.scripts.grpo", "--config", "trl.yaml", *settings]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=run.parent / "out", env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run.parent / "out" / "policy" / "model.safetensors").exists()
    assert "rewards/reward/mean" in done.stdout
