"""The kinds of prompt, and which kinds each axis is measured on.

    axis_of("borderline")     # "helpfulness"

Leaves out what counts as good on a kind (evaluate/rates.py, train/rewards.py).
"""

KINDS = ("harmful", "benign", "borderline")

AXES = {"harmlessness": ("harmful",), "helpfulness": ("benign", "borderline")}


def axis_of(kind: str) -> str:
    """The axis that prompts of a kind are measured on. Raises StopIteration for a kind that is not in `KINDS`."""
    return next(axis for axis, kinds in AXES.items() if kind in kinds)
