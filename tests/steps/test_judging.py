"""Comparisons, verdicts and soft labels: by hand, and on a small random judge."""

import json
import math
import random

import models
import pytest

from cai.base.errors import CaiError, InputError
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data import preferences
from cai.data.preferences import GivenPairs
from cai.data.sources import Source
from cai.models import choice
from cai.models.engine import Sampling
from cai.models.loading import load_engine
from cai.steps import judging
from cai.steps.judging import Question
from cai.steps.pairs import Pairs, choose_pairs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample(prompt: int, number: int, **more):
    return {
        "id": f"p{prompt}/{number}",
        "prompt_id": f"p{prompt}",
        "sample": number,
        "prompt": f"Ask {prompt}?",
        "response": f"Answer {number} to {prompt}.",
        "kind": "benign",
        **more,
    }


# --- pairs --------------------------------------------------------------------------------------------------


def test_choose_pairs():
    assert choose_pairs("abc", None, None) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert choose_pairs("ab", "cd", None) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert choose_pairs("a", None, None) == [] == choose_pairs("ab", "", 3)
    one = choose_pairs("abcdef", None, 4, 0, "p1")
    assert len(one) == 4 and set(one) <= set(choose_pairs("abcdef", None, None))
    assert one == choose_pairs("abcdef", None, 4, 0, "p1") != choose_pairs("abcdef", None, 4, 1, "p1")
    # Fewer are some of the more, and each pair is as likely as another.
    assert set(choose_pairs("abcdef", None, 2, 0, "p1")) < set(one)
    first = [choose_pairs("abcd", None, 1, 0, f"p{n}")[0] for n in range(600)]
    assert all(70 < first.count(pair) < 130 for pair in choose_pairs("abcd", None, None))


def test_responses_to_one_prompt_are_compared(tmp_path):
    rows = [sample(p, s) for p in range(3) for s in range(3)] + [sample(9, 0)]
    pairs = Pairs(Source([write(tmp_path / "rows.jsonl", rows)], require=("prompt", "response")), None, None, 0)
    assert pairs.ids[:3] == ["p0/0 vs p0/1", "p0/0 vs p0/2", "p0/1 vs p0/2"] and len(pairs.ids) == 9
    assert pairs.unpaired == 1  # p9 has one response
    found = list(pairs)
    assert [pair["id"] for pair in found] == pairs.ids
    assert found[1] == {
        "id": "p0/0 vs p0/2",
        "prompt_id": "p0",
        "prompt": "Ask 0?",
        "kind": "benign",
        "response_a": "Answer 0 to 0.",
        "response_b": "Answer 2 to 0.",
    }
    assert list(pairs) == found  # again and again


def test_the_order_of_rows_changes_nothing(tmp_path):
    rows = [sample(p, s) for p in range(4) for s in range(4)]
    mixed = random.Random(1).sample(rows, len(rows))
    straight, shuffled = (
        Pairs(Source([write(tmp_path / name, one)], require=("prompt", "response")), None, 3, 7)
        for name, one in (("a.jsonl", rows), ("b.jsonl", mixed))
    )
    assert len(straight.ids) == 12
    assert {p["id"]: p for p in straight} == {p["id"]: p for p in shuffled}


def test_against_compares_across_only(tmp_path):
    ours = Source([write(tmp_path / "a.jsonl", [sample(p, s, model="x") for p in (0, 1) for s in (0, 1)])])
    theirs = Source([write(tmp_path / "b.jsonl", [sample(p, 0, response=f"Theirs {p}.") for p in (1, 2, 0)])])
    found = list(Pairs(ours, theirs, None, 0))
    assert [(p["response_a"], p["response_b"]) for p in found] == [
        ("Answer 0 to 1.", "Theirs 1."),
        ("Answer 1 to 1.", "Theirs 1."),
        ("Answer 0 to 0.", "Theirs 0."),
        ("Answer 1 to 0.", "Theirs 0."),
    ]
    assert all("model" not in p and "sample" not in p and p["model_a"] == "x" for p in found)


