"""What `judge.py --serve` answers with: a reward model's score, or how probably a response is better than a reference.

    serve("8000", "tiny", settings, against="references.jsonl", constitution="harmlessness", ...)

A judge compares the response with a reference to the same prompt, in both orders under a principle, as judge.py does:
the reward is `p_a`. The reference is the request's label, or that of `--against`. Leaves out HTTP (service.py).
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import click

from cai.base import cli
from cai.base.errors import InputError
from cai.base.hashing import sha256_text
from cai.constitution import files
from cai.data.dialogue import as_messages
from cai.data.rounds import text_of_round
from cai.data.sources import Source
from cai.models import loading, scorer
from cai.models.engine import Engine
from cai.steps import judges, judging, service
from cai.steps.principles import Chooser

# The options of judge.py that have no effect with --serve.
UNUSED = {
    *("inputs", "output", "judge", "verdict_files", "verdict_fields", "combine", "audit_path", "prefer_input"),
    *("pairs_per_prompt", "limit", "overwrite", "dry_run", "shard", "like", "gpu", "price", "matches"),
}

# Those besides that have none with a reward model, which is asked nothing.
OF_A_JUDGE = {
    *("constitution", "principles", "template", "answer_template", "cot", "clamp", "against", "seed", "most_examples"),
    *("temperature", "top_p", "max_new_tokens", "batch_tokens", "endpoints"),
}

serve_option = click.option(
    "--serve",
    "address",
    metavar="[HOST:]PORT",
    help="Answer requests for rewards over HTTP, as OpenRLHF and verl send them, instead of judging a file. A reward "
    "model is scored; a judge compares each response with a reference: the request's label, or that of --against. "
    f"On loopback, unless a host is named and a key is in {service.KEY_NAME}.",
)


class ModelRewards:
    """A reward model's scores."""

    def __init__(self, model: scorer.Scorer):
        self.model = model

    def __call__(self, texts: Sequence[service.Text]) -> list[float | service.RequestError]:
        too_long = service.RequestError(422, "prompt and response exceed the context of the reward model")
        scores = self.model([text.prompt for text in texts], [text.response for text in texts])
        return [too_long if score is None else score for score in scores]


class JudgeRewards:
    """How probably a judge finds each response better than its reference, 0 to 1.

    references: {`prompt_key`: a response}.
    """

    def __init__(
        self,
        engine: Engine,
        question: judging.Question,
        limits: tuple[float, float] = (0.0, 1.0),
        references: Mapping[str, str] | None = None,
    ):
        self.engine, self.question, self.limits, self.references = engine, question, limits, references or {}

    def __call__(self, texts: Sequence[service.Text]) -> list[float | service.RequestError]:
        lost = service.RequestError(500, "the judge gave no answer")
        rewards: list[float | service.RequestError] = [lost] * len(texts)  # what stays so is no reward
        comparisons: dict[str, dict[str, Any]] = {}
        numbers: dict[str, list[int]] = defaultdict(list)  # of the texts of each comparison
        for number, text in enumerate(texts):
            reference = text.reference or self.references.get(prompt_key(text.prompt))
            if reference is None:
                rewards[number] = service.RequestError(
                    400, "nothing to compare it with: give a reference as its label, or start with --against FILE"
                )
            elif reference.strip() == text.response:
                rewards[number] = 0.5  # a tie, as in judge.py
            else:
                sides = {"response_a": text.response, "response_b": reference}
                prompt = text.prompt[0]["content"] if len(text.prompt) == 1 else text.prompt
                digest = sha256_text(json.dumps([text.key, text.prompt, *sides.values()]))
                comparisons[digest] = {"id": digest, "key": text.key or digest, "prompt": prompt, **sides}
                numbers[digest].append(number)
        for comparison, verdicts in judging.judge(self.engine, comparisons.values(), self.question):
            for number in numbers[comparison["id"]]:
                rewards[number] = self._read(verdicts)
        return rewards

    def _read(self, verdicts: list[dict] | None) -> float | service.RequestError:
        if verdicts is None:
            return service.RequestError(422, "it does not fit the judge's context, or its server would not answer")
        p_a = judging.soft_label(verdicts, self.question.weights)
        if p_a is None or math.isnan(p_a):
            return service.RequestError(422, "the judge gave no readable verdict")
        return judging.clamp(p_a, *self.limits)


def prompt_key(prompt: Sequence[Mapping[str, Any]]) -> str:
    """What names a prompt among the references: its turns without the system message, which a chat template may add."""
    turns = [[message["role"], message["content"].strip()] for message in prompt if message["role"] != "system"]
    return sha256_text(json.dumps(turns))


def read_references(path: str | None, reading: Any) -> dict[str, str]:
    """{`prompt_key`: response} of the rows of a file; a revised row counts with its last revision.

    Raises InputError for two different responses to one prompt.
    """
    references: dict[str, str] = {}
    source = Source([path], require=("prompt", "response"), reading=reading) if path else ()
    for row in source:
        response, key = text_of_round(row), prompt_key(as_messages(row["prompt"]))
        if references.setdefault(key, response) != response:
            raise InputError(
                f"row {row['id']!r} is another response to a prompt that has one",
                where=path,
                expected="one reference per prompt",
                remedy="Keep one of them",
            )
    return references


def answer_requests(
    address: str | None, output: str | None, model: str | None, settings: Any, options: Mapping[str, Any]
) -> bool:
    """`serve` with --serve. Returns whether it was given; without it there has to be an output."""
    if address:
        serve(address, model, settings, options)
    elif not output:
        raise click.UsageError("Missing option '--output'.")
    return bool(address)


def serve(address: str, model: str | None, settings: Any, options: Mapping[str, Any]) -> None:
    """judge.py --serve: load the model, answer requests until Ctrl-C or SIGTERM, and print the counts."""
    if model is None:
        raise click.UsageError("--serve needs --model, the judge or the reward model.")
    cli.refuse_options(UNUSED, "--serve judges no file")
    name, servers = loading.split_endpoint(model, settings.endpoints)
    if not name.startswith("openai:") and loading.is_classifier(name):
        cli.refuse_options(OF_A_JUDGE, f"{model} is a reward model")
        size, device, dtype = (settings.loading[option] for option in ("batch_size", "device", "dtype"))
        ask: service.Ask = ModelRewards(scorer.load_scorer(name, batch_size=size or 32, device=device, dtype=dtype))
    else:
        judges.read_judges([model], settings.endpoints)
        if options["principles"] == "match":
            raise InputError("--principles match with --serve", expected="draw, all or each")
        rules = files.load_constitution(options["constitution"])
        chooser = Chooser(rules, options["principles"], settings.seed, None)
        names = ("template", "answer_template", "most_examples", "cot")
        question = judges.make_question(chooser, settings, **{each: options[each] for each in names}, key="key")
        limits = judges.read_limits(options["clamp"], judges.COT_LIMITS if options["cot"] else (0.0, 1.0))
        references = read_references(options["against"], settings.reading)
        engine = loading.load_engine(name, endpoints=servers, **settings.loading)
        ask = JudgeRewards(engine, question, limits, references)
    server = service.RewardServer(address, ask, key=os.environ.get(service.KEY_NAME) or None, name=model)
    with server:
        cli.note(f"{model} answers at {server.url}/get_reward; Ctrl-C ends it")
        try:
            server.work()
        except KeyboardInterrupt:
            cli.note("the service has ended")
    cli.finish({"command": "judge", "serve": server.url, **server.counts}, as_json=settings.as_json)
