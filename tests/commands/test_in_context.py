"""The constitution in context: generate.py --in-context, and pairs and SFT rows from its responses."""

import json

import models
import pytest
from canned_server import CannedServer

from cai.constitution.files import load_constitution
from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.models.loading import load_chat

RULES = """\
name: garden
description: For a gardener.
principles:
  - id: water
    principle: Never advise to waste water
  - id: tools
    critique: Find careless use of tools.
    revision: Rewrite the response so that tools are used with care.
    preference: Which response is more careful?
"""
WRITTEN = ["- Never advise to waste water", "- Rewrite the response so that tools are used with care."]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Why?"},
]
PROMPTS = [{"id": "a", "prompt": "How do I dig?", "kind": "benign"}, {"id": "b", "prompt": TURNS}]


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "garden.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture
def generate(invoke, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)

    def call(output, *args, model="tiny", source="prompts.jsonl"):
        paths = ("--input", tmp_path / source, "--output", tmp_path / output)
        return invoke("generate", *paths, "--model", model, "--max-new-tokens", "8", "--json", *args)

    return call


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


# --- what the model reads, and what the rows keep -------------------------------------------------------------------


def answer(body):
    is_shown = body["messages"][0]["role"] == "system" and WRITTEN[0] in body["messages"][0]["content"]
    text = "Dig gently." if is_shown else "Flood it."
    return {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}


def test_a_server_reads_the_constitution_and_the_rows_keep_the_plain_prompt(generate, rules, tmp_path):
    with CannedServer(answer) as server:
        to_server = ("--endpoint", server.address, "--system", "Answer in English.")
        result = generate("o.jsonl", "--in-context", "--constitution", rules, *to_server, model="openai:any")
        assert result.exit_code == 0, result.output
        asked = {body["messages"][-1]["content"]: body["messages"] for body in server.requests}
    plain, (system, *turns) = asked["How do I dig?"], asked["Why?"]
    assert [message["role"] for message in plain] == ["system", "user"]
    shown, own = plain[0]["content"].split("\n\nAnswer in English.")
    assert [line for line in shown.splitlines() if line.startswith("- ")] == WRITTEN
    assert "For a gardener." in shown and "garden" not in shown.replace("gardener", "") and own == ""
    # One system message: the constitution, then --system, then that of the row.
    assert system["content"] == f"{plain[0]['content']}\n\nBe brief." and turns == TURNS[1:]
    rows = rows_of(tmp_path / "o.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS]
    assert [(row["response"], row["in_context"]) for row in rows] == [("Dig gently.", "garden")] * 2
    fingerprint = read_manifest(tmp_path / "o.jsonl")["fingerprint"]
    assert fingerprint["constitution"] == load_constitution(str(rules)).sha256 and len(fingerprint["template"]) == 64


def test_a_local_model_answers_otherwise_and_another_constitution_is_another_run(generate, rules, tmp_path):
    assert generate("without.jsonl").exit_code == 0
    result = generate("with.jsonl", "--in-context", "--constitution", rules)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["next"].startswith("python scripts/judge.py --input ")
    shown, plain = rows_of(tmp_path / "with.jsonl"), rows_of(tmp_path / "without.jsonl")
    assert [row["id"] for row in shown] == [row["id"] for row in plain]
    assert [row["response"] for row in shown] != [row["response"] for row in plain]
    tokens = [read_manifest(tmp_path / f"{name}.jsonl")["tokens"]["prompt"] for name in ("with", "without")]
    assert tokens[0] > tokens[1] + 2 * 50
    rules.write_text(RULES.replace("water\n", "soil\n"))
    result = generate("with.jsonl", "--in-context", "--constitution", rules)
    assert result.exit_code == 2 and "constitution was" in result.stderr
    result = generate("with.jsonl")
    assert result.exit_code == 2 and "made by a run that differs" in result.stderr


def test_a_new_response_does_not_carry_an_old_context(generate, tmp_path):
    write_jsonl(tmp_path / "old.jsonl", [{**PROMPTS[0], "response": "Old.", "in_context": "garden"}])
    assert generate("new.jsonl", source="old.jsonl").exit_code == 0
    [row] = rows_of(tmp_path / "new.jsonl")
    assert "in_context" not in row and row["response"] != "Old."


def test_a_template_that_refuses_a_system_role(generate, rules, tmp_path):
    """It gets the constitution in front of the first question, which the rows do not show either."""
    folder = models.folder("gemma2")
    assert not load_chat(str(folder))._takes_system
    assert generate("plain.jsonl", model=folder).exit_code == 0
    result = generate("shown.jsonl", "--in-context", "--constitution", rules, model=folder)
    assert result.exit_code == 0, result.output
    shown, plain = (read_manifest(tmp_path / f"{name}.jsonl")["tokens"]["prompt"] for name in ("shown", "plain"))
    assert shown > plain + 2 * 50
    assert [row["prompt"] for row in rows_of(tmp_path / "shown.jsonl")] == [row["prompt"] for row in PROMPTS]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_constitution_that_fills_the_context(generate, tmp_path):
    long = tmp_path / "long.yaml"
    long.write_text("".join(f"- Never help anybody to break gate {n} of the city\n" for n in range(120)))
    result = generate("o.jsonl", "--in-context", "--constitution", long)
    assert result.exit_code == 2 and "long.yaml" in result.stderr
    assert "and 8 new ones leave no room for a prompt in the context of 1024 tokens of tiny" in result.stderr
    # One that fits with a row that does not: the row fails, as always.
    write_jsonl(tmp_path / "rows.jsonl", [PROMPTS[0], {"id": "long", "prompt": "Why? " * 400}])
    result = generate("o.jsonl", "--in-context", source="rows.jsonl")
    assert result.exit_code == 3, result.output
    assert list(read_manifest(tmp_path / "o.jsonl")["failed_rows"]) == ["long/0"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% block user %}Hi{% endblock %}", "no `{% block system %}`"),
        ("{% block system %}Be kind.{% endblock %}{% block user %}Hi{% endblock %}", "blocks beside `system`: user"),
        ("{% block system %}{{ principle.critique }}{% endblock %}", "'principle' is undefined"),
    ],
)
def test_a_template_that_is_no_system_message(generate, tmp_path, template, words):
    (tmp_path / "mine.jinja").write_text(template)
    result = generate("o.jsonl", "--in-context", "--template", tmp_path / "mine.jinja")
    assert result.exit_code == 2 and words in result.stderr and "mine.jinja" in result.stderr
    assert not (tmp_path / "o.jsonl.run.json").exists()


