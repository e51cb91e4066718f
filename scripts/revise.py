"""Have a model revise responses after their critique: the second half of a round.

    python scripts/revise.py --input critiques.jsonl --model tiny --output revisions.jsonl

Each revision is looked at by rules (scripts/cai/revision.py) and flagged where its form is wrong: flagged
ones stay in the file, and sft.py leaves them out. Leaves out the critique (critique.py), and trying again
what was flagged.
"""

from collections import Counter

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.constitution.files import load_constitution
from cai.constitution.templates import load_template
from cai.data.rounds import check_rounds, text_of_round
from cai.data.sources import Source
from cai.steps import text
from cai.steps.flags import REASONS, flags


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--template", metavar="NAME|FILE", default="revise", show_default=True, help="The prompt template.")
@text.options
def main(inputs, output, model, constitution, template, **options):
    """Have a model revise responses after their critique.

    \b
    Example:
      python scripts/revise.py --input critiques.jsonl --model tiny \\
          --constitution harmlessness --output revisions.jsonl
    """
    template, constitution = load_template(template), load_constitution(constitution)

    def check(row, where, line):
        check_rounds(row, where, line, critiqued=True)
        if (name := row["rounds"][-1]["principle"]) not in constitution:
            raise InputError(
                f"no principle {shorten(name)!r} in the constitution {constitution.name}",
                where=where,
                line=line,
                expected="the constitution of the critique",
                remedy="Give the same --constitution again",
            )

    source = Source(inputs, require=("prompt", "response", "rounds"), limit=options["limit"], check=check)

    def render(row):
        last = row["rounds"][-1]
        return template.render(
            principle=constitution[last["principle"]],
            prompt=row["prompt"],
            response=text_of_round(row),
            critique=last["critique"],
        )

    def answer(row, made):
        found = flags(text_of_round(row), made.text, made.finish)
        last = {**row["rounds"][-1], "revision": made.text, "flags": found}
        return {**row, "rounds": [*row["rounds"][:-1], last]}

    def tally(done):
        flagged, reasons = 0, Counter({reason: 0 for reason in REASONS})
        for row in done:
            found = row["rounds"][-1]["flags"]
            flagged += bool(found)
            reasons.update(found)
        return {"flagged": flagged, "flags": dict(reasons)}

    text.run(
        "revise",
        source,
        source.ids,
        render,
        answer,
        tally=tally,
        inputs=inputs,
        output=output,
        model=model,
        fingerprint={"input": source.digest, "constitution": constitution.sha256, "template": template.sha256},
        # A critique without fault leads to a copy of the response; without those SFT learns only to refuse.
        next_command=["sft", "--input", output, "--model", model, "--keep", "copy", "--output", "SFT"],
        **options,
    )


if __name__ == "__main__":
    main()
