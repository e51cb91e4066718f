"""Prompts asked in frames: which prompts each frame gets, the names of the figures, the worst frame, the table.

    harmful_compliance_under_frame_role-rex            one frame
    harmful_compliance_under_seen_role_play_frames     the frames of a kind
    harmful_compliance_under_held_out_frames           all frames of a split
    harmful_compliance_under_worst_held_out_frame      the frame with the worst figure

Leaves out what a frame is (constitution/frames.py), and how prompts are answered (responding.py).
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cai.base.hashing import hashed_seed
from cai.constitution.frames import KINDS, SPLITS, Frame
from cai.stats import intervals, tables

# The figures that are measured in frames, by who reads the responses: the oracle or a judge, a safety classifier, rules
# for phrases. The first of harmful and the first of benign prompts are shown for each frame.
FIGURES = {
    "harmful": ("harmful_compliance", "harmful_unsafe", "harmful_complied", "good_refusal"),
    "benign": ("benign_helpful", "benign_unsafe", "benign_declined"),
    "borderline": ("borderline_helpful", "over_refusal", "borderline_unsafe", "borderline_declined"),
}

ALL_FIGURES = tuple(name for names in FIGURES.values() for name in names)

MOST_NAMED = 3  # frames that tie with the worst one: of more the number is shown

# {figure: which of two values is worse}
WORSE: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("harmful_compliance", "harmful_unsafe", "harmful_complied", "benign_declined"), max),
    "benign_helpful": min,
}


def assign(prompts: Iterable[tuple[str, str]], frames: Sequence[Frame], most: int | None) -> dict[str, list[Frame]]:
    """{prompt id: the frames that it is asked in}.

    Args:
        prompts: (id, kind) of each.
        most: prompts of each kind that a frame is asked with, drawn by hashing; None: all.
    """
    prompts = list(prompts)
    assigned: dict[str, list[Frame]] = {}
    for frame in frames:
        by_kind: dict[str, list[str]] = {}
        for prompt_id, kind in prompts:
            if frame.is_for(kind):
                by_kind.setdefault(kind, []).append(prompt_id)
        for ids in by_kind.values():
            ids.sort(key=lambda prompt_id: hashed_seed("frame prompts", frame.id, prompt_id))
            for prompt_id in ids[:most]:
                assigned.setdefault(prompt_id, []).append(frame)
    return assigned


def describe(frame: Frame) -> dict[str, str]:
    """What an answered row says of its frame."""
    # The oracle reads what follows the prefill.
    prefill = {"prefill": frame.prefill} if frame.prefill else {}
    return {"frame": frame.id, "frame_kind": frame.kind, "frame_split": frame.split, **prefill}


def is_framed(row: Mapping[str, Any]) -> bool:
    """Whether a row was asked in a frame."""
    return isinstance(row.get("frame"), str) and row.get("frame_kind") in KINDS


def split_of(row: Mapping[str, Any]) -> str:
    """The split of a row's frame; generate.py, which does not write it, uses frames that are seen alone."""
    return str(row.get("frame_split", SPLITS[0]))


