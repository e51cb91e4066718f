"""The decoding loop, on small random models: the plain loop's tokens, with less work."""

import json
from types import SimpleNamespace

import models
import pytest

from cai.models.decoding import (
    Prefixes,
    RowSampler,
    align,
    cache_parameter,
    chunks,
    common_prefix,
    decode,
    prefill,
    shared_beginnings,
    slow_reason,
)
from cai.models.engine import Sampling
from cai.models.loading import load_engine


def test_chunks_by_hand():
    assert list(chunks([5, 4, 4, 9, 1], 10)) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(chunks([5, 4, 4, 9, 1], 40)) == [range(0, 5 - 1), range(4, 5)]
    assert list(chunks([50], 10)) == [range(0, 1)] and list(chunks([], 10)) == []


def test_shared_beginnings_by_hand():
    first, second = list(range(40)), list(range(100, 120))
    prompts = [[*first, 1], [*first, 2, 3], [*second, 1], [*second, 2], [9] * 30]
    # By their first 8 or 16 tokens both groups are found; by 32 the first alone, which saves less.
    assert shared_beginnings(prompts, [0] * len(prompts)) == [first, second]
    # One token at least is left of each prompt.
    assert shared_beginnings([first, first], [0, 0]) == [first[:-1]]
    assert shared_beginnings([[1, 2, 3], [1, 2, 4]], [0, 0]) == [] and shared_beginnings([], []) == []
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 9]]) == [1, 2]
    # Of what is known already nothing is saved: what comes after it counts, were it shorter.
    pairs = [[*first, *second[:9], 1], [*first, *second[:9], 2], [*first, 7]]
    assert shared_beginnings(pairs, [0, 0, 0]) == [first]
    assert shared_beginnings(pairs, [40, 40, 40]) == [[*first, *second[:9]]]


def test_align_by_hand():
    import torch

    states = torch.arange(1.0, 13.0).reshape(3, 1, 4, 1)
    into = torch.full((3, 1, 3, 1), float("nan"))
    align(states, [1, 1, 0], [2, 2, 3], into)
    assert into[:, 0, :, 0].tolist() == [[0, 2, 3], [0, 6, 7], [9, 10, 11]]


def prompts_of(engine, count=9):
    """Two groups that begin alike, of different lengths, and one prompt that begins like none."""
    texts = [
        ("Name the ways in which the response is harmful: " if n % 2 else "Consider the principle, and: ")
        + "open the old gate " * (1 + n * 3 % 7)
        for n in range(count - 1)
    ]
    return [engine.chat.encode(text) for text in [*texts, "I can't help with that because it would hurt someone"]]


def made(engine, prompts, prefixes, stop_ids=(), new=10, temperature=0.0, **options):
    import torch

    sampler = RowSampler(Sampling(new, temperature), range(len(prompts)))
    with torch.inference_mode():
        return dict(
            decode(
                engine.model,
                prompts,
                prefixes,
                sampler,
                max_new_tokens=new,
                stop_ids=set(stop_ids),
                pad_id=engine.pad_id,
                **options,
            )
        )


