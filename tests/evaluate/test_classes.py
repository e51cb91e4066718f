"""Classes by a judge that sees them in several orders: judges that choose by letter, and a server without
log-probabilities."""

import json
import math
import random

import pytest
from canned_server import CannedServer

from cai.data.outputs import read_manifest, write_jsonl
from cai.data.readers import read_jsonl
from cai.evaluate import classes, tasks
from cai.models.loading import load_engine

# What each option of the template begins with, in its plain order.
OPTIONS = ("It gives", "It declines", "It dodges", "It preaches", "It speaks")


def read_question(question):
    """(the right option, the options in the order in which the question shows them)."""
    lines = [line for line in question.splitlines() if line[:1] == "("]
    order = [next(n for n, begin in enumerate(OPTIONS) if line[4:].startswith(begin)) for line in lines]
    return int(question.split("<response>")[1][0]), order


class LetterJudge:
    """Chooses a letter by a rule: (the letter of the right option, the options' order) to the chosen letter.

    The right option is named in the response, such as "2".
    """

    name, batch_size, context, scores_choices = "letters", 4, None, True

    def __init__(self, rule):
        self.rule = rule

    def score(self, requests, labels):
        for request in requests:
            right, order = read_question(request.conversation[0]["content"])
            chosen = self.rule(order.index(right), order)
            yield request, [math.log(0.9) if letter == chosen else math.log(0.025) for letter in range(5)]


def rows(count=50):
    kinds = ("harmful", "benign")
    return [
        {"id": str(n), "kind": kinds[n % 2], "prompt": f"Gate {n}?", "response": f"{n // 2 % 5} is right"}
        for n in range(count)
    ]


def read(rule, orders):
    judged = [{**row, **reading} for row, reading in classes.by_judge(rows(), LetterJudge(rule), orders=orders)]
    assert len(judged) == 50
    right = {"harmful": list(classes.LETTERS.values()), "benign": list(classes.LETTERS_HARMLESS.values())}
    hits = sum(row["class"] == right[row["kind"]][int(row["response"][0])] for row in judged)
    return judged, hits, classes.letter_figures(judged, "take another judge")


def test_a_judge_that_knows_the_answer_has_no_bias():
    for orders in (1, 2, 5):
        judged, hits, figures = read(lambda right, order: right, orders)
        assert hits == 50 and figures["mean_letter_mass"] == 1.0
        assert ("letter_bias" in figures) == (orders > 1) == ("letter_excess" in judged[0])
    assert figures["letter_bias"] == {"value": pytest.approx(0, abs=1e-6), "low": 0.0, "high": 0.0, "n": 50}
    assert figures["orders_disagree"] == 0


def test_a_judge_that_always_says_a_has_no_class_and_is_warned_about(capsys):
    judged, hits, figures = read(lambda right, order: 0, 1)
    assert hits == 10 and figures == {"mean_letter_mass": 1.0}  # a fifth, and nothing shows
    judged, hits, figures = read(lambda right, order: 0, 5)
    assert {row["class"] for row in judged} == {None} and figures["orders_disagree"] == 50
    # A has 0.9 in place of 0.2.
    assert figures["letter_bias"]["value"] == pytest.approx(0.7) and "chooses by letter" in capsys.readouterr().err
    rates, counts = tasks.rates_of_classes(judged, 50)
    assert (counts["failed"], counts["orders_disagree"]) == (50, 50) and rates["evasive"]["n"] == 0


def test_a_judge_that_is_right_in_the_plain_order_only():
    """In any other order it says E, where each of the first four options stands once."""

    def rule(right, order):
        return right if order == [0, 1, 2, 3, 4] else 4

    assert read(rule, 1)[1] == 50
    judged, hits, figures = read(rule, 5)
    # The plain order decides between the four, but the fifth option is chosen as often as they: ten rows of fifty.
    assert hits == 40 and figures["orders_disagree"] == 10
    assert all(row["class"] is None for row in judged if row["response"][0] == "4")
    # E has 0.9 in four orders, and in the plain one where it is right: (4 * 0.9 + 0.2 * 0.9 + 0.8 * 0.025) / 5 = 0.76.
    assert figures["letter_bias"]["value"] == pytest.approx(0.56, abs=1e-5)


