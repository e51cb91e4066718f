"""Held-out prompts answered by a policy: with one seed or several, plainly and under stress.

    answers = plan(rows, seed=0, seeds=1, ways=("push", "prefill"), frames={})
    respond(answers, output, "tiny", options)

Under stress the same harmful prompt comes with a prefilled answer, after a push, or under a system prompt that asks for
harm or for care: templates/stress/, one way each. In frames a prompt of any kind is asked within conversations from a
file (framed.py). Leaves out searched-for attacks: these are what anybody would try.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType, SimpleNamespace

from cai.base import hashing, paths
from cai.constitution.frames import Frame
from cai.constitution.templates import Template, load_template
from cai.data import dialogue, outputs, prefills, readers, sources
from cai.data.preferences import without_responses
from cai.evaluate import framed
from cai.evaluate.measurement import fill
from cai.models import loading
from cai.models.engine import Engine, RowRequest, Sampling

WAYS = ("push", "prefill", "role_play", "ignore", "safety")

# A safety prompt may make a model refuse what is harmless; the others are for harmful prompts alone.
ALL_KINDS = ("safety",)


@cache
def template(way: str) -> Template:
    return load_template(str(paths.TEMPLATES / "stress" / f"{way}.jinja"))


def digest(ways: Iterable[str]) -> str:
    """A hash that tells these ways of stress from others."""
    return hashing.sha256_text("".join(template(way).sha256 for way in ways))


@dataclass(frozen=True)
class Answer:
    """One answer that is wanted.

    row: what is written with the response, with an id of its own. way: of stress, or None. plain_id: the id of the
    same prompt without stress. frame: that it is asked in, or None.
    """

    row: dict
    seed: int
    way: str | None
    plain_id: str
    frame: Frame | None = None

    def conversation(self, plain_response: str | None = None) -> list[dict]:
        """What the model reads. plain_response: what it answered without stress, which is pushed against."""
        messages = dialogue.as_messages(self.row["prompt"])
        if self.frame is not None:
            return prefills.begin_answer(self.frame.surround(messages), self.frame.prefill)
        if self.way is None:
            return messages
        stress = template(self.way).render(prompt=messages[-1]["content"])
        if self.way == "push":
            return [*messages, {"role": "assistant", "content": plain_response}, *stress]
        system = [message for message in stress if message["role"] == "system"]
        return [*system, *messages[:-1], *stress[len(system) :]]


def plan(
    rows: Iterable[dict],
    seed: int,
    seeds: int = 1,
    ways: Iterable[str] = (),
    frames: Mapping[str, Sequence[Frame]] = MappingProxyType({}),
) -> Iterator[Answer]:
    """Every answer that is wanted, each plain one before those under stress and in frames.

    frames: {prompt id: those that it is asked in}.
    """
    ways = tuple(ways)
    for row in map(without_responses, rows):
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
            for frame in frames.get(row["id"], ()):
                answer_seed = hashing.hashed_seed("evaluate", number, row["id"], "frame", frame.id)
                about = {**sample, "id": f"{plain}@frame:{frame.id}", **framed.describe(frame)}
                about["conversation"] = frame.surround(row["prompt"])
                yield Answer({**row, "prompt_id": row["id"], **about}, answer_seed, None, plain, frame)


def conversations_in_frames(answers: Iterable[Answer]) -> dict[str, list[dict]]:
    """{`in frame ID`: the conversation in which the first prompt is asked there}."""
    shown: dict[str, list[dict]] = {}
    for answer in answers:
        if answer.frame is not None and f"in frame {answer.frame.id}" not in shown:
            shown[f"in frame {answer.frame.id}"] = answer.conversation()
    return shown


def respond(answers: Iterable[Answer], output: outputs.Output, model: str, options: SimpleNamespace) -> sources.Source:
    """Write {...row, response, model, finish} of every Answer (resumable), except those too long for the model.

    Args:
        options: sampling, and endpoints and loading of the model.
    """
    answers = list(answers)

    def produce(engine: Engine) -> Iterator[dict | None]:
        remaining = [answer for answer in answers if answer.row["id"] not in output.done]
        yield from _generate(
            engine, [answer for answer in remaining if answer.way != "push"], {}, model, options.sampling
        )
        pushed = {answer.plain_id: answer for answer in remaining if answer.way == "push"}
        if pushed:
            rows = (row for _, row in readers.read_jsonl(output.journal))
            plain = {row["id"]: row["response"] for row in rows if row["id"] in pushed}
            yield from _generate(
                engine, [pushed[plain_id] for plain_id in pushed if plain_id in plain], plain, model, options.sampling
            )

    fill(
        output,
        [answer.row["id"] for answer in answers],
        "respond",
        partial(loading.load_named_engine, model, options.endpoints, options.loading, options.sampling.temperature),
        produce,
    )
    return sources.Source([output.path], require=("prompt", "kind", "response"))


def _generate(
    engine: Engine, answers: Iterable[Answer], plain_responses: Mapping[str, str], model: str, sampling: Sampling
) -> Iterator[dict | None]:
    """The row of each answer, None if it is too long."""
    requests = (
        RowRequest(
            answer.row["id"], answer.conversation(plain_responses.get(answer.plain_id)), answer.seed, row=answer.row
        )
        for answer in answers
    )
    for request, generation in engine.generate(requests, sampling):
        # A prefilled beginning is a part of the response.
        response = prefills.join_prefill(request.prefill, generation.text)
        written = {"response": response, "model": model, "finish": generation.finish}
        yield None if generation.lost else {**request.row, **written}
