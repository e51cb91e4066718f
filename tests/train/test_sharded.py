"""Training under the configurations of templates/accelerate: read by accelerate, and FSDP2 in two CPU processes."""

import json
import subprocess
import time

import models
import pytest
from conftest import ROOT
from launcher import kill, launch_sharded
from sharded_on_cpu import MARK

from cai.models import loading

CONFIGS = ROOT / "templates" / "accelerate"
FAST = ("--learning-rate", "1e-3", "--json")
BOTH = ("--gradient-accumulation", "2")  # one process does what two do; the rows' order depends on the batch size


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def preferences(tmp_path):
    return write_rows(
        tmp_path / "preferences.jsonl",
        [
            {
                "id": str(i),
                "prompt": f"How do I open gate {i}{', please' * (i % 4)}?",
                "chosen": "I can't help with that.",
                "rejected": f"Push, then pull{' it' * (i % 5)}.",
                "p_chosen": 0.7 + i % 3 / 10,
            }
            for i in range(32)
        ],
    )


def finish(process, timeout=150):
    """The summary of a sharded command."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, stderr
    assert stderr.count(f"{MARK} DistributedType.FSDP") == 2
    return json.loads(stdout.splitlines()[-1])


def read_weights(folder, name="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def assert_same_weights(one, other, atol):
    import torch

    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=atol) for name in one)


# --- the configurations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_accelerate_reads_the_configuration_whole(name):
    import yaml
    from accelerate.commands import launch

    parser = launch.launch_command_parser()
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_machines", "2", "--num_processes", "16", "x.py"]
    options, config, _ = launch._validate_launch_command(parser.parse_args(arguments))
    assert (config.num_processes, options.num_processes, options.num_machines) == (8, 16, 2)
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config.distributed_type == written["distributed_type"] and config.mixed_precision == "bf16"
    # What accelerate does not know it drops without a word.
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in written.get(section, {}).items():
            assert getattr(options, key) == value, key


def test_accelerate_makes_fsdp2_of_the_configuration():
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    path = str(CONFIGS / "fsdp2.yaml")
    options, *_ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(["--config_file", path, "x"])
    )
    environment = environments.prepare_multi_gpu_env(options)
    assert options.use_fsdp and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_accelerate_makes_zero_3_of_the_configuration():
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    path = str(CONFIGS / "zero3.yaml")
    options, config, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(["--config_file", path, "x"])
    )
    # As launch_command itself does, which then starts the processes.
    options.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    _, environment = environments.prepare_deepspeed_cmd_env(options)
    assert options.use_deepspeed and environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


class ZeRO3:
    """What transformers asks a configuration of DeepSpeed, which is not installed here."""

    def is_zero3(self):
        return True


def test_models_load_whole_where_zero_3_is_configured_already():
    from transformers.integrations import deepspeed

    config, folder = ZeRO3(), str(models.folder("qwen"))
    deepspeed.set_hf_deepspeed_config(config)
    try:
        policy = loading.load_policy(folder)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert all(parameter.numel() for parameter in policy.parameters())


# --- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_sharded_run_continues_and_ends_as_one_process_does(invoke, tmp_path):
    rows = [
        {"prompt": f"How do I open gate {i}?", "response": "Ask" + " the owner" * (i % 3) + "."} for i in range(120)
    ]
    helpful = write_rows(tmp_path / "helpful.jsonl", rows)
    line = ["--helpful", helpful, "--model", models.folder("qwen"), *FAST, "--epochs", "1", "--save-steps", "5"]
    line += ["--batch-size", "2"]
    sharded = [*line, "--output", tmp_path / "two"]

    killed = launch_sharded("sft", *sharded)
    states, until = tmp_path / "two" / "checkpoints", time.monotonic() + 120
    while not list(states.glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None and time.monotonic() < until, killed.communicate()[1]
        time.sleep(0.02)
    kill(killed)
    # A sharded state, which holds the whole model too.
    state = max(states.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert (state / "pytorch_model_fsdp.bin").exists()
    assert not (tmp_path / "two" / "config.json").exists()

    two = finish(launch_sharded("sft", *sharded))
    one = invoke("sft", *line, "--device", "cpu", *BOTH, "--output", tmp_path / "one")
    assert two["steps"] == json.loads(one.stdout)["steps"] == 30
    assert not states.exists()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert_same_weights(read_weights(tmp_path / "two"), read_weights(tmp_path / "one"), atol=1e-5)
    loading.load_policy(str(tmp_path / "two"))


@pytest.mark.slow
def test_a_sharded_reward_model_keeps_the_best_weights(invoke, tmp_path, preferences):
    line = ["--input", preferences, "--model", models.folder("qwen"), *FAST, "--holdout", "0.25"]
    line += ["--eval-steps", "2", "--patience", "9", "--batch-size", "2"]
    two = finish(launch_sharded("reward_model", *line, "--output", tmp_path / "two"))
    done = invoke("reward_model", *line, "--device", "cpu", *BOTH, "--output", tmp_path / "one")
    one = json.loads(done.stdout)
    assert two["train"] == one["train"] and two["holdout"]["log_loss"] == pytest.approx(
        one["holdout"]["log_loss"], 1e-2
    )
    assert_same_weights(read_weights(tmp_path / "two"), read_weights(tmp_path / "one"), atol=1e-3)
    loading.load_reward_model(str(tmp_path / "two"))


@pytest.mark.slow
def test_a_sharded_lora_dpo_is_merged_as_one_process_merges_it(invoke, tmp_path, preferences):
    line = ["--input", preferences, "--model", models.folder("qwen"), *FAST, "--lora", "--lora-rank", "4"]
    line += ["--batch-size", "4"]
    two = finish(launch_sharded("dpo", *line, "--output", tmp_path / "two"))
    done = invoke("dpo", *line, "--device", "cpu", *BOTH, "--output", tmp_path / "one")
    assert two["steps"] == json.loads(done.stdout)["steps"] == 4
    start = read_weights(models.folder("qwen"))
    merged = read_weights(tmp_path / "two")
    assert_same_weights(merged, read_weights(tmp_path / "one"), atol=1e-5)
    assert any((merged[name] - start[name]).abs().max() > 1e-4 for name in merged)
    adapters = [read_weights(tmp_path / name / "adapter", "adapter_model.safetensors") for name in ("two", "one")]
    assert_same_weights(*adapters, atol=1e-4)


@pytest.mark.slow
def test_sharded_grpo_begins_at_its_reference_and_scores_alike_in_both_processes(invoke, tmp_path, preferences):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"How do I open gate {i}?"} for i in range(8)])
    made = invoke(
        "reward_model", "--input", preferences, "--model", models.folder("qwen"), *FAST, "--device", "cpu",
        "--holdout", "0", "--output", tmp_path / "reward",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    line = ["--input", prompts, "--model", models.folder("qwen"), "--reward-model", tmp_path / "reward", *FAST]
    line += [
        "--updates",
        "2",
        "--prompts-per-update",
        "4",
        "--samples",
        "2",
        "--max-new-tokens",
        "8",
        "--batch-size",
        "2",
    ]
    two = finish(launch_sharded("grpo", *line, "--output", tmp_path / "two"))
    assert (two["updates"], two["episodes"]) == (2, 16)
    first, *_ = map(json.loads, (tmp_path / "two" / "metrics.jsonl").read_text().splitlines())
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    trained, start = read_weights(tmp_path / "two"), read_weights(models.folder("qwen"))
    assert trained.keys() == start.keys() and any((trained[n] - start[n]).abs().max() > 1e-5 for n in start)
