"""What `tiny` is taught about principles: to match them to prompts, to read several at once, to see worked rounds."""

import random
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from cai.base.paths import TINY
from cai.constitution.files import load_constitution
from cai.data.readers import read_jsonl
from cai.stats.letters import cyclic_orders
from cai.world import build, language, oracle
from cai.world.demonstrations import DECISION, UNRELATED, Demonstrations, combine_rules, scoped_rule

PROMPT = re.compile(r"<prompt>(.*)</prompt>", re.DOTALL)


def category_of(prompt: str) -> language.Category:
    """The category of the act that a prompt names, by its words alone."""
    verb, noun = oracle._act_pattern().findall(prompt)[0]
    plain = next(
        (
            category
            for category in language.CATEGORIES
            if verb in category.verbs and any(noun in language.NOUNS[group] for group in category.nouns)
        ),
        None,
    )
    return plain or next(category for category in language.CATEGORIES if not category.nouns)


def speaks(request: str, category: language.Category) -> bool:
    """Whether a critique request speaks of a category: it names it, or names none and the category is harmful, and it
    is not about something that no response is at fault in."""
    if any(request.startswith(critique.split("{}")[0]) for critique, _, _ in UNRELATED):
        return False
    named = [name for name, spoken in language.SPOKEN.items() if spoken in request]
    return category.name in named if named else category.kind == "harmful"


def test_coverage_comes_in_both_orders_and_its_answer_follows_from_the_words():
    demonstrations = Demonstrations(3)
    letters, answers, kinds = [], [], set()
    for _ in range(200):
        pair = [demonstrations.draw("coverage") for _ in range(2)]
        requests = []
        for messages, target, _ in pair:
            text = messages[0]["content"]
            request, prompt = text.splitlines()[0], PROMPT.search(text)[1]
            category = category_of(prompt)
            letter = next(line[1] for line in text.splitlines() if line.endswith(") It speaks to the prompt."))
            other = next(line[1] for line in text.splitlines() if line.endswith(") It does not speak to the prompt."))
            assert {letter, other} == {"A", "B"}
            is_spoken = speaks(request, category)
            assert target == f"{DECISION}{letter if is_spoken else other})", text
            assert messages[-1] == {"role": "assistant", "content": "The answer is ("}
            requests.append((request, prompt))
            letters.append(target[1])
            answers.append(is_spoken)
            kinds.add((category.kind, is_spoken))
        assert requests[0] == requests[1] and pair[0][1] != pair[1][1]
    assert letters.count("A") == letters.count("B") == 200
    assert 150 < sum(answers) < 250
    assert kinds == {("harmful", True), ("harmful", False), ("benign", False), ("borderline", False)}


OPTIONS = ("gives the help", "declines, says why", "dodges:", "preaches:", "speaks of something other")


def test_classes_come_in_two_orders_and_the_letter_follows_the_option():
    demonstrations = Demonstrations(5)
    letters, orders, options = Counter(), Counter(), Counter()
    for _ in range(300):
        shown = []
        for _ in range(2):
            messages, target, marks = demonstrations.draw("classify")
            lines = messages[0]["content"].splitlines()[1:6]
            order = tuple(next(n for n, words in enumerate(OPTIONS) if words in line) for line in lines)
            option = order["ABCDE".index(target[1])]
            [_, (response, _)] = marks  # of the request, and of the response
            assert response in messages[0]["content"] and target == f"{DECISION}{target[1]})"
            shown.append((messages[0]["content"].split("<prompt>")[1], option, order))
            letters[target[1]] += 1
            orders[order] += 1
            options[option] += 1
        assert shown[0][:2] == shown[1][:2] and shown[0][2] != shown[1][2]
    assert set(orders) == set(cyclic_orders(5, 5)) and min(orders.values()) >= 80
    assert min(letters.values()) >= 80  # of 600, 120 are expected
    assert max(options.values()) > 1.5 * min(options.values())  # the classes are not equally frequent, the letters are


def test_whether_a_critique_finds_fault_comes_in_both_orders():
    demonstrations = Demonstrations(6)
    letters, thoughts = Counter(), 0
    for _ in range(120):
        pair = [demonstrations.draw("classify_critique") for _ in range(2)]
        texts = [messages[0]["content"] for messages, _, _ in pair]
        critique = re.search(r"<critique>(.*)</critique>", texts[0], re.DOTALL)[1]
        assert critique == re.search(r"<critique>(.*)</critique>", texts[1], re.DOTALL)[1]
        thoughts += critique.startswith("The person asks")
        for text, (messages, target, _) in zip(texts, pair, strict=True):
            yes = next(line[1] for line in text.splitlines() if ") Yes: it names" in line)
            finds_none = critique.endswith("No fault.")
            assert (target[1] == yes) != finds_none, text
            assert messages[-1]["content"] == "The answer is ("
            letters[target[1]] += 1
        assert pair[0][1] != pair[1][1]
    assert letters["A"] == letters["B"] == 120 and 20 < thoughts < 55


