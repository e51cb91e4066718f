"""Estimates against what is then measured: tokens within a tenth, memory of tensors within a quarter."""

import json
import weakref

import models
import pytest

from cai.base.errors import InputError
from cai.base.paths import TINY
from cai.data.outputs import read_manifest, write_jsonl
from cai.models import estimate, folders
from cai.models.decoding import Prefixes, RowSampler, decode
from cai.models.engine import Sampling
from cai.models.estimate import Shape
from cai.models.loading import load_engine

# Eight billion parameters, as of a known model's sizes: a token's keys and values take 2·32·8·128 numbers.
EIGHT = Shape(8_000_000_000, 32, 4096, 14336, 32, 8, 128, 128256)


def test_by_hand():
    assert EIGHT.kv == 65536
    memory = estimate.text_memory(EIGHT, size=2, rows=10, longest=900, new=100, chunk=4096)
    assert memory["weights"] == 16e9 and memory["kv_cache"] == 65536 * 10 * 1000 * 2
    assert estimate.gigabytes({"a": 1_500_000_000, "b": 2_000_000}) == {"a": 1.5, "b": 0.002, "total": 1.5}
    training = estimate.training_memory(EIGHT, tokens=0)
    assert sum(training.values()) == 16 * 8e9
    # Rank 16 on 32 layers: query and output 2·8192, key and value 2·5120, the feed-forward 3·18432.
    lora = estimate.training_memory(EIGHT, tokens=0, lora_rank=16, autocast=True, frozen_size=2)
    added = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert lora["gradients"] == 4 * added and lora["weights"] == 16e9 + 4 * added
    # 6·8e9·1e9 operations at 0.35 of 989e12 a second.
    hours = estimate.training_hours(EIGHT, "h100", tokens=10**9)
    assert hours == pytest.approx(4.8e19 / (0.35 * 989e12) / 3600)
    # One row at a time the weights are moved for every token: 16 GB at 0.4 of 3.35 TB/s.
    hours = estimate.text_hours(EIGHT, "h100", size=2, rows=1, prompt_tokens=0, new_tokens=3600, length=0)
    assert hours == pytest.approx(16e9 / (0.4 * 3.35e12))
    assert estimate.text_hours(EIGHT, "h100", size=2, rows=64, prompt_tokens=0, new_tokens=3600, length=0) < hours / 9


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_prompts_are_counted_as_the_model_reads_them(family):
    engine = load_engine(str(models.folder(family)), device="cpu")
    talks = [[{"role": "user", "content": "How do I open the old gate? " * n}] for n in range(1, 6)]
    talks.append([*talks[0], {"role": "assistant", "content": "Lift it."}, {"role": "user", "content": "And then?"}])
    real = [len(engine.chat.encode(engine.chat.render(talk))) for talk in talks]
    found = estimate.token_counter(str(models.folder(family)))(talks)
    assert found == real


def test_a_sample_stands_for_many(monkeypatch):
    talks = [[{"role": "user", "content": "open the gate " * (1 + n % 9)}] for n in range(400)]
    all_of_them = estimate.count_tokens(iter(talks), "tiny")
    monkeypatch.setattr(estimate, "SAMPLE", 100)
    tokens, longest, calls = estimate.count_tokens(iter(talks), "tiny")
    assert calls == 400 and tokens == pytest.approx(all_of_them[0], rel=0.05)
    assert longest == pytest.approx(all_of_them[1], rel=0.25)
    assert estimate.count_tokens([], "tiny") == (0, 0, 0)