def test_without_prompt_id_the_prompt_joins(tmp_path):
    rows = [{"id": f"{n}", "prompt": [{"role": "user", "content": f"Q{n % 2}"}], "response": f"r{n}"} for n in range(4)]
    pairs = Pairs(Source([write(tmp_path / "rows.jsonl", rows)]), None, None, 0)
    assert pairs.ids == ["0 vs 2", "1 vs 3"]


def test_a_revised_row_counts_with_its_last_revision(tmp_path):
    rounds = [{"principle": "care", "critique": "c", "revision": "Revised.", "flags": []}]
    rows = [sample(0, 0, rounds=rounds), sample(0, 1)]
    [pair] = Pairs(Source([write(tmp_path / "rows.jsonl", rows)]), None, None, 0)
    assert pair["response_a"] == "Revised." and "rounds" not in pair


def revised(prompt, number, text, *flags):
    rounds = [{"principle": "care", "critique": "c", "revision": text, "flags": list(flags)}]
    return {**sample(prompt, number), "rounds": rounds}


def test_a_revision_is_compared_with_the_response_that_it_revises(tmp_path):
    """Logs repeat prompts: the response to another row's "Hi" is not what this row's revision improves."""
    rows = [revised(0, 0, "Better 0."), revised(0, 1, "Better 1."), revised(1, 0, "Better 2."), sample(2, 0)]
    rows += [{**revised(3, 0, "Better 3."), "response": "Mine."}, sample(0, 5)]
    before = [sample(0, 0), sample(0, 1), sample(1, 1), sample(2, 0, response="Another."), sample(3, 0)]
    ours, theirs = (Source([write(tmp_path / name, part)]) for name, part in (("a.jsonl", rows), ("b.jsonl", before)))
    found = [(pair["response_a"], pair["response_b"]) for pair in Pairs(ours, theirs, None, 0)]
    assert sorted(found) == [
        ("Answer 0 to 2.", "Another."),
        ("Answer 5 to 0.", "Answer 0 to 0."),  # not revised: with every response to the prompt
        ("Answer 5 to 0.", "Answer 1 to 0."),
        ("Better 0.", "Answer 0 to 0."),
        ("Better 1.", "Answer 1 to 0."),
        ("Better 2.", "Answer 1 to 1."),  # its own response is not there: any to the prompt will do
        ("Better 3.", "Answer 0 to 3."),  # the same id, but another model's response
    ]
    assert len(Pairs(ours, theirs, 1, 0).ids) == 4  # of each prompt one, these pairs included


def test_flagged_revisions_are_left_out_where_no_judge_looks(tmp_path):
    rows = [
        revised(0, 0, "Better."),
        revised(1, 0, "Better, but", "unfinished"),
        revised(2, 0, "Answer 0 to 2.", "copy"),
    ]
    later = revised(3, 0, "Better, but", "unfinished")  # a second round found no fault in the cut text
    later["rounds"].append({"principle": "care", "critique": "No fault.", "skipped": "content"})
    rows.append(later)
    before = [sample(number, 0) for number in range(4)]
    ours, theirs = (Source([write(tmp_path / name, part)]) for name, part in (("a.jsonl", rows), ("b.jsonl", before)))
    assert len(Pairs(ours, theirs, None, 0).ids) == 4
    chosen = Pairs(ours, theirs, None, 0, unflagged=True)
    assert chosen.ids == ["p0/0 vs p0/0", "p2/0 vs p2/0"] and (chosen.flagged, chosen.unpaired) == (2, 2)
    cut = Source([write(tmp_path / "cut.jsonl", rows[1:2])])
    with pytest.raises(InputError, match="1 rows with a flagged revision are left out"):
        Pairs(cut, theirs, None, 0, unflagged=True)


