"""plots.py: a picture comes out, whatever the figures."""

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


def test_what_is_drawn_are_the_figures(tmp_path):
    one, other = [0.9] * 10, [0.6] * 10
    outcomes = [True] * 9 + [False]
    drawing.reliability(tmp_path / "one.png", calibration.calibration(one, outcomes), "t")
    drawing.reliability(tmp_path / "same.png", calibration.calibration(one, outcomes), "t")
    drawing.reliability(tmp_path / "other.png", calibration.calibration(other, outcomes), "t")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()
