"""Model folders that can't do what is asked: found before anything is written, by the command and by doctor.py."""

import json
import shutil

import models
import pytest

from cai.base import run_settings
from cai.base.errors import InputError
from cai.base.hashing import identity
from cai.base.paths import TINY
from cai.models import folders, loading
from cai.models.chat import Chat, unknown_tokens

PROMPTS = [{"id": name, "prompt": f"How do I oil the hinge of door {name}?"} for name in ("a", "b")]
REVISED = [
    {**row, "response": "No.", "rounds": [{"principle": "p", "critique": "c", "revision": text, "flags": []}]}
    for row, text in zip(PROMPTS, ("Two drops on the pin.", "Lift the pin first."), strict=True)
]
PAIRS = [
    {"prompt": f"How do I oil hinge {n}?", "chosen": "Two drops on the pin.", "rejected": "No.", "p_chosen": 0.9}
    for n in range(4)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def commands(tmp_path, model):
    """Arguments of a step of each kind on the model: (command, its arguments, where its output goes)."""
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS)
    revised = write(tmp_path / "revised.jsonl", REVISED)
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    steps = {
        "generate": ["--input", prompts, "--max-new-tokens", 4],
        "sft": ["--input", revised],
        "dpo": ["--input", pairs],
        "reward_model": ["--input", pairs, "--holdout", 0],
    }
    return [(name, [*arguments, "--model", model], tmp_path / f"out-{name}") for name, arguments in steps.items()]


def diagnose(invoke, model) -> dict:
    return json.loads(invoke("doctor", "--json", "--timeout", 60, "--model", model).stdout)


def refused(invoke, tmp_path, model, words, steps=None):
    """Each step ends with 2, names the reason and leaves nothing."""
    for name, arguments, output in commands(tmp_path, model):
        if steps and name not in steps:
            continue
        before = sorted(tmp_path.iterdir())
        result = invoke(name, *arguments, "--output", output)
        assert result.exit_code == 2, (name, result.output)
        assert all(word in result.stderr for word in words), (name, result.stderr)
        assert "Traceback" not in result.stderr and sorted(tmp_path.iterdir()) == before


# --- a tokenizer larger than the embedding --------------------------------------------------------------------------


def add_tokens(folder, *tokens, template=None, **special):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_words_that_were_added_without_rows_are_refused(invoke, tmp_path):
    """huggingface/transformers #12763: words added by `add_tokens`, the model not resized."""
    folder = models.copy("llama", tmp_path / "model")
    add_tokens(folder, "hinge")
    refused(invoke, tmp_path, folder, ["beyond the model's embedding", "'hinge'", "resize_token_embeddings"])
    report = diagnose(invoke, folder)
    assert not report["ok"] and "'hinge'" in report["problems"][0]


def test_control_tokens_of_the_template_are_refused(invoke, tmp_path):
    """huggingface/transformers #11102: special tokens added for a template, the model not resized."""
    folder = models.copy("llama", tmp_path / "model")
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    chatml = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    add_tokens(folder, template=chatml, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    refused(invoke, tmp_path, folder, ["beyond the model's embedding", "<|im_start|>"], steps=["generate", "sft"])


def test_an_end_token_beyond_the_embedding_is_refused(tmp_path):
    folder = models.copy("llama", tmp_path / "model")
    add_tokens(folder, eos_token="<|done|>")
    with pytest.raises(InputError, match=r"<\|done\|>"):
        loading.check_model(str(folder))


def test_tokens_that_no_conversation_holds_are_no_fault(tmp_path):
    """Gemma 3 1B: the tokenizer lists `<image_soft_token>`, id 262144, beyond an embedding of 262144 rows."""
    folder = models.copy("gemma3", tmp_path / "model")
    tokenizer = add_tokens(folder, additional_special_tokens=["<image_soft_token>"])
    loading.check_model(str(folder))
    assert not unknown_tokens(Chat(tokenizer), len(tokenizer) - 1)
    text = Chat(tokenizer).render([{"role": "user", "content": "What is <image_soft_token>?"}])
    assert max(tokenizer(text)["input_ids"]) < len(tokenizer) - 1


@pytest.mark.slow
def test_a_padding_token_beyond_the_embedding_is_replaced(invoke, tmp_path):
    """Many fine-tunes: `add_special_tokens({"pad_token": "[PAD]"})`, the model not resized."""
    folder = models.copy("llama", tmp_path / "model")
    tokenizer = add_tokens(folder, pad_token="[PAD]")
    chat = loading.load_chat(str(folder))
    assert chat.tokenizer.pad_token_id < len(tokenizer) - 1
    for name, arguments, output in commands(tmp_path, folder):
        if name in ("generate", "sft"):
            result = invoke(name, *arguments, "--output", output)
            assert result.exit_code == 0, result.output
    assert any("pad token is beyond" in note for note in diagnose(invoke, folder)["notes"])


# --- quantised checkpoints ------------------------------------------------------------------------------------------

QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes-8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
    "aqlm": {"quant_method": "aqlm", "in_group_size": 8, "num_codebooks": 1, "nbits_per_codebook": 16},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "exl2": {"quant_method": "exl2", "bits": 4.0},
}