def test_options_without_effect(generate, rules, tmp_path):
    result = generate("o.jsonl", "--constitution", rules, "--template", "in_context")
    assert result.exit_code == 2 and "--constitution, --template would have no effect" in result.stderr
    assert not list(tmp_path.glob("o.jsonl*"))


# --- pairs without a judge ------------------------------------------------------------------------------------------


def write_sides(folder, shown=("Dig gently.", "Same.", " ", "Ask."), plain=("Flood it.", " Same.\n", "Go on.", "Run.")):
    for name, texts, context in (("with", shown, {"in_context": "garden"}), ("without", plain, {})):
        rows = [
            {
                "id": f"p{number}/0",
                "prompt_id": f"p{number}",
                "prompt": f"How do I dig {number}?",
                "sample": 0,
                "response": response,
                "model": "tiny",
                "finish": "stop",
                **context,
            }
            for number, response in enumerate(texts)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return ["--input", folder / "with.jsonl", "--against", folder / "without.jsonl"]


def test_one_file_is_preferred_to_the_other(invoke, tmp_path):
    sides, output = write_sides(tmp_path), tmp_path / "pairs.jsonl"
    arguments = ["judge", *sides, "--prefer-input", "--output", output, "--json"]
    plan = json.loads(invoke(*arguments, "--dry-run").stdout)
    assert not output.exists()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    counts = {"pairs": 2, "identical": 1, "empty": 1, "flagged": 0, "unpaired": 0}
    assert plan.items() >= counts.items() <= summary.items()
    assert summary["next"] == f"python scripts/dpo.py --input {output} --model MODEL --output POLICY"
    first, last = rows_of(output)
    assert first == {
        "id": "p0/0 vs p0/0",
        "prompt_id": "p0",
        "prompt": "How do I dig 0?",
        "model": "tiny",
        "in_context_a": "garden",
        "response_a": "Dig gently.",
        "response_b": "Flood it.",
        "chosen": "Dig gently.",
        "rejected": "Flood it.",
        "p_chosen": 1.0,
        "p_a": 1.0,
        "principle": None,
        "verdicts": [],
    }
    assert (last["chosen"], last["rejected"]) == ("Ask.", "Run.")
    fingerprint = read_manifest(output)["fingerprint"]
    assert fingerprint["preferred"] == "input" and "constitution" not in fingerprint
    before = output.read_bytes()
    again = invoke(*arguments)
    assert json.loads(again.stdout) == summary and output.read_bytes() == before


def test_nothing_to_prefer_is_refused(invoke, tmp_path):
    sides, output = write_sides(tmp_path, ("Same.", ""), ("Same.", "Go on.")), tmp_path / "pairs.jsonl"
    result = invoke("judge", *sides, "--prefer-input", "--output", output)
    assert result.exit_code == 2 and "'identical': 1, 'empty': 1" in result.stderr
    assert not list(tmp_path.glob("pairs*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "tiny", "--cot"], "--model, --cot would have no effect: --prefer-input asks no judge"),
        (["--constitution", "garden.yaml"], "--constitution would have no effect"),
        (["--audit", "a.json"], "--audit would have no effect"),
    ],
)
def test_judging_options_with_a_preferred_file(invoke, tmp_path, options, words):
    sides = write_sides(tmp_path)
    result = invoke("judge", *sides, "--prefer-input", "--output", tmp_path / "pairs.jsonl", *options)
    assert result.exit_code == 2 and words in result.stderr.replace("\n", " ")


def test_a_preferred_file_needs_another(invoke, tmp_path):
    sides, output = write_sides(tmp_path), tmp_path / "pairs.jsonl"
    result = invoke("judge", *sides[:2], "--prefer-input", "--output", output)
    assert result.exit_code == 2 and "--prefer-input needs --against" in result.stderr
    write_jsonl(tmp_path / "pairs-in.jsonl", [{"prompt": "Why?", "chosen": "a", "rejected": "b"}])
    result = invoke("judge", "--input", tmp_path / "pairs-in.jsonl", *sides[2:], "--prefer-input", "--output", output)
    assert result.exit_code == 2 and "pairs already" in result.stderr


# --- the whole route ------------------------------------------------------------------------------------------------


def test_a_judge_compares_the_two_sides(invoke, tmp_path):
    sides, output = write_sides(tmp_path), tmp_path / "judged.jsonl"
    result = invoke("judge", *sides, "--model", "tiny", "--output", output, "--json")
    assert result.exit_code == 0, result.output
    rows = rows_of(output)
    assert len(rows) == 4 and all(row["in_context_a"] == "garden" and "in_context_b" not in row for row in rows)


@pytest.mark.slow
def test_from_prompts_to_a_policy_and_to_an_sft_model(invoke, generate, rules, tmp_path):
    whole = ["--max-new-tokens", "48"]  # the rules need not change the first words of an answer
    assert generate("with.jsonl", "--in-context", "--constitution", rules, *whole).exit_code == 0
    assert generate("without.jsonl", *whole).exit_code == 0
    sides = ["--input", tmp_path / "with.jsonl", "--against", tmp_path / "without.jsonl"]
    result = invoke("judge", *sides, "--prefer-input", "--output", tmp_path / "pairs.jsonl", "--json")
    assert json.loads(result.stdout)["pairs"] == 2, result.output
    small = ["--model", "tiny", "--batch-size", "1", "--device", "cpu", "--json"]
    for command, source, more in (
        ("dpo", "--input", []),
        ("reward_model", "--input", ["--holdout", "0"]),
        ("sft", "--helpful", ["--epochs", "1"]),
    ):
        file = "with.jsonl" if command == "sft" else "pairs.jsonl"
        result = invoke(command, source, tmp_path / file, "--output", tmp_path / command, *small, *more)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["steps"] == 2
        assert (tmp_path / command / "model.safetensors").exists()