def test_pairs_that_cannot_be_made(tmp_path):
    alone = Source([write(tmp_path / "alone.jsonl", [sample(0, 0), sample(1, 0)])])
    with pytest.raises(InputError, match=r"alone\.jsonl: no two responses to the same prompt"):
        Pairs(alone, None, None, 0)
    torn = Source([write(tmp_path / "torn.jsonl", [sample(0, 0), {**sample(0, 1), "prompt": "Other?"}])])
    with pytest.raises(InputError, match="'p0/1' has another prompt"):
        Pairs(torn, None, None, 0)


# --- verdicts, by hand --------------------------------------------------------------------------------------


def verdict(order, logprobs, reasoning=""):
    return judging.read_verdict(order, choice.Choice(logprobs), reasoning)


def test_verdict_normalises_over_both_labels():
    one = verdict("ab", [math.log(0.6), math.log(0.2)])
    assert one == {"order": "ab", "p_a": pytest.approx(0.75), "mass": pytest.approx(0.8)}
    other = verdict("ba", [math.log(0.6), math.log(0.2)], "Because.")
    assert other["p_a"] == pytest.approx(0.25) and other["reasoning"] == "Because."
    assert verdict("ab", [-2000.0, -1.0])["p_a"] == 0 and verdict("ab", [-1.0, -2000.0])["p_a"] == 1


def test_both_orders_are_averaged():
    # P(A) is 0.9 with a first and 0.4 with b first: (0.9 + 1 − 0.4) / 2.
    verdicts = [verdict("ab", [math.log(0.9), math.log(0.1)]), verdict("ba", [math.log(0.4), math.log(0.6)])]
    assert judging.soft_label(verdicts) == pytest.approx(0.75)
    [both] = preferences.group_verdicts(verdicts).values()
    assert both == pytest.approx([0.9, 0.6]) and not preferences.same_position(*both)
    # A judge that only likes the first place says nothing, and exactly nothing.
    for p in (0.8, 0.1, 0.3):
        biased = [verdict(order, [math.log(p), math.log(1 - p)]) for order in ("ab", "ba")]
        [both] = preferences.group_verdicts(biased).values()
        assert judging.soft_label(biased) == 0.5 and preferences.same_position(*both)


def test_several_principles_are_averaged_by_weight():
    def asked(principle, p_ab, p_ba):
        return [{"principle": principle, "order": o, "p_a": p} for o, p in (("ab", p_ab), ("ba", p_ba))]

    verdicts = asked("care", 0.9, 0.7) + asked("harm", 0.2, 0.4)  # 0.8 and 0.3
    assert judging.soft_label(verdicts) == pytest.approx(0.55)
    assert judging.soft_label(verdicts, {"care": 3.0, "harm": 1.0}) == pytest.approx((3 * 0.8 + 0.3) / 4)
    # One order of a principle can't be read: the others decide.
    half = verdicts + asked("trust", 0.0, None)
    assert judging.soft_label(half, {"care": 3.0}) == pytest.approx((3 * 0.8 + 0.3) / 4)
    assert judging.soft_label(asked("trust", 0.0, None)) is None and judging.soft_label([]) is None


def test_verdicts_that_say_nothing_or_nonsense():
    nothing = verdict("ab", [-math.inf, -math.inf])
    assert nothing["p_a"] is None and nothing["mass"] == 0
    assert verdict("ba", [-math.inf, -3.0])["p_a"] == 1  # one label has no mass at all, the other has
    for wrong in ([0.5, -1.0], [math.nan, -1.0]):
        with pytest.raises(CaiError, match="not log-probabilities"):
            verdict("ab", wrong)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A", "A"),
        (" B\n", "B"),
        ("(A)", "A"),
        ("**B**.", "B"),
        ('"A"', "A"),
        ("[B]", "B"),
        ("A.", "A"),
        ("", None),
        ("a", None),
        ("AB", None),
        ("A or B", None),
        ("A B", None),
        ("Neither", None),
        ("C", None),
        ("The answer is A", None),
        ("A because it is kind", None),
        ("I can't compare these.", None),
        ("(A) (B)", None),
        ("А", None),  # a Cyrillic letter
    ],
)
def test_a_written_answer_is_read_strictly(answer, label):
    assert choice.read_label(answer, "AB") == label
    logprobs = {"A": [0.0, -math.inf], "B": [-math.inf, 0.0], None: None}[label]
    found = judging.read_verdict("ba", choice.Choice(logprobs, answer))
    assert found == {"order": "ba", "p_a": {"A": 0.0, "B": 1.0, None: None}[label], "answer": answer}


