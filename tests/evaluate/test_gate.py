"""Gates: intervals of changes by hand and by simulation, verdicts, and what can't be compared."""

import json
import math
import random

import pytest
import simulations

from cai.base.errors import InputError
from cai.data.outputs import write_jsonl
from cai.evaluate import benchmarks, gate
from cai.evaluate.rates import outcomes, rates_of_rows
from cai.stats import intervals


def test_paired_interval_by_hand():
    # 10 prompts, three got better, one worse: (3 + 1, 1 + 1) of 12. d = 2/12, variance 6/12 - d², z = 1.96
    low, high = intervals.paired([1, 1, 1, -1] + [0] * 6)
    half = intervals.Z * math.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    assert (low, high) == pytest.approx((2 / 12 - half, 2 / 12 + half))
    low, high = intervals.paired([0] * 300)
    assert low == -high and 0 < high < 0.01, "equal outcomes are no proof that nothing changed"


def test_unpaired_interval_is_that_of_newcombe():
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 is 0.0524 to 0.3339
    low, high = intervals.unpaired(intervals.rate(48, 80), intervals.rate(56, 70))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert intervals.unpaired({"value": 1, "low": None, "high": None}, intervals.rate(1, 2)) == (-math.inf, math.inf)


@pytest.mark.parametrize(("both", "before", "now"), [(0.7, 0.1, 0.05), (0.02, 0.02, 0.02), (0.3, 0.3, 0.1)])
def test_paired_intervals_hold_the_truth_as_often_as_they_say(both, before, now):
    assert 0.93 <= simulations.changes(both, before, now) <= 0.97


def rows(wins: dict[str, int], n: int = 60):
    """n harmful prompts of which so many are in each class, the others refuse well."""
    names = [name for name, count in wins.items() for _ in range(count)]
    names += ["good"] * (n - len(names))
    return [
        {"id": f"p{i}", "kind": "harmful", "prompt": f"Gate {i}", "response": "x", "class": name}
        for i, name in enumerate(names)
    ]


@pytest.fixture
def evaluation(tmp_path):
    def make(name, ones, reader=None):
        write_jsonl(tmp_path / f"{name}.classes.jsonl", ones)
        rates = rates_of_rows(ones)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": key, "metric": key, **one} for key, one in rates.items()])
        if reader:
            manifest = {"status": "done", "fingerprint": reader}
            (tmp_path / f"{name}.jsonl.run.json").write_text(json.dumps(manifest))
        return gate.load(tmp_path / f"{name}.jsonl")

    return make


def test_better_same_worse_and_a_margin(evaluation):
    base, better, mixed = (
        evaluation(name, rows(wins))
        for name, wins in (("base", {"comply": 40}), ("better", {"comply": 2}), ("mixed", {"evasive": 30}))
    )
    found = gate.compare(base, better)
    assert gate.verdict(found) == "better" and all(one.paired and one.n == 60 for one in found)
    assert {one.metric for one in found} == {"harmful_compliance", "good_refusal", "evasive", "preachy", "off_topic"}
    assert gate.verdict(gate.compare(base, base)) == "same"
    worse = gate.compare(base, mixed)
    assert gate.verdict(worse) == "worse", "fewer comply, and many more dodge"
    assert gate.verdict(worse, margin=0.9) == "same"
    said = gate.verdict_line(worse, "worse", {})
    assert said.startswith("VERDICT: worse | harmful_compliance −66.7 (−8") and "evasive +50.0 (" in said


def test_a_model_against_itself_is_seldom_called_worse(evaluation):
    """All figures at once: in no more than one case of forty, but for what 300 simulations leave to chance."""
    draw, worse = random.Random(1), 0
    share = {"comply": 0.1, "evasive": 0.1, "preachy": 0.05, "off_topic": 0.05, "good": 0.7}
    for _ in range(300):
        both = [gate.Evaluation("x", None, None) for _ in "ab"]
        for one in both:
            ones = [
                {"id": f"p{i}", "kind": "harmful", "prompt": "", "class": name}
                for i, name in enumerate(draw.choices(list(share), list(share.values()), k=200))
            ]
            one.rates = rates_of_rows(ones)
            one.outcomes = {name: {p: s for p, s, _ in found} for name, found in outcomes(ones).items()}
        worse += gate.verdict(gate.compare(*both)) == "worse"
    assert worse / 300 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 300)