def quantise(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_checkpoint_is_not_trained(invoke, tmp_path, name):
    """The `quantization_config` of published checkpoints; those of unsloth, TheBloke, ISTA-DASLab, RedHatAI, DeepSeek,
    turboderp. The documentation of transformers ("Quantization") lists what each takes."""
    folder = quantise(models.copy("llama", tmp_path / "model"), QUANTISED[name])
    method = QUANTISED[name]["quant_method"]
    refused(
        invoke,
        tmp_path,
        folder,
        [f"a quantised checkpoint ({method}", "can't be trained"],
        ["sft", "dpo", "reward_model"],
    )


@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "fp8"])
def test_a_quantised_checkpoint_without_its_package_is_refused(invoke, tmp_path, name):
    """huggingface/transformers #26165 and #30887: an ImportError, from deep inside."""
    folder = quantise(models.copy("llama", tmp_path / "model"), QUANTISED[name])
    reason = folders.quantisation_problem(QUANTISED[name])
    if reason is None:
        pytest.skip("the package is installed")
    refused(invoke, tmp_path, folder, ["can't be loaded here", reason.split("`")[0][:40]], ["generate"])
    report = diagnose(invoke, folder)
    assert not report["ok"] and "can't be loaded here" in report["problems"][0]


@pytest.mark.slow
def test_a_quantised_checkpoint_answers_where_its_package_is_installed(invoke, tmp_path):
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    source, folder = TINY, tmp_path / "model"  # the smaller ones have less than a block of 64 weights in a row
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    [(name, arguments, output), *_] = commands(tmp_path, folder)
    assert invoke(name, *arguments, "--output", output).exit_code == 0
    report = diagnose(invoke, folder)
    assert report["ok"] and any("refuse to train it" in note for note in report["notes"])
    refused(invoke, tmp_path, folder, ["can't be trained"], ["sft", "reward_model"])


def test_weights_in_a_makers_own_format_are_refused(invoke, tmp_path):
    """AutoGPTQ's older quantize_config.json, and NVIDIA ModelOpt's hf_quant_config.json."""
    for name in ("quantize_config.json", "hf_quant_config.json"):
        folder = models.copy("llama", tmp_path / name.partition(".")[0])
        (folder / name).write_text('{"bits": 4}')
        refused(invoke, tmp_path, folder, ["transformers does not read", name], ["generate", "sft"])


# --- adapters -------------------------------------------------------------------------------------------------------


