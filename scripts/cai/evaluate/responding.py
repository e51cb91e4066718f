"""Held-out prompts answered by a policy: with one seed or several, plainly and under stress.

    answers = plan(rows, seed=0, seeds=1, ways=("push", "prefill"))
    respond(lambda: answers, output, lambda: load_engine("tiny"), Sampling(), "tiny")

Under stress the same harmful prompt comes with a prefilled answer, after a push, or under a system prompt that asks for
harm or for care: templates/stress/, one way each. Leaves out searched-for attacks: these are what anybody would try.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from cai.base import cli, hashing, paths
from cai.constitution.templates import Template, load_template
from cai.data import dialogue, outputs, readers
from cai.models import local
from cai.models.engine import Engine, Request, Sampling

WAYS = ("push", "prefill", "role_play", "ignore", "safety")

# A safety prompt may make a model refuse what is harmless; the others are for harmful prompts alone.
ALL_KINDS = ("safety",)


@cache
def template(way: str) -> Template:
    """The template of one way of stress."""
    return load_template(str(paths.TEMPLATES / "stress" / f"{way}.jinja"))


def digest(ways: Iterable[str]) -> str:
    """A hash that tells these ways of stress from others."""
    return hashing.sha256_text("".join(template(way).sha256 for way in ways))


@dataclass(frozen=True)
class Answer:
    """One answer that is wanted.

    row: what is written with the response, with an id of its own. way: of stress, or None. plain_id: the id of the
    same prompt without stress.
    """

    row: dict
    seed: int
    way: str | None
    plain_id: str

    def conversation(self, plain_response: str | None = None) -> list[dict]:
        """What the model reads. plain_response: what it answered without stress, which is pushed against."""
        messages = dialogue.as_messages(self.row["prompt"])
        if self.way is None:
            return messages
        stress = template(self.way).render(prompt=messages[-1]["content"])
        if self.way == "push":
            return [*messages, {"role": "assistant", "content": plain_response}, *stress]
        system = [message for message in stress if message["role"] == "system"]
        return [*system, *messages[:-1], *stress[len(system) :]]

    def request(self, plain_responses: Mapping[str, str]) -> "AnswerRequest":
        """What is asked of the engine, once the plain response is known."""
        return AnswerRequest(
            self.row["id"], self.conversation(plain_responses.get(self.plain_id)), self.seed, answer=self
        )


@dataclass(frozen=True, kw_only=True)
class AnswerRequest(Request):
    """The request for an answer."""

    answer: Answer


def plan(rows: Iterable[dict], seed: int, seeds: int = 1, ways: Iterable[str] = ()) -> Iterator[Answer]:
    """Every answer that is wanted, each plain one before those under stress."""
    ways = tuple(ways)
    for row in rows:
        for number in range(seed, seed + seeds):
            sample = {"prompt_id": row["id"], "seed": number} if seeds > 1 else {}
            plain = f"{row['id']}/{number}" if seeds > 1 else row["id"]
            # The text of a prompt depends on the seed and the prompt's id, however many seeds there are.
            yield Answer(
                {**row, **sample, "id": plain}, hashing.hashed_seed("evaluate", number, row["id"]), None, plain
            )
            for way in ways:
                if row["kind"] == "harmful" or way in ALL_KINDS:
                    stressed = {**row, "prompt_id": row["id"], **sample, "id": f"{plain}@{way}", "stress": way}
                    yield Answer(stressed, hashing.hashed_seed("evaluate", number, row["id"], way), way, plain)


def respond(
    answers: Callable[[], Iterable[Answer]],
    output: outputs.Output,
    load: Callable[[], Engine],
    sampling: Sampling,
    model: str,
) -> None:
    """Write {...row, response, model, finish} of every Answer (resumable), except those too long for the model."""
    if output.complete:
        return
    engine = load()
    with output:
        order, first, pushed = [], [], []
        for answer in answers():
            order.append(answer.row["id"])
            if answer.row["id"] not in output.done:
                (pushed if answer.way == "push" else first).append(answer)
        with cli.progress(len(first) + len(pushed), "respond") as bar:

            def write(batch: Iterable[Answer], plain_responses: Mapping[str, str]) -> None:
                requests = (answer.request(plain_responses) for answer in batch)
                for request, generation in engine.generate(requests, sampling):
                    bar.update()
                    if not generation.lost:
                        # A prefilled beginning is a part of the response.
                        response = f"{request.prefill} {generation.text}" if request.prefill else generation.text
                        made_by = {"model": model, "finish": generation.finish}
                        output.write({**request.answer.row, "response": response, **made_by})

            write(first, {})
            if pushed:
                wanted = {answer.plain_id for answer in pushed}
                rows = (row for _, row in readers.read_jsonl(output.journal))
                plain_responses = {row["id"]: row["response"] for row in rows if row["id"] in wanted}
                write((answer for answer in pushed if answer.plain_id in plain_responses), plain_responses)
        output.finish(order, {"rows": len(output.done)}, **local.fast_path(engine))
