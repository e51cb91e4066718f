"""Who is fit to read, to judge and to criticise: engines whose faults are known, and the bundled model."""

import json
import math
import random
import re

import models
import pytest

from cai.constitution.templates import load_template, neutralise
from cai.evaluate import qualification, qualification_sets
from cai.models.engine import Generation

ORDERED = ("It gives", "It declines", "It dodges", "It preaches", "It speaks")


def english(role):
    return qualification_sets.load_rows(role, "english")


class Stub:
    """An engine that knows the labels, and answers by a rule.

    rule: takes (the right label, whether the options are in the plain order, a source of chance) to a label. mass: of
    all labels together. criticise: the critique of a row. writes: there are no log-probabilities.
    """

    name, batch_size, context = "stub", 64, None

    def __init__(self, role, rule, *, mass=1.0, criticise=None, writes=False):
        self.role, self.rule, self.mass, self.criticise = role, rule, mass, criticise
        self.scores_choices, self.rng = not writes, random.Random(0)
        self.rows = {}
        for row in english(role):
            self.rows.setdefault(neutralise(row.get("response") or row["response_a"]), []).append(row)

    def row_of(self, text):
        """The row that a conversation is about."""
        shown = re.findall(r"<response(?:_[ab])?>(.*?)</response", text, re.DOTALL)
        rows = [row for part in shown for row in self.rows.get(part, ()) if neutralise(row["prompt"]) in text]
        asked = [row for row in rows if (row.get("principle") or {}).get("preference", qualification.BETTER) in text]
        return asked[0] if len(shown) == 2 else rows[0]

    def right(self, text):
        """(the right label, whether the options are in the plain order)."""
        row = self.row_of(text)
        if self.role == "judge":
            first = re.search("<response_a>(.*?)</response_a>", text, re.DOTALL)[1]
            is_plain = first == neutralise(row["response_a"])
            return "AB"[(row["gold"] == "a") != is_plain], is_plain
        begins = ORDERED if self.role == "reader" else ("Yes", "No")
        lines = [line[4:] for line in text.splitlines() if re.match(r"\([A-E]\) ", line)]
        order = [next(n for n, begin in enumerate(begins) if line.startswith(begin)) for line in lines]
        option = "ABCDE".index(row["letter"]) if self.role == "reader" else int(not row["gold"])
        return "ABCDE"[order.index(option)], order[0] == 0

    def choose(self, request):
        text = "\n".join(message["content"] for message in request.conversation)
        return self.rule(*self.right(text), self.rng)

    def score(self, requests, labels):
        for request in requests:
            chosen, rest = self.choose(request), 0.1 / (len(labels) - 1)
            yield request, [math.log(self.mass * (0.9 if label == chosen else rest)) for label in labels]

    def generate(self, requests, sampling, done=()):
        for request in requests:
            text = "\n".join(message["content"] for message in request.conversation)
            asks_for_critique = self.role == "critic" and "<critique>" not in text
            answer = self.criticise(self.row_of(text)) if asks_for_critique else self.choose(request)
            yield request, Generation(answer, "stop", 10, 2)


def knows(right, is_plain, rng):
    return right


def mostly_right(right, is_plain, rng):
    return right if rng.random() < 0.95 else rng.choice("AB".replace(right, "") or "A")


def guesses(right, is_plain, rng):
    return rng.choice("AB")


def guesses_a_class(right, is_plain, rng):
    return rng.choice("ABCDE")


def says_a(right, is_plain, rng):
    return "A"


def says_c(right, is_plain, rng):
    return "C"


def knows_one_order(right, is_plain, rng):
    return mostly_right(right, is_plain, rng) if is_plain else "A"


def names_the_fault(row):
    return f"{row['response'][:60]}: {row['what']} ({row['id']})" if row["gold"] else "There is nothing to change."


def repeats(row):
    return "The response is not good and could be better in many ways."


def qualify(role, rule, **settings):
    orders = {"orders": settings.pop("orders")} if "orders" in settings else {}
    engine = Stub(role, rule, criticise=settings.pop("criticise", names_the_fault), **settings)
    return qualification.measure(engine, qualification.Task(role, **orders))


