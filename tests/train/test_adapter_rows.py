"""What the adapters are taught is what the commands ask: the same words, the right answers, the loss on them alone."""

import random
from collections import Counter
from functools import partial

import models
import pytest

from cai.base.errors import InputError
from cai.base.paths import SMOLLM2
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.readers import read_jsonl
from cai.models import loading
from cai.stats import letters
from cai.train import adapter_rows, adapters

PRINCIPLED = {
    "principle": "privacy/repeats-little",
    "prompt": "Write a note that our trainer is away.",
    "response": "Our trainer is away, because she has a bad back and sees a doctor on Monday.",
    "critique": "The response tells the whole club of the trainer's back. It should say only that she is away.",
    "revision": "Our trainer is away this week. The next lesson is on Monday.",
    "praise": "No fault: the note says that the trainer is away and nothing of why.",
}


@pytest.fixture(scope="module")
def demonstrations():
    return [row for _, row in read_jsonl(SMOLLM2 / "demonstrations.jsonl")]


@pytest.fixture(scope="module")
def chat():
    return loading.load_chat(str(models.folder("chatml")))


@pytest.fixture
def tasks(chat):
    return adapter_rows.Tasks(chat, random.Random(0))


def first(rows, **fields):
    return next(row for row in rows if all(row[name] == value for name, value in fields.items()))


def texts(chat, row):
    """(what the model reads, what it is to answer)."""
    at = len(row.ids) - row.targets
    return chat.tokenizer.decode(row.ids[:at]), chat.tokenizer.decode(row.ids[at:])


def test_a_critique_is_asked_for_as_the_command_asks(chat, tasks, demonstrations):
    row = first(demonstrations, fault="harm")
    read, answer = texts(chat, tasks.criticise(row))
    asked = [
        chat.render(load_template("critique").render(principle=p, prompt=row["prompt"], response=row["response"]))
        for p in load_constitution("harmlessness").principles
    ]
    assert read in asked
    assert answer == f"{row['critique']}<|im_end|>"


def test_a_revision_follows_its_critique(chat, tasks, demonstrations):
    row = first(demonstrations, fault="refusal")
    read, answer = texts(chat, tasks.revise(row))
    assert f"<critique>{row['critique']}</critique>" in read and f"<response>{row['response']}</response>" in read
    assert answer == f"{row['revision']}<|im_end|>"


@pytest.mark.parametrize(("fault", "option"), [("harm", 0), ("none", 1)])
def test_a_critique_is_read_in_either_order(chat, tasks, demonstrations, fault, option):
    row, orders = first(demonstrations, fault=fault), set()
    for asked in tasks.read_critique(row, row):
        read, label = texts(chat, asked)
        order = next(
            order
            for order in letters.cyclic_orders(2, 2)
            if read.endswith(
                chat.render(
                    load_template("classify_critique").render(
                        **{name: row[name] for name in ("prompt", "response", "critique")}, order=order
                    )
                )
            )
        )
        assert order["AB".index(label)] == option
        orders.add(order)
    assert len(orders) == 2


def test_both_orders_of_a_reading_come_in_one_batch(chat, tasks, demonstrations, monkeypatch):
    """Also where a batch's rows have more tokens in common than the orders do, which depends on the chat template."""
    monkeypatch.setattr(adapter_rows, "TokenRow", partial(adapters.TokenRow, beginning=500))
    rows = [reading for row in demonstrations[:40] for reading in tasks.read_critique(row, row)]
    for batch in adapters.batches_of(rows, adapters.Settings(batch_tokens=3000), 0):
        assert {"(A) Yes" in texts(chat, rows[number])[0] for number in batch} == {True, False}


def test_half_of_the_readings_are_of_the_critique_of_another_row(chat, demonstrations):
    """Each verdict comes with faulty responses and with faultless ones, so that it can't be guessed from these."""
    rows = adapter_rows.critic_rows(adapter_rows.Material(demonstrations), chat, 0)
    verdicts = {(row["prompt"], row["response"]): row["fault"] != "none" for row in demonstrations}
    found = Counter()
    for row in rows:
        read, label = texts(chat, row)
        if "Does the critique say" in read:
            prompt, response = (
                read.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in ("prompt", "response")
            )
            says_fault = (label == "A") == ("(A) Yes" in read)
            found[verdicts[prompt, response], says_fault] += 1
    assert set(found) == {(True, True), (True, False), (False, True), (False, False)}
    assert max(found.values()) - min(found.values()) <= 2


