"""What the audit measures of labels: by hand, and of judges whose biases are known."""

import json
import math
import random

import pytest

from cai.base.errors import InputError
from cai.evaluate import audit
from cai.steps import judging


def row(number, p_ab, p_ba, a="aaaa", b="bbbb", **more):
    verdicts = [{"order": order, "p_a": p, "mass": 0.8} for order, p in (("ab", p_ab), ("ba", p_ba))]
    pair = {"id": f"r{number}", "prompt_id": f"p{number}", "prompt": "Q?", "response_a": a, "response_b": b, **more}
    return judging.preference(pair, "care", verdicts, judging.soft_label(verdicts), (0.0, 1.0))


def figures(rows, judges=("j",)):
    found = audit.measure(rows, judges)
    return found, {name: one["value"] for name, one in found.items() if isinstance(one, dict) and "value" in one}


def test_by_hand():
    rows = [
        row(0, 0.9, 0.7, a="long one", b="short", gold="a"),  # right, the longer one
        row(1, 0.9, 0.3, a="long one", b="short", gold="b"),  # wrong, in the same place twice
        row(2, 0.2, 0.0, a="long one", b="short", gold="b"),  # right
        row(3, 0.7, 0.3, a="long one", b="short", gold="a"),  # undecided, in the same place twice
        row(4, None, 0.4, a="long one", b=" "),  # can't be read
        judging.tie({"id": "r5", "prompt": "Q?", "response_a": "same", "response_b": "same"}),
    ]
    found, values = figures(rows)
    assert [found[name] for name in ("rows", "pairs", "identical", "empty")] == [6, 5, 1, 1]
    assert values["nulls"] == 0.2 and values["undecided"] == 0.25
    assert values["same_position"] == 0.5 and values["order_agreement"] == 0.5
    # Shown first: a in the order ab, b in the order ba.
    first = [0.9, 0.3, 0.9, 0.7, 0.2, 1.0, 0.7, 0.7, 0.6]
    assert values["first_shown"] == pytest.approx(sum(first) / 9) and found["first_shown"]["n"] == 9
    assert values["label_mass"] == pytest.approx(0.8) and values["low_mass"] == 0
    assert values["mean_margin"] == pytest.approx((0.6 + 0.2 + 0.8 + 0) / 4)
    assert values["win_rate"] == pytest.approx((0.8 + 0.6 + 0.1 + 0.5) / 4)
    assert values["accuracy"] == pytest.approx(2 / 3) and found["accuracy"]["n"] == 3
    assert values["always_a"] == values["longer"] == pytest.approx(1 / 3)
    assert values["longer_wins"] == pytest.approx(2 / 3)
    # Sure 0.8 and right, 0.6 and wrong, 0.9 and right, 0.5: in bins of a tenth each is alone.
    assert values["ece"] == pytest.approx((0.2 + 0.6 + 0.1 + 0) / 4, abs=1e-9)
    assert values["log_loss"] == pytest.approx(-sum(map(math.log, (0.8, 0.4, 0.9, 0.5))) / 4)
    care = {name: one["value"] for name, one in found["principles"]["care"].items()}
    assert care == {"win_rate": pytest.approx(0.5), "same_position": 0.5, "accuracy": pytest.approx(2 / 3)}
    for name, one in found.items():
        if isinstance(one, dict) and one.get("value") is not None:
            assert one["low"] <= one["value"] <= one["high"], name
    assert json.loads(json.dumps(found)) == found


def test_nothing_to_measure():
    found, values = figures([judging.tie({"id": "x", "prompt": "Q?", "response_a": "s", "response_b": "s"})])
    assert set(values.values()) == {None} and "accuracy" not in found and "calibration" not in found


def test_pairs_of_one_prompt_count_as_alike():
    alone = [row(n, *((0.9, 0.9) if n % 2 else (0.1, 0.1)), gold="a") for n in range(40)]
    together = [{**one, "prompt_id": f"p{n // 2 % 2 + 2 * (n % 2)}"} for n, one in enumerate(alone)]
    wide, narrow = (audit.measure(rows, ["j"])["accuracy"] for rows in (together, alone))
    assert wide["value"] == narrow["value"] == 0.5 and wide["clusters"] == 4
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_length():
    """A judge that sees length alone; and one that does not, of policies of which one is longer."""
    rng = random.Random(0)

    def judged(label):
        rows = []
        for n in range(400):
            difference = rng.randrange(-40, 60)
            p = min(max(label(difference), 0.01), 0.99)
            rows.append(row(n, p, p, a="x" * (50 + max(difference, 0)), b="x" * (50 + max(-difference, 0))))
        return audit.measure(rows, ["j"])

    by_length = judged(lambda d: 1 / (1 + math.exp(-d / 10)))
    assert by_length["length_correlation"]["low"] > 0.8
    assert by_length["win_rate"]["value"] > 0.58
    corrected = by_length["length_corrected_win_rate"]
    assert abs(corrected["value"] - 0.5) < 0.06 and corrected["value"] < by_length["win_rate"]["value"]
    blind = judged(lambda d: 0.7 + rng.uniform(-0.2, 0.2))
    assert abs(blind["length_correlation"]["value"]) < 0.2
    corrected = blind["length_corrected_win_rate"]
    assert corrected["low"] < 0.7 < corrected["high"] and corrected["high"] - corrected["low"] < 0.05


