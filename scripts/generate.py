"""Generate responses to prompts: the first responses, or several samples for the judge to compare.

    python scripts/generate.py --input prompts.jsonl --model tiny --output responses.jsonl

With --in-context the model reads a constitution in its system message while it answers, and the rows keep the plain
prompt: what is trained on them learns to answer so without it (context distillation).

Leaves out any judgement of the answers, and few-shot prompting: the model is asked through its chat template.
"""

from collections import Counter

import click

from cai.base import cli
from cai.constitution.frames import Framing, frame_options, read_framing
from cai.data import dialogue, prefills, sources
from cai.data.preferences import without_responses
from cai.data.sources import Source
from cai.models.reasoning import has_reasoning_tag
from cai.steps import text
from cai.steps.flags import DUPLICATE, LEAKED_TAG
from cai.steps.in_context import check_room, read_in_context


class Samples:
    """The rows of a source, each in its frame and as many times as it is sampled, with ids `<prompt id>/<sample>`."""

    def __init__(self, source: sources.Source, samples: int, framing: Framing):
        self.source, self.samples, self.framing = source, samples, framing

    @property
    def ids(self) -> list[str]:
        return [f"{row_id}/{n}" for row_id in self.source.ids for n in range(self.samples)]

    def __iter__(self):
        for row in self.source:
            row = self.framing.apply(without_responses(row))
            for n in range(self.samples):
                yield {**row, "id": f"{row['id']}/{n}", "prompt_id": row["id"], "sample": n}


@click.command(cls=cli.Command)
@cli.options("input", "output", "model")
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Responses per prompt.")
@click.option("--system", metavar="TEXT", help="A system message in front of every prompt.")
@click.option(
    "--in-context",
    is_flag=True,
    help="Show the model a constitution in the system message while it answers; the rows keep the plain prompt.",
)
@click.option(
    "--constitution",
    metavar="NAME|FILE",
    help="With --in-context: a YAML file, or the name of one in constitutions/.  [default: harmlessness]",
)
@click.option(
    "--template", metavar="NAME|FILE", help="With --in-context: template of the system message.  [default: in_context]"
)
@frame_options
@text.options
def main(inputs, output, model, samples, system, in_context, constitution, template, frames, frame_share, settings):
    """Generate responses to prompts with a model.

    \b
    Example:
      python scripts/generate.py --input scripts/cai/tiny/prompts/train.jsonl \\
          --model tiny --limit 100 --output responses.jsonl
    """
    if not in_context:
        cli.refuse_options(["constitution", "template"], "without --in-context the model reads no constitution")
    source = Source(inputs, limit=settings.limit, reading=settings.reading, shard=settings.shard)
    framing = read_framing(frames, frame_share, settings.seed)
    rows = Samples(source, samples, framing)
    shown, system_text = None, system or ""
    if in_context:
        shown = read_in_context(constitution or "harmlessness", template or "in_context")
        system_text = "\n\n".join(filter(None, [shown.text, system]))
        check_room(shown, system_text, model, settings.sampling.max_new_tokens)

    def render(row):
        return dialogue.add_system(prefills.conversation_of(row), system_text)

    def answer(row, generation):
        flags = {"flags": [LEAKED_TAG]} if has_reasoning_tag(generation.text) else {}
        if own_flags(row):
            row = {name: value for name, value in row.items() if name != "flags"}  # they are of an earlier response
        context = {"in_context": shown.constitution.name} if shown else {}
        response = prefills.join_prefill(prefills.prefill_of(row), generation.text)
        return {**row, "response": response, "model": model, "finish": generation.finish, **context, **flags}

    text.run(
        text.Step(
            "generate", model, rows, rows.ids, render, answer, written=written_by_model, flag_duplicate=flag_duplicate
        ),
        settings,
        inputs=inputs,
        output=output,
        tally=lambda answered: {"prompts": source.count, **count_faults(answered, framing)},
        fingerprint={
            "input": source.digest,
            "samples": samples,
            "system": system,
            **framing.fingerprint,
            **(shown.fingerprint if shown else {}),
        },
        next_command=(
            ["judge", "--input", output, "--against", "WITHOUT", "--prefer-input", "--output", "PAIRS"]
            if shown
            else text.next_step("critique", output, model, "CRITIQUES")
        ),
    )


def written_by_model(row):
    """The response without its prefill."""
    return prefills.continuation_of(row, row["response"])


def count_faults(answered, framing):
    """Counts over the finished rows; `framed`, with --frames: the rows in a frame."""
    counts = Counter(unfinished=0, empty=0, **({"framed": 0} if framing.frames else {}))
    for row in answered:
        counts.update(unfinished=row["finish"] == "length", empty=not written_by_model(row))
        if framing.frames:
            counts["framed"] += row.get("frame") is not None
        if LEAKED_TAG in own_flags(row):
            counts[LEAKED_TAG] += 1
    return dict(counts)


def flag_duplicate(row):
    return {**row, "flags": [*own_flags(row), DUPLICATE]}


def own_flags(row):
    """The flags of the response; [] where `flags` is a column of another origin."""
    flags = row.get("flags")
    is_ours = isinstance(flags, list) and all(flag in (LEAKED_TAG, DUPLICATE) for flag in flags)
    return flags if is_ours else []


if __name__ == "__main__":
    main()
