"""Dependencies: the ranges, the lock, and a canary for each name of theirs that this project leans on.

tests/benchmarks/lowest.py runs this file, and more, in an environment of the lowest versions of the stated ranges.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from functools import cache
from importlib.util import find_spec

import newest
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cai.models.decoding import CACHE_PARAMETERS

WATCHED = ("trl", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]

# What our subclasses override or call of theirs, which no import tells of.
METHODS = {
    "trl.SFTTrainer": ["compute_loss"],
    "trl.RewardTrainer": ["compute_loss"],
    "trl.GRPOTrainer": ["compute_loss"],
    "trl.RLOOTrainer": ["compute_loss"],
    "trl.trainer.reward_trainer.DataCollatorForPreference": ["torch_call"],
    "trl.trainer.dpo_trainer.DataCollatorForPreference": ["torch_call"],
    "transformers.Trainer": [
        "compute_loss",
        "create_optimizer",
        "get_train_dataloader",
        "log",
        "remove_callback",
        "train",
        "training_step",
        "is_world_process_zero",
        "save_model",
        "evaluate",
        "get_optimizer_cls_and_kwargs",
    ],
    "transformers.PreTrainedTokenizerFast": [
        "apply_chat_template",
        "batch_decode",
        "convert_tokens_to_ids",
        "convert_ids_to_tokens",
        "decode",
        "get_vocab",
        "added_tokens_decoder",
        "all_special_tokens",
        "save_pretrained",
    ],
    "transformers.DynamicCache": ["get_seq_length"],
    "transformers.cache_utils.DynamicLayer": ["get_seq_length", "update"],
    # Whether a model remembers more than keys and values; without this name it would count as one that does not.
    "transformers.PreTrainedModel": ["_is_stateful", "get_output_embeddings", "base_model", "save_pretrained"],
    "transformers.PreTrainedConfig": ["get_text_config"],
    "transformers.GenerationMixin": ["generate"],
    "transformers.TrainerCallback": ["on_evaluate", "on_log", "on_step_end", "on_train_begin", "on_train_end"],
    "transformers.modeling_layers.GradientCheckpointingLayer": ["gradient_checkpointing"],
    "peft.PeftModel": ["disable_adapter", "get_base_model", "save_pretrained"],
    "peft.tuners.lora.LoraModel": ["merge_and_unload"],
    "accelerate.Accelerator": ["autocast", "get_state_dict", "no_sync", "reduce", "unwrap_model", "wait_for_everyone"],
    "datasets.Dataset": ["from_list", "select"],
    "huggingface_hub.HfApi": ["create_commit", "create_repo", "repo_info", "upload_folder"],
    # Left out of TRL's own preparation, because rows come tokenized.
    "trl.DPOTrainer": ["compute_loss", "_prepare_dataset"],
}
# Parameters that we pass by name, or override; of a tuple one is enough, and our code takes whichever is there.
FORWARD = ["input_ids", "attention_mask", "position_ids", "use_cache", CACHE_PARAMETERS]
LOSS = ["model", "inputs", "return_outputs", "num_items_in_batch"]
PREPARED = ["model", "args", "train_dataset", "processing_class", "callbacks"]
TRAINER = [*PREPARED, "peft_config"]
PARAMETERS = {
    **{
        f"transformers.{family}ForCausalLM.forward": FORWARD
        for family in ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mistral")
    },
    "transformers.LlamaForSequenceClassification.forward": ["input_ids", "attention_mask", CACHE_PARAMETERS],
    "transformers.LlamaModel.forward": ["input_ids", "use_cache"],
    "transformers.cache_utils.Cache.__init__": ["layers"],
    "transformers.DynamicCache.__init__": ["ddp_cache_data"],
    "transformers.cache_utils.DynamicLayer.update": ["key_states", "value_states"],
    "transformers.GenerationMixin.generate": ["generation_config", "logits_processor", "stopping_criteria"],
    "transformers.PreTrainedModel.from_pretrained": ["config", "use_safetensors"],
    "transformers.PreTrainedModel.save_pretrained": ["state_dict"],
    "transformers.PreTrainedTokenizerFast.apply_chat_template": ["tokenize", "add_generation_prompt"],
    "transformers.PreTrainedTokenizerFast.decode": ["skip_special_tokens"],
    "transformers.PreTrainedTokenizerFast.batch_decode": ["clean_up_tokenization_spaces"],
    "transformers.Trainer.__init__": PREPARED,
    "transformers.Trainer.compute_loss": LOSS,
    "transformers.Trainer.create_optimizer": ["model"],
    "transformers.Trainer.evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "transformers.Trainer.log": ["logs", "start_time"],
    "transformers.Trainer.save_model": ["output_dir", "_internal_call"],
    "transformers.Trainer.train": ["resume_from_checkpoint"],
    "transformers.EarlyStoppingCallback.__init__": ["early_stopping_patience"],
    "trl.SFTTrainer.__init__": TRAINER,
    "trl.RewardTrainer.__init__": [*TRAINER, "data_collator", "eval_dataset"],
    "trl.DPOTrainer.__init__": [*TRAINER, "data_collator", "ref_model"],
    **{f"trl.{algorithm}Trainer.__init__": [*TRAINER, "reward_funcs"] for algorithm in ("GRPO", "RLOO")},
    **{f"trl.{algorithm}Trainer.compute_loss": LOSS for algorithm in ("SFT", "Reward", "DPO", "GRPO", "RLOO")},
    "trl.trainer.reward_trainer.DataCollatorForPreference.__init__": ["pad_token_id"],
    "trl.trainer.reward_trainer.DataCollatorForPreference.torch_call": ["examples"],
    "trl.trainer.dpo_trainer.DataCollatorForPreference.__init__": ["pad_token_id"],
    "trl.trainer.dpo_trainer.DataCollatorForPreference.torch_call": ["examples"],
    "peft.LoraConfig": ["r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "modules_to_save"],
    "datasets.load_dataset": ["path", "split"],
    "datasets.Dataset.from_list": ["mapping"],
    "datasets.Dataset.select": ["indices"],
    "huggingface_hub.snapshot_download": ["local_files_only"],
    "huggingface_hub.HfApi.create_repo": ["repo_id", "repo_type", "private", "exist_ok"],
    "huggingface_hub.HfApi.create_commit": ["repo_id", "repo_type", "operations", "commit_message"],
    "huggingface_hub.HfApi.upload_folder": ["repo_id", "repo_type", "folder_path", "ignore_patterns", "commit_message"],
}
# What a class sets on itself while it runs, and we read: looked for in its source.
ATTRIBUTES = {
    "transformers.Trainer": [
        "accelerator",
        "args",
        "callback_handler",
        "control",
        "current_gradient_accumulation_steps",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
        "model",
        "model_wrapped",
        "optimizer",
        "processing_class",
        "state",
    ],
    "trl.DPOTrainer": ["beta", "ref_model"],
    "transformers.cache_utils.DynamicLayer": ["is_initialized", "keys", "values"],
    "transformers.cache_utils.Cache": ["layers"],
}
# Fields of a trainer's arguments that are passed to all of them.
FIELDS = {
    "transformers.TrainingArguments": [
        "train_sampling_strategy",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "save_total_limit",
        "gradient_accumulation_steps",
        "warmup_steps",
        "max_grad_norm",
        "save_strategy",
        "logging_first_step",
        "use_cpu",
        "report_to",
        "disable_tqdm",
        "bf16",
        "fp16",
        "dataloader_pin_memory",
        "ddp_find_unused_parameters",
    ],
    "trl.SFTConfig": ["max_length", "completion_only_loss"],
    "trl.RewardConfig": ["center_rewards_coefficient", "max_length"],
    "trl.DPOConfig": ["beta", "max_length", "label_smoothing"],
    "trl.GRPOConfig": ["beta", "num_generations", "num_iterations", "max_completion_length"],
    "trl.RLOOConfig": ["beta", "num_generations", "num_iterations", "max_completion_length"],
}


def installed(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def moved(place: str, package: str) -> str:
    """What a failing canary says."""
    versions = next((str(one.specifier) for one in NEEDED if one.name == package), "what transformers needs")
    return (
        f"{place} is not in {installed(package)} (the project says {versions}): it was moved, renamed or removed. "
        "Look for it in the release notes, fix its use, and narrow the range in pyproject.toml if need be."
    )


def parameters_of(place: str) -> list[str]:
    """The names of the parameters of `package.module.function`, or of `package.module.Class.method`."""
    try:
        return list(inspect.signature(look_up(place)).parameters)
    except ImportError:
        owner, _, method = place.rpartition(".")
        return list(inspect.signature(getattr(look_up(owner), method)).parameters)


@cache
def attributes_set(kind: type) -> set[str]:
    """The names that a class, or one that it inherits from, assigns to itself or to `self`."""
    names = set()
    for ancestor in kind.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(ancestor)))
        names |= {node.target.id for node in tree.body[0].body if isinstance(node, ast.AnnAssign)}
        for node in ast.walk(tree):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return names


@cache
def names_used() -> dict[str, str]:
    """{module.name: the first file and line that imports it} of the watched packages, over all of scripts/."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        whole = set()  # packages imported as such
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in WATCHED:
                for one in node.names:
                    found.setdefault(f"{node.module}.{one.name}", f"{path.relative_to(ROOT)}:{node.lineno}")
            elif isinstance(node, ast.Import):
                whole |= {one.name for one in node.names if one.name in WATCHED and not one.asname}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in whole:
                found.setdefault(f"{node.value.id}.{node.attr}", f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def imported() -> dict[str, str]:
    """{distribution: a file that imports it} of all that is neither Python's own nor ours, over all of scripts/."""
    ours = {"cai", *sys.stdlib_module_names}
    distributions = importlib.metadata.packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {name.partition(".")[0] for name in names} - ours:
                found.setdefault(canonical(distributions.get(top, [top])[0]), path.name)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def look_up(place: str):
    """The object at `package.module.name`; AttributeError or ImportError if there is none."""
    module, _, name = place.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        return importlib.import_module(place)


def test_the_names_are_found():
    used = names_used()
    assert {
        "trl.SFTTrainer",
        "trl.RewardTrainer",
        "transformers.AutoModelForCausalLM",
        "datasets.load_dataset",
        "datasets.Dataset",
    } <= set(used)
    assert len(used) > 25


@pytest.mark.parametrize("place", sorted(names_used()))
def test_a_name_that_we_use_is_there(place):
    try:
        look_up(place)
    except (ImportError, AttributeError):
        pytest.fail(f"{names_used()[place]} uses it, and {moved(place, place.partition('.')[0])}")


def test_a_name_that_moved_is_said_so():
    with pytest.raises((ImportError, AttributeError)):
        look_up("trl.PPOTrainerThatWasRemoved")
    said = moved("trl.X", "trl")
    assert "trl.X is not in trl " in said and "release notes" in said


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in METHODS.items() for name in names])
def test_a_method_that_we_call_or_override_is_there(place, name):
    if not hasattr(look_up(place), name):
        pytest.fail(moved(f"{place}.{name}", place.partition(".")[0]))


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in PARAMETERS.items() for name in names])
def test_a_parameter_that_we_pass_by_name_is_there(place, name):
    known = parameters_of(place)
    if not set(known) & set(name if isinstance(name, tuple) else (name,)):
        named = " or ".join(name) if isinstance(name, tuple) else name
        said = moved(f"the parameter {named} of {place}", place.partition(".")[0])
        pytest.fail(f"{said} It takes {', '.join(known)}.")


