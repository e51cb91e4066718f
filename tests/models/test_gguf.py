"""Models in GGUF files: read as the same model in a folder is, kept once, and refused with a reason."""

import json
import os
import resource
import shutil
import subprocess
import sys

import models
import pytest
from conftest import ROOT

from cai.base.errors import CaiError, InputError
from cai.base.hashing import identity, sha256_file
from cai.models import gguf, loading
from cai.models.chat import encode

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
import gguf_files

PROMPT = [{"id": "a", "prompt": "How do I open the old gate?"}]
PAIRS = [{"prompt": "How do I open the gate?", "chosen": "Lift the bar.", "rejected": "No.", "p_chosen": 0.9}] * 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder where GGUF files are kept as folders, in this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "constitutional-ai" / "gguf"


@pytest.fixture
def file(tmp_path, cache):
    (tmp_path / "model").mkdir()
    return gguf_files.write(models.folder("llama"), tmp_path / "model" / "small.gguf")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(cache):
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_the_file_gives_the_logits_and_the_token_ids_of_the_folder(file, cache, capsys):
    import torch

    ids = torch.arange(60)[None]
    ours, theirs = (loading.load_policy(str(path)) for path in (file, models.folder("llama")))
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert ours.dtype == torch.float32 and not hasattr(ours.config, "quantization_config")
    chats = [loading.load_chat(str(path)) for path in (file, models.folder("llama"))]
    talk = [{"role": "user", "content": "Why <|eot_id|> ünder 12?"}]
    assert encode(chats[0], talk, "Because.") == encode(chats[1], talk, "Because.")
    assert kept(cache) == [sha256_file(file)]
    assert capsys.readouterr().err.count("reading it once") == 1


def test_a_packed_file_gives_what_the_gguf_package_dequantises(tmp_path, cache):
    import numpy
    from gguf import GGMLQuantizationType, quants
    from safetensors.numpy import load_file

    file = gguf_files.write(models.folder("llama"), tmp_path / "packed.gguf", packed="down_proj")
    name = "model.layers.0.mlp.down_proj.weight"
    weights = load_file(models.folder("llama") / "model.safetensors")[name]
    packed = quants.quantize(weights, GGMLQuantizationType.Q8_0)
    result = load_file(f"{gguf.resolve(str(file))}/model.safetensors")[name]
    assert numpy.array_equal(result, quants.dequantize(packed, GGMLQuantizationType.Q8_0))
    assert not numpy.array_equal(result, weights)


@pytest.mark.slow
def test_commands_take_the_file_and_its_folder_and_know_them_as_one_model(file, cache, invoke, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPT)
    texts = []
    for number, model in enumerate((models.folder("llama"), file, file.parent)):
        arguments = ["--input", prompts, "--model", model, "--max-new-tokens", 8]
        output = tmp_path / f"out-{number}.jsonl"
        plan = invoke("generate", *arguments, "--output", output, "--dry-run", "--json")
        assert json.loads(plan.stdout)["memory_gb"]["total"] > 0, plan.output
        result = invoke("generate", *arguments, "--output", output)
        assert result.exit_code == 0, result.output
        texts.append(json.loads(output.read_text())["response"])
    assert texts[0] == texts[1] == texts[2]
    assert identity(str(file)) == identity(str(file.parent)) == sha256_file(file)
    report = json.loads(invoke("doctor", "--json", "--timeout", 60, "--model", file).stdout)
    assert report["packages"]["gguf"]["version"] and report["model"]["fits"]["steps"]
    assert any("a GGUF file" in note for note in report["notes"])


@pytest.mark.slow
def test_an_adapter_trained_on_the_file_loads_again_after_the_cache_is_cleared(file, cache, invoke, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    rows = write_rows(tmp_path / "rows.jsonl", [{**PROMPT[0], "response": "Lift the bar."}])
    training = {
        "sft": ["--helpful", rows],
        "reward_model": ["--input", pairs, "--holdout", 0],
        "dpo": ["--input", pairs],
    }
    for name, arguments in training.items():
        result = invoke(name, *arguments, "--model", file, "--lora", "--epochs", 1, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        adapter = tmp_path / name / "adapter"
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    shutil.rmtree(cache)
    before = identity(str(adapter))
    result = invoke(
        "generate", "--input", write_rows(tmp_path / "p.jsonl", PROMPT), "--model", adapter, "--output", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert kept(cache) == [sha256_file(file)]
    gguf_files.write(models.folder("llama"), file, packed="down_proj")
    assert identity(str(adapter)) != before


def test_a_folder_with_several_files_names_them(file):
    shutil.copy(file, file.parent / "other.GGUF")
    with pytest.raises(InputError, match=r"2 GGUF files: other.GGUF, small.gguf.*Name the file"):
        loading.check_model(str(file.parent))


def test_a_file_without_a_chat_template_takes_the_one_beside_it(tmp_path, cache):
    file = gguf_files.write(models.folder("llama"), tmp_path / "base.gguf", template=False)
    with pytest.raises(InputError, match=r"base.gguf: the model has no chat template.*chat_template.jinja"):
        loading.check_model(str(file))
    assert kept(cache) == []
    before = identity(str(file))
    (tmp_path / "chat_template.jinja").write_text(loading.load_tokenizer(str(models.folder("llama"))).chat_template)
    loading.check_model(str(file))
    assert identity(str(file)) != before and kept(cache) == [identity(str(file))]


def damage(file, how):
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "noise":
        file.write_bytes(os.urandom(1000))
    elif how == "empty":
        file.write_bytes(b"")
    else:
        gguf_files.write(models.folder("llama"), file, architecture="rwkv7")


@pytest.mark.parametrize("how", ["cut", "noise", "empty", "architecture"])
def test_a_file_that_cannot_be_read_is_refused_and_leaves_nothing(file, cache, invoke, tmp_path, how):
    damage(file, how)
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPT)
    result = invoke("generate", "--input", prompts, "--model", file, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2, result.output
    assert f"{file}: the GGUF file can't be read" in result.stderr and "serve it with llama.cpp" in result.stderr
    assert ("rwkv7" in result.stderr) == (how == "architecture")
    assert not kept(cache) and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("absent.gguf", "no such GGUF file"), ("m-00001-of-00002.gguf", "part 1 of 2 of a model")]
)
def test_a_name_that_is_no_whole_file_is_refused(file, name, words):
    if "-of-" in name:
        shutil.copy(file, file.parent / name)
    with pytest.raises(InputError, match=words):
        loading.check_model(str(file.parent / name))


def test_without_the_package_the_error_names_it(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r'pip install "\.\[gguf\]"'):
        loading.check_model(str(file))


def test_remains_of_a_killed_process_are_removed(file, cache):
    remains = cache / f"{sha256_file(file)}.123.tmp"
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    loading.check_model(str(file))
    assert kept(cache) == [sha256_file(file)]


def test_a_place_that_cannot_be_written_is_named(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(CaiError, match=r"taken.*can't be written.*set XDG_CACHE_HOME"):
        loading.check_model(str(file))


def test_a_disk_that_fills_up_leaves_no_half_folder(file, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files end as on a full disk
    try:
        with pytest.raises(CaiError, match="can't be written"):
            loading.check_model(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(cache) == []
    loading.check_model(str(file))


CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
from cai.models import loading
loading.check_model(sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_make_one_folder(file, cache):
    command = [sys.executable, "-c", CHECK, str(ROOT / "scripts"), str(file)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("reading it once" in error for error in errors) == 1
    assert kept(cache) == [sha256_file(file)]