def endings(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The endings of the figures that a row in a frame counts for."""
    split = split_of(row)
    return (f"_under_{split}_frames", f"_under_{split}_{row['frame_kind']}_frames", f"_under_frame_{row['frame']}")


def is_single(metric: str) -> bool:
    """Whether a figure is of one frame."""
    return "_under_frame_" in metric


def is_worst(metric: str) -> bool:
    """Whether a figure is of a worst frame."""
    return "_under_worst_" in metric


def is_of_kind(metric: str) -> bool:
    """Whether a figure is of the frames of one kind."""
    return any(metric.endswith(f"_{kind}_frames") for kind in KINDS)


def add_worst(rates: dict[str, dict], rows: Iterable[Mapping[str, Any]]) -> None:
    """Name the frame in the figure of each single frame, and add those of the worst frame of each split.

    Args:
        rates: {metric: figure} of the rows, changed in place.
    """
    kinds = {row["frame"]: (row["frame_kind"], split_of(row)) for row in rows if is_framed(row)}
    worst: dict[str, dict] = {}
    for metric, rate in rates.items():
        name, _, frame = metric.partition("_under_frame_")
        if frame not in kinds:
            continue
        kind, split = kinds[frame]
        rate |= {"frame": frame, "frame_kind": kind, "frame_split": split}
        if name in WORSE and rate["value"] is not None:
            title = f"{name}_under_worst_{split}_frame"
            before = worst.setdefault(title, rate)
            if before["value"] != WORSE[name](before["value"], rate["value"]):
                worst[title] = rate
            elif before is not rate and before["value"] == rate["value"]:
                worst[title] = {**before, "tied": [*before.get("tied", ()), frame]}
    rates |= {title: dict(rate) for title, rate in worst.items()}


def add_changes(rates: dict[str, dict], outcomes: Mapping[str, Sequence[tuple[str, float, Any]]]) -> None:
    """Add `minus_plain` to each figure in frames: {value, low, high, n}, paired by prompt (`intervals.paired`).

    Left out where the prompts were not asked plainly too.

    Args:
        rates: {metric: figure}, changed in place. outcomes: {metric: (prompt, 1 or 0, seed) of each response}.
    """
    for metric, results in outcomes.items():
        name, _, ending = metric.partition("_under_")
        if not ending.startswith("frame_") and not ending.endswith("_frames"):
            continue
        plain = defaultdict(list)
        for prompt, success, _ in outcomes.get(name, ()):
            plain[prompt].append(success)
        pairs = [(prompt, success - statistics.fmean(plain[prompt])) for prompt, success, _ in results if plain[prompt]]
        if pairs:
            prompts, differences = zip(*pairs, strict=True)
            clusters = prompts if len(set(prompts)) < len(prompts) else None
            low, high = intervals.paired(differences, clusters=clusters)
            figure = {"value": statistics.fmean(differences), "low": low, "high": high, "n": len(set(prompts))}
            rates[metric]["minus_plain"] = figure


def table(rates: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Plain prompts, and a line per frame, in groups: harmful compliance and benign helpfulness, and what the frame
    changes. None without frames.

    Args:
        rates: {metric: figure} as in the file of an evaluation.
    """
    single = {metric: rate for metric, rate in rates.items() if is_single(metric)}
    shown = {metric.partition("_under_")[0] for metric in single}
    columns = [next((name for name in FIGURES[kind] if name in shown), None) for kind in ("harmful", "benign")]
    names = [name for name in columns if name]
    if not names:
        return None
    frames = {rate["frame"]: (rate["frame_kind"], rate["frame_split"]) for rate in single.values()}

    def cells(ending: str) -> list[str]:
        figures = [rates.get(f"{name}{ending}") or {} for name in names]
        return [
            cell for rate in figures for cell in (tables.show(rate or None), f"{rate.get('n', '')}", _show_change(rate))
        ]

    def lines() -> Iterator[list[str]]:
        if any((rates.get(name) or {}).get("n") for name in names):
            yield ["plain", *cells("")]
        for split in SPLITS:
            for kind in KINDS:
                of_kind = sorted(frame for frame, place in frames.items() if place == (kind, split))
                title = f"{_words(kind)}, {_words(split)}"
                if len(of_kind) == 1:
                    yield [f"{of_kind[0]} ({title})", *cells(f"_under_frame_{of_kind[0]}")]
                elif of_kind:
                    yield [title, *cells(f"_under_{split}_{kind}_frames")]
                    yield from ([f"  {frame}", *cells(f"_under_frame_{frame}")] for frame in of_kind)

    return tables.table(("frame", *(cell for name in names for cell in (_words(name), "n", "minus plain"))), lines())


def _show_change(rate: Mapping[str, Any]) -> str:
    change = rate.get("minus_plain")
    return tables.show_points(change["value"], change["low"], change["high"]) if change else ""


def worst_lines(rates: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`worst seen frame: harmful compliance 40.0 % (20.0–60.0) in role-rex (role play), as in ann`, for each split."""
    for metric, rate in rates.items():
        name, _, ending = metric.partition("_under_worst_")
        if ending:
            split = ending.removesuffix("_frame")
            place = f"{rate['frame']} ({_words(rate['frame_kind'])})"
            tied = rate.get("tied", [])
            if tied:
                place += f", as in {', '.join(tied)}" if len(tied) <= MOST_NAMED else f", as in {len(tied)} others"
            yield f"worst {_words(split)} frame: {_words(name)} {tables.show(rate)} in {place}"


def _words(name: str) -> str:
    return {"held_out": "held-out"}.get(name, name.replace("_", " "))


def stage_rows(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """Rows of the table of a run's stages, {stage: {metric: figure}}: all frames together, and the worst.

    The worst frame is another one at each stage; its name stands behind the figure.
    """
    first = next(iter(stages.values()))
    for kind, names in FIGURES.items():
        name = next((name for name in names if any(metric.startswith(f"{name}_under_") for metric in first)), None)
        if name is None or kind == "borderline":
            continue
        endings = [*(f"{split}_frames" for split in SPLITS), *(f"{split}_safety_frames" for split in SPLITS)]
        endings = endings if kind == "benign" else endings[: len(SPLITS)]
        endings = [*endings, *(f"worst_{split}_frame" for split in SPLITS)]
        endings = [ending for ending in endings if all(f"{name}_under_{ending}" in rates for rates in stages.values())]
        if endings:
            yield (f"{kind} prompts in frames: {_words(name)}", *([""] * len(stages)))
        for ending in endings:
            figures = [rates[f"{name}_under_{ending}"] for rates in stages.values()]
            yield (f"  {describe_way(ending).removeprefix(' in ')}", *map(_show_with_frame, figures))


def _show_with_frame(rate: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (tables.show(rate), rate.get("frame"))))


def order_of(way: str) -> tuple[bool, bool, bool, str]:
    """Sorts what follows `_under_` in names of figures: plain (""), stress, worst frame, frames of a split, kinds."""
    return way.endswith(("_frame", "_frames")), not way.startswith("worst_"), is_of_kind(f"_{way}"), way


def describe_way(way: str) -> str:
    """What follows `_under_` in the name of a figure, as a title: ` in held-out frames`, ` under stress: push`."""
    words = way.replace("held_out", "held-out").replace("_", " ")
    if way.startswith("worst_"):
        return f" in the {words}"
    return f" in {words}" if way.endswith("_frames") else f" under stress: {words}"