def test_a_parameter_that_was_renamed_is_said_so(monkeypatch):
    """As transformers 5.24 did with past_key_values, had the new name been another."""
    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lambda self, input_ids, memory=None: None)
    with pytest.raises(pytest.fail.Exception) as failed:
        test_a_parameter_that_we_pass_by_name_is_there("transformers.LlamaForCausalLM.forward", CACHE_PARAMETERS)
    said = str(failed.value)
    assert "the parameter cache or past_key_values of transformers.LlamaForCausalLM.forward is not in" in said
    assert "It takes self, input_ids, memory." in said


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in ATTRIBUTES.items() for name in names])
def test_an_attribute_that_we_read_is_set(place, name):
    if name not in attributes_set(look_up(place)):
        pytest.fail(moved(f"the attribute {name} of {place}", place.partition(".")[0]))


def test_an_attribute_that_is_not_set_is_found():
    assert "an_attribute_that_was_removed" not in attributes_set(look_up("transformers.Trainer"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trl.trainer.dpo_trainer", "log_probs"),  # of what its model returns: the soft label is made of them
        *(("trl.trainer.grpo_trainer", name) for name in ("completion_ids", "log_metric", "trainer_state")),
        *(("trl.trainer.rloo_trainer", name) for name in ("completion_ids", "log_metric", "trainer_state")),
    ],
)
def test_what_a_trainer_gives_us_has_its_name(module, name):
    if not re.search(rf"\b{name}\b", inspect.getsource(importlib.import_module(module))):
        pytest.fail(moved(f"{name} of {module}", module.partition(".")[0]))