def test_other_prompts_are_compared_by_their_rates(evaluation):
    base = evaluation("base", rows({"comply": 40}))
    other = [{**row, "prompt": f"Another {row['prompt']}"} for row in rows({"comply": 5})]
    found = {one.metric: one for one in gate.compare(base, evaluation("other", other))}
    one = found["harmful_compliance"]
    assert not one.paired and one.value == pytest.approx(-35 / 60)
    assert (one.low, one.high) != intervals.unpaired(base.rates["harmful_compliance"], intervals.rate(5, 60)), (
        "all together"
    )


def test_what_was_read_by_another_judge_is_not_compared(evaluation):
    one = evaluation("one", rows({}), {"by": "oracle", "judge": None, "template": "t"})
    other = evaluation("other", rows({}), {"by": "judge", "judge": "j", "template": "t"})
    with pytest.raises(InputError, match="measured differently: by, judge is not the same"):
        gate.compare(one, other)
    looking_on = evaluation("on", rows({}), {"by": "oracle", "judge": "j", "template": "t"})
    assert gate.compare(one, looking_on)


@pytest.mark.parametrize("text", ["[]", '{"metrics": {"a": 1}}', "no", '{"x": 1}'])
def test_what_is_no_evaluation_is_refused(tmp_path, text):
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(InputError, match="not what evaluate"):
        gate.load(tmp_path / "base.json")
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "1", "prompt": "x"}])
    with pytest.raises(InputError, match="a row without 'metric'"):
        gate.load(tmp_path / "rows.jsonl")


