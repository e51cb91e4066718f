"""Letter bias by numbers worked out on paper, and what its interval is worth."""

import random

import pytest

from cai.stats.letters import cyclic_orders, letter_bias, letter_excess, mean_shares


def test_each_option_stands_once_at_each_letter():
    orders = cyclic_orders(5, 5)
    assert orders[0] == (0, 1, 2, 3, 4) and orders[1] == (1, 2, 3, 4, 0)
    assert all(sorted(at_letter) == [0, 1, 2, 3, 4] for at_letter in zip(*orders, strict=True))
    assert cyclic_orders(2, 2) == [(0, 1), (1, 0)]
    # Fewer are spread evenly: neighbours would show most options near their old letter.
    assert [order[0] for order in cyclic_orders(5, 2)] == [0, 2] and cyclic_orders(5, 1) == [(0, 1, 2, 3, 4)]


def test_excess_by_hand():
    # A has 0.9 and then 0.8, of options that have 0.55 and 0.45 on average: 0.85 - 0.5.
    assert letter_excess([[0.9, 0.1], [0.2, 0.8]], [(0, 1), (1, 0)]) == pytest.approx([0.35, -0.35])
    assert mean_shares([[0.9, 0.1], [0.2, 0.8]]) == pytest.approx([0.55, 0.45])
    # Always the same option, wherever it stands: none.
    orders = cyclic_orders(5, 5)
    assert letter_excess([[0.0, 0.0, 1.0, 0.0, 0.0]] * 5, orders) == pytest.approx([0.0] * 5)
    # Always the first letter: all of it, less the fifth that it should have.
    first = [[float(option == order[0]) for option in range(5)] for order in orders]
    assert letter_excess(first, orders) == pytest.approx([0.8, -0.2, -0.2, -0.2, -0.2])
    # Two of the five orders show less: options 0 and 2 have a half each, of which A accounts for one in each order.
    two = cyclic_orders(5, 2)
    assert letter_excess([first[0], first[2]], two) == pytest.approx([0.5, 0.0, -0.25, -0.25, 0.0])


def test_bias_by_hand():
    assert letter_bias([]) == {"value": None, "low": None, "high": None, "n": 0}
    assert letter_bias([[0.35, -0.35]]) == {"value": 0.35, "low": None, "high": None, "n": 1}
    # 0.225 with a standard deviation of 0.1768 over two rows: 1.96 * 0.1768 / 1.4142 = 0.245.
    bias = letter_bias([[0.35, -0.35], [0.1, -0.1]])
    assert bias == {"value": pytest.approx(0.225), "low": 0.0, "high": pytest.approx(0.47, abs=1e-3), "n": 2}
    # Rows that lean to different letters cancel out in the mean.
    assert letter_bias([[0.3, -0.3], [-0.3, 0.3]])["value"] == 0
    # Three letters are divided in two in three ways: z is 2.394 instead of 1.960.
    rows = [[0.2, 0.1, -0.3], [0.4, 0.1, -0.5]]
    assert letter_bias(rows)["high"] - letter_bias(rows)["value"] == pytest.approx(2.394 * 0.1, abs=1e-4)
    always_first = letter_bias([[0.8, -0.2, -0.2, -0.2, -0.2]] * 150)
    assert always_first == {
        "value": pytest.approx(0.8),
        "low": pytest.approx(0.8),
        "high": pytest.approx(0.8),
        "n": 150,
    }


@pytest.mark.parametrize("letters", [2, 5])
def test_a_random_choice_has_no_bias(letters):
    """Its distance is never exactly 0, but the interval begins there in 95 % of draws (of 200, give or take 3)."""
    rng, orders, begins_at_0 = random.Random(0), cyclic_orders(letters, letters), 0
    for _ in range(200):
        rows = []
        for _ in range(40):
            choices = [rng.randrange(letters) for _ in orders]
            rows.append(letter_excess([[float(o == c) for o in range(letters)] for c in choices], orders))
        begins_at_0 += letter_bias(rows)["low"] == 0.0
    assert begins_at_0 >= 0.92 * 200