@pytest.mark.slow
def test_dry_run_tells_tokens_memory_hours_and_price(invoke, tmp_path):
    """Prompt tokens, and with a smaller run to go by the new ones, within a tenth of the real run's."""
    line = [
        "--input",
        TINY / "prompts" / "train.jsonl",
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--json",
        "--max-new-tokens",
        64,
    ]
    small, whole = tmp_path / "small.jsonl", tmp_path / "whole.jsonl"
    assert invoke("generate", *line, "--limit", 96, "--output", small).exit_code == 0
    told = invoke(
        "generate",
        *line,
        "--limit",
        192,
        "--output",
        whole,
        "--dry-run",
        "--like",
        small,
        "--gpu",
        "h100",
        "--price",
        1,
        10,
    )
    plan = json.loads(told.stdout)
    assert invoke("generate", *line, "--limit", 192, "--output", whole).exit_code == 0
    real = read_manifest(whole)["tokens"]
    assert plan["model_calls"] == real["rows"] == 192
    assert plan["prompt_tokens_about"] == pytest.approx(real["prompt"], rel=0.1)
    assert plan["new_tokens_about"] == pytest.approx(real["new"], rel=0.1)
    assert plan["new_tokens_at_most"] == 192 * 64
    about = (plan["prompt_tokens_about"] + 10 * plan["new_tokens_about"]) / 1e6
    assert plan["cost_about"] == pytest.approx(about, abs=1e-4)
    assert plan["hours_on_one_h100"] > 0 and plan["memory_gb"]["total"] >= plan["memory_gb"]["weights"] > 0


def test_dry_run_spreads_an_engine_over_gpus(invoke, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"id": str(n), "prompt": "How are you?"} for n in range(100)])
    line = ["--input", tmp_path / "rows.jsonl", "--model", "tiny", "--output", tmp_path / "out.jsonl"]
    line += ["--dry-run", "--json", "--gpu", "h100", "--batch-size", 64]
    one = json.loads(invoke("generate", *line).stdout)
    spread = ["--engine", "vllm", "--tensor-parallel-size", 4, "--replicas", 2]
    plan = json.loads(invoke("generate", *line, *spread).stdout)
    assert (plan["engine"], plan["gpus"]) == ("vllm", 8) and "memory_gb" not in plan
    assert plan["gpu_memory_gb"]["weights"] == pytest.approx(one["memory_gb"]["weights"] / 4, rel=0.01)
    # Each of two servers has half of the 64 rows, over four GPUs.
    assert plan["gpu_memory_gb"]["kv_cache"] == pytest.approx(one["memory_gb"]["kv_cache"] / 8, rel=0.01)
    assert 0 < plan["hours_on_8_h100"] < one["hours_on_one_h100"]


def test_like_needs_an_output_of_ours(tmp_path):
    with pytest.raises(InputError, match="no manifest that counts"):
        estimate.mean_answer(str(tmp_path / "none.jsonl"))


def test_what_is_not_here_is_counted_by_characters():
    talks = [[{"role": "user", "content": "x" * 400}]]
    plan = estimate.text_plan(talks, "nobody/no-such-model", Sampling(10))
    assert plan == {
        "model_calls": 1,
        "prompt_tokens_about": 104,
        "new_tokens_at_most": 10,
        "weights_on_disk_mb": "unknown",
    }
    unknown = {"hours_on_one_l4": "unknown: no local folder with the model's sizes"}
    assert estimate.text_plan(talks, "nobody/no-such-model", Sampling(10), gpu="l4") == plan | unknown
    training = estimate.training_plan("nobody/none", [1], epochs=1, batch_size=1, gpu="l4")
    assert unknown.items() <= training.items()


# --- memory, against every tensor that lives ----------------------------------------------------------------


