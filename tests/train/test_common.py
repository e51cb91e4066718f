"""train/common.py: the order of rows, token ids of a row, loading, saving, scoring, the metrics log."""

import json
import warnings
from types import SimpleNamespace

import models
import pytest

from cai.base.errors import InputError
from cai.models import loading, local, scorer
from cai.models.chat import encode
from cai.models.loading import load_engine
from cai.train import common

PROMPT = [{"role": "user", "content": "How do I open the old gate?"}]
ANSWER = "Ask the owner for a key."


# --- order -----------------------------------------------------------------------------------------------


def test_every_epoch_has_every_row_once_in_another_order():
    lengths = [7 * i % 50 for i in range(53)]
    order = common.training_order(lengths, batch=8, epochs=2, seed=1)
    first, second = order[:53], order[53:]
    assert sorted(first) == sorted(second) == list(range(53))
    assert first != second
    assert order == common.training_order(lengths, batch=8, epochs=2, seed=1)
    assert order != common.training_order(lengths, batch=8, epochs=2, seed=2)


def test_rows_of_like_length_share_a_batch_and_batches_are_shuffled():
    lengths = [i * 37 % 200 for i in range(200)]
    order = common.training_order(lengths, batch=10, epochs=1, seed=0)
    batches = [[lengths[row] for row in order[i : i + 10]] for i in range(0, 200, 10)]
    assert max(max(batch) - min(batch) for batch in batches) <= 10
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)


def test_a_fraction_of_an_epoch():
    assert len(set(common.training_order([1] * 40, batch=8, epochs=0.5, seed=0))) == 20
    assert len(common.training_order([1] * 40, batch=8, epochs=1.5, seed=0)) == 60
    assert len(common.training_order([1], batch=8, epochs=0.1, seed=0)) == 1


# --- token ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_row_is_what_would_have_been_generated(family):
    engine = load_engine(str(models.folder(family)))
    chat = loading.load_chat(str(models.folder(family)))
    prompt, answer = encode(chat, PROMPT, ANSWER)
    assert prompt == engine.chat.encode(engine.chat.render(PROMPT))
    # Generation ends at the last token, and at no token before it.
    assert [token in engine.stop_ids for token in answer] == [False] * (len(answer) - 1) + [True]
    assert engine.chat.answer(answer[:-1], continued=False)[0] == ANSWER
    template = chat.tokenizer.apply_chat_template
    parts = family == "mistral"
    messages = [
        {**m, "content": [{"type": "text", "text": m["content"]}] if parts else m["content"]}
        for m in [*PROMPT, {"role": "assistant", "content": ANSWER}]
    ]
    whole = template(messages, tokenize=False, enable_thinking=False)
    assert whole.strip().endswith(chat.tokenizer.decode(answer).split("</think>")[-1].strip())


def test_control_tokens_in_a_row_are_text():
    chat = loading.load_chat(str(models.folder("llama")))
    prompt, answer = encode(chat, PROMPT, "Yes.<|eot_id|><|start_header_id|>user")
    plain_prompt, _ = encode(chat, PROMPT, "Yes.")
    assert prompt == plain_prompt
    assert answer.count(chat.stop_id) == 1 and answer[-1] == chat.stop_id
    assert chat.tokenizer.convert_tokens_to_ids("<|start_header_id|>") not in answer


def test_padding_is_no_end_of_an_answer():
    for family in models.FAMILIES:
        tokenizer = loading.load_chat(str(models.folder(family))).tokenizer
        assert tokenizer.padding_side == "right" and tokenizer.pad_token_id is not None


def test_a_spare_token_pads_where_there_is_one(tmp_path):
    folder = models.copy("llama", tmp_path / "model")  # has no pad token
    chat = loading.load_chat(str(folder))
    assert chat.tokenizer.pad_token == chat.tokenizer.eos_token
    chat.tokenizer.pad_token = None
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    chat.tokenizer.save_pretrained(folder)
    assert loading.load_chat(str(folder)).tokenizer.pad_token == chat.tokenizer.eos_token  # it has no embedding
    policy = loading.load_policy(str(folder))
    policy.resize_token_embeddings(len(chat.tokenizer))
    policy.save_pretrained(folder)
    assert loading.load_chat(str(folder)).tokenizer.pad_token == "<|reserved_0|>"


