"""drawing.py: a picture comes out, whatever the figures."""

import math
import struct

import pytest

from cai.stats import calibration, drawing


@pytest.mark.parametrize(
    ("probabilities", "outcomes"),
    [([0.1, 0.4, 0.95, 0.96, 1.0], [False, True, True, True, False]), ([0.5], [1.0]), ([], [])],
)
def test_a_reliability_diagram_is_a_png_of_some_size(tmp_path, probabilities, outcomes):
    path = tmp_path / "new" / "reliability.png"
    drawing.reliability(path, calibration.calibration(probabilities, outcomes), "a $title$ with <b>signs</b> & _more_^")
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n") and struct.unpack(">II", picture[16:24]) == (675, 825)


def test_the_pareto_front():
    assert drawing.pareto([(90, 10), (80, 90), (70, 80), (80, 90), (95, 5)]) == [0, 1, 3, 4]


def test_curves_of_updates_with_alarms_and_a_judge(tmp_path):
    rows = [{"update": i, "score": i / 9, "kl": math.nan, "judge": 0.5, "alarms": ["kl"] * (i == 4)} for i in range(9)]
    drawing.curves(tmp_path / "new" / "curves.png", rows, "a $title$ with _signs_^")
    drawing.curves(tmp_path / "plain.png", [{"update": 1, "score": 2.0}], "t")
    drawing.curves(tmp_path / "none.png", [{"update": 1, "loss": "?"}, {"step": 3}], "t")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "plain.png").exists() and not (tmp_path / "none.png").exists()
    panels = drawing.panels("x", "x", rows, {"score": "score", "kl": "KL"}, along="update", alarms=[4])
    assert panels.says == "score from 0 to 0.889, over 9 logged rows. 1 alarms, at the dashed lines."
    assert 'id="x-' in panels.inline and 'fill: #ffffff"' not in panels.inline and "<svg aria-hidden" in panels.inline


def test_what_is_drawn_are_the_figures(tmp_path):
    one, other = [0.9] * 10, [0.6] * 10
    outcomes = [True] * 9 + [False]
    drawing.reliability(tmp_path / "one.png", calibration.calibration(one, outcomes), "t")
    drawing.reliability(tmp_path / "same.png", calibration.calibration(one, outcomes), "t")
    drawing.reliability(tmp_path / "other.png", calibration.calibration(other, outcomes), "t")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()
