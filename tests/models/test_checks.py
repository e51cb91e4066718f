"""What doctor.py checks: the bounds of versions."""

import pytest

from cai.models.checks import is_within


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("2.13.0+cpu", ">=2.8,<2.14", True),
        ("2.14.0", ">=2.8,<2.14", False),
        ("2.8", ">=2.8,<2.14", True),
        ("2.10.1", ">=2.8,<2.14", True),
        ("5", ">=5.0,<6", True),
        ("5.0.0", ">=5,<6", True),
        ("6.0rc1", ">=5,<6", False),
        ("3.11.7", ">=3.11", True),
        ("3.9", ">=3.11", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_number(version, bounds, inside):
    assert is_within(version, bounds) == inside