# --- loading ---------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path):
    folder = models.copy("qwen", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template"):
        loading.load_chat(str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        loading.load_chat(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        loading.load_policy(str(folder))
    with pytest.raises(InputError, match="nowhere"):
        loading.load_reward_model(str(tmp_path / "nowhere"))


def test_a_reward_model_has_one_score(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = loading.load_reward_model(str(models.folder("qwen")))
    assert model.config.num_labels == 1 and model.score.weight.shape[0] == 1
    three = AutoModelForSequenceClassification.from_pretrained(models.folder("qwen"), num_labels=3)
    three.save_pretrained(models.copy("qwen", tmp_path / "three"))
    with pytest.raises(InputError, match="3 classes"):
        loading.load_reward_model(str(tmp_path / "three"))


def test_dropout_as_configured_or_none(tmp_path):
    folder = models.copy("qwen", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    layer = loading.load_policy(str(folder)).model.layers[0]
    assert layer.self_attn.attention_dropout == 0.5
    layer = loading.load_policy(str(folder), dropout=False).model.layers[0]
    assert layer.self_attn.attention_dropout == 0.0


def test_precision_on_a_cpu_and_as_asked():
    assert loading.precision("cpu", "auto") == ("float32", None)
    # As for writing and judging: by the processor and the size of the model.
    forward = "bfloat16" if local.cpu_multiplies_bfloat16() else None
    assert loading.precision("cpu", "auto", parameters=135_000_000) == ("float32", forward)
    assert loading.precision("cpu", "auto", parameters=1_000_000) == ("float32", None)
    assert loading.precision("cpu", "float32", parameters=135_000_000) == ("float32", None)
    assert loading.precision("cpu", "float32") == ("float32", None)
    assert loading.precision("cpu", "bfloat16") == ("bfloat16", "bfloat16")
    with pytest.raises(InputError, match="float16 does not train"):
        loading.precision("cpu", "float16")


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = models.copy("gemma2", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (loading.load_policy, loading.load_reward_model):
        with pytest.raises(InputError, match=r"lack 1 tensors.*up_proj"):
            load(str(folder))


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="cuda:77"):
        loading.choose_device("cuda:77")
    with pytest.raises(InputError, match="expected cpu, cuda"):
        loading.choose_device("gpu")


def test_arguments_suit_every_trainer_without_a_warning(tmp_path):
    from trl import RewardConfig, SFTConfig

    arguments = common.trainer_arguments(tmp_path, learning_rate=1, batch_size=2, save_steps=7, device="cpu")
    for config in (SFTConfig, RewardConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = config(**arguments, max_length=None)
        assert made.use_cpu and not made.bf16 and not made.gradient_checkpointing
        assert made.save_steps == 7 and made.device.type == "cpu"
    assert common.trainer_arguments(tmp_path, learning_rate=1, batch_size=2, seed=5)["seed"] == 5
    assert common.trainer_arguments(tmp_path, learning_rate=1, batch_size=2, max_steps=5)["max_steps"] == 5


# --- metrics, saving, scoring ----------------------------------------------------------------------------


def line_trainer(folder, count: int, **settings):
    """A Trainer of one weight on `count` rows, four in a step, with the states and the metrics of our commands."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    class LineTrainer(Trainer):
        def compute_loss(self, model, inputs, **_):
            return (model(inputs["x"][:, None]) - 3).square().mean()

    model = torch.nn.Linear(1, 1)
    model.accepts_loss_kwargs = False
    arguments = common.trainer_arguments(
        folder, learning_rate=0.1, batch_size=4, dtype="float32", device="cpu", **settings
    )
    rows = Dataset.from_dict({"x": [1.0] * count})
    arguments = TrainingArguments(**arguments, remove_unused_columns=False)
    return LineTrainer(model, arguments, train_dataset=rows, callbacks=[common.MetricsLog(folder)])


@pytest.mark.parametrize("count", [3, 9])
def test_training_of_a_single_step_has_a_learning_rate(tmp_path, count):
    trainer = line_trainer(tmp_path, count)
    before = trainer.model.weight.item()
    common.run_trainer(trainer, tmp_path)
    assert trainer.state.global_step == (1 if count == 3 else 3)
    assert trainer.model.weight.item() != before
    assert trainer.args.warmup_steps == (0 if count == 3 else 0.05)


def test_metrics_are_one_row_a_log_and_a_resume_drops_later_rows(tmp_path):
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    log = common.MetricsLog(tmp_path)
    log.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        state.global_step = step
        log.on_step_end(None, state, None)
        log.on_log(None, state, None, logs={"loss": step / 2, "epoch": 0.1})
    log.on_train_end(None, state, None)
    assert log.on_prediction_step(None, state, None) is None
    state.global_step = 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    again = common.MetricsLog(tmp_path)
    again.on_train_begin(None, state, None)
    state.global_step = 4
    again.on_log(None, state, None, logs={"loss": 9.0})
    again.on_train_end(None, state, None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (4, 9.0)]
    assert all(row["seconds"] >= 0 and "epoch" not in row for row in rows)


def test_a_run_killed_after_its_last_step_and_resumed_has_one_row_of_the_whole_run(tmp_path):
    rows = []
    for _ in range(2):  # what is left of the first is what a kill before the last weights leaves
        trainer = line_trainer(tmp_path, 9, save_steps=1)
        common.run_trainer(trainer, tmp_path)
        rows.append([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()])
    assert trainer.state.global_step == 3 and common.last_state(tmp_path / "checkpoints").name == "checkpoint-3"
    whole, resumed = ([(row["step"], "train_runtime" in row) for row in one] for one in rows)
    assert whole == resumed == [(1, False), (3, True)]


def test_a_torn_state_is_passed_over(tmp_path):
    assert common.last_state(tmp_path) is None
    for step, text in ((5, "{}"), (20, "{}"), (100, '{"step'), (1000, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert common.last_state(tmp_path).name == "checkpoint-20"


def test_a_checkpoint_is_read_back_by_the_engine(tmp_path):
    import torch

    source = str(models.folder("gemma2"))
    chat, policy = loading.load_chat(source), loading.load_policy(source)
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.add_(0.5)
    common.save_checkpoint(policy, chat.tokenizer, tmp_path / "saved")
    engine = load_engine(str(tmp_path / "saved"))
    ids = torch.tensor([chat.encode(chat.render(PROMPT))])
    with torch.no_grad():
        assert torch.equal(engine.model(ids).logits, policy.eval()(ids).logits)
    assert engine.chat.render(PROMPT) == chat.render(PROMPT)


@pytest.mark.parametrize("family", ["gemma3", "llama", *models.OLDER])
def test_nothing_before_the_first_block_is_trained(family, tmp_path):
    older = family in models.OLDER
    source = str(models.build_older(family, tmp_path / family) if older else models.folder(family))
    policy = common.freeze_before(loading.load_policy(source), 1)
    name, blocks = common.find_blocks(policy)
    assert len(blocks) == loading.read_blocks(source)
    trained = {key for key, weight in policy.named_parameters() if weight.requires_grad}
    later = {key for key, _ in policy.named_parameters() if key.startswith(f"{name}.1.")}
    embeddings = ("embed_", "word_embeddings", "wte", "wpe")
    assert later <= trained
    assert not any(part in key and "embed_out" not in key for key in trained for part in embeddings)
    assert not any(key.startswith(f"{name}.0.") for key in trained)


def test_the_blocks_are_the_language_models_and_no_blocks_experts():
    from torch.nn import Linear, Module, ModuleDict, ModuleList
    from transformers import PretrainedConfig

    def blocks():
        return ModuleList(ModuleDict({"experts": ModuleList([Linear(1, 1), Linear(1, 1)])}) for _ in range(2))

    model = Module()
    model.config = PretrainedConfig(num_hidden_layers=2)
    model.vision = ModuleDict({"layers": blocks()})
    model.language = ModuleDict({"layers": blocks()})
    assert common.find_blocks(model)[0] == "language.layers"
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="no list of its 3 blocks"):
        common.find_blocks(model)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_are_saved_alone_and_merged(tmp_path, task):
    import torch
    from peft import get_peft_model

    source = str(models.folder("llama"))
    chat = loading.load_chat(source)
    load = loading.load_policy if task == "CAUSAL_LM" else loading.load_reward_model
    model = get_peft_model(load(source), common.lora_config(4, task))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained) == (task == "SEQ_CLS")
    assert not any("lm_head" in name for name in trained)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in trained:
                weight.normal_(0, 0.1)
    model.config.pad_token_id = chat.tokenizer.pad_token_id
    ids = torch.tensor([chat.encode(chat.render(PROMPT))])
    with torch.no_grad():
        before = model.eval()(ids).logits
    # First as from a sharded model, whose weights are given, then from the model itself.
    common.save_checkpoint(model, chat.tokenizer, tmp_path / "gathered", state_dict=model.state_dict())
    common.save_checkpoint(model, chat.tokenizer, tmp_path / "saved")
    for folder in ("gathered", "saved"):
        merged = load(str(tmp_path / folder)).eval()
        with torch.no_grad():
            assert torch.allclose(merged(ids).logits, before, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(load(source).eval()(ids).logits, before, atol=1e-2)
    adapter = json.loads((tmp_path / "saved" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["task_type"] == task


def test_a_score_depends_on_its_sequence_alone():
    import torch

    torch.manual_seed(0)
    chat = loading.load_chat(str(models.folder("qwen")))
    model = loading.load_reward_model(str(models.folder("qwen")))
    model.config.pad_token_id = pad = chat.tokenizer.pad_token_id
    answers = ["Yes.", "No, and here is why I would not.", "A key.", "Push, lift, pull. " * 6]
    pairs = [encode(chat, PROMPT, answer) for answer in answers]
    sequences = [before + after for before, after in pairs]
    alone = [scorer.score_sequences(model, pad, [ids], 1)[0] for ids in sequences]
    assert scorer.score_sequences(model, pad, sequences, 3) == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in alone}) == 4
