"""Have a model revise responses after their critique: the second half of a round.

    python scripts/revise.py --input critiques.jsonl --model tiny --output revisions.jsonl

Rules check the form of each revision (steps/flags.py) and flag what is wrong with it. Flagged revisions stay in the
file, and sft.py skips them. A row whose round was skipped is passed on as it is. With --gate a judge decides whether a
revision replaces the text before it. Leaves out the critique (critique.py), and a second try for flagged revisions.
"""

from collections import Counter
from functools import partial

import click

from cai.base import cli
from cai.base.errors import InputError, shorten
from cai.constitution import files, templates
from cai.data import prefills, rounds, sources
from cai.steps import content, gating, principles, text
from cai.steps.examples import Examples, default_most
from cai.steps.flags import DUPLICATE, REASONS, flags


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@click.option("--template", metavar="NAME|FILE", default="revise", show_default=True, help="The prompt template.")
@gating.gate_option
@cli.options("examples")
@content.stop_option
@text.options
def main(inputs, output, model, constitution, template, gate, most_examples, stops, settings):
    """Have a model revise responses after their critique.

    \b
    Example:
      python scripts/revise.py --input critiques.jsonl --model tiny \\
          --constitution harmlessness --output revisions.jsonl
    """
    most = default_most(most_examples, model)
    constitution = files.load_constitution(constitution)
    gate = gating.read_gate(gate, settings.endpoints, constitution, settings.seed) if gate else None
    reviser = Reviser(constitution, templates.load_template(template), most, gate)
    fields = ("prompt", "response", "rounds")
    source = sources.Source(
        inputs,
        require=fields,
        limit=settings.limit,
        check=reviser.check_row,
        reading=settings.reading,
        shard=settings.shard,
    )
    # A critique that finds no fault leads to a copy of the response; without copies SFT learns only to refuse.
    train = ["sft", "--input", output, "--model", reviser.responder, "--keep", "copy", "--output", "SFT"]
    again = text.next_step("critique", output, model, "CRITIQUES", *text.OF_A_ROUND, options=text.round_options(inputs))
    step = text.Step(
        "revise",
        model,
        source,
        source.ids,
        reviser.render,
        reviser.answer,
        check=lambda engine: reviser.check(engine, settings.sampling.max_new_tokens, source),
        settle=lambda row: row if rounds.is_skipped(row) else None,
        examples=reviser.examples,
        info={"round_options": cli.given_options("template", "gate")},
        written=written_by_model,
        flag_duplicate=flag_duplicate,
    )
    saved = partial(content.tally, model=model, render=reviser.render) if stops else lambda _: {}
    text.run(
        content.stop_when_content(step) if stops else step,
        settings,
        tally=lambda answered: {**tally(answered), **saved(answered)},
        inputs=inputs,
        output=output,
        fingerprint={
            "input": source.digest,
            "constitution": reviser.constitution.sha256,
            "template": reviser.template.sha256,
            **(content.fingerprint() if stops else {}),
            "examples": most,
        },
        gate=gate,
        next_command=again if reviser.rounds == 1 else train,
        alternative=train if reviser.rounds == 1 else None,
    )


class Reviser:
    """What a model is asked about a row that has a critique, and the row with its revision."""

    def __init__(self, constitution, template, most_examples=None, gate=None):
        self.constitution, self.template, self.gate = constitution, template, gate
        self.examples = Examples(constitution, template, "revision", most_examples)
        self.combined = principles.Chooser(constitution, files.ALL, seed=0)
        self.has_combined = False  # whether a critique was written under all principles
        self.rounds = 0  # the most that a row has
        self.responders = set()  # the models that wrote the responses; "" for an unknown one

    @property
    def responder(self):
        """The model to train: the one that wrote all responses, which may be another than revises them.

        "MODEL" where there are several, or none that can be trained.
        """
        name = min(self.responders) if len(self.responders) == 1 else ""
        return name if name.isprintable() and not name.startswith("openai:") and name else "MODEL"

    def check_row(self, row, where, line):
        rounds.check_rounds(row, where, line, critiqued=True)
        self.rounds = max(self.rounds, len(row["rounds"]))
        model = row.get("model")
        self.responders.add(model if isinstance(model, str) else "")
        if rounds.is_skipped(row):
            return
        name = row["rounds"][-1]["principle"]
        self.has_combined |= name == files.ALL
        if name != files.ALL and name not in self.constitution:
            raise InputError(
                f"no principle {shorten(name)!r} in the constitution {self.constitution.name}",
                where=where,
                line=line,
                expected="the constitution of the critique",
                remedy="Give the same --constitution again",
            )
        if self.gate:
            self.gate.check_row(row, where, line)

    def check(self, engine, new_tokens, rows):
        if self.has_combined:
            self.combined.check_context(engine, new_tokens, self.template, prompt="", response="", critique="")
        self.examples.fit(engine, new_tokens)
        self.examples.check(self.ask(row) for row in rows if not rounds.is_skipped(row))

    def ask(self, row):
        """(the principle of the row's round, the question about the row alone)."""
        last = row["rounds"][-1]
        is_combined = last["principle"] == files.ALL
        principle = self.combined.combined if is_combined else self.constitution[last["principle"]]
        response = rounds.text_of_round(row)
        question = self.template.render(
            principle=principle, prompt=row["prompt"], response=response, critique=last["critique"]
        )
        # A prefilled answer stays prefilled, so that its revision is a recovery.
        return principle, prefills.begin_answer(question, prefills.prefill_of(row))

    def render(self, row):
        return self.examples.add(*self.ask(row))

    def answer(self, row, generation):
        response = prefills.continuation_of(row, rounds.text_of_round(row))
        revision_flags = flags(response, generation.text, generation.finish)
        revision = prefills.join_prefill(prefills.prefill_of(row), generation.text)
        last = {**row["rounds"][-1], "revision": revision, "flags": revision_flags}
        return {**row, "rounds": [*row["rounds"][:-1], last]}


def written_by_model(row):
    """The revision without the row's prefill; None for a round without one."""
    revision = row["rounds"][-1].get("revision")
    return None if revision is None else prefills.continuation_of(row, revision)


def flag_duplicate(row):
    *earlier, last = row["rounds"]
    return {**row, "rounds": [*earlier, {**last, "flags": [*last["flags"], DUPLICATE]}]}


def tally(answered):
    """Counts over the finished rows."""
    flagged, reasons, skipped = 0, Counter({reason: 0 for reason in REASONS}), Counter()
    for row in answered:
        last = row["rounds"][-1]
        if rounds.is_skipped(row):
            skipped[last["skipped"]] += 1
            continue
        flagged += bool(last["flags"])
        reasons.update(last["flags"])
    return {"flagged": flagged, "flags": dict(reasons), **({"skipped": dict(skipped)} if skipped else {})}


if __name__ == "__main__":
    main()