def test_settings_of_layers_have_their_names():
    """`slow_reason` reads them with a default: renamed, they would count as absent."""
    import transformers

    assert "sliding_attention" in transformers.Gemma2Config(num_hidden_layers=2).layer_types
    assert transformers.Gemma3nTextConfig().num_kv_shared_layers
    assert transformers.T5Config().is_encoder_decoder and transformers.MambaForCausalLM._is_stateful


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in FIELDS.items() for name in names])
def test_a_field_that_we_set_is_there(place, name):
    if name not in inspect.signature(look_up(place)).parameters:
        pytest.fail(moved(f"the field {name} of {place}", place.partition(".")[0]))


# --- the ranges and the lock -------------------------------------------------------------------------------------


def test_whatever_is_imported_is_stated_or_comes_with_what_is():
    extras = PROJECT["optional-dependencies"]
    stated = [*NEEDED, *map(Requirement, [*extras["openai"], *extras["gguf"]])]
    brought = {canonical(one.name) for one in stated}
    for need in stated:
        if need.name == "gguf" and not find_spec("gguf"):
            continue
        brought |= {
            canonical(Requirement(line).name)
            for line in importlib.metadata.requires(need.name) or ()
            if "extra ==" not in line
        }
    assert len(imported()) > 10
    assert not {name: file for name, file in imported().items() if name not in brought}


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: need.name)
def test_every_range_has_both_ends_and_what_is_installed_within(need):
    operators = {one.operator for one in need.specifier}
    assert operators == {">=", "<"}, f"{need}: state a lowest and a highest version"
    assert need.specifier.contains(Version(importlib.metadata.version(need.name)).public)