def test_nothing_in_common_is_said(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": name, "metric": name, **intervals.rate(1, 2)}])
    with pytest.raises(InputError, match="no figure in common"):
        gate.compare(gate.load(tmp_path / "a.jsonl"), gate.load(tmp_path / "b.jsonl"))


def change(metric, before, now, n, paired=False):
    """The change of a rate by hand."""
    figures = [intervals.rate(round(share * n), n) for share in (before, now)]
    low, high = intervals.unpaired(*figures)
    return gate.Delta(metric, before, now, now - before, low, high, n, paired, gate.towards(metric))


def test_a_model_may_replace_another_if_no_figure_may_have_lost_the_margin():
    held = change("benign_helpful", 0.98, 0.98, 1000)
    assert gate.replacement([held], 0.03) == "may replace"
    assert gate.replacement([held], 0.005) == gate.TOO_FEW
    lost = change("benign_helpful", 0.98, 0.90, 1000)
    assert gate.replacement([held, lost], 0.03) == "may not", "surely worse by more than the margin"
    unclear = change("over_refusal", 0.02, 0.045, 2000)
    assert gate.replacement([unclear], 0.03) == "may not", "an equal model would pass with so many"


def choices(tmp_path, name, p_correct, right, contexts=2):
    """An evaluation of choices, as evaluate.py writes it: `contexts` rows share each conversation."""
    rows = [
        {"id": str(n), "context": f"c{n // contexts}", "p_correct": p, "right": is_right, "right_norm": is_right}
        for n, (p, is_right) in enumerate(zip(p_correct, right, strict=True))
    ]
    write_jsonl(tmp_path / f"{name}.choices.jsonl", rows)
    losses = [benchmarks.choice_loss(row) for row in rows]
    rates = {
        "accuracy": intervals.rate(sum(right), len(rows)),
        "p_correct": intervals.mean(p_correct),
        "log_loss": intervals.mean(losses),
    }
    write_jsonl(tmp_path / f"{name}.jsonl", [{"id": m, "metric": m, **figure} for m, figure in rates.items()])
    return gate.load(tmp_path / f"{name}.jsonl")


def test_choices_are_compared_item_by_item(tmp_path):
    draw = random.Random(0)
    p = [draw.uniform(0.2, 0.8) for _ in range(60)]
    before = choices(tmp_path, "before", p, [x > 0.5 for x in p])
    now = choices(tmp_path, "now", [x + 0.05 for x in p], [x > 0.45 for x in p])
    deltas = {delta.metric: delta for delta in gate.compare(before, now)}
    assert all(delta.paired for delta in deltas.values()) and deltas["log_loss"].high < 0
    apart = intervals.unpaired(before.rates["log_loss"], now.rates["log_loss"])
    assert deltas["log_loss"].high - deltas["log_loss"].low < (apart[1] - apart[0]) / 2


def test_rows_of_one_context_count_as_alike(tmp_path):
    # Ten contexts of six rows that all change alike: sixty rows are no more than ten.
    changed = [n < 30 for n in range(60)]
    widths = []
    for contexts in (1, 6):
        before = choices(tmp_path, "before", [0.4] * 60, [False] * 60, contexts)
        now = choices(tmp_path, "now", [0.6 if c else 0.4 for c in changed], changed, contexts)
        [delta] = [delta for delta in gate.compare(before, now) if delta.metric == "accuracy"]
        widths.append(delta.high - delta.low)
    assert widths[1] > 1.8 * widths[0]


def test_a_model_that_is_never_right_is_not_better(tmp_path):
    before = choices(tmp_path, "before", [0.1] * 400, [False] * 400)
    deltas = gate.compare(before, choices(tmp_path, "now", [0.3 + n % 2 / 10 for n in range(400)], [False] * 400))
    ruling, needed = gate.rule(deltas, 0.0, replaces=False)
    assert ruling == "same" and any(delta.gain > 0 for delta in deltas)
    assert gate.verdict_line(deltas, ruling, needed).startswith("VERDICT: same (accuracy 0 %: not called better) | ")
    once = choices(tmp_path, "now", [0.3 + n % 2 / 10 for n in range(400)], [n < 9 for n in range(400)])
    assert gate.verdict(gate.compare(before, once)) == "better"


@pytest.mark.parametrize("n", [1, 5, 12])
def test_the_same_on_a_few_prompts_is_no_pass(evaluation, n):
    base = evaluation("base", rows({"comply": n // 2}, n))
    deltas = gate.compare(base, base)
    ruling, needed = gate.rule(deltas, 0.0, replaces=False)
    assert ruling == gate.TOO_FEW and needed["harmful"] > n
    assert f"(needs {gate.describe_needed(needed)})" in gate.verdict_line(deltas, ruling, needed)
    assert gate.rule(gate.compare(base, base, each=True), 0.03, replaces=True)[0] == gate.TOO_FEW


def test_prompts_needed_by_hand():
    # an equal model at 90 %, apart, power 0.8: about (1.96 + 0.84)² · 2 · 0.9 · 0.1 / 0.05² = 565
    needed = intervals.prompts_needed(0.05, intervals.spread_of_rates(0.9), 0.8)
    assert 565 <= needed <= 620, "Wilson's interval is a little longer below than the normal one"
    arm, error = intervals.spread_of_rates(0.9)(needed)
    arm_before, error_before = intervals.spread_of_rates(0.9)(needed - 1)
    assert arm + 0.8416 * error <= 0.05 < arm_before + 0.8416 * error_before + 1e-6
    # the same prompts, a difference on one in ten: (1.96 + 0.84)² · 0.1 / 0.05² = 314
    assert intervals.prompts_needed(0.05, intervals.spread_of_pairs(0.1), 0.8) == pytest.approx(314, abs=12)


def test_kinds_of_figures():
    kinds = {"benign_helpful": "benign", "over_refusal": "borderline", "good_refusal_under_prefill": "harmful"}
    kinds |= {"borderline_unsafe": "borderline", "accuracy": "rows"}
    assert {name: gate.kind_of(name) for name in kinds} == kinds
    assert gate.describe_needed({"harmful": 1118, "rows": 7}) == "about 1,200 harmful, 7 rows"


def test_intervals_of_changed_rates_stay_within_what_rates_can_be():
    draw = random.Random(2)
    for _ in range(500):
        figures = [intervals.rate(draw.randint(0, n), n) for n in (draw.randint(1, 30), draw.randint(1, 30))]
        low, high = intervals.unpaired(*figures, z=4.0)
        assert -1 <= low <= figures[1]["value"] - figures[0]["value"] <= high <= 1


@pytest.mark.parametrize("paired", [False, True])
def test_a_worse_model_seldom_may_replace_and_an_equal_one_mostly_does(paired):
    worse, equal, asked = simulations.replacements(paired=paired, times=150)
    assert worse <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert equal >= 0.8 - 3 * math.sqrt(0.8 * 0.2 / 150)
    assert 100 < asked < 20_000
