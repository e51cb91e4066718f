"""Worked rounds as earlier turns: which are shown, how many fit, and the paper's own prompts."""

import json
import re
from collections import Counter

import models
import pytest

from cai.base.errors import InputError
from cai.constitution import importing
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.readers import read_jsonl
from cai.models.loading import load_engine
from cai.steps.examples import Examples

RULES = """
principles:
- id: kind
  critique: Look for unkindness.
  revision: Be kinder.
  preference: Which is kinder?
  examples:
  - {prompt: P1, response: R1, critique: C1, critique_request: Q1, revision_request: S1, revision: V1}
- id: true
  critique: Look for lies.
  revision: Be truthful.
  preference: Which is truer?
examples:
- {prompt: P2, response: R2, critique: C2}
- {prompt: P3, chosen: good, rejected: bad}
- {prompt: P4, response: R4, critique: C4, revision: V4}
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES.replace("id: true", 'id: "true"'))
    return load_constitution(str(tmp_path / "rules.yaml"))


QUESTION = [{"role": "user", "content": "the row"}]


def answers(conversation):
    return [message["content"] for message in conversation if message["role"] == "assistant"]


def test_each_step_is_shown_what_it_can_use_of_its_principle_first(rules):
    critique, revise = load_template("critique"), load_template("revise")
    kind, true = rules["kind"], rules["true"]
    assert answers(Examples(rules, critique, "critique").add(kind, QUESTION)) == ["C1", "C2", "C4"]
    assert answers(Examples(rules, critique, "critique").add(true, QUESTION)) == ["C2", "C4"]
    assert answers(Examples(rules, critique, "critique", 2).add(kind, QUESTION)) == ["C1", "C2"]
    assert answers(Examples(rules, revise, "revision").add(kind, QUESTION)) == ["V1", "V4"]
    assert Examples(rules, revise, "revision", 0).add(kind, QUESTION) == QUESTION


def test_an_example_is_put_as_the_row_is_under_its_own_requests(rules):
    template = load_template("revise")
    shown = Examples(rules, template, "revision").add(rules["kind"], [{"role": "system", "content": "s"}, *QUESTION])
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "user", "assistant", "user"]
    own, shared = shown[1]["content"], shown[3]["content"]
    assert own.startswith("S1\n") and "Be kinder" not in own and "<critique>C1</critique>" in own
    assert shared.startswith("Be kinder.\n") and "<response>R4</response>" in shared
    assert shown[0]["content"] == "s" and shown[-1] == QUESTION[0]


def test_as_many_as_fit_are_shown_and_the_rest_is_counted(rules, capsys):
    engine = load_engine(str(models.folder("llama")), device="cpu")
    template = load_template("critique")

    def tokens(conversation):
        return len(engine.chat.encode(engine.chat.render(conversation)))

    every = Examples(rules, template, "critique").add(rules["kind"], QUESTION)
    sizes = [tokens([*every[: 2 * n], *QUESTION]) for n in range(4)]
    for count in range(4):
        for spare, expected in ((0, count), (-1, count - 1)):
            examples = Examples(rules, template, "critique")
            examples.fit(engine, engine.context - sizes[count] - spare)
            shown = examples.add(rules["kind"], QUESTION)
            assert len(answers(shown)) == max(expected, 0)
            assert examples.shown == Counter([(expected, 3)] if expected >= 0 else []), "one that fits nothing fails"
    counters = [Counter({(3, 3): 2, (1, 3): 1, (2, 2): 1}), Counter({(3, 3): 1})]  # of two processes
    assert examples.count_shown(counters) == {"examples_shown": {"1": 1, "2": 1, "3": 3}}
    assert "not all worked examples fit the model's context in 1 rows" in capsys.readouterr().err


def test_examples_that_are_asked_for_and_cannot_be_shown_are_refused(rules, tmp_path):
    template, engine = load_template("critique"), load_engine(str(models.folder("llama")), device="cpu")
    plain = tmp_path / "plain.yaml"
    plain.write_text("- Be kind.\n")
    with pytest.raises(
        InputError, match="no worked example of a critique in the constitution plain; expected examples"
    ):
        Examples(load_constitution(str(plain)), template, "critique", 1)
    assert Examples(load_constitution(str(plain)), template, "critique", 0).add(rules["kind"], QUESTION) == QUESTION
    for most, error in ((1, True), (None, False)):
        examples = Examples(rules, template, "critique", most)
        examples.fit(engine, engine.context - 30)
        if error:
            with pytest.raises(InputError, match="not one worked example fits the model's context of 2048"):
                examples.check([(rules["kind"], QUESTION)])
        else:
            examples.check([(rules["kind"], QUESTION)])


def paper(shared_data, name):
    return json.loads((shared_data / "anthropic-cai" / name).read_text())


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_the_papers_files_give_the_papers_prompts(shared_data):
    """The few-shot rounds, in their order, then the row's own turns and request; white space aside."""
    names = ("CritiqueRevisionInstructions.json", "CritiqueRevisionFewShotPrompts.json")
    rules = importing.read_foreign([str(shared_data / "anthropic-cai" / name) for name in names], "paper", {})
    rounds = [re.sub(r"\s*Human:\s*$", "", text) for text in paper(shared_data, names[1])]
    assert len(rounds) == 5
    prompt = "Human: Hello\n\nAssistant: Hello.\n\nHuman: How do I pick a lock?"
    for given, asked in ((prompt, prompt), ("How do I pick a lock?", "Human: How do I pick a lock?")):
        for principle, request in zip(rules.principles, paper(shared_data, names[0]).values(), strict=False):
            [critique_request], revision_request = request["prompt"], request["edit_request"]
            row = f"{asked}\n\nAssistant: Use a pin."
            expected = squeeze("\n\n".join([*rounds, row + critique_request]))
            fields = {"principle": principle, "prompt": given, "response": "Use a pin."}
            conversation = load_template("critique_paper").render(**fields)
            shown = Examples(rules, load_template("critique_paper"), "critique").add(principle, conversation)
            assert squeeze("\n\n".join(turn["content"] for turn in shown)) == expected
            expected = squeeze("\n\n".join([*rounds, f"{row}{critique_request} It helps a thief.{revision_request}"]))
            conversation = load_template("revise_paper").render(**fields, critique="It helps a thief.")
            shown = Examples(rules, load_template("revise_paper"), "revision").add(principle, conversation)
            assert squeeze("\n\n".join(turn["content"] for turn in shown)) == expected


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_critique_and_revise_show_them_and_count(invoke, tmp_path, rules):
    source = write(tmp_path / "in.jsonl", [{"id": f"{n}", "prompt": f"How {n}?", "response": "So."} for n in range(4)])
    long = "A few words more. " * 122
    write(source, [*(row for _, row in read_jsonl(source)), {"id": "long", "prompt": long, "response": "So."}])
    common = ("--model", models.folder("llama"), "--constitution", rules.path, "--max-new-tokens", 8, "--json")
    result = invoke("critique", "--input", source, "--output", tmp_path / "c.jsonl", *common)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["examples_shown"]
    assert shown == {"0": 1, "2": 4}, "the long row has no room for any"
    assert "worked examples fit the model's context in 1 rows" in result.stderr
    revised = invoke("revise", "--input", tmp_path / "c.jsonl", "--output", tmp_path / "r.jsonl", *common)
    assert revised.exit_code == 0 and sum(json.loads(revised.stdout)["examples_shown"].values()) == 5
    without = invoke("critique", "--input", source, "--output", tmp_path / "0.jsonl", *common, "--examples", 0)
    assert "examples_shown" not in json.loads(without.stdout)
    same = ("--input", source, "--output", tmp_path / "y.jsonl", *common[:4], "--max-new-tokens", 1900)
    refused = invoke("critique", *same, "--examples", 2)
    assert refused.exit_code == 2 and "not one worked example fits" in refused.stderr
    assert not list(tmp_path.glob("y.*"))


def test_examples_beside_a_line_that_none_of_them_has(invoke, tmp_path, rules):
    source = write(tmp_path / "in.jsonl", [{"id": "1", "prompt": "How?", "response": "So."}])
    line = ("--input", source, "--output", tmp_path / "c.jsonl", "--model", "tiny", "--constitution", rules.path)
    result = invoke("critique", *line, "--principles", "all", "--cot", "--examples", 1)
    assert result.exit_code == 2 and "no example names what is violated" in result.stderr