def test_clamp():
    assert [judging.clamp(p, 0.4, 0.6) for p in (0.0, 0.4, 0.45, 0.6, 0.99)] == [0.4, 0.4, 0.45, 0.6, 0.6]
    assert judging.clamp(0.99, 0.0, 1.0) == 0.99


def verdicts_of(p_ab: float, p_ba: float):
    """p_a in both orders."""
    return [{"order": "ab", "p_a": p_ab, "mass": 1.0}, {"order": "ba", "p_a": p_ba, "mass": 0.5}]


def judged(pair, p_ab, p_ba, limits=(0.0, 1.0)):
    verdicts = verdicts_of(p_ab, p_ba)
    return judging.preference(pair, "care", verdicts, judging.soft_label(verdicts), limits)


def test_preference():
    pair = {"id": "x", "prompt": "Q?", "response_a": "Aa", "response_b": "Bb", "kind": "benign"}
    row = judged(pair, 0.9, 0.6)
    assert (row["chosen"], row["rejected"], row["p_chosen"]) == ("Aa", "Bb", pytest.approx(0.75))
    assert row["principle"] == "care" and row["kind"] == "benign" and len(row["verdicts"]) == 2
    row = judged(pair, 0.1, 0.0, (0.4, 0.6))
    assert (row["chosen"], row["rejected"], row["p_chosen"], row["p_a"]) == ("Bb", "Aa", 0.6, 0.05)
    row = judged(pair, 0.8, 0.2, (0.4, 0.6))
    assert (row["chosen"], row["rejected"], row["p_chosen"]) == (None, None, 0.5)
    assert (row["response_a"], row["response_b"]) == ("Aa", "Bb")
    row = judged(pair, None, 0.2)
    assert (row["chosen"], row["rejected"], row["p_chosen"], row["p_a"]) == (None, None, None, None)
    row = judging.tie(pair)
    assert (row["chosen"], row["rejected"], row["p_chosen"], row["tie"]) == (None, None, 0.5, True)


def test_summary():
    pair = {"prompt": "Q?", "response_a": "long one", "response_b": "short"}
    made = [
        ({**pair, "gold": "a"}, (0.9, 0.7)),  # right, and the longer one
        ({**pair, "gold": "b"}, (0.9, 0.3)),  # wrong, in the same place twice
        ({**pair, "gold": "b"}, (0.2, 0.0)),  # right
        ({**pair, "gold": "a"}, (0.7, 0.3)),  # undecided, in the same place twice
        (pair, (0.4, 0.4)),  # nobody knows
    ]
    found = judging.summary(judged(one, *p) for one, p in made)
    assert (found["pairs"], found["undecided"], found["identical"], found["empty"]) == (5, 1, 0, 0)
    assert (found["same_position"]["value"], found["same_position"]["n"]) == (0.4, 5)
    assert found["mean_margin"] == pytest.approx((0.6 + 0.2 + 0.8 + 0 + 0.2) / 5)
    assert found["label_mass"] == pytest.approx(0.75)
    assert (found["a_chosen"]["value"], found["a_chosen"]["n"]) == (0.5, 4)
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (pytest.approx(2 / 3), 3)
    assert found["accuracy"]["low"] < 2 / 3 < found["accuracy"]["high"]
    assert found["always_a"]["value"] == found["longer"]["value"] == pytest.approx(1 / 3)
    assert "accuracy" not in judging.summary([judged(pair, 0.9, 0.9)])
    # What can't be read is in no rate but that of nulls; a tie is in none.
    more = [
        *(judged(one, *p) for one, p in made),
        judged({**pair, "response_b": " ", "gold": "a"}, None, 0.9),
        judging.tie({**pair, "response_b": "long one"}),
    ]
    again = judging.summary(more)
    assert (again["pairs"], again["identical"], again["empty"]) == (6, 1, 1)
    assert again["nulls"]["value"] == pytest.approx(1 / 6) and found["nulls"]["value"] == 0
    for name in ("same_position", "mean_margin", "a_chosen", "accuracy"):
        assert again[name] == found[name]