def make_adapter(base, where, task="CAUSAL_LM", **config):
    """A random adapter of a base, with no file of its own but what peft writes."""
    import torch
    from peft import LoraConfig, get_peft_model

    load = loading.load_policy if task == "CAUSAL_LM" else loading.load_reward_model
    modules = ["score"] if task == "SEQ_CLS" else None
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=task, modules_to_save=modules, **config)
    model = get_peft_model(load(str(base)), lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(models.folder("llama"), tmp_path_factory.mktemp("adapters") / "lora")


@pytest.fixture(scope="module")
def reward_adapter(tmp_path_factory):
    return make_adapter(models.folder("llama"), tmp_path_factory.mktemp("adapters") / "reward", "SEQ_CLS")


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def test_an_adapter_is_merged_wherever_a_model_is_loaded(adapter, reward_adapter):
    import torch
    from peft import PeftModel

    base = loading.load_policy(str(models.folder("llama")))
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    assert not torch.allclose(before, expected, atol=1e-2)
    policy = loading.load_policy(str(adapter))
    assert torch.allclose(logits(policy), expected, atol=1e-4)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert torch.allclose(logits(loading.load_engine(str(adapter), device="cpu").model), expected, atol=1e-4)
    # Under a new head, the body of the adapter; and with its own head, a reward model.
    assert torch.allclose(
        loading.load_reward_model(str(adapter)).model.layers[1].mlp.up_proj.weight,
        policy.model.layers[1].mlp.up_proj.weight,
    )
    scorer = loading.load_reward_model(str(reward_adapter))
    assert torch.equal(logits(scorer), logits(loading.load_reward_model(str(reward_adapter))))


@pytest.mark.slow
def test_every_training_command_takes_an_adapter(invoke, tmp_path, adapter, reward_adapter):
    """huggingface/trl #297 and #368: reward models saved as adapters lost their head, or their kind, when merged."""
    for name, arguments, output in commands(tmp_path, adapter):
        result = invoke(name, *arguments, "--output", output)
        assert result.exit_code == 0, (name, result.output)
    sizes = ["--updates", 1, "--prompts-per-update", 2, "--max-new-tokens", 4, "--input", tmp_path / "prompts.jsonl"]
    models_ = ["--model", adapter, "--reward-model", reward_adapter]
    for name, more in (("ppo", []), ("grpo", ["--samples", 2])):
        result = invoke(name, *sizes, *models_, *more, "--output", tmp_path / name)
        assert result.exit_code == 0, (name, result.output)
        assert not (tmp_path / name / "checkpoints").exists()


def test_an_adapter_trained_on_an_adapter_belongs_to_both(invoke, tmp_path, adapter):
    import torch

    result = invoke(
        *(
            "sft",
            "--lora",
            "--learning-rate",
            0.01,
            "--input",
            write(tmp_path / "r.jsonl", REVISED),
            "--model",
            adapter,
        ),
        *("--output", tmp_path / "sft"),
    )
    assert result.exit_code == 0, result.output
    merged, again = (loading.load_policy(str(tmp_path / "sft" / name)) for name in ("", "adapter"))
    assert folders.adapter_chain(str(tmp_path / "sft" / "adapter"))[1:] == [str(adapter), str(models.folder("llama"))]
    assert torch.allclose(logits(merged), logits(again), atol=1e-4)


def test_an_adapter_with_tokens_of_its_own(tmp_path):
    """peft's documentation, "Add new tokens": the embedding is trained and saved with the adapter."""
    from peft import LoraConfig, get_peft_model

    base = models.folder("llama")
    policy, chat = loading.load_policy(str(base)), loading.load_chat(str(base))
    chat.tokenizer.add_tokens(["hinge"])
    policy.resize_token_embeddings(len(chat.tokenizer))
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    get_peft_model(policy, lora).save_pretrained(tmp_path / "lora")
    chat.tokenizer.save_pretrained(tmp_path / "lora")
    loading.check_model(str(tmp_path / "lora"))
    engine = loading.load_engine(str(tmp_path / "lora"), device="cpu")
    assert engine.model.get_input_embeddings().weight.shape[0] == len(chat.tokenizer)


def change_adapter(adapter, where, **settings):
    shutil.copytree(adapter, where)
    config = json.loads((where / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return where


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_model_name_or_path": "/content/llama"}, ["an adapter of /content/llama", "merge it first"]),
        ({"base_model_name_or_path": "nobody/llama"}, ["an adapter of nobody/llama", "merge it first"]),
        ({"base_model_name_or_path": None}, ["names no base"]),
        ({"peft_type": "PROMPT_TUNING"}, ["can't be merged", "virtual tokens"]),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(invoke, tmp_path, adapter, settings, words):
    broken = change_adapter(adapter, tmp_path / "broken", **settings)
    refused(invoke, tmp_path, broken, words)
    assert not diagnose(invoke, broken)["ok"]


def test_an_adapter_of_another_model_is_refused(invoke, tmp_path, adapter):
    """peft warns of missing keys and goes on with an adapter that does nothing (huggingface/peft #577)."""
    other = change_adapter(adapter, tmp_path / "other", base_model_name_or_path=str(models.folder("qwen")))
    lora = next(other.glob("*.safetensors"))
    from safetensors.torch import load_file, save_file

    save_file({name.replace("layers", "blocks"): weight for name, weight in load_file(lora).items()}, lora)
    refused(invoke, tmp_path, other, ["the adapter can't be merged into"])


def test_an_adapter_is_another_one_on_another_base(tmp_path, adapter):
    base = models.copy("llama", tmp_path / "base")
    copy = change_adapter(adapter, tmp_path / "copy", base_model_name_or_path=str(base))
    before = identity(str(copy))
    (base / "generation_config.json").write_text("{}")
    assert identity(str(copy)) != before


# --- the context ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "opt", "mpt", "neox"])
def test_rows_beyond_the_context_are_left_out(invoke, tmp_path, kind):
    """EleutherAI/gpt-neo #273 and huggingface/transformers #530: "index out of range" beyond the learned positions."""
    folder = models.build_older(kind, tmp_path / "model", context=128)
    long = "Two drops on the pin, and lift it. " * 30
    commands(tmp_path, folder)
    write(
        tmp_path / "revised.jsonl",
        [*REVISED, {**REVISED[0], "id": "c", "rounds": [{**REVISED[0]["rounds"][0], "revision": long}]}],
    )
    write(tmp_path / "pairs.jsonl", [*PAIRS, {**PAIRS[0], "chosen": long}])
    for name, file in (("sft", "revised"), ("dpo", "pairs"), ("reward_model", "pairs")):
        more = ["--holdout", 0] if name == "reward_model" else []
        result = invoke(
            *(
                name,
                "--input",
                tmp_path / f"{file}.jsonl",
                "--model",
                folder,
                "--output",
                tmp_path / name,
                "--json",
                *more,
            )
        )
        assert result.exit_code == 0, (name, result.output)
        assert json.loads(result.stdout)["overlong"] == 1
        assert "longer than the model's context of 128 tokens" in result.stderr
    report = diagnose(invoke, folder)
    assert report["model"]["context"] == 128 and any("context is 128 tokens" in note for note in report["notes"])


def test_rows_that_are_all_too_long_name_the_context(invoke, tmp_path):
    folder = models.build_older("gpt2", tmp_path / "model", context=16)
    refused(invoke, tmp_path, folder, ["longer than the model's context of 16 tokens"], ["sft", "dpo", "reward_model"])


# --- reward models of any architecture ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", models.OLDER)
@pytest.mark.parametrize("adapters", [False, True])
def test_a_reward_model_of_an_older_architecture(invoke, tmp_path, kind, adapters):
    """The architectures of Pythia, Cerebras-GPT, OPT, Falcon, BLOOMZ and MPT; as value model of PPO too."""
    folder, pairs = models.build_older(kind, tmp_path / "model"), write(tmp_path / "pairs.jsonl", PAIRS)
    result = invoke(
        *("reward_model", "--input", pairs, "--model", folder, "--output", tmp_path / "reward", "--holdout", 0),
        *(["--lora", "--lora-rank", 2] if adapters else []),
    )
    assert result.exit_code == 0, result.output
    result = invoke(
        *("ppo", "--input", write(tmp_path / "prompts.jsonl", PROMPTS), "--model", folder, "--updates", 1),
        *("--reward-model", tmp_path / "reward", "--prompts-per-update", 2, "--max-new-tokens", 4),
        *("--output", tmp_path / "ppo"),
        *(["--lora", "--lora-rank", 2] if adapters else []),
    )
    assert result.exit_code == 0, result.output


def test_an_architecture_without_a_head_is_refused_with_the_reason(invoke, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, CodeGenConfig

    folder = tmp_path / "model"
    config = CodeGenConfig(vocab_size=400, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=64, n_ctx=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.folder("llama")).save_pretrained(folder)
    refused(invoke, tmp_path, folder, ["no sequence classifier of the kind codegen", "dpo.py"], ["reward_model"])


def test_a_template_that_writes_the_date_is_noted(tmp_path):
    import click

    folder = models.copy("llama", tmp_path / "model")
    with click.Context(click.Command("x")) as context, context.scope():
        loading.check_model(str(folder))
        assert run_settings.identify({}) == {}
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text("{# {{ strftime_now('%d %b %Y') }} #}" + template)
        loading.check_model(str(folder))
        assert set(run_settings.identify({})) == {"date"}
