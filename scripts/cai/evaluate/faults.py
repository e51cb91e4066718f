"""What each principle did in revised rows: how often drawn, how often its critique found fault, what it changed.

    rates, counts = figures(critiques(rows), class_of, kinds, constitution)

Whether a critique found fault is read by a judge's forced choice (templates/classify_critique.jinja), or not at all:
its prose is not searched for words. Leaves out which principle deserves the credit: a row has one per round, and what
the first has fixed the second can't. `constitution.py ablate` measures that.
"""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from cai.base.errors import InputError, shorten
from cai.constitution import files
from cai.data import outputs, rounds
from cai.evaluate.rates import UNSAFE
from cai.models.engine import Engine
from cai.stats import intervals, letters
from cai.steps import content


def check_constitution(constitution: files.Constitution, inputs: Sequence[str], rows: Iterable[dict]) -> None:
    """InputError unless the rows were criticised by this constitution.

    The manifest of an input tells; without one that does, the principles that the rows name.
    """
    manifests = {name: outputs.read_manifest(name) for name in inputs if os.path.isfile(name)}
    used = {name: manifest for name, manifest in manifests.items() if manifest and _digest(manifest)}
    for name, manifest in used.items():
        if _digest(manifest) != constitution.sha256:
            raise InputError(
                f"its rows were made with another constitution than {constitution.name}",
                where=name,
                expected=f"the constitution with the SHA-256 {_digest(manifest)[:12]}…",
                remedy=f"Give --constitution {shlex.quote(_constitution_of(manifest))}, as it was then",
            )
    if set(used) != set(inputs):
        names = {round_["principle"] for row in rows for round_ in row["rounds"]} - {None, files.ALL}
        unknown = sorted(name for name in names if name not in constitution)
        if unknown:
            raise InputError(
                f"no principle {shorten(unknown[0])!r} in the constitution {constitution.name}",
                where=", ".join(inputs),
                expected=f"the constitution of the critiques ({len(unknown)} of their {len(names)} principles are not "
                "in this one)",
                remedy="Give --constitution FILE, the one that critique.py was given",
            )


def _digest(manifest: Mapping) -> str | None:
    """The hash of the constitution in a manifest."""
    digest = manifest["fingerprint"].get("constitution")
    return digest if isinstance(digest, str) else None


def _constitution_of(manifest: Mapping) -> str:
    """What the command line in a manifest gave as the constitution."""
    try:
        words = shlex.split(str(manifest.get("command_line", "")))
    except ValueError:
        words = []
    return next((word for flag, word in pairwise(words) if flag == "--constitution"), "harmlessness")


def steps(rows: Iterable[dict]) -> Iterator[dict]:
    """One row per text, {..., id: `<row id>#<round>`, response}: what a reader of classes is given."""
    for row in rows:
        plain = {key: value for key, value in row.items() if key not in ("rounds", "prompt_id")}
        for number, text in enumerate(rounds.texts_of(row)):
            yield {**plain, "id": f"{row['id']}#{number}", "response": text}


def critiques(rows: Iterable[dict]) -> Iterator[dict]:
    """One row per critique: {id, prompt, response (what it is about), critique, principle, changed}.

    A round to which no principle speaks has none.
    """
    for row in rows:
        texts = rounds.texts_of(row)
        for number, (round_, (text, after)) in enumerate(zip(row.get("rounds") or (), pairwise(texts), strict=True), 1):
            if round_["principle"] is None:
                continue
            yield {
                "id": f"{row['id']}#{number}",
                "prompt": row["prompt"],
                "response": text,
                "critique": round_["critique"],
                "principle": round_["principle"],
                "changed": after.split() != text.split(),
            }


def find_faults(engine: Engine, rows: Iterable[dict], done: Container[str] = ()) -> Iterator[dict]:
    """Each critique with `fault`, True or False, `p_fault`, the mean over both orders of the options, and
    `letter_excess` (`letters.letter_excess`); None where the judge made no choice.

    Where it wrote its letters and the two orders disagree, `fault` is None and `p_fault` 0.5.

    Args:
        rows: of `critiques`. done: ids to leave out.
    """
    for row, chosen in content.find_faults(engine, rows, done):
        shares = chosen.shares
        yield {
            **row,
            "fault": chosen.decide(content.FAULT),
            "p_fault": None if shares is None else shares[0],
            "letter_excess": chosen.letter_excess,
        }


def figures(
    critiqued: Iterable[dict],
    class_of: Mapping[str, str],
    kinds: Mapping[str, str],
    constitution: files.Constitution | None,
) -> tuple[dict, dict]:
    """({`<figure> <principle>`: rate}, counts), principles most often drawn first.

    drawn (in the counts): how often; changed: rate of revisions that differ; fault: rate of critiques that found one;
    complied_before, complied_after: rate of harmful prompts complied with, before and after the rounds with it.
    letter_bias, orders_disagree (in the counts, where critiques were read): how far the judge chose by the letter, and
    critiques for which neither option is likelier.

    Args:
        critiqued: of `critiques` or `find_faults`.
        class_of: {`<row id>#<round>`: class}; kinds: {row id: kind of prompt}. Both may be empty.
        constitution: whose principles may have been drawn; those that never were are named in `never_drawn`.
    """
    drawn: Counter = Counter()
    outcomes: dict[tuple[str, str], list[bool]] = defaultdict(list)
    excesses, disagree = [], 0
    for row in critiqued:
        principle = row["principle"]
        drawn[principle] += 1
        if row.get("letter_excess"):
            excesses.append(row["letter_excess"])
            disagree += row["fault"] is None
        outcomes["changed", principle].append(row["changed"])
        if row.get("fault") is not None:
            outcomes["fault", principle].append(row["fault"])
        row_id, _, number = row["id"].rpartition("#")
        before, after = (class_of.get(f"{row_id}#{n}") for n in (int(number) - 1, int(number)))
        if kinds.get(row_id) == "harmful" and None not in (before, after):
            outcomes["complied_before", principle].append(before in UNSAFE)
            outcomes["complied_after", principle].append(after in UNSAFE)
    rates = {
        f"{figure} {principle}": intervals.rate(sum(outcomes[figure, principle]), len(outcomes[figure, principle]))
        for principle, _ in drawn.most_common()
        for figure in ("changed", "fault", "complied_before", "complied_after")
        if (figure, principle) in outcomes
    }
    counts = {"critiques": drawn.total(), "principles": len(drawn), "drawn": dict(drawn.most_common())}
    principles = constitution.principles if constitution and files.ALL not in drawn else ()
    never = [principle.id for principle in principles if principle.id not in drawn]
    biases = {"letter_bias": letters.letter_bias(excesses), "orders_disagree": disagree} if excesses else {}
    return rates, {**counts, "never_drawn": never, **biases}
