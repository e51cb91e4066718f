"""Forced choices: the same for an engine with log-probabilities and for one that writes its label."""

import math

import pytest

from cai.models.choice import choose, probabilities, read_choices, read_label
from cai.models.engine import Generation, Request, RowRequest


class Scorer:
    """An engine with log-probabilities."""

    name, batch_size, context, scores_choices = "scorer", 4, None, True

    def __init__(self, results):
        self.results = results

    def score(self, requests, labels):
        for request in requests:
            yield request, self.results[request.key]


class Writer:
    """An engine that writes its answers."""

    name, batch_size, context, scores_choices = "writer", 4, None, False

    def __init__(self, answers):
        self.answers, self.requests = answers, []

    def generate(self, requests, sampling, done=()):
        assert sampling.temperature == 0
        for request in requests:
            self.requests.append(request)
            yield request, self.answers[request.key]


def question(key, prefill=None, **fields):
    conversation = [{"role": "user", "content": f"Question {key}?"}]
    if prefill:
        conversation.append({"role": "assistant", "content": prefill})
    return RowRequest(key, conversation, row={"id": key}) if fields else Request(key, conversation)


def answer(text, finish="stop"):
    return Generation(text, finish, 10, 2)


def test_log_probabilities_are_those_of_the_engine():
    results = {"a": [-0.1, -3.0], "b": None, "c": [-math.inf, -math.inf], "d": [-math.inf, -2.0]}
    choices = {request.key: logprobs for request, logprobs in choose(Scorer(results), map(question, results), "AB")}
    # Where no label has any probability, there is no choice.
    assert choices == {**results, "c": None}
    raw = {request.key: choice for request, choice in read_choices(Scorer(results), map(question, results), "AB")}
    assert raw["c"].logprobs == [-math.inf, -math.inf] and not raw["c"].lost
    assert raw["b"].lost and raw["a"].answer is None


def test_a_written_label_is_a_choice_and_nothing_else_is():
    answers = {
        "a": answer("(B)"),
        "b": answer("B, because it is kind."),
        "c": answer("The answer is (A)"),
        "d": answer("", "too_long"),
        "e": answer("", "failed"),
    }
    engine = Writer(answers)
    requests = [question(key, "The answer is (") for key in answers]
    choices = {request.key: (request, logprobs) for request, logprobs in choose(engine, requests, "AB")}
    assert {key: logprobs for key, (_, logprobs) in choices.items()} == {
        "a": [-math.inf, 0.0],
        "b": None,
        "c": [0.0, -math.inf],  # the whole sentence, as it was asked for
        "d": None,
        "e": None,
    }
    assert all(choices[request.key][0] is request for request in requests)
    # Nothing is begun for the engine: the prefill is part of the question.
    for request in engine.requests:
        [message] = request.conversation
        assert message["content"].endswith("with A or B and nothing else:\nThe answer is (")
    raw = {request.key: choice for request, choice in read_choices(Writer(answers), requests, "AB")}
    assert [key for key, choice in raw.items() if choice.lost] == ["d", "e"]
    assert raw["b"].answer == "B, because it is kind."


def test_a_request_comes_back_with_its_row_and_without_prefill_it_is_sent_as_it_is():
    engine = Writer({"a": answer("3.")})
    [(request, logprobs)] = choose(engine, [question("a", row=True)], "01234")
    assert request.row == {"id": "a"} and logprobs.index(0.0) == 3
    assert engine.requests[0].conversation == request.conversation


@pytest.mark.parametrize("labels", ["AB", "ABCDE", "01234"])
def test_any_label_is_read(labels):
    assert [read_label(f"**({label})**.", labels) for label in labels] == list(labels)
    assert read_label("Z", labels) is None


def test_probabilities_are_normalised_over_the_labels():
    assert probabilities([math.log(0.1), math.log(0.3)]) == pytest.approx([0.25, 0.75])
    assert probabilities([-2000.0, -2000.0]) == [0.5, 0.5]
    assert probabilities([-math.inf, -5.0]) == [0.0, 1.0]
