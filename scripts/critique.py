"""Have a model criticise responses by a principle of the constitution: the first half of a round.

    python scripts/critique.py --input responses.jsonl --model tiny --output critiques.jsonl

Each row draws a principle (paper, section 3.1), or takes the one that best matches its prompt, or all at once. Run it
on revised rows for another round. Leaves out the revision (revise.py) and any check of the critique's text.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import filterfalse

import click

from cai.base import cli
from cai.constitution import files, templates
from cai.data import rounds, sources
from cai.evaluate import qualification
from cai.models.reasoning import has_reasoning_tag
from cai.steps import content, text
from cai.steps import principles as choosing
from cai.steps.examples import Examples, default_most


@click.command(cls=cli.Command)
@cli.options("input", "output", "model", "constitution")
@choosing.principles_option("draw", "match", "all")
@choosing.matches_option
@click.option(
    "--unmatched",
    type=click.Choice(["draw", "keep"]),
    default="draw",
    show_default=True,
    help="With --principles match, where no unused principle speaks to the prompt: draw one, or keep the response as "
    "it is. Such rows are counted.",
)
@click.option("--template", metavar="NAME|FILE", help="The prompt template.  [default: critique]")
@click.option(
    "--cot", is_flag=True, help="Think step by step first: the template critique_cot (all: critique_all_cot)."
)
@cli.options("examples")
@content.stop_option
@text.options
def main(
    inputs, output, model, constitution, principles, matches, unmatched, template, cot, most_examples, stops, settings
):
    """Have a model criticise responses by a principle of the constitution.

    \b
    Example:
      python scripts/critique.py --input responses.jsonl --model tiny \\
          --constitution harmlessness --output critiques.jsonl
    """
    if cot and template:
        raise click.UsageError("--cot is the template critique_cot: give --cot or --template, not both.")
    if unmatched == "keep" and principles != "match":
        raise click.UsageError("--unmatched keep needs --principles match.")
    names_violated = cot and principles == "all"
    if names_violated and most_examples:
        raise click.UsageError("--examples with --principles all --cot: no example names what is violated.")
    cot_template = "critique_all_cot" if names_violated else "critique_cot"
    template = templates.load_template(template or (cot_template if cot else "critique"))
    constitution = files.load_constitution(constitution)
    source = sources.Source(
        inputs,
        require=("prompt", "response"),
        limit=settings.limit,
        reading=settings.reading,
        shard=settings.shard,
        check=lambda row, where, line: rounds.check_rounds(row, where, line, critiqued=False),
    )
    kept = choosing.read_matches(principles, matches, model, constitution, output, source.inputs, settings)
    chooser = choosing.Chooser(constitution, principles, settings.seed, kept)
    most = 0 if names_violated else default_most(most_examples, model)
    examples = Examples(constitution, template, "critique", most)
    critic = Critic(chooser, template, examples, unmatched, names_violated, stops)
    shared_matches = ["--matches", kept.path] if kept else []
    options = text.round_options(inputs)
    text.run(
        text.Step(
            "critique",
            model,
            source,
            source.ids,
            critic.render,
            critic.answer,
            check=lambda engine: critic.check(engine, settings.sampling.max_new_tokens, source),
            prepare=lambda team, engine: critic.prepare(team, engine, source, settings),
            settle=critic.settle,
            plan=lambda: chooser.plan(source),
            examples=examples,
            written=lambda row: None if rounds.is_skipped(row) else row["rounds"][-1]["critique"],
            info={"round_options": [*cli.given_options("principles", "unmatched", "template", "cot"), *shared_matches]},
        ),
        settings,
        tally=lambda answered: critic.tally(answered, model),
        inputs=inputs,
        output=output,
        fingerprint={"input": source.digest, **critic.fingerprint, "examples": most},
        next_command=text.next_step("revise", output, model, "REVISIONS", *text.OF_A_ROUND, options=options),
    )


@dataclass
class Critic:
    """What a model is asked about a row, and the round that its critique begins.

    unmatched: "keep" skips the round where no principle speaks to the prompt.
    names_violated: the critique's last line names the principles that are violated.
    stops: rows whose last critique found no fault are passed on as they are.
    """

    chooser: choosing.Chooser
    template: templates.Template
    examples: Examples
    unmatched: str = "draw"
    names_violated: bool = False
    stops: bool = False

    @property
    def fingerprint(self):
        """What the rounds depend on, beside the input and the examples."""
        return {
            "template": self.template.sha256,
            **self.chooser.fingerprint,
            **({"unmatched": self.unmatched} if self.chooser.matches else {}),
            **({"stop_when_content": True} if self.stops else {}),
        }

    def check(self, engine, new_tokens, rows):
        self.chooser.check_context(engine, new_tokens, self.template, prompt="", response="")
        self.examples.fit(engine, new_tokens)
        self.examples.check(map(self.ask, rows))

    def prepare(self, team, engine, rows, settings):
        """In one process, measure whether the model is fit as a critic; in all, ask what speaks to the prompts."""
        if team.first:
            task = qualification.critic_task(self.template, settings.sampling.max_new_tokens)
            how = {"endpoints": settings.endpoints, "dtype": settings.loading["dtype"]}
            qualification.report(engine.name, task, lambda: engine, **how)
        self.chooser.prepare(team, lambda: engine, rows)

    def settle(self, row):
        if self.stops and rounds.is_content(row):
            return row
        if self.unmatched == "keep" and self.chooser.is_unmatched(row):
            return begin_round(row, {"principle": None, "critique": "", "skipped": "unmatched"})
        return None

    def ask(self, row):
        """(the principle of the row's round, the question about the row alone)."""
        principle, response = self.chooser.choose(row), rounds.text_of_round(row)
        return principle, self.template.render(principle=principle, prompt=row["prompt"], response=response)

    def render(self, row):
        return self.examples.add(*self.ask(row))

    def answer(self, row, generation):
        principle = self.chooser.choose(row)
        new_round = {"principle": principle.id, "critique": generation.text, **self.chooser.describe(row)}
        if self.names_violated:
            new_round["violated"] = choosing.read_violated(generation.text, self.chooser.constitution)
        return begin_round(row, new_round)

    def tally(self, answered, model):
        """Counts over the finished rows; those that were passed on are in `content` alone."""
        counts = Counter(empty=0, **({"unmatched": 0} if self.chooser.matches else {}))
        violated = dict.fromkeys((principle.id for principle in self.chooser.constitution.principles), 0)
        for row in filterfalse(rounds.is_content, answered):
            last = row["rounds"][-1]
            counts["empty"] += "skipped" not in last and not last["critique"]
            if self.chooser.matches and last.get("speaks") is None:
                counts["unmatched"] += 1
            if self.names_violated and last["violated"] is None:
                counts["violations_unread"] += 1
            for name in (self.names_violated and last["violated"]) or ():
                violated[name] += 1
            if has_reasoning_tag(last["critique"]):
                counts["leaked_tag"] += 1
        saved = content.tally_passed_on(answered, model, self.render) if self.stops else {}
        return {**counts, **({"violated": violated} if self.names_violated else {}), **saved}


def begin_round(row, new_round):
    return {**row, "rounds": [*(row.get("rounds") or ()), new_round]}


if __name__ == "__main__":
    main()
