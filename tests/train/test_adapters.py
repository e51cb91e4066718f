"""Adapters trained by the plain loop: the gradient of the plain loss, resumed with the same result, read by peft."""

import json
from dataclasses import replace

import models
import pytest
import torch

from cai.base.errors import InputError
from cai.models import loading
from cai.train import adapters
from cai.train.adapters import Settings, TokenRow

SETTINGS = Settings(rank=2, first_layer=0, learning_rate=2e-2, batch_tokens=120, save_steps=2)


def load():
    from transformers import AutoModelForCausalLM

    return loading.load_weights(AutoModelForCausalLM, str(models.folder("llama")), "float32")


def make_rows(count=12, beginning=60, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(5, 300, (length,), generator=draw).tolist()

    shared = ids(beginning)
    return [TokenRow([*shared, *ids(8 + number % 5)], 3 + number % 2) for number in range(count)]


def plain_loss(model, rows):
    """The same loss, row by row, without anything shared or padded."""
    losses = []
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0, -row.targets - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[-row.targets :])))
    return sum(losses) / len(losses)


def test_what_rows_have_in_common_is_computed_once_and_changes_nothing():
    model, rows = load(), make_rows(5)
    adapters.adapted_layers(model, SETTINGS)
    assert adapters.shared_tokens(rows) == 60 and adapters.shared_tokens(rows[:1]) == 0
    assert adapters.loss_of(model, rows).item() == pytest.approx(plain_loss(model, rows).item(), rel=1e-5)
    # Rows that are equal share their prompt but its last token, from which the first answer token is predicted.
    assert adapters.shared_tokens([rows[0], rows[0]]) == len(rows[0].ids) - rows[0].targets - 1


def test_the_gradient_is_that_of_the_plain_loss():
    model, rows = load(), make_rows(4)
    layers = adapters.adapted_layers(model, SETTINGS)
    assert len(layers) == 2 * len(adapters.TARGETS)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    gradients = []
    for loss in (adapters.loss_of, plain_loss):
        loss(model, rows).backward()
        gradients.append([layer.lora_a.grad.clone() for layer in layers.values()])
        gradients[-1] += [layer.lora_b.grad.clone() for layer in layers.values()]
        model.zero_grad()
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    # A step of the gradient changes the loss as much as the gradient says: it is no constant that both have wrong.
    layer = next(iter(layers.values()))
    before, step = plain_loss(model, rows).item(), 1e-3
    layer.lora_a.data -= step * gradients[0][0] / gradients[0][0].norm()
    assert before - plain_loss(model, rows).item() == pytest.approx(step * gradients[0][0].norm().item(), rel=0.05)


def test_the_first_of_the_targets_counts_for_more_where_a_row_says_so():
    model, rows = load(), make_rows(4)
    led = [replace(row, lead=1.5) for row in rows]
    first = [TokenRow(row.ids[: len(row.ids) - row.targets + 1], 1) for row in rows]
    expected = adapters.loss_of(model, rows) + 1.5 * adapters.loss_of(model, first)
    assert adapters.loss_of(model, led).item() == pytest.approx(expected.item(), rel=1e-5)


def test_blocks_before_the_first_are_left_as_they_are(tmp_path):
    settings = replace(SETTINGS, first_layer=1)
    model, rows, base = load(), make_rows(4), str(models.folder("llama"))
    adapters.adapt(model, [rows], tmp_path, settings, base=base, report=lambda note: None)
    loaded = loading.load_policy(str(tmp_path))
    for ours, plain in zip(loaded.model.layers, load().model.layers, strict=True):
        changed = not torch.equal(ours.mlp.up_proj.weight.float(), plain.mlp.up_proj.weight.float())
        assert changed == (ours is not loaded.model.layers[0])
    with pytest.raises(InputError, match=r"99 is not a block of .*, which has 2"):
        adapters.adapted_layers(load(), replace(SETTINGS, first_layer=99))