def peak_of(run) -> int:
    """Most bytes of tensors that `run` made and that lived at the same time."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        live = peak = 0

        def __init__(self):
            super().__init__()
            self.known = weakref.WeakSet()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage not in self.known and id(storage) not in given:
                        self.known.add(storage)
                        self.live += storage.nbytes()
                        weakref.finalize(storage, self.freed, storage.nbytes())
            self.peak = max(self.peak, self.live)
            return made

        def freed(self, size):
            self.live -= size

    with Watch() as watch:
        run()
    return watch.peak


@pytest.mark.parametrize("new", [4, 64])
def test_memory_of_a_text_step(new):
    import torch

    engine = load_engine("tiny", device="cpu", dtype="float32")
    model, prompts = engine.model, [[5 + n % 50] * (200 - n) for n in range(32)]

    def run():
        with torch.inference_mode():
            prefixes = Prefixes(model, prompts, 0, share=False)
            sampler = RowSampler(Sampling(new, 0.7), range(32))
            list(
                decode(
                    model, prompts, prefixes, sampler, max_new_tokens=new, stop_ids=set(), pad_id=0, chunk_tokens=2048
                )
            )

    shape = estimate.shape_of("tiny")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    told = estimate.text_memory(shape, size=4, rows=32, longest=200, new=new, chunk=2048)
    assert sum(told.values()) - told["weights"] == pytest.approx(peak_of(run), rel=0.25)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_training(checkpointing):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).train()
    if checkpointing:
        new_name = hasattr(model, "activation_checkpointing_enable")
        enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(5, 500, (8, 128))

    def run():
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    told = estimate.training_memory(estimate.shape_of("tiny"), tokens=8 * 128, checkpointing=checkpointing)
    assert sum(told.values()) - told["weights"] == pytest.approx(peak_of(run), rel=0.25)


def test_training_plan():
    plan = estimate.training_plan("tiny", [100] * 10, epochs=2, batch_size=4, gpu="l4")
    assert (plan["rows"], plan["steps"], plan["tokens_about"]) == (10, 5, 2000)
    full = plan["memory_gb"]
    lora = estimate.training_plan("tiny", [100] * 10, epochs=2, batch_size=4, lora_rank=4)["memory_gb"]
    assert lora["optimizer"] < full["optimizer"] and plan["hours_on_one_l4"] > 0
    assert "memory_gb" not in estimate.training_plan("nobody/none", [1], epochs=1, batch_size=1)
    beside = estimate.training_plan("tiny", [100] * 10, epochs=2, batch_size=4, frozen=["tiny"], gpu="l4")
    assert beside["memory_gb"]["frozen_models"] == pytest.approx(2e-9 * folders.count_parameters("tiny"), rel=0.01)
    assert beside["memory_gb"]["total"] > full["total"] and beside["hours_on_one_l4"] > plan["hours_on_one_l4"]
    assert "memory_gb" not in estimate.training_plan("tiny", [1], epochs=1, batch_size=1, frozen=["nobody/none"])


def test_rl_plan():
    prompts = [[{"role": "user", "content": "How do I mend a chair?"}]] * 10
    sizes = {"episodes": 40, "new_tokens": 8, "epochs": 1, "batch_size": 4, "sampled": 16}
    plan = estimate.rl_plan("tiny", prompts, gpu="l4", **sizes)
    counted, _, _ = estimate.count_tokens(prompts, "tiny")
    assert (plan["prompt_tokens_about"], plan["new_tokens_at_most"]) == (4 * counted, 320)
    beside = estimate.rl_plan("tiny", prompts, gpu="l4", value_model="tiny", frozen=["tiny", "tiny"], **sizes)
    one, two = plan["memory_gb"], beside["memory_gb"]
    assert two["optimizer"] == pytest.approx(2 * one["optimizer"], rel=0.01)
    assert two["frozen_models"] == pytest.approx(4e-9 * folders.count_parameters("tiny"), rel=0.01)
    assert beside["hours_on_one_l4"] > plan["hours_on_one_l4"]
    more = estimate.rl_plan("tiny", prompts, **{**sizes, "sampled": 40})["memory_gb"]
    assert more["activations"] > one["activations"]  # of 40 caches instead of 16
    assert estimate.rl_plan("nobody/none", prompts, **sizes).keys() == {"prompt_tokens_about", "new_tokens_at_most"}


def test_lengths_of_rows():
    ask = [{"role": "user", "content": "How do I mend a chair?"}]
    answer = "Find the crack, and glue it."
    count = estimate.token_counter("tiny")
    whole = count([[*ask, {"role": "assistant", "content": answer}]])[0] + 1  # and the end token
    assert estimate.lengths_of("tiny", [(ask, [answer]), (ask, [answer, answer])]) == [whole, 2 * whole]
    many = estimate.lengths_of("tiny", [(ask, [answer])] * (estimate.SAMPLE + 5))
    assert many == [whole] * (estimate.SAMPLE + 5)
