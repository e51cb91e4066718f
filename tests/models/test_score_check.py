"""models/score_check.py, reward_folders.py: planted faults are found, and the copy is one that engines agree on."""

import json
from types import SimpleNamespace

import models
import pytest

from cai.base.errors import InputError
from cai.models import reward_folders, scorer
from cai.models.score_check import TOLERANCE, Reading, check_scores, explain_reading

RESPONSES = [
    ([{"role": "user", "content": f"How do I open gate {n}?"}], f"Ask the owner for key {n}, then push.")
    for n in range(4)
]
ENGINES = ("cai", "openrlhf", "verl", "trl")


@pytest.fixture
def build(tmp_path):
    """A reward model of a family with a random head, as reward_model.py saves it."""

    def make(family, change=None, labels=1):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(models.folder(family), num_labels=labels)
        tokenizer = AutoTokenizer.from_pretrained(models.folder(family))
        torch.manual_seed(1)
        torch.nn.init.normal_(model.score.weight, 0, 0.3)
        model.config.pad_token_id = tokenizer.pad_token_id
        folder = tmp_path / family
        if change:
            change(tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def beyond(report):
    return {name: set(figures["causes"]) for name, figures in report["engines"].items() if figures["beyond"]}


def causes(folder):
    return {fault.cause for fault in reward_folders.find_faults(str(folder))}


def assert_fixed(folder, tmp_path, reference, policy=None):
    """The exported folder gives every engine the reference scores."""
    copy = tmp_path / "exported"
    reward_folders.write_folder(str(folder), copy, reward_folders.find_faults(str(folder)))
    report = check_scores(str(copy), RESPONSES, policy=str(policy or models.folder(folder.name)), reference=reference)
    assert set(report["engines"]) == set(ENGINES) and not beyond(report), report["engines"]
    assert causes(copy) == set()
    ours = scorer.load_scorer(str(copy)).scores(RESPONSES, show_progress=False)
    assert ours == pytest.approx(reference, abs=TOLERANCE)


def rewrite_weights(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("theirs", "position", "cause"),
    [
        ([1, 5, 6, 9], 2, "pad"),
        ([1, 5, 6, 9], 3, "numbers"),
        ([1, 5, 6, 9, 7], 4, "extra token"),
        ([1, 5, 6, 9, 9], 4, "extra token"),
        ([1, 5, 6], 2, "missing token"),
        ([5, 6, 9], 2, "bos"),
        ([1, 1, 5, 6, 9], 4, "bos"),
    ],
)
def test_the_cause_of_a_difference_is_told_by_the_tokens(theirs, position, cause):
    tokenizer = SimpleNamespace(bos_token_id=1)
    assert explain_reading(Reading([1, 5, 6, 9], 3), Reading(theirs, position), tokenizer) == cause


@pytest.mark.slow
@pytest.mark.parametrize("family", ["chatml", "llama", "gemma2"])
def test_the_exported_folder_gives_every_engine_our_scores(build, tmp_path, family):
    folder = build(family)
    report = check_scores(str(folder), RESPONSES)
    ours = scorer.load_scorer(str(folder)).scores(RESPONSES, show_progress=False)
    assert report["scores"] == pytest.approx(ours, abs=1e-5)
    if family in ("chatml", "gemma2"):  # a line break after the end token
        assert beyond(report) == {"verl": {"extra token"}, "trl": {"extra token"}}
        assert "extra token" in causes(folder)
    assert_fixed(folder, tmp_path, ours)


@pytest.mark.slow
def test_a_template_that_adds_a_line_break_is_found(build, tmp_path):
    def add(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.rstrip() + "{{ '\\n' if not add_generation_prompt }}"

    folder = build("llama", add)
    report = check_scores(str(folder), RESPONSES)
    assert beyond(report)["trl"] == {"extra token"} and "extra token" in causes(folder)
    assert_fixed(folder, tmp_path, report["scores"])


@pytest.mark.slow
def test_a_missing_padding_token_is_found(build, tmp_path):
    def remove(tokenizer):
        tokenizer.pad_token = None
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>' + '\\n'", "<|im_end|>'")

    folder = build("chatml", remove)
    rewrite_config(folder, pad_token_id=None)
    report = check_scores(str(folder), RESPONSES)
    assert beyond(report) == {"trl": {"pad"}} and {"pad", "pad_token_id"} <= causes(folder)
    assert_fixed(folder, tmp_path, report["scores"], policy=folder)


@pytest.mark.slow
def test_a_head_with_a_bias_is_found(build, tmp_path):
    import torch

    folder = build("llama")
    rewrite_weights(folder, lambda tensors: tensors.update({"score.bias": torch.tensor([0.5])}))
    report = check_scores(str(folder), RESPONSES)
    assert {name: found & {"head bias"} for name, found in beyond(report).items()} == {
        name: {"head bias"} for name in ENGINES
    }
    assert "head bias" in causes(folder)
    assert_fixed(folder, tmp_path, [score - 0.5 for score in report["scores"]])


@pytest.mark.slow
def test_a_swapped_label_order_is_found(build, tmp_path):
    folder = build("llama", labels=2)
    rewrite_config(folder, id2label={"0": "chosen", "1": "rejected"}, label2id={"chosen": 0, "rejected": 1})
    report = check_scores(str(folder), RESPONSES)
    assert {name: found & {"label order"} for name, found in beyond(report).items()} == {
        name: {"label order"} for name in ENGINES
    }
    assert "label order" in causes(folder)
    assert_fixed(folder, tmp_path, report["scores"])
    rewrite_config(folder, id2label={"0": "a", "1": "b"})
    with pytest.raises(InputError, match="neither name says which response is better"):
        reward_folders.read_head(str(folder))


@pytest.mark.slow
def test_another_name_of_the_head_is_found(build, tmp_path):
    folder = build("llama")
    rewrite_weights(folder, lambda tensors: tensors.update({"value.weight": tensors.pop("score.weight")}))
    report = check_scores(str(folder), RESPONSES)
    assert beyond(report)["openrlhf"] == {"head name"} and "head name" in causes(folder)
    assert_fixed(folder, tmp_path, report["scores"])


@pytest.mark.slow
def test_an_ending_of_the_template_is_scored_after_it(build):
    folder = build("chatml")
    rewrite_config(folder, score_ending="template")
    assert "missing token" in causes(folder)
    report = check_scores(str(folder), RESPONSES)
    assert beyond(report) == {"openrlhf": {"missing token"}}
    before = scorer.load_scorer(str(folder)).scores(RESPONSES, show_progress=False)
    assert before == pytest.approx(report["scores"], abs=1e-5)
