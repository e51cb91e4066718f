"""Our attention on a CPU against attention written out in float64, and models against transformers' own attention."""

import math

import models
import pytest

from cai.base.paths import TINY
from cai.models import attention, local
from cai.models.engine import Request, Sampling
from cai.models.folders import count_parameters
from cai.models.loading import load_engine, release_engines


def written_out(query, key, value, mask):
    """Softmax of the scaled products, in float64; every head of queries takes the keys of its group."""
    import torch

    groups = query.shape[1] // key.shape[1]
    query, key, value = (states.double() for states in (query, key, value))
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def padded_on_the_left(rows, columns):
    import torch

    gaps = torch.tensor([(7 * row) % (columns - 1) for row in range(rows)])
    return (torch.arange(columns) >= gaps[:, None])[:, None, None]


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["keys by column", "keys by feature"])
def test_one_token_per_row_in_16_bits(rows, heads, key_heads, is_transposed):
    import torch

    torch.manual_seed(rows)
    columns, size = 33, 16
    query = torch.randn(rows, heads, 1, size).bfloat16()
    key, value = torch.randn(2, rows, key_heads, columns, size).bfloat16()
    if is_transposed:
        key = key.transpose(2, 3).contiguous().transpose(2, 3)
    mask = padded_on_the_left(rows, columns)
    key = key.where(mask.transpose(2, 3), float("nan"))  # what is only padding is never read into a result ...
    value = value.where(mask.transpose(2, 3), 0)  # ... as zero times a value is
    output, _ = attention.attend(torch.nn.Module(), query, key, value, mask)
    assert output.shape == (rows, 1, heads, size) and output.dtype == torch.bfloat16
    expected = written_out(query, key.nan_to_num(), value, mask)
    assert (output.double() - expected).abs().max() < 0.05  # of values about 1, with 8 bits


@pytest.mark.parametrize("is_masked", [True, False])
def test_grouped_heads_over_known_columns(is_masked):
    """Several tokens per row, which follow columns that are known: nothing is copied, and the values are the same."""
    import torch

    torch.manual_seed(0)
    rows, tokens, columns = 3, 5, 12 if is_masked else 5
    query, key, value = torch.randn(rows, 6, tokens, 16), *torch.randn(2, rows, 2, columns, 16)
    mask = torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens).expand(rows, 1, -1, -1)
    output, _ = attention.attend(torch.nn.Module(), query, key, value, mask if is_masked else None)
    assert torch.allclose(output.double(), written_out(query, key, value, mask), atol=1e-5)


def test_parts_begin_at_the_first_column_that_a_row_needs():
    import torch

    mask = torch.zeros(20, 1, 1, 9, dtype=torch.bool)
    for row in range(20):
        mask[row, :, :, (3 if row < 16 else 7) :] = True
    mask[5, :, :, 2:] = True
    assert attention._parts(mask, 20) == [(slice(0, 16), 2), (slice(16, 32), 7)]
    assert attention._parts(mask, 20) is attention._parts(mask, 20)  # computed once per mask
    assert attention._parts(None, 20) == [(slice(0, 20), 0)]


def texts_and_scores(engine):
    requests = [Request(str(n), [{"role": "user", "content": "word " * (1 + 5 * n)}], seed=n) for n in range(9)]
    texts = {
        request.key: answer.text
        for request, answer in engine.generate(requests, Sampling(temperature=0.0, max_new_tokens=12))
    }
    return texts, {request.key: scores for request, scores in engine.score(requests, ["A", "B"])}


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral"])
def test_a_model_in_float32_writes_and_scores_as_with_the_attention_of_transformers(family):
    release_engines()
    engine = load_engine(str(models.folder(family)), device="cpu", dtype="float32")
    if not attention.is_used(engine.model):
        pytest.skip(f"the heads of {family} share no keys")
    texts, scores = texts_and_scores(engine)
    engine.model.set_attn_implementation("sdpa")
    plain_texts, plain_scores = texts_and_scores(engine)
    release_engines()
    assert texts == plain_texts
    assert all(scores[key] == pytest.approx(plain_scores[key], abs=1e-4) for key in plain_scores)


def test_auto_is_bfloat16_where_it_is_faster():
    assert (
        count_parameters("tiny") < local.BFLOAT16_FROM
        and local.auto_dtype("cpu", count_parameters("tiny")) == "float32"
    )
    expected = "bfloat16" if local.cpu_multiplies_bfloat16() else "float32"
    assert local.auto_dtype("cpu", local.BFLOAT16_FROM) == expected
    assert local.auto_dtype("cpu", None) == local.auto_dtype("mps", 10**9) == "float32"
    assert local.auto_dtype("cuda:1", None) == "bfloat16"


def test_the_bundled_model_keeps_its_attention_and_its_batches():
    """What it writes is the same to the last byte as before there was an attention of our own."""
    engine = load_engine("tiny", device="cpu")
    assert not attention.is_used(engine.model) and count_parameters(str(TINY)) == count_parameters("tiny")
    assert local.chunk_tokens(engine.model.config.hidden_size, on_cpu=True) == 4096


@pytest.mark.parametrize(("hidden", "tokens"), [(64, 4096), (576, 1024), (896, 1024), (2048, 512), (8192, 256)])
def test_wide_models_read_fewer_tokens_at_once_on_a_cpu(hidden, tokens):
    assert local.chunk_tokens(hidden, on_cpu=True) == tokens
    assert local.chunk_tokens(hidden, on_cpu=False) == local.CHUNK_TOKENS