def test_length_corrected_equals_the_mean_where_lengths_are_alike():
    found = audit.length_corrected([0.6, 0.8, 0.7, 0.9] * 50, [0] * 200, range(200))
    assert found["value"] == pytest.approx(0.75, abs=1e-3) and found["n"] == 200
    assert audit.length_corrected([0.5], [1], [0])["value"] is None
    all_one_way = audit.length_corrected([1.0] * 50, list(range(50)), range(50))
    assert 0.9 < all_one_way["value"] < 1


def test_a_judge_that_prefers_its_own():
    rows = [
        row(n, p, p, gold="ab"[n % 2], model_a="j", model_b="other")
        for n, p in enumerate([0.9, 0.9, 0.8, 0.7, 0.9, 0.2, 0.5])
    ]
    rows.append(row(9, 0.9, 0.9, gold="a", model="j"))  # both its own
    found, values = figures(rows)
    assert values["self_preference"] == pytest.approx(5 / 6) and found["self_preference"]["n"] == 6
    # By gold it would win three of the six: those at 0, 2 and 4.
    assert values["self_preference_excess"] == pytest.approx((0 + 1 + 0 + 1 + 0 + 0) / 6)
    _, values = figures(rows, ["someone"])
    assert values["self_preference"] is None


def several(number, by_judge, **more):
    one = row(number, 0.5, 0.5, **more)
    verdicts = [{"judge": name, "order": order, "p_a": p} for name, p in by_judge.items() for order in ("ab", "ba")]
    known = [p for p in by_judge.values() if p is not None]
    p = sum(known) / len(known) if known else None
    return {**judging.preference(one, "care", verdicts, p, (0.0, 1.0)), "judges": by_judge}


def test_several_judges():
    rows = [
        several(n, {"x": 0.9, "y": 0.8, "z": 0.7 if n % 4 else 0.1}, gold="a", model_a="z", model_b="w")
        for n in range(20)
    ] + [several(20, {"x": None, "y": None, "z": None})]
    found, values = figures(rows, ["x", "y", "z"])
    assert values["agreement"] < 1 and found["agreement"]["n"] == 20
    assert values["nulls"] == pytest.approx(1 / 21)
    judges = found["judges"]
    assert judges["x"]["accuracy"]["value"] == 1 and judges["z"]["accuracy"]["value"] == 0.75
    assert judges["z"]["disagreement"]["value"] == 0.25 and judges["x"]["disagreement"]["value"] == 0
    assert judges["z"]["nulls"]["value"] == pytest.approx(1 / 21)
    assert judges["z"]["self_preference"]["value"] == 0.75 and judges["x"]["self_preference"]["n"] == 0
    # Without gold labels the other judges say what is too much: they all prefer z's.
    for one in rows:
        one.pop("gold", None)
    _, values = figures(rows, ["x", "y", "z"])
    assert values["self_preference_excess"] == pytest.approx(-0.25) and "accuracy" not in values
    assert values["label_mass"] is None  # no verdict has one


def test_several_principles():
    verdicts = [
        {"principle": name, "order": order, "p_a": p, "mass": 1.0}
        for name, p in (("care", 0.9), ("harm", 0.2))
        for order in ("ab", "ba")
    ]
    pair = {"id": "x", "prompt": "Q?", "response_a": "a", "response_b": "b", "gold": "a"}
    found, values = figures([judging.preference(pair, "all", verdicts, 0.55, (0.0, 1.0))])
    assert values["disagreement"] == 0.5 and values["accuracy"] == 1
    assert found["principles"]["harm"]["disagreement"]["value"] == 1
    assert found["principles"]["care"]["win_rate"]["value"] == pytest.approx(0.9)
    assert found["principles"]["harm"]["accuracy"]["value"] == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"p_a": 1.2}, r"row 1 \(r0\) has the label '1.2'"),
        ({"p_a": True}, "has the label 'True'"),
        ({"judges": {"j": -0.1}}, "has the label '-0.1'"),
        ({"p_a": "0.5"}, "has the label '0.5'"),
        ({"verdicts": [{"order": "ab", "p_a": 7, "mass": 1}]}, "has the label '7'"),
    ],
)
def test_labels_that_are_no_probabilities(broken, said):
    with pytest.raises(InputError, match=said):
        audit.measure([{**row(0, 0.9, 0.9), **broken}], ["j"])
    with pytest.raises(InputError, match="row 1 has no 'verdicts'"):
        audit.measure([{"prompt": "Q?", "response_a": "a", "response_b": "b", "p_a": 0.5}], ["j"])


def test_files(tmp_path):
    measured = audit.measure([row(n, 0.9, 0.7, gold="ab"[n % 2]) for n in range(20)], ["j"])
    path = tmp_path / "new" / "audit.json"
    written = audit.write(str(path), measured, "a judge of $5")
    assert json.loads(path.read_text()) == measured
    assert written == {"file": str(path), "reliability": str(path.with_suffix(".png"))}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    bare = audit.write(str(tmp_path / "bare.json"), audit.measure([row(0, 0.9, 0.9)], ["j"]), "j")
    assert "reliability" not in bare and not (tmp_path / "bare.png").exists()
    audit.check_path(None, [str(path)])
    audit.check_path(str(path), [str(tmp_path / "x.jsonl")])
    with pytest.raises(InputError, match=r"ends in \.json"):
        audit.check_path("audit.txt", [])
    with pytest.raises(InputError, match="would replace"):
        audit.check_path(str(path), [str(path)])
