"""Which principle a round is under: drawn, matched, or all; and the numbers that a critique under all names."""

import pytest

from cai.constitution.files import Constitution, Principle
from cai.data.outputs import Output
from cai.data.processes import Team
from cai.steps.matching import Matches, key_of
from cai.steps.principles import Chooser, read_violated


def constitution(*names) -> Constitution:
    return Constitution("rules", "", "", tuple(Principle(name, f"look {name}", f"fix {name}", "q") for name in names))


def known_matches(folder, rules, speaking) -> Matches:
    """The matches of a file that says {prompt: {principle: probability}}."""
    matches = Matches(str(folder / "m.jsonl"), "tiny", rules)
    fingerprint = matches._output.fingerprint
    with Output(folder / "m.jsonl", command="match", fingerprint=fingerprint) as output:
        for prompt, by in speaking.items():
            output.write({"id": key_of(prompt), "prompt": prompt, "by": by})
        output.finish(list(output.done), {})
    matches = Matches(str(folder / "m.jsonl"), "tiny", rules)
    matches.fill(Team(), pytest.fail, [{"prompt": prompt} for prompt in speaking])
    return matches


def row(prompt="p", *used):
    return {"id": "1", "prompt": prompt, "rounds": [{"principle": name} for name in used]}


def test_a_draw_passes_over_what_the_row_has_used():
    chooser = Chooser(constitution("a", "b", "c"), "draw", seed=0)
    used = []
    for _ in range(6):
        used.append(chooser.choose(row("p", *used)).id)
    assert sorted(used[:3]) == sorted(used[3:]) == ["a", "b", "c"]
    assert chooser.describe(row()) == {} and not chooser.is_unmatched(row())
    # A round without a principle counts as a round and uses none.
    assert chooser.choose(row("p", None, "a", "b")).id == "c"


def test_the_best_match_that_is_unused_is_taken_and_where_there_is_none_one_is_drawn(tmp_path):
    rules = constitution("a", "b", "c")
    speaking = {"p": {"b": 0.9, "c": 0.5, "a": 0.4}, "q": {"a": 0.49, "b": 0.1, "c": 0.0}}
    chooser = Chooser(rules, "match", 0, known_matches(tmp_path, rules, speaking))
    assert (chooser.choose(row()).id, chooser.describe(row())) == ("b", {"speaks": 0.9})
    assert (chooser.choose(row("p", "b")).id, chooser.describe(row("p", "b"))) == ("c", {"speaks": 0.5})
    third = row("p", "b", "c")
    assert (chooser.choose(third).id, chooser.describe(third)) == ("a", {"speaks": None})
    assert chooser.is_unmatched(third) and not chooser.is_unmatched(row("p", "b"))
    assert chooser.choose(row("q")) == Chooser(rules, "draw", 0).choose(row("q"))


def test_all_are_one_principle():
    chooser = Chooser(constitution("a", "b"), "all", seed=0)
    principle = chooser.choose(row("p", "all"))
    assert principle.id == "all" and "1. look a\n2. look b" in principle.critique and "2. fix b" in principle.revision
    assert chooser.fingerprint["principles"] == "all"


@pytest.mark.parametrize(
    ("critique", "violated"),
    [
        ("1 is kept.\n2 is not.\nViolated: 2", ["b"]),
        ("It lies.\n\n**Violated:** 3, 1 and 3.\n", ["c", "a"]),
        ("Nothing.\nviolated: None.", []),
        ("Violated: 2\nBut 3 as well.", None),  # not the last line
        ("Violated: 4", None),  # there are three
        ("Violated: 0", None),
        ("Violated: the second", None),
        ("Violated: 1, perhaps", None),
        ("Violated:", None),
        ("", None),
        ("1 to 3 are", None),
    ],
)
def test_the_numbers_in_the_last_line_are_read_strictly(critique, violated):
    assert read_violated(critique, constitution("a", "b", "c")) == violated