def passes(model):
    """A list that gets the shape (rows, columns) of every forward pass, and what takes the hook away."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen, hook


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_prefixes_and_chunks_change_nothing(family):
    engine = load_engine(str(models.folder(family)), device="cpu")
    prompts = prompts_of(engine)
    shared = Prefixes(engine.model, prompts, engine.pad_id)
    alone = Prefixes(engine.model, prompts, engine.pad_id, share=False)
    assert len(shared.lengths) == 2 and len(set(shared.lengths)) == 2 and alone.width == 0
    assert shared.find(prompts[-1]) is None and shared.shared(prompts[-1]) == 0
    # Both are used, and at one time with rows that have none.
    assert {shared.find(prompt) for prompt in prompts} == {None, 0, 1}
    plain = {}
    for n, prompt in enumerate(prompts):
        [(_, plain[n])] = made(engine, [prompt], alone).items()
    assert len({tuple(tokens) for tokens in plain.values()}) > 2
    for prefixes in (alone, shared):
        for chunk in (1, 60, 10_000):
            assert made(engine, prompts, prefixes, chunk_tokens=chunk) == plain


@pytest.mark.parametrize("family", models.ARCHITECTURES)
def test_prefixes_within_prefixes_change_nothing(family):
    """Pairs that begin alike beyond what their group does, one prompt that only its group knows, and one alone."""
    engine = load_engine(str(models.folder(family)), device="cpu")
    groups = ("Name the ways in which the response is harmful:", "Consider the principle, and choose what is better:")
    texts = [
        begun + f" the old gate number {n}" * (n + 1) + end
        for n in range(3)
        for begun in groups
        for end in (" A or B", " or leave it")
    ]
    prompts = [engine.chat.encode(text) for text in [*texts, groups[1] + " B", "Open the gate"]]
    none = Prefixes(engine.model, prompts, engine.pad_id, share=False)
    outer = Prefixes(
        engine.model, [engine.chat.encode(begun + end) for begun in groups for end in (" A", " B")], engine.pad_id
    )
    inner = Prefixes(engine.model, prompts, engine.pad_id, within=outer)
    assert outer.shared(prompts[-2]) == inner.shared(prompts[-2]) > 0 == inner.shared(prompts[-1])
    gained = [inner.shared(prompt) - outer.shared(prompt) for prompt in prompts[:-2]]
    assert min(gained) >= 0 and sum(more > 0 for more in gained) >= 6
    plain = made(engine, prompts, none)
    assert made(engine, prompts, outer) == plain and made(engine, prompts, inner) == plain
    # Of a few of the prompts, and where nothing is found in common, the outer ones are handed on.
    few = [prompts[0], prompts[-2], prompts[-1]]
    handed = Prefixes(engine.model, few, engine.pad_id, within=outer)
    assert [handed.shared(prompt) for prompt in few] == [outer.shared(prompt) for prompt in few]
    assert made(engine, few, handed) == {0: plain[0], 1: plain[len(prompts) - 2], 2: plain[len(prompts) - 1]}


def test_what_prompts_begin_with_is_computed_once():
    engine = load_engine(str(models.folder("llama")), device="cpu")
    prompts = prompts_of(engine)
    seen, hook = passes(engine.model)
    try:
        prefixes = Prefixes(engine.model, prompts, engine.pad_id)
        made(engine, prompts, prefixes, new=1)
    finally:
        hook.remove()
    rest = max(len(prompt) - prefixes.shared(prompt) for prompt in prompts)
    assert seen == [(2, max(prefixes.lengths)), (9, rest)]


def test_rows_that_have_ended_leave_the_batch():
    engine = load_engine(str(models.folder("qwen")), device="cpu")
    prompts = prompts_of(engine, 16)
    none = Prefixes(engine.model, prompts, engine.pad_id, share=False)
    free = made(engine, prompts, none, new=24, temperature=1.0)
    # Ends that come early in some rows and late or never in others.
    ends = {tokens[n] for n, tokens in free.items() if n < 10}
    cut = {
        n: tokens[: next((at + 1 for at, one in enumerate(tokens) if one in ends), 24)] for n, tokens in free.items()
    }
    assert len({len(tokens) for tokens in cut.values()}) > 4
    seen, hook = passes(engine.model)
    try:
        assert made(engine, prompts, none, stop_ids=ends, new=24, temperature=1.0) == cut
    finally:
        hook.remove()
    steps = [rows for rows, columns in seen if columns == 1]
    assert steps == sorted(steps, reverse=True) and steps[-1] < len(prompts) // 2
    # No more rows than were live, but for the sixteenth that may wait.
    for step, rows in enumerate(steps, 1):
        live = sum(len(tokens) > step for tokens in cut.values())
        assert live <= rows <= live + max(1, rows // 16)


def test_logits_are_made_of_the_last_position_alone():
    import torch

    engine = load_engine(str(models.folder("gemma2")), device="cpu")
    prompts, shapes = prompts_of(engine), []
    hook = engine.model.get_output_embeddings().register_forward_hook(
        lambda _module, _args, logits: shapes.append(tuple(logits.shape[:2]))
    )
    try:
        with torch.inference_mode():
            none = Prefixes(engine.model, prompts, engine.pad_id, share=False)
            logits, past, starts = prefill(engine.model, prompts, none, engine.pad_id, keep=False)
    finally:
        hook.remove()
    assert shapes == [(9, 1)] and logits.shape[0] == 9 and past is None and starts == [0] * 9


# --- which models it can run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*models.ARCHITECTURES, "thinker"])
def test_attention_over_tokens_takes_the_fast_path(family):
    assert load_engine(str(models.folder(family)), device="cpu").slow_reason is None


class Model:
    """What `slow_reason` reads of a model; its classes say the arguments of `forward`."""

    config = SimpleNamespace(is_encoder_decoder=False)
    config.get_text_config = lambda: Model.config


class Before(Model):
    def forward(self, input_ids, position_ids, attention_mask, past_key_values): ...


class Since(Model):
    def forward(self, input_ids, position_ids, attention_mask, cache): ...


class Renamed(Model):
    def forward(self, input_ids, position_ids, attention_mask, memory): ...


def test_the_cache_is_found_by_either_name():
    """transformers 5.24 renamed it; a name that is not known is no fast path, with the reason."""
    assert [cache_parameter(kind) for kind in (Before, Since, Renamed)] == ["past_key_values", "cache", None]
    assert slow_reason(Before()) is None and slow_reason(Since()) is None
    assert slow_reason(Renamed()) == "Renamed.forward takes no cache or past_key_values"


def recurrent():
    """A small model that remembers a recurrent state beside keys and values, for which no cache of rows stands."""
    from transformers import BambaConfig, BambaForCausalLM

    return BambaForCausalLM(
        BambaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_layer_indices=[1],
            mamba_n_heads=2,
            mamba_d_head=32,
            mamba_d_state=8,
        )
    )


def test_a_recurrent_model_is_left_to_generate_with_a_reason():
    assert slow_reason(recurrent()) == "it keeps a recurrent state"


def test_layers_of_another_kind_are_named():
    engine = load_engine(str(models.folder("gemma2")), device="cpu")
    kinds = engine.model.config.layer_types
    try:
        engine.model.config.layer_types = ["chunked_attention", "full_attention"]
        assert slow_reason(engine.model) == "it has layers of type chunked_attention"
    finally:
        engine.model.config.layer_types = kinds


def test_a_slow_path_is_warned_of_and_recorded(tmp_path, invoke):
    """A model with a recurrent state: a warning, a field of the manifest, a line of doctor.py."""
    from transformers import AutoTokenizer

    from cai.data.outputs import read_manifest

    folder = tmp_path / "recurrent"
    recurrent().save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.folder("llama")).save_pretrained(folder)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "one", "prompt": "Name the ways in."}\n')

    def generate(model, output):
        made = invoke(
            "generate",
            "--input",
            prompts,
            "--output",
            tmp_path / output,
            "--model",
            model,
            "--device",
            "cpu",
            "--max-new-tokens",
            2,
        )
        assert made.exit_code == 0, made.output
        return made.stderr.count("the fast decoding loop is off"), read_manifest(tmp_path / output)["fast_path"]

    assert generate(models.folder("llama"), "fast.jsonl") == (0, True)
    assert generate(folder, "slow.jsonl") == (1, "no: it keeps a recurrent state")

    said = invoke("doctor", "--model", folder, "--json")
    report = json.loads(said.stdout)
    assert report["model"]["fast_path"] == "no: it keeps a recurrent state"
    assert any("it keeps a recurrent state" in note for note in report["notes"])
    assert "fast path no: it keeps a recurrent state" in invoke("doctor", "--model", folder).stdout