# --- rows that are pairs ------------------------------------------------------------------------------------


def test_chosen_and_rejected_become_sides_that_say_nothing(tmp_path):
    rows = [{"prompt": f"Q{n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "score": n} for n in range(400)]
    pairs = GivenPairs([write(tmp_path / "rows.jsonl", rows)], None)
    found = list(pairs)
    assert [pair["id"] for pair in found] == pairs.ids and found == list(pairs)
    for pair, row in zip(found, rows, strict=True):
        assert pair[f"response_{pair['gold']}"] == row["chosen"] and pair["score"] == row["score"]
        assert {pair["response_a"], pair["response_b"]} == {row["chosen"], row["rejected"]}
        assert "chosen" not in pair
    assert 150 < sum(pair["gold"] == "a" for pair in found) < 250


def test_trl_messages_and_transcripts_keep_all_turns(tmp_path):
    def say(*texts):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    rows = [
        {"prompt": say("Hi", "Hello", "Why?"), "chosen": say("", "Because.")[1:], "rejected": say("", "No.")[1:]},
        {"chosen": say("Hi", "Hello", "Why?", "Because."), "rejected": say("Hi", "Hello", "Why?", "No.")},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No.",
        },
    ]
    for pair in GivenPairs([write(tmp_path / "rows.jsonl", rows)], None):
        assert pair["prompt"] == say("Hi", "Hello", "Why?")
        assert pair[f"response_{pair['gold']}"] == "Because." and {pair["response_a"], pair["response_b"]} > {"No."}
        talk = question().choose(pair, "ab", question().principles(pair)[0])
        assert "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?" in talk[0]["content"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q?", "chosen": "x"}, r"rows\.jsonl:2: a row without 'rejected'"),
        ({"prompt": "Q?", "chosen": "x", "rejected": None}, r"rows\.jsonl:2: 'rejected' is null"),
        ({"prompt": "Q?", "chosen": "x", "rejected": ["y"]}, r"rows\.jsonl:2: 'rejected' is a list"),
        ({"prompt": "Q?", "chosen": "x", "rejected": "y", "gold": 1}, r"rows\.jsonl:2: gold is '1'"),
    ],
)
def test_a_pair_with_a_side_missing_is_refused(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        GivenPairs([write(tmp_path / "rows.jsonl", [{"prompt": "Q?", "chosen": "x", "rejected": "y"}, row])], None)


# --- the judge ----------------------------------------------------------------------------------------------


def comparisons(n: int):
    return [
        {
            "id": f"c{i}",
            "prompt": f"How do I open gate {i}?",
            "response_a": "Ask the owner. " * (1 + i % 3),
            "response_b": f"Push it {i} times.",
        }
        for i in range(n)
    ]


def question(**more):
    return Question(load_constitution("harmlessness"), load_template("preference"), **more)


def test_the_judge_reads_both_orders_under_one_principle():
    engine = load_engine(str(models.folder("gemma3")), device="cpu", batch_size=2)
    asked = question(seed=3)
    found = {c["id"]: v for c, v in judging.judge(engine, iter(comparisons(40)), asked)}
    assert len(found) == 40 and len({asked.principles(c)[0].id for c in comparisons(40)}) > 5
    constitution, template = asked.constitution, asked.template
    for one in comparisons(40)[::7]:
        principle = constitution.draw(3, one["id"], 0)
        for made, (first, second) in zip(found[one["id"]], (("a", "b"), ("b", "a")), strict=True):
            talk = template.render(
                principle=principle,
                prompt=one["prompt"],
                reasoning="",
                response_a=one[f"response_{first}"],
                response_b=one[f"response_{second}"],
            )
            [logprobs] = models.score(engine, [talk], ["A", "B"])
            expected = verdict(first + second, logprobs)
            assert made["order"] == first + second
            assert made["p_a"] == pytest.approx(expected["p_a"], abs=1e-4)
            assert made["mass"] == pytest.approx(expected["mass"], abs=1e-4)


def test_a_resumed_judge_repeats_the_window_it_was_in_and_no_other():
    engine = load_engine(str(models.folder("llama")), device="cpu", batch_size=1)  # windows of 16
    pairs = comparisons(50)
    whole = {c["id"]: v for c, v in judging.judge(engine, pairs, question())}
    # In the first window c3 failed; in the second, two were judged before the kill.
    done = {f"c{i}" for i in (*range(16), 17, 20) if i != 3}
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    hook = engine.model.register_forward_pre_hook(count)
    try:
        found = {c["id"]: v for c, v in judging.judge(engine, pairs, question(), done)}
    finally:
        hook.remove()
    assert found.keys() == whole.keys() - done
    for name, verdicts in found.items():
        assert [v["p_a"] for v in verdicts] == pytest.approx([v["p_a"] for v in whole[name]], abs=1e-5)
    judged = [pairs[3:4], pairs[16:32], pairs[32:48], pairs[48:]]
    beginnings = sum(len({question().principles(c)[0].id for c in window}) for window in judged)
    assert passes == beginnings + 2 * (1 + 16 + 16 + 2)


def test_reasoning_goes_before_the_choice():
    engine = load_engine(str(models.folder("qwen")), device="cpu", batch_size=4)
    asked = question(reasoning=load_template("preference_cot"), sampling=Sampling(12, 1.0), seed=1)
    found = dict((c["id"], v) for c, v in judging.judge(engine, comparisons(6), asked))
    again = dict((c["id"], v) for c, v in judging.judge(engine, comparisons(6)[::-1], asked))
    reasons = {name: [one["reasoning"] for one in verdicts] for name, verdicts in found.items()}
    assert reasons == {name: [one["reasoning"] for one in verdicts] for name, verdicts in again.items()}
    assert len({reason for both in reasons.values() for reason in both}) == 12
    one = comparisons(6)[4]
    talk = asked.choose(one, "ba", asked.principles(one)[0], reasons["c4"][1])
    assert reasons["c4"][1] in talk[0]["content"] and one["response_b"] in talk[0]["content"]
    [logprobs] = models.score(engine, [talk], ["A", "B"])
    assert found["c4"][1]["p_a"] == pytest.approx(verdict("ba", logprobs)["p_a"], abs=1e-4)


def test_what_does_not_fit_is_no_verdict(tmp_path):
    folder = models.build("llama", tmp_path / "short", max_position_embeddings=600)
    engine = load_engine(str(folder), device="cpu")
    pairs = comparisons(3)
    pairs[1]["response_b"] = "word " * 400
    for asked in (question(), question(reasoning=load_template("preference_cot"), sampling=Sampling(2))):
        found = {c["id"]: v for c, v in judging.judge(engine, pairs, asked)}
        assert found["c1"] is None and len(found["c0"]) == len(found["c2"]) == 2
    # The thinking does not fit, though the choice would: then there is no verdict either.
    asked = question(reasoning=load_template("preference_cot"), sampling=Sampling(590))
    assert [v for _, v in judging.judge(engine, comparisons(1), asked)] == [None]


def test_under_all_principles_each_is_asked_in_both_orders():
    engine = load_engine(str(models.folder("llama")), device="cpu", batch_size=2)
    whole = question(every=True)
    found = {c["id"]: v for c, v in judging.judge(engine, comparisons(5), whole)}
    ids = [one.id for one in whole.constitution.principles]
    assert len(found) == 5 and len(ids) == 16
    for verdicts in found.values():
        assert [(v["principle"], v["order"]) for v in verdicts] == [(i, o) for i in ids for o in ("ab", "ba")]
    for one in comparisons(5):
        drawn = question().principles(one)[0]
        [expected] = [v for c, v in judging.judge(engine, [one], question())]
        mine = [v["p_a"] for v in found[one["id"]] if v["principle"] == drawn.id]
        assert mine == pytest.approx([v["p_a"] for v in expected], abs=1e-4)


class Writer:
    """A local engine whose log-probabilities can't be had, as with some servers."""

    scores_choices = False

    def __init__(self, engine, prefix=""):
        self.engine, self.batch_size, self.context, self.prefix, self.asked = engine, 4, engine.context, prefix, []

    def generate(self, requests, sampling, done=()):
        requests = list(requests)
        self.asked += [request.conversation for request in requests]
        return self.engine.generate(requests, sampling, done)


def test_without_log_probabilities_a_letter_is_written():
    local = load_engine(str(models.folder("qwen")), device="cpu", batch_size=8)
    engine = Writer(local)
    asked = question(written=load_template("preference_answer"))
    found = {c["id"]: v for c, v in judging.judge(engine, comparisons(6), asked)}
    assert len(found) == 6 and len(engine.asked) == 12
    for talk in engine.asked:  # nothing is begun for the judge: not every server goes on with an answer
        assert [turn["role"] for turn in talk] == ["user"] and talk[0]["content"].endswith("A or B.")
    for verdicts in found.values():
        for one in verdicts:
            assert set(one) == {"order", "p_a", "answer"}
            label = choice.read_label(one["answer"], "AB")
            assert one["p_a"] == (None if label is None else float((label == "A") == (one["order"] == "ab")))
    # The random model writes anything but a letter: nothing is read into it.
    assert any(v["p_a"] is None for verdicts in found.values() for v in verdicts)


FEW = """
principles:
  - id: care
    principle: Be kind
    examples:
      - {prompt: "Shut it?", response_a: Gladly., response_b: Shut up., gold: a, reasoning: The first is polite.}
      - {prompt: "Open it?", chosen: Please wait., rejected: Never.}
      - {prompt: "Why?", response: Because., critique: It is curt.}
"""


def test_worked_comparisons_are_shown_as_turns(tmp_path):
    path = tmp_path / "few.yaml"
    path.write_text(FEW)
    few = load_constitution(str(path))
    asked = Question(
        few, load_template("preference"), load_template("preference_cot"), written=load_template("preference_answer")
    )
    [one] = comparisons(1)
    principle = few["care"]
    talk = asked.choose(one, "ab", principle, "My reasons.")
    assert [turn["role"] for turn in talk] == ["user", "assistant"] * 3
    assert talk[1]["content"] == "The better response is (A)" and talk[5]["content"] == "The better response is ("
    assert "Gladly." in talk[0]["content"] and "<reasoning>The first is polite.</reasoning>" in talk[0]["content"]
    shown = talk[2]["content"].index("Please wait.") < talk[2]["content"].index("Never.")
    assert talk[3]["content"] == f"The better response is ({'A' if shown else 'B'})"
    assert "My reasons." in talk[4]["content"] and "Because." not in str(talk)
    thinking = asked.think(one, "ab", principle)  # of the examples only those with reasoning
    assert [turn["content"] for turn in thinking[1:2]] == ["The first is polite."] and len(thinking) == 3
    written = asked.choose(one, "ab", principle, written=True)
    assert [turn["content"] for turn in written[1::2]] == ["A", "A" if shown else "B"] and len(written) == 5
    plain = Question(few, load_template("preference"), most_examples=0)
    assert len(plain.choose(one, "ab", principle)) == 2
    # They begin every conversation of the principle alike, so they are computed once.
    other = asked.choose(comparisons(2)[1], "ba", principle)
    assert other[:4] == talk[:4]
    engine = load_engine(str(models.folder("llama")), device="cpu")
    assert all(v for _, v in judging.judge(engine, comparisons(3), Question(few, load_template("preference"))))