def test_training_lowers_the_loss_and_the_adapter_says_the_same_after_loading(tmp_path):
    model, rows, notes = load(), make_rows(), []
    base = str(models.folder("llama"))
    before = plain_loss(load(), rows).item()
    figures = adapters.adapt(model, [rows] * 6, tmp_path / "critic", SETTINGS, base=base, report=notes.append)
    after = adapters.loss_of(model, rows).item()
    assert after < 0.7 * before and figures["tokens"] == 6 * sum(len(row.ids) for row in rows)
    assert notes and notes[0].startswith("step 2 of ")
    assert not (tmp_path / "critic" / adapters.STATE).exists()
    loaded = loading.load_policy(str(tmp_path / "critic"))
    assert plain_loss(loaded, rows).item() == pytest.approx(after, rel=0.02)  # saved in bfloat16
    config = json.loads((tmp_path / "critic" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["r"] == 2


def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path):
    rows, base = make_rows(), str(models.folder("llama"))

    class StoppedError(Exception):
        pass

    def stop(note):
        if note.startswith("step 4 "):
            raise StoppedError

    with pytest.raises(StoppedError):
        adapters.adapt(load(), [rows] * 2, tmp_path / "stopped", SETTINGS, base=base, report=stop)
    assert (tmp_path / "stopped" / adapters.STATE).exists()
    for name in ("stopped", "whole"):
        adapters.adapt(load(), [rows] * 2, tmp_path / name, SETTINGS, base=base, report=lambda note: None)
    stopped, whole = (tmp_path / name / "adapter_model.safetensors" for name in ("stopped", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_state_of_other_settings_is_not_continued(tmp_path):
    rows, base = make_rows(), str(models.folder("llama"))
    other = replace(SETTINGS, learning_rate=1e-3)
    steps = []

    def stop(note):
        steps.append(note)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapters.adapt(load(), [rows] * 2, tmp_path, SETTINGS, base=base, report=stop)
    adapters.adapt(load(), [rows] * 2, tmp_path, other, base=base, report=steps.append)
    assert steps[1].startswith("step 2 of ")  # from the beginning


def test_a_state_of_other_rows_is_not_continued(tmp_path):
    """As many rows and tokens, and other ones: an adapter that learned half of each would be neither."""
    base, notes = str(models.folder("llama")), []

    def stop(note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapters.adapt(load(), [make_rows(seed=1)], tmp_path, SETTINGS, base=base, report=stop)
    adapters.adapt(load(), [make_rows(seed=2)], tmp_path, SETTINGS, base=base, report=notes.append)
    assert notes[0].startswith("step 2 of ")


def test_an_adapter_begins_where_another_one_ended(tmp_path):
    rows, base = make_rows(), str(models.folder("llama"))

    def train(name, epochs, **more):
        return adapters.adapt(load(), epochs, tmp_path / name, SETTINGS, base=base, report=lambda note: None, **more)

    train("critic", [rows] * 6)
    model = load()
    adapters.load_adapter(adapters.adapted_layers(model, SETTINGS), tmp_path / "critic")
    begun = adapters.loss_of(model, rows).item()
    assert begun == pytest.approx(plain_loss(loading.load_policy(str(tmp_path / "critic")), rows).item(), rel=1e-4)
    assert train("judge", [rows], start=tmp_path / "critic")["loss"] < 0.8 * train("alone", [rows])["loss"]


def test_batches_hold_rows_that_begin_alike_within_the_bound():
    rows = [*make_rows(6, seed=1), *make_rows(6, seed=2)]
    batches = adapters.batches_of(rows, SETTINGS, seed=0)
    assert sorted(number for batch in batches for number in batch) == list(range(12))
    for batch in batches:
        together = [rows[number] for number in batch]
        shared = adapters.shared_tokens(together)
        assert len({tuple(row.ids[: adapters.BEGINNING]) for row in together}) == 1
        assert shared + len(batch) * (max(len(row.ids) for row in together) - shared) <= 120 or len(batch) == 1
    assert batches != adapters.batches_of(rows, SETTINGS, seed=1)
