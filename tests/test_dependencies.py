"""Dependencies: the ranges, the lock, and a canary for each name of theirs that this project leans on.

tests/lowest.py runs this file, and more, in an environment of the lowest versions of the stated ranges.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from functools import cache

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

WATCHED = ("trl", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]

# What our subclasses override or call of theirs, which no import tells of.
METHODS = {
    "trl.SFTTrainer": ["compute_loss"],
    "trl.RewardTrainer": ["compute_loss"],
    "trl.DPOTrainer": ["compute_loss"],
    "trl.GRPOTrainer": ["compute_loss"],
    "trl.RLOOTrainer": ["compute_loss"],
    "trl.trainer.reward_trainer.DataCollatorForPreference": ["torch_call"],
    "trl.trainer.dpo_trainer.DataCollatorForPreference": ["torch_call"],
    "transformers.Trainer": ["compute_loss", "create_optimizer", "get_train_dataloader", "log", "remove_callback",
                             "train", "is_world_process_zero", "save_model"],
    "transformers.PreTrainedTokenizerFast": ["apply_chat_template", "batch_decode", "convert_tokens_to_ids"],
    "transformers.DynamicCache": ["get_seq_length"],
    "transformers.cache_utils.DynamicLayer": ["get_seq_length", "update"],
}
# Fields of a trainer's arguments that are passed to all of them.
FIELDS = {
    "transformers.TrainingArguments": [
        "train_sampling_strategy", "per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit",
        "gradient_accumulation_steps", "warmup_steps", "max_grad_norm", "save_strategy", "logging_first_step",
        "use_cpu", "report_to", "disable_tqdm", "bf16", "fp16", "dataloader_pin_memory", "ddp_find_unused_parameters"],
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
    return (f"{place} is not in {installed(package)} (the project says {versions}): it was moved, renamed or removed. "
            "Look for it in the release notes, mend its use, and narrow the range in pyproject.toml if need be.")


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
    assert {"trl.SFTTrainer", "trl.RewardTrainer", "transformers.AutoModelForCausalLM", "datasets.load_dataset",
            "datasets.Dataset"} <= set(used)
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


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in FIELDS.items() for name in names])
def test_a_field_that_we_set_is_there(place, name):
    if name not in inspect.signature(look_up(place)).parameters:
        pytest.fail(moved(f"the field {name} of {place}", place.partition(".")[0]))


# --- the ranges and the lock -------------------------------------------------------------------------------------


def test_whatever_is_imported_is_stated_or_comes_with_what_is():
    stated = [*NEEDED, *map(Requirement, PROJECT["optional-dependencies"]["openai"])]
    brought = {canonical(one.name) for one in stated}
    for need in stated:
        brought |= {canonical(Requirement(line).name) for line in importlib.metadata.requires(need.name) or ()
                    if "extra ==" not in line}
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
    """tests/lowest.py, asked what it would install."""
    line = [sys.executable, str(ROOT / "tests" / "lowest.py"), "--dry-run"]
    said = subprocess.run(line, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for need in NEEDED:
        [lowest] = [one.version for one in need.specifier if one.operator == ">="]
        assert f"{need.name}=={lowest}" in said.stdout
        assert SpecifierSet(f"=={lowest}").contains(lowest)
