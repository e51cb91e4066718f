"""Weights packed for the processor: the same texts, and a model that can't be packed keeps its layers."""

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from cai.models import packing
from cai.models.engine import Request, Sampling
from cai.models.loading import load_engine, release_engines

has_operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
packs_bfloat16 = has_operators and torch.ops.mkldnn._is_mkldnn_bf16_supported()

needs_operators = pytest.mark.skipif(not has_operators, reason="this torch has no operators for packed weights")
needs_bfloat16 = pytest.mark.skipif(
    not packs_bfloat16, reason="this processor has no AVX512, so oneDNN doesn't pack weights in bfloat16"
)


def small_model(dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(models.folder("qwen"), dtype=dtype)


def answer(engine):
    requests = [Request(n, [{"role": "user", "content": f"Question {n}?"}], seed=n) for n in range(5)]
    written = {request.key: generation.text for request, generation in engine.generate(requests, Sampling(24, 0.0))}
    questions = [
        Request(n, [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "It is ("}])
        for n in range(5)
    ]
    return written, {request.key: logprobs for request, logprobs in engine.score(questions, "AB")}


@needs_operators
@needs_bfloat16
def test_packed_layers_give_the_same_values(monkeypatch):
    monkeypatch.setattr(packing, "suits", lambda model: False)
    release_engines()
    written, scores = answer(load_engine("tiny", dtype="bfloat16"))
    monkeypatch.undo()
    release_engines()
    engine = load_engine("tiny", dtype="bfloat16")
    try:
        assert "PackedLinear" in {type(module).__name__ for module in engine.model.modules()}
        packed_written, packed_scores = answer(engine)
    finally:
        release_engines()
    # Processors differ in the kernels that they take for either; 8 bits are what both have.
    for key, logprobs in scores.items():
        assert packed_scores[key] == pytest.approx(logprobs, abs=0.2)
    assert written.keys() == packed_written.keys()
    assert sum(packed_written[key] == text for key, text in written.items()) >= 3


@needs_operators
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), pytest.param("bfloat16", 0.02, marks=needs_bfloat16)])
def test_a_bias_is_added(dtype, tolerance):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32).to(getattr(torch, dtype))
    states = torch.randn(5, 7, 48).to(layer.weight.dtype)
    with torch.inference_mode():
        difference = packing._make_packed(layer)(states) - layer(states)
    assert difference.abs().max() < tolerance


@needs_operators
@pytest.mark.skipif(packs_bfloat16, reason="this processor packs weights in bfloat16")
def test_a_processor_that_packs_no_bfloat16_keeps_the_layers():
    model = small_model()
    assert packing.suits(model) and not packing.pack(model)
    assert all(type(module).__name__ != "PackedLinear" for module in model.modules())


@needs_operators
def test_a_model_that_reads_the_weights_of_its_layers_keeps_them():
    class ReadsWeights(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            return self.layer(*args, **kwargs) * self.layer.weight.new_ones(1)

    model = small_model(torch.float32)  # which every processor packs
    attention = model.model.layers[0].self_attn
    attention.o_proj = ReadsWeights(attention.o_proj)
    assert not packing.pack(model)
    assert all(type(module).__name__ != "PackedLinear" for module in model.modules())


@needs_operators
def test_large_models_are_packed_in_float32_and_text_does_not_depend_on_the_batch(tmp_path):
    folder = models.build("llama", tmp_path / "large", hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    release_engines()
    try:
        texts = []
        for size in (1, 3, 8):
            engine = load_engine(str(folder), dtype="float32", batch_size=size)
            texts.append(answer(engine)[0])
        assert "PackedLinear" in {type(module).__name__ for module in engine.model.modules()}
    finally:
        release_engines()
    assert texts[0] == texts[1] == texts[2]


def test_small_models_in_float32_keep_their_layers():
    release_engines()
    model = load_engine("tiny").model
    assert model.dtype == torch.float32 and not packing.suits(model)
