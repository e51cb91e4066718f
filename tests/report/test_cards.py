"""Cards: valid for the Hub, true to the manifests, and safe whatever a run's names are."""

import json

import pytest
import run_folders as runs
from huggingface_hub import DatasetCard, ModelCard

from cai.data import outputs
from cai.report import cards, run_folder
from cai.report.escaping import MARK


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder.collect(runs.make_run(tmp_path_factory.mktemp("cards") / "my-run"))


@pytest.fixture(scope="module")
def written(run):
    return cards.write(run)


def test_a_card_for_every_model_and_both_sets_of_data(written):
    assert list(written) == [
        "model-sft.md",
        "model-reward-model.md",
        "model-ppo.md",
        "dataset-05-revision-2.md",
        "dataset-07-preferences.md",
    ]
    assert all(MARK in text for text in written.values()), "so that report.py may replace them"


def test_front_matter_is_what_the_hub_reads(written):
    data = ModelCard(written["model-ppo.md"]).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["constitutional-ai", "rlaif", "ppo"] and data.base_model is None and data.license is None
    assert ModelCard(written["model-reward-model.md"]).data.pipeline_tag == "text-classification"
    data = DatasetCard(written["dataset-07-preferences.md"]).data
    assert data.pretty_name == "my-run preferences" and "preferences" in data.tags


def test_what_the_manifests_say_is_in_the_card(run, written):
    text = written["model-ppo.md"]
    assert f"| constitution | harmlessness, SHA-256 {run.constitution.sha256} |" in text
    assert "| base model | my-model |" in text and "| reward model | reward-model |" in text
    assert "| learning rate | 1e-05 |" in text and "- torch 2.13" in text
    assert "harmful: harmful compliance | 100.0 % (83.9–100.0) | 10.0 % (2.8–30.1) |" in text
    assert "after SFT" not in text, "another model's figures"
    assert "Alarm at step 7: kl" in text
    assert "No licence is stated" in text
    text = written["dataset-07-preferences.md"]
    assert "| rows in the file | 19 |" in text and "| same position | 0.5 (0.2–0.8) |" in text
    assert "| p\\_chosen | the judge's probability" in text


def test_what_was_not_measured_is_said(tmp_path):
    made = cards.write(run_folder.collect(runs.make_run(tmp_path / "run", hostile=False, stages=False)))
    assert "It was not measured on held-out prompts." in made["model-sft.md"]
    assert "has no evaluation of this model" in made["model-sft.md"]
    assert "It was not measured" not in made["model-reward-model.md"], "no such measure applies to it"


def test_the_card_of_one_output_speaks_of_what_led_to_it_alone(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    runs.manifest(path, "others.jsonl", "generate", "--model another-model", {}, 5)
    (path / "others.jsonl").write_text("no rows of ours")
    (path / "settings.json").write_text("// somebody else's")
    for name, more in (("sft", "--input 05-revision-2.jsonl"), ("ppo", f"--model {path}/sft")):
        manifest = path / f"{name}.run.json"
        manifest.write_text(
            manifest.read_text().replace("--model my-model", more if name == "ppo" else f"--model my-model {more}")
        )
    text = cards.card_of(path / "ppo")
    assert "| base model | my-model |" in text and "another-model" not in text
    assert "| constitution | harmlessness, SHA-256" in text, "of the revisions that the policy before was trained on"
    assert "| revised rows | 12 |" in text and "| compared pairs |" not in text, "its reward model is not of this run"
    assert "harmful: harmful compliance | 100.0 % (83.9–100.0) | 10.0 % (2.8–30.1) |" in text
    assert "| rows in the file | 12 |" in cards.card_of(path / "07-preferences.jsonl")


def test_pairs_without_a_judge_and_responses_without_revisions_are_called_so(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    row = {
        "id": "a vs a",
        "prompt": "Why?",
        "in_context_a": "garden",
        "chosen": "So.",
        "rejected": "No.",
        "p_chosen": 1,
    }
    outputs.write_jsonl(path / "pairs.jsonl", [row])
    runs.manifest(path, "pairs.jsonl", "judge", "--prefer-input", {"pairs": 1}, 0)
    for name, part, key, value in (("pairs.jsonl", "fingerprint", "preferred", "input"), ("sft", "counts", None, None)):
        manifest = json.loads((path / f"{name}.run.json").read_text())
        manifest[part] = {**manifest[part], key: value} if key else {"helpful": 4}
        (path / f"{name}.run.json").write_text(json.dumps(manifest))
    text = cards.card_of(path / "pairs.jsonl")
    assert "No judge compared them" in text and "| in\\_context\\_a | the same, for the first response alone" in text
    run = run_folder.collect(path)
    assert run.preferences_file == "07-preferences.jsonl" and [name for name, _ in run.judged] == ["07-preferences"]
    assert "fine-tuned on responses to prompts as they were written" in cards.card_of(path / "sft")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my-org/my-model", "my-org/my-model"),
        ("tiny", None),
        ("runs/a/sft", None),
        ("../x", None),
        (None, None),
        ("my-model", None),
    ],
)
def test_only_a_name_that_a_hub_may_have_is_a_base_model(name, expected):
    assert cards.hub_id(name) == expected


def test_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-org" / "my-model").mkdir(parents=True)
    assert cards.hub_id("my-org/my-model") is None


def test_lora_and_a_hub_model_are_named(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    for manifest in path.glob("*.run.json"):
        text = manifest.read_text().replace("--model my-model", "--model my-org/my-model")
        manifest.write_text(text.replace('"lora_rank": null', '"lora_rank": 16'))
    data = ModelCard(cards.write(run_folder.collect(path))["model-sft.md"]).data
    assert (data.base_model, data.library_name) == ("my-org/my-model", "peft")


def test_names_from_files_are_text(tmp_path):
    path = runs.make_run(tmp_path / "run", hostile=False)
    hostile = "<script>x</script> | --- [a](b) `c`\n---\nlicense: mit"
    for manifest in path.glob("*.run.json"):
        text = manifest.read_text()
        manifest.write_text(text.replace('"torch": "2.13"', f'"torch": {hostile!r}'.replace("'", '"')))
    for name, text in cards.write(run_folder.collect(path)).items():
        assert "<script" not in text.replace("\\<script", ""), name
        kind = ModelCard if name.startswith("model") else DatasetCard
        assert kind(text).data.license is None
    assert cards.file_name("../../etc/x y") == "etc-x-y" and cards.file_name("...") == "unnamed"