def pins() -> dict[str, str]:
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_lock_names_every_dependency_within_its_range():
    locked = pins()
    for need in NEEDED:
        assert need.specifier.contains(locked[need.name]), f"tests/constraints.txt has {need.name} {locked[need.name]}"
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) and Version(version) for name, version in locked.items())
    assert list(locked) == sorted(locked)


def test_the_lock_is_closed():
    """Whatever a locked package needs on this platform is locked too."""
    locked = pins()
    for name in locked:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonical(need.name) in locked, f"{name} needs {need}"


def test_the_lowest_versions_are_those_of_the_ranges():
    """tests/benchmarks/lowest.py, asked what it would install."""
    line = [sys.executable, str(ROOT / "tests" / "benchmarks/lowest.py"), "--dry-run"]
    said = subprocess.run(line, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for need in NEEDED:
        [lowest] = [one.version for one in need.specifier if one.operator == ">="]
        assert f"{need.name}=={lowest}" in said.stdout
        assert SpecifierSet(f"=={lowest}").contains(lowest)


def test_the_newest_versions_are_those_without_the_upper_bounds():
    """tests/benchmarks/newest.py, asked what it would install."""
    line = [sys.executable, str(ROOT / "tests" / "benchmarks/newest.py"), "--dry-run"]
    said = subprocess.run(line, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for need in NEEDED:
        [low] = [one.version for one in need.specifier if one.operator == ">="]
        bounds = f">={low}" if need.name in newest.RAISED else f"{need.specifier}"
        words = shlex.split(said.stdout)
        assert any(
            word.startswith(need.name) and Requirement(word).specifier == SpecifierSet(bounds)
            for word in words
            if word[:1].isalpha() and ">=" in word
        ), need


def test_bounds_are_raised_to_the_next_minor_version_of_what_passed():
    text = '["transformers>=5.20,<5.25",\n "trl>=1.16,<1.17", "transformers[serving]>=5.20,<5.25", "datasets>=5,<6"]'
    inside = {"transformers": "5.24.3", "trl": "1.16.0", "datasets": "5.2.0"}
    assert newest.raise_bounds(text, inside) == (text, [])
    raised, changes = newest.raise_bounds(text, {**inside, "transformers": "5.26.1", "datasets": "6.0.0"})
    assert raised == (
        '["transformers>=5.20,<5.27",\n "trl>=1.16,<1.17", "transformers[serving]>=5.20,<5.27", "datasets>=5,<6.1"]'
    )
    assert changes == ["transformers 5.26.1: <5.25 becomes <5.27", "datasets 6.0.0: <6 becomes <6.1"]
    assert tomllib.loads(f"x = {raised}")["x"]
