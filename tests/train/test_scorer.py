"""models/scorer.py: a reward model is checked, loaded and called in the same way wherever it is used."""

import json
import os
import subprocess
import sys

import models
import pytest
import toys
from conftest import ROOT

from cai.base.errors import CaiError, InputError
from cai.data import outputs, readers
from cai.models import loading
from cai.models.scorer import check_reward_model, load_scorer
from cai.train import common
from cai.train.rewards import Total, compute_scores, fill_overlong

PROMPT = [{"role": "user", "content": "How do I open it?"}]
FITTING, OVERLONG = "Push.", "Push, then pull. " * 6250  # 100,000 characters are more than 2,048 tokens


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    loading.load_reward_model(str(models.folder("llama")), "cpu").save_pretrained(folder)
    loading.load_chat(str(models.folder("llama"))).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(reward_model, tmp_path_factory):
    """A cache of the hub that holds the reward model as `lab/reward`."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--lab--reward"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(reward_model)
    return cache


def command_line(name, folder, reward_model):
    """A dry run of each command that takes a reward model."""
    row = {"prompt": "A or B?", "response_a": "x", "response_b": "y", "gold": "a"}
    outputs.write_jsonl(folder / "rows.jsonl", [row])
    line = ["--input", folder / "rows.jsonl", "--output", folder / "new" / "out.jsonl", "--dry-run"]
    policy = [] if name == "evaluate" else ["--model", models.folder("llama")]
    return [str(part) for part in (*line, *policy, "--reward-model", reward_model)]


@pytest.mark.parametrize("name", ["ppo", "grpo", "evaluate"])
@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        ("a language model", "not a reward model (LlamaForCausalLM)"),
        ("no/such/folder", "no such model folder"),
        ("./nowhere", "no such model folder"),
        ("lab/unknown", "can't be loaded"),
    ],
)
def test_what_is_no_reward_model_is_refused_alike(invoke, tmp_path, name, reward_model, message):
    if reward_model == "a language model":
        reward_model = str(models.folder("llama"))
    result = invoke(name, *command_line(name, tmp_path, reward_model))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo", "evaluate"])
def test_a_hub_id_is_taken_as_a_folder_is(invoke, tmp_path, reward_model, hub, name):
    result = invoke(name, *command_line(name, tmp_path, reward_model))
    assert result.exit_code == 0, result.output
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    script = str(ROOT / "scripts" / f"{name}.py")
    line = [sys.executable, script, *command_line(name, tmp_path, "lab/reward")]
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_scores_by_a_hub_id_are_those_of_the_folder(reward_model, hub):
    code = (
        "import sys, json; from cai.models.scorer import load_scorer; "
        f"print(json.dumps(load_scorer('lab/reward', device='cpu')([{PROMPT!r}], [{FITTING!r}])))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "scripts")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert json.loads(result.stdout) == load_scorer(str(reward_model), device="cpu")([PROMPT], [FITTING])


def test_a_response_beyond_the_context_has_no_score(reward_model):
    scorer = load_scorer(str(reward_model), device="cpu")
    scores = scorer([PROMPT] * 3, [FITTING, OVERLONG, ""])
    assert scores[1] is None and None not in (scores[0], scores[2])
    assert compute_scores(scorer, "it", [PROMPT] * 2, [FITTING, OVERLONG])[1] is None
    total = Total({"model": (scorer, 2.0), "length": (lambda prompts, responses: [1.0] * len(responses), 1.0)})
    assert total([PROMPT] * 2, [FITTING, OVERLONG]) == [pytest.approx(2 * scores[0] + 1, abs=1e-5), None]
    # A function has to score every response.
    with pytest.raises(CaiError, match="not a number"):
        compute_scores(lambda prompts, responses: [None], "mine", [PROMPT], [FITTING])


def test_ppo_gives_an_overlong_response_the_lowest_score():
    assert fill_overlong([2.0, None, -1.0, None]) == [2.0, -1.0, -1.0, -1.0]
    with pytest.raises(CaiError, match="every response is too long"):
        fill_overlong([None, None])


def test_ppo_counts_overlong_responses(tmp_path, reward_model):
    """Responses of more than two words are too long for this reward."""
    scorer = load_scorer(str(reward_model), device="cpu")

    class Short(type(scorer)):
        def __call__(self, prompts, responses):
            return [None if len(text.split()) > 2 else float(len(text)) for text in responses]

    chat, make = toys.talker(("go", "a", "b", "c"), 0.5)
    reward = Short(scorer.chat, scorer.model)
    trainer = toys.trainer(tmp_path, chat, make, reward, updates=2, samples_every=1)
    common.run_trainer(trainer, tmp_path)
    first, second = (row for _, row in readers.read_jsonl(tmp_path / "metrics.jsonl") if "update" in row)
    assert 0 < first["overlong"] < 64 and first["score"] >= 0
    samples = [row for _, row in readers.read_jsonl(tmp_path / "samples.jsonl")]
    assert all((row["score"] is None) == (len(row["response"].split()) > 2) for row in samples)
    assert second["overlong"] > 0


def test_a_classifier_with_several_classes_is_refused(tmp_path):
    from transformers import AutoModelForSequenceClassification

    models.copy("qwen", tmp_path / "two")
    two = AutoModelForSequenceClassification.from_pretrained(models.folder("qwen"), num_labels=2)
    two.save_pretrained(tmp_path / "two")
    check_reward_model(str(tmp_path / "two"))  # the width of the head is known when it is loaded
    with pytest.raises(InputError, match="2 classes"):
        load_scorer(str(tmp_path / "two"), device="cpu")