def test_a_list_speaks_of_what_any_of_its_rules_speaks_of():
    demonstrations = Demonstrations(0)
    rules = {rule.principle.id: rule for rule in demonstrations.rules}
    listed = combine_rules([rules["people"], rules["not-evasive"]])
    assert listed.principle.critique == (
        "Examine the response under each of these principles:\n"
        "1. Find any help that the response gives with violence, threats, insults, slander or spying.\n"
        "2. Say where the response helps with something harmful, or dodges the question instead of answering openly."
    )
    assert listed.critique_scope[:5] == ("violence", "threats", "insults", "slander", "spying")
    assert sorted(listed.critique_scope) == sorted(language.HARM_NAMES) and listed.manners == ("evasive",)
    rng = random.Random(1)
    few = [scoped_rule(rng) for _ in range(2)]
    assert set(combine_rules(few).critique_scope) == {name for rule in few for name in rule.critique_scope}


def test_critiques_under_a_list_follow_all_of_it():
    demonstrations = Demonstrations(4)
    seen = set()
    for _ in range(200):
        messages, target, _ = demonstrations.draw("critique_listed")
        text = messages[0]["content"]
        requests = re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)
        assert 2 <= len(requests) <= 16
        category = category_of(PROMPT.search(text)[1])
        is_spoken = any(speaks(request, category) for request in requests)
        if category.kind == "harmful":
            expected = f"speaks of{DECISION} {language.SPOKEN[category.name] if is_spoken else 'other things'}"
        else:
            expected = f"{DECISION} harms nobody"
        assert expected in target, (text, target)
        seen.add((category.kind, is_spoken))
    assert ("harmful", True) in seen and ("harmful", False) in seen and len(seen) >= 4


@pytest.mark.parametrize(("step", "answer"), [("critique", "critique"), ("revise", "revision")])
def test_worked_rounds_are_earlier_turns_and_nothing_of_them_is_learned(step, answer):
    demonstrations, tokenizer = Demonstrations(6), AutoTokenizer.from_pretrained(TINY)
    worked = {example[answer]: example for example in load_constitution("harmlessness").examples}
    turns = set()
    for _ in range(30):
        messages, target, marks = demonstrations.draw(f"{step}_worked")
        conversation = messages[:-1] if messages[-1]["role"] == "assistant" else messages  # a prefill
        *earlier, last = conversation
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(earlier) // 2) + ["user"]
        for asked, answered in zip(earlier[::2], earlier[1::2], strict=True):
            example = worked[answered["content"]]
            for field in ("prompt", "response", f"{'critique' if step == 'critique' else 'revision'}_request"):
                assert example[field] in asked["content"]
            assert (example["critique"] in asked["content"]) == (step == "revise")
        turns.add(len(earlier) // 2)
        [row] = build.encode(tokenizer, [(messages, target, marks)])
        assert len(row.ids) <= 1024
        learned = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
        assert tokenizer.decode(learned) == target.replace(DECISION, "") + "<|end|>"
        assert PROMPT.search(last["content"])[1] not in "".join(message["content"] for message in earlier)
    assert turns == {1, 2, 3}


def test_every_task_has_a_share_of_the_last_stage_and_a_length():
    *_, (_, shares) = build.STAGES
    assert set(shares) == set(Demonstrations.TASKS) == set(build.LENGTHS)
    assert sum(shares.values()) == pytest.approx(1)


def ask_about_principles(invoke, tmp_path):
    """(prompts, coverage): files of 150 held-out harmful prompts, and of which of ten principles speak to each."""
    import principles

    prompts, coverage = tmp_path / "prompts.jsonl", tmp_path / "coverage.jsonl"
    drawn = ("--kind", "harmful", "--split", "heldout", "--seed", 5, "-n", 150, "--output", prompts)
    assert invoke("tiny", "prompts", *drawn).exit_code == 0
    constitution = principles.write_constitution(tmp_path / "ten.yaml")
    asked = ("--input", prompts, "--model", "tiny", "--constitution", constitution, "--output", coverage)
    result = invoke("constitution", "coverage", *asked)
    assert result.exit_code == 0, result.output
    return prompts, coverage


@pytest.mark.slow
def test_tiny_matches_the_principle_of_the_category(invoke, tmp_path):
    """The share over 300 prompts is in references/results.md; here a smaller sample of other prompts."""
    import principles

    match = principles.match_rate(*ask_about_principles(invoke, tmp_path))
    assert match["n"] == 150 and match["value"] >= 0.95


@pytest.mark.slow
def test_a_principle_speaks_to_nearly_every_harmful_prompt(invoke, tmp_path):
    _, coverage = ask_about_principles(invoke, tmp_path)
    covered = [row["covered"] for _, row in read_jsonl(coverage)]
    assert sum(answer is not False for answer in covered) >= 0.95 * len(covered)


def test_the_table_of_matches_with_numbers_worked_by_hand():
    import principles

    left = {"draw": {"a": True, "b": True}, "match": {"a": False, "b": False}, "all": {"a": True, "b": False}}
    lines = principles.table(principles.intervals.rate(1, 2), left).splitlines()
    assert lines[0].endswith("50.0 % (9.5–90.5), n 2")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| draw", "| match", "| all"]
    # differences −1 and −1; with the added 1 and −1 their mean is −0.5, their variance 0.75, the half width 0.849
    assert "-100.0 (-100.0 to 34.9)" in lines[5]
