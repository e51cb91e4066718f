"""Preferences without a judge: each response of one file is preferred to those of another to the same prompt.

    prefer_input(Output("pairs.jsonl", command="judge", fingerprint=...), comparisons)

For responses that are better by the way they were made, such as those with the constitution in context against those
without it. Leaves out any check that they are better: evaluate.py measures both files.
"""

from collections import Counter

from cai.base.errors import InputError
from cai.data import outputs
from cai.data.dialogue import is_blank
from cai.data.preferences import is_tie
from cai.steps import judging
from cai.steps.pairs import Pairs


def is_contrast(comparison: dict) -> bool:
    """Whether a comparison teaches something: two texts that differ, of which the preferred one is not empty."""
    return not is_tie(comparison) and not is_blank(comparison["response_a"])


def count_pairs(comparisons: Pairs) -> dict[str, int]:
    """pairs; those that are left out: identical ones, those whose preferred response is empty, and rows whose revision
    is flagged; and unpaired rows.

    Raises InputError if no pair remains.
    """
    counts = Counter(pairs=0, identical=0, empty=0, flagged=comparisons.flagged)
    for comparison in comparisons:
        counts["pairs" if is_contrast(comparison) else "identical" if is_tie(comparison) else "empty"] += 1
    if not counts["pairs"]:
        raise InputError(
            f"no pair that teaches anything ({dict(counts)})",
            where=", ".join(comparisons.sources[0].inputs),
            expected="responses that differ from those of --against",
            remedy="Make the two files in different ways, such as with and without generate.py --in-context",
        )
    return {**counts, "unpaired": comparisons.unpaired}


def prefer_input(output: outputs.Output, comparisons: Pairs) -> None:
    """Write the comparisons as preferences for `response_a`, with p_chosen 1, no principle and no verdicts.

    Raises InputError, before anything is written, as `count_pairs`.
    """
    if output.complete:
        return
    counts = count_pairs(comparisons)
    with output:
        if output.complete:
            return
        for comparison in filter(is_contrast, comparisons):
            if comparison["id"] not in output.done:
                output.write(judging.preference(comparison, None, [], 1.0, (0.0, 1.0)))
        output.finish(comparisons.ids, counts)
