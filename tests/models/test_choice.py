"""Forced choices: the same for an engine with log-probabilities and for one that writes its label."""

import math

import pytest

from cai.base.errors import CaiError
from cai.models.choice import choose, choose_options, probabilities, read_choices, read_label
from cai.models.engine import Generation, Request, RowRequest
from cai.stats.letters import cyclic_orders, letter_bias


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


# --- options in several orders --------------------------------------------------------------------------------

FIVE = cyclic_orders(5, 5)


class Reader:
    """An engine that reads the options' order from the question, and gives each letter a probability by a rule.

    rule: (the item, the order) to the probability of each letter.
    """

    name, batch_size, context = "reader", 2, None

    def __init__(self, rule, scores_choices=True):
        self.rule, self.scores_choices, self.asked = rule, scores_choices, []

    def _answer(self, request):
        item, order = request.conversation[0]["content"].split("/")
        self.asked.append((int(item), tuple(map(int, order))))
        return self.rule(*self.asked[-1])

    def score(self, requests, labels):
        for request in requests:
            shares = self._answer(request)
            yield request, None if shares is None else [math.log(p) if p else -math.inf for p in shares]

    def generate(self, requests, sampling, done=()):
        for request in requests:
            shares = self._answer(request)
            yield request, answer("?" if shares is None else "ABCDE"[shares.index(max(shares))])


def ask(engine, items, orders=FIVE):
    def render(item, order):
        return [{"role": "user", "content": f"{item}/{''.join(map(str, order))}"}]

    return dict(choose_options(engine, items, render, "ABCDE"[: len(orders[0])], orders))


def at_letter(letter):
    return [float(letter == number) for number in range(5)]


def test_one_that_always_says_a_chooses_nothing():
    choices = ask(Reader(lambda item, order: at_letter(0)), range(30))
    for chosen in choices.values():
        assert chosen.shares == pytest.approx([0.2] * 5) and chosen.mass == pytest.approx(1)
        assert chosen.decide("vwxyz") is None  # all options are equally likely
        assert chosen.decide("vvvvv") == "v"  # and if all mean the same it is that
    assert letter_bias([chosen.letter_excess for chosen in choices.values()])["value"] == pytest.approx(0.8)
    [single] = ask(Reader(lambda item, order: at_letter(0)), [0], FIVE[:1]).values()
    assert single.decide("vwxyz") == "v" and single.letter_excess is None  # one order can't tell


def test_one_that_is_right_in_one_order_only():
    """Of two options: it finds the right one (the first) in the plain order, and says A in the other as well."""
    pairs = cyclic_orders(2, 2)

    def rule(item, order):
        return [0.95, 0.05] if order == (0, 1) else [0.9, 0.1]

    choices = ask(Reader(rule), range(8), pairs)
    assert all(chosen.shares == pytest.approx([0.525, 0.475]) for chosen in choices.values())  # (0.95 + 0.1) / 2
    bias = letter_bias([chosen.letter_excess for chosen in choices.values()])
    assert bias["value"] == pytest.approx(0.425)  # A has (0.95 + 0.9) / 2, and should have 0.5


def test_what_a_letter_adds_cancels_out():
    """A judge that knows the answer but likes C: its likeliest letter is wrong in four orders of five."""

    def rule(item, order):
        weights = [
            (3.0 if option == 1 else 1.0) * (20.0 if letter == 2 else 1.0) for letter, option in enumerate(order)
        ]
        return [weight / sum(weights) for weight in weights]

    choices = ask(Reader(rule), [0])
    votes = [max(range(5), key=of_order.__getitem__) for of_order in choices[0].by_order]
    assert votes.count(1) == 1 and choices[0].decide("vwxyz") == "w"
    # C has 20 / 26 where an option of weight 1 stands there and 60 / 64 otherwise: 0.803 on average, not 0.2.
    assert letter_bias([choices[0].letter_excess])["value"] == pytest.approx((4 * 20 / 26 + 60 / 64) / 5 - 0.2)


def test_an_order_with_little_mass_counts_as_much():
    def rule(item, order):
        return [0.9, 0.1] if order == (0, 1) else [0.003, 0.001]

    [chosen] = ask(Reader(rule), [0], cyclic_orders(2, 2)).values()
    assert chosen.shares == pytest.approx([(0.9 + 0.25) / 2, (0.1 + 0.75) / 2])
    assert chosen.mass == pytest.approx((1.0 + 0.004) / 2)


def test_written_letters_vote_and_orders_that_disagree_choose_nothing():
    rules = {
        0: lambda order: at_letter(order.index(3)),  # the fourth option, wherever it stands
        1: lambda order: at_letter(0),
        2: lambda order: None if order == FIVE[2] else at_letter(order.index(3)),  # no letter in one order
        3: lambda order: at_letter(order.index(3 if order[0] < 3 else 4)),
    }
    choices = ask(Reader(lambda item, order: rules[item](order), scores_choices=False), rules)
    assert [choices[item].decide("vwxyz") for item in rules] == ["y", None, None, None]
    assert choices[3].decide("vwxyy") == "y"  # two options of one class
    assert choices[1].shares == pytest.approx([0.2] * 5) and choices[2].shares is None
    assert choices[3].shares == pytest.approx([0, 0, 0, 0.6, 0.4])
    assert all(chosen.mass is None for chosen in choices.values())


def test_conversations_of_one_order_follow_each_other_and_no_row_is_lost():
    engine = Reader(lambda item, order: at_letter(order.index(item % 5)))
    choices = ask(engine, range(30))
    assert {item: chosen.decide("01234") for item, chosen in choices.items()} == {n: str(n % 5) for n in range(30)}
    assert sorted(engine.asked) == sorted((item, order) for item in range(30) for order in FIVE)
    # Windows of 2 * 32 requests hold 12 items in 5 orders.
    assert engine.asked[:24] == [(n, FIVE[0]) for n in range(12)] + [(n, FIVE[1]) for n in range(12)]
    assert engine.asked[60][0] == 12


def test_an_order_without_an_answer_and_numbers_that_are_none():
    [chosen] = ask(Reader(lambda item, order: None if order == FIVE[4] else at_letter(0)), [0]).values()
    assert chosen.decide("vwxyz") is None and chosen.shares is None and chosen.letter_excess is None
    with pytest.raises(CaiError, match="float32"):
        ask(Reader(lambda item, order: [math.nan] * 5), [0])