def test_the_better_response_is_named_wherever_it_stands(chat, tasks, demonstrations):
    row = first(demonstrations, fault="harm")
    for compared, label in zip(tasks.prefer(row, row["revision"], row["response"]), "AB", strict=True):
        read, answer = texts(chat, compared)
        side = label.lower()
        assert answer == label and f"<response_{side}>{row['revision']}</response_{side}>" in read
        assert read.endswith("The better response is (")


def test_a_refusal_is_better_for_a_harmful_prompt_and_worse_for_a_harmless_one_in_the_same_words(chat, demonstrations):
    harmful, benign = (first(demonstrations, kind=kind, fault="none") for kind in ("harmful", "benign"))
    answered = [{**harmful, "fault": "harm", "response": "Yes, like this."}, {**benign, "response": "Yes, like this."}]
    compared = adapter_rows.judge_rows(adapter_rows.Material([], decided=[*answered, answered[1]]), chat, 0)
    assert len(compared) == 4  # the harmful one and as many harmless ones, each in both orders
    for number, asked in enumerate(compared):
        row, is_refused = answered[number // 2], number < 2
        read, label = texts(chat, asked)
        helps = "AB"[read.rindex("<response_b>") < read.index("Yes, like this.")]
        assert row["topic"].replace("-", " ") in read and (label == helps) is not is_refused


def test_the_judge_compares_with_refusals_of_both_kinds_in_the_critics_words(chat, demonstrations):
    """Prompts without such a refusal are left out: where most harmless ones lack it, its words would tell the kind."""
    kinds = ("harmful", "benign", "borderline")
    rows = [
        {**row, "id": f"{kind}-{n}", "response": "Yes, like this.", "fault": "harm" if kind == "harmful" else "none"}
        for kind in kinds
        for n, row in enumerate([row for row in demonstrations if row["kind"] == kind][:12])
    ]
    requests = adapter_rows.refusal_requests(rows, 0)
    assert Counter(request.key.split("-")[0] for request in requests) == dict.fromkeys(kinds, 4)
    asked = {request.key: request.conversation[-1]["content"] for request in requests}
    assert all("could be harmed. It should decline" in text and "Yes, like this." in text for text in asked.values())
    texts_ = {key: "Here you are." if key.startswith("benign") else f"I can't help with {key}." for key in asked}
    declined = adapter_rows.read_refusals(rows, texts_)
    assert declined == {key: text for key, text in texts_.items() if not key.startswith("benign")}
    compared = adapter_rows.judge_rows(adapter_rows.Material([], decided=rows, refusals=declined), chat, 0)
    read = [texts(chat, row)[0] for row in compared]
    assert len(compared) == 16  # four of each kind, in both orders
    assert sum("I can't help with harmful" in text for text in read) >= 2
    assert sum("I can't help with borderline" in text for text in read) >= 2


def test_a_fault_is_named_under_principles_that_speak_of_it(tasks, demonstrations):
    fraud = {tasks.principle(first(demonstrations, fault="harm", category="fraud")).id for _ in range(200)}
    assert "crime" in fraud and not fraud & {"people", "belongings-and-animals"}
    harmless = {tasks.principle(first(demonstrations, fault="none", kind="benign")).id for _ in range(300)}
    assert {"people", "belongings-and-animals", "helps"} <= harmless
    refused = Counter(tasks.principle(first(demonstrations, fault="refusal")).id for _ in range(300))
    assert refused["frightening-words"] > 20 and refused["harm"] > 0


def test_own_answers_become_demonstrations_only_where_their_fault_is_known(demonstrations):
    harmful, evasive = first(demonstrations, fault="harm"), first(demonstrations, fault="evasive")
    helpful, refusal = first(demonstrations, fault="none", kind="benign"), first(demonstrations, fault="refusal")
    declined = first(demonstrations, fault="harm", category="theft")
    answers = {row["id"]: "Sure, begin with the first step." for row in (harmful, evasive, helpful, refusal)}
    answers |= {declined["id"]: "I'm sorry, but I can't help with that.", "elsewhere": "Hello."}
    own = {row["id"]: row for row in adapter_rows.own_demonstrations(demonstrations, answers)}
    assert set(own) == {harmful["id"], helpful["id"], refusal["id"]}
    assert own[harmful["id"]] == {**harmful, "response": answers[harmful["id"]]}
    assert own[helpful["id"]]["critique"] == helpful["critique"] and own[helpful["id"]]["fault"] == "none"
    assert own[refusal["id"]]["critique"].startswith("Nothing in the response goes against this")
    assert own[refusal["id"]]["revision"] == answers[refusal["id"]]


def test_of_own_answers_to_other_prompts_the_first_word_of_a_critique_is_learned(chat, tasks):
    prompts = [row for _, row in read_jsonl(SMOLLM2 / "prompts" / "train.jsonl")]
    harmful, benign, declined = (first(prompts, kind=kind) for kind in ("harmful", "benign", "borderline"))
    answers = {row["id"]: "Yes. Begin with the first step." for row in (harmful, benign)}
    answers[declined["id"]] = "I'm sorry, but I can't help with that."
    decided = adapter_rows.own_decisions(prompts, answers)
    assert {row["id"] for row in decided} == {harmful["id"], benign["id"]}
    for row in decided:
        word = "The" if row["kind"] == "harmful" else "Nothing"
        read, answer = texts(chat, tasks.decide(row))
        assert f"<response>{answers[row['id']]}</response>" in read and read.endswith("<|im_start|>assistant\n")
        assert answer and word.startswith(answer)


def test_a_demonstration_of_a_principle_shows_the_fault_and_what_is_right_under_it(chat, tasks):
    faulty, good = adapter_rows.principle_demonstrations([PRINCIPLED])
    principle = load_constitution("privacy")["repeats-little"]
    for row, response, critique in (
        (faulty, PRINCIPLED["response"], PRINCIPLED["critique"]),
        (good, PRINCIPLED["revision"], PRINCIPLED["praise"]),
    ):
        read, answer = texts(chat, tasks.criticise(row))
        asked = load_template("critique").render(principle=principle, prompt=PRINCIPLED["prompt"], response=response)
        assert (read, answer) == (chat.render(asked), f"{critique}<|im_end|>")
    compared = adapter_rows.judge_rows(adapter_rows.Material([], named=[faulty, good] * 3), chat, 0)
    assert len(compared) == 2 and principle.preference in texts(chat, compared[0])[0]


def test_principles_that_are_unknown_and_rows_that_lack_a_text_are_refused():
    adapter_rows.check_principle(PRINCIPLED, "p.jsonl", 2)
    for unknown in ("privacy/no-such", "no-such/harm", "../privacy", "privacy"):
        with pytest.raises(InputError, match=f"the principle '{unknown}'"):
            adapter_rows.check_principle(PRINCIPLED | {"principle": unknown}, "p.jsonl", 2)
    with pytest.raises(InputError, match="without praise"):
        adapter_rows.check_principle(PRINCIPLED | {"praise": " "}, "p.jsonl", 2)


@pytest.mark.parametrize("role", ["critic", "judge"])
def test_rows_follow_from_the_seed(chat, demonstrations, role):
    some = demonstrations[::6]
    own = adapter_rows.own_demonstrations(some, {row["id"]: "Yes, here it is." for row in some[::2]})
    decided = [{**row, "critique": "The"} for row in some[:5]]
    material = adapter_rows.Material(some, own, decided, adapter_rows.principle_demonstrations([PRINCIPLED]))
    make = getattr(adapter_rows, f"{role}_rows")
    rows = make(material, chat, 1)
    assert rows == make(material, chat, 1) and rows != make(material, chat, 2)
    assert all(0 < row.targets < len(row.ids) for row in rows)
    choices = Counter(chat.tokenizer.decode(row.ids[-1:]) for row in rows if row.targets == 1)
    assert choices["A"] and choices["B"]


def test_a_demonstration_that_lacks_something_is_refused():
    row = dict.fromkeys(adapter_rows.FIELDS, "x") | {"fault": "harm", "kind": "harmful"}
    adapter_rows.check_demonstration(row, "d.jsonl", 3)
    with pytest.raises(InputError, match=r"d.jsonl:3: a demonstration without critique, revision; expected prompt,"):
        adapter_rows.check_demonstration(row | {"critique": " ", "revision": None}, "d.jsonl", 3)
    with pytest.raises(InputError, match=r"d.jsonl:3: the kind 'toxic'; expected one of harmful, benign"):
        adapter_rows.check_demonstration(row | {"kind": "toxic"}, "d.jsonl", 3)
    with pytest.raises(InputError, match="the fault 'x'; expected"):
        adapter_rows.check_demonstration(row | {"fault": "x"}, "d.jsonl", 3)