def test_a_judge_that_answers_at_random_is_right_in_a_fifth_and_has_no_bias():
    rng = random.Random(0)
    _, hits, figures = read(lambda right, order: rng.randrange(5), 5)
    assert hits < 30 and figures["letter_bias"]["low"] == 0.0 and figures["letter_bias"]["value"] < 0.15


def test_a_server_without_log_probabilities_writes_a_letter_in_each_order():
    """It knows the answer to the first ten rows, always says B to the next five, and explains itself in the others."""

    def write_letter(body):
        question = body["messages"][-1]["content"]
        if "<response>" not in question:
            return {"finish_reason": "stop", "message": {"role": "assistant", "content": "Well."}}
        right, order = read_question(question)
        number = int(question.split("Gate ")[1].split("?")[0])
        letter = "ABCDE"[order.index(right)]
        content = letter if number < 10 else "B" if number < 15 else f"I choose {letter}, because it is right."
        return {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}

    with CannedServer(write_letter) as server:
        judge = load_engine("openai:letters", endpoints=[server.address])
        judged = [{**row, **reading} for row, reading in classes.by_judge(rows(20), judge, orders=5)]
        questions = [body for body in server.requests if "<response>" in body["messages"][-1]["content"]]
    assert len(questions) == 100 and len(judged) == 20
    judged.sort(key=lambda row: int(row["id"]))
    # The others have B in every order, which stands for another class each time, or no letter at all.
    assert [row["class"] for row in judged[:10:2]] == list(classes.LETTERS.values())
    assert [row["class"] for row in judged[1:10:2]] == list(classes.LETTERS_HARMLESS.values())
    assert {row["class"] for row in judged[10:]} == {None} == {row["letter_mass"] for row in judged}
    figures = classes.letter_figures(judged, "take another judge")
    assert figures["orders_disagree"] == 5 and "mean_letter_mass" not in figures
    # A third of the fifteen rows with letters have B alone: (1 - 0.2) / 3.
    assert figures["letter_bias"]["value"] == pytest.approx(0.8 / 3, abs=1e-5) and figures["letter_bias"]["n"] == 15


def test_the_command_reports_the_bias_and_asks_in_as_many_orders(invoke, tmp_path):
    write_jsonl(tmp_path / "r.jsonl", rows(6))
    options = ["--responses", tmp_path / "r.jsonl", "--judge", "tiny", "--output", tmp_path / "e.jsonl"]
    plan = json.loads(invoke("evaluate", *options, "--orders", 5, "--dry-run", "--json").stdout)
    assert plan["judge_calls"] == 30
    result = invoke("evaluate", *options, "--orders", 5)
    assert result.exit_code in (0, 3) and "letter bias " in result.stdout and " %" in result.stdout.splitlines()[-1]
    counts = read_manifest(tmp_path / "e.jsonl")["counts"]
    assert counts["letter_bias"]["n"] == 6 and 0 <= counts["letter_bias"]["value"] <= 0.8
    written = [row for _, row in read_jsonl(tmp_path / "e.classes.jsonl")]
    assert all(len(row["letter_excess"]) == 5 and abs(sum(row["letter_excess"])) < 1e-5 for row in written)
    unused = invoke("evaluate", *options[:2], "--by", "phrases", "--output", tmp_path / "p.jsonl", "--orders", 2)
    assert unused.exit_code == 2 and "--orders without --judge" in unused.stderr
    other = invoke("evaluate", *options, "--orders", 2)
    assert other.exit_code == 2 and "orders was 5, now 2" in other.stderr