@pytest.mark.parametrize("role", qualification.ROLES)
@pytest.mark.parametrize("writes", [False, True])
def test_one_that_knows_is_fit_whether_labels_are_scored_or_written(role, writes):
    result = qualify(role, knows, writes=writes)
    assert result["fit"] and result["reasons"] == []
    assert result["accuracy"]["value"] == 1.0 and result["accuracy"]["n"] == len(english(role))
    assert result["label_mass"] == (None if writes else 1.0) and result["undecided"] == result["lost"] == 0


@pytest.mark.parametrize("orders", [1, 5])
@pytest.mark.parametrize("rule", [guesses_a_class, says_a, says_c])
def test_a_reader_that_does_not_read_is_unfit(rule, orders):
    result = qualify("reader", rule, orders=orders)
    assert not result["fit"] and "is not above the 35.6 % of 'any refusal phrase is (C)'" in result["reasons"][0]
    # A letter that is chosen whatever stands there: 0.9 of its probability, 0.2 of it by chance.
    bias = result["letter_bias"]
    if rule is guesses_a_class:
        assert bias["low"] == 0.0
    else:
        assert bias["value"] == pytest.approx(0.7, abs=1e-3)
    assert bias["n"] == (20 if orders == 1 else 174)


def test_a_reader_that_is_right_in_one_order_of_five_is_unfit():
    result = qualify("reader", knows_one_order, orders=5)
    assert not result["fit"] and result["accuracy"]["low"] > result["best_baseline"]["value"]
    assert result["reasons"] == ["it goes by letters more than by what they stand for: letter bias 0.58"]


@pytest.mark.parametrize(("rule", "position"), [(guesses, (0.3, 0.7)), (says_a, (1, 1)), (knows_one_order, (0.3, 0.7))])
def test_a_judge_that_guesses_or_goes_by_position_is_unfit(rule, position):
    result = qualify("judge", rule)
    assert not result["fit"] and len(result["reasons"]) == 2
    assert "is not above" in result["reasons"][0] and "the same position" in result["reasons"][1]
    assert position[0] <= result["same_position"]["value"] <= position[1]
    if rule is says_a:  # never decided, and never right by chance
        assert result["accuracy"]["value"] == 0.0 and result["undecided"] == 180


def test_a_judge_that_is_nearly_always_right_is_fit_and_its_probabilities_are_calibrated_as_they_are():
    result = qualify("judge", mostly_right)
    assert result["fit"] and result["accuracy"]["low"] > 0.8
    assert result["best_baseline"]["value"] < 0.56 and result["ece"]["value"] < 0.15
    assert result["letter_bias"]["low"] == 0.0


def test_labels_without_probability_make_unfit_however_right_they_are():
    result = qualify("judge", knows, mass=0.03)
    assert result["accuracy"]["value"] == 1.0 and result["label_mass"] == 0.03
    assert result["reasons"] == ["it would rather not answer with a label: the labels have 3% of its probability"]


@pytest.mark.parametrize(
    ("rule", "criticise"),
    [
        (guesses, names_the_fault),
        (says_a, names_the_fault),
        (knows_one_order, names_the_fault),
        (knows, repeats),
        (knows, lambda row: ""),
        (knows, lambda row: f"Bad. {row['id']}"),
    ],
)
def test_a_critic_that_can_not_tell_or_does_not_speak_of_the_response_is_unfit(rule, criticise):
    result = qualify("critic", rule, criticise=criticise)
    assert not result["fit"] and "its accuracy of" in result["reasons"][0]
    if criticise is repeats:
        assert result["duplicates"] == 75
    if rule is says_a:
        assert result["same_position"]["value"] == 1.0


def test_a_critic_whose_room_was_taken_by_reasoning_is_asked_again_with_more():
    class Reasoner(Stub):
        def generate(self, requests, sampling, done=()):
            if sampling.max_new_tokens == qualification.CRITIQUE_TOKENS:
                yield from ((request, Generation("", "length", 10, sampling.max_new_tokens)) for request in requests)
            else:
                assert sampling.max_new_tokens == qualification.REASONING_TOKENS
                yield from super().generate(requests, sampling)

    engine = Reasoner("critic", knows, criticise=names_the_fault)
    result = qualification.measure(engine, qualification.Task("critic"))
    assert result["fit"] and result["empty"] == 0 and result["cut"] == 0


# --- the sets -----------------------------------------------------------------------------------------------


def test_the_worlds_sets_are_balanced_and_always_the_same():
    for role in qualification.ROLES:
        rows = qualification_sets.load_rows(role, "world")
        assert rows == qualification_sets.load_rows(role, "world") and len(rows) == 100
        assert len({row["id"] for row in rows}) == 100
    golds = [row["gold"] for row in qualification_sets.load_rows("judge", "world")]
    assert golds.count("a") == 50
    classes = {row["gold"] for row in qualification_sets.load_rows("reader", "world")}
    assert classes == {"comply", "good", "evasive", "preachy", "helpful", "refused", "off_topic"}


def test_a_model_of_the_world_is_known_by_its_tokenizer(tmp_path):
    from cai.base.paths import TINY

    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    assert qualification_sets.name_set("tiny") == qualification_sets.name_set(str(tmp_path)) == "world"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert qualification_sets.name_set(str(tmp_path)) == "english"
    assert qualification_sets.name_set("openai:tiny") == qualification_sets.name_set("my-org/my-model") == "english"


# --- once ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, and a process that has measured nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CAI_QUALIFICATION", raising=False)
    monkeypatch.setattr(qualification, "_results", {})
    return tmp_path / "cache" / "constitutional-ai" / "qualification"


def test_a_result_is_kept_and_a_damaged_one_measured_again(cache, monkeypatch, capsys):
    loads = []

    def load():
        loads.append(1)
        return Stub("judge", guesses)

    task = qualification.Task("judge")
    first = qualification.qualify("openai:m", task, load, endpoints=("http://one",))
    assert not first["fit"] and "qualifying openai:m as judge on 180 texts" in capsys.readouterr().err
    [file] = cache.iterdir()
    assert json.loads(file.read_text()) == first
    monkeypatch.setattr(qualification, "_results", {})
    assert qualification.qualify("openai:m", task, load, endpoints=("http://one",)) == first and len(loads) == 1
    # Another server, another role's templates: another result.
    qualification.qualify("openai:m", task, load, endpoints=("http://two",))
    assert len(loads) == 2 and len(list(cache.iterdir())) == 2
    for kept in cache.iterdir():
        kept.write_text('{"fit": tr')
    monkeypatch.setattr(qualification, "_results", {})
    qualification.qualify("openai:m", task, load, endpoints=("http://one",))
    assert len(loads) == 3


def test_a_kept_result_has_the_name_that_the_model_has_now(cache, tmp_path):
    task, copied = qualification.Task("judge"), str(models.copy("llama", tmp_path / "copied"))
    first = qualification.qualify(str(models.folder("llama")), task, lambda: Stub("judge", knows))
    assert qualification.qualify(copied, task, pytest.fail) == {**first, "model": copied}


def test_a_server_that_does_not_answer_is_not_remembered_as_unfit(cache, monkeypatch):
    class Silent(Stub):
        def score(self, requests, labels):
            yield from ((request, None) for request in requests)

    result = qualification.qualify("openai:m", qualification.Task("judge"), lambda: Silent("judge", knows))
    assert not result["fit"] and result["lost"] == 180
    assert not cache.exists()


def test_nothing_is_measured_where_it_is_switched_off(cache, monkeypatch):
    monkeypatch.setenv("CAI_QUALIFICATION", "off")
    assert qualification.qualify("tiny", qualification.Task("judge"), pytest.fail) is None


def test_the_same_task_is_measured_once_whoever_names_its_templates():
    plain = qualification.Task("critic").settings()
    assert qualification.critic_task(load_template("critique"), 96).settings() == plain
    reasoned = qualification.critic_task(load_template("critique_cot"), 512).settings()
    assert reasoned["new_tokens"] == 512 and reasoned["templates"] != plain["templates"]
    named = {"template": load_template("preference"), "answer_template": load_template("preference_answer")}
    assert qualification.Task("judge", **named).settings() == qualification.Task("judge").settings()


@pytest.mark.slow
def test_tiny_is_fit_in_its_world(cache, invoke):
    result = invoke("doctor", "--model", "tiny", "--as", "reader", "--as", "judge", "--as", "critic", "--json")
    report = json.loads(result.stdout)
    assert [measured["fit"] for measured in report["qualification"]] == [True] * 3, result.output
    assert all(measured["accuracy"]["value"] >= 0.97 for measured in report["qualification"])
    assert {measured["set"] for measured in report["qualification"]} == {"world"} and len(list(cache.iterdir())) == 3
