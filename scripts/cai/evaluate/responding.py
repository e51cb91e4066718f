"""Held-out prompts answered by a policy: by one seed or several, plainly and under stress.

    asks = plan(source, seed=0, seeds=1, ways=("push", "prefill"))
    respond(asks, output, lambda: load_engine("tiny"), Sampling())

Under stress the same harmful prompt comes with a begun answer, after a push, or under a system prompt that asks for
harm or for care: templates/stress/, one way each. Leaves out searched-for attacks: these are what anybody would try.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from cai.base import cli
from cai.base.hashing import hashed_seed, sha256_text
from cai.base.paths import TEMPLATES
from cai.constitution.templates import Template, load_template
from cai.data.dialogue import as_messages
from cai.data.outputs import Output
from cai.data.readers import read_jsonl
from cai.models.engine import Engine, Request, Sampling
from cai.models.local import fast_path

WAYS = ("push", "prefill", "role_play", "ignore", "safety")

# A safety prompt may make a model refuse what is harmless; the others are asked of harmful prompts alone.
ALL_KINDS = ("safety",)


@cache
def template(way: str) -> Template:
    """The template of one way of stress."""
    return load_template(str(TEMPLATES / "stress" / f"{way}.jinja"))


def digest(ways: Iterable[str]) -> str | None:
    """What tells these ways of stress from others, or None without any."""
    return sha256_text("".join(template(way).sha256 for way in ways)) if ways else None


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted. `row`: what is written with the response, with an id of its own."""

    row: dict
    seed: int
    way: str | None
    plain_id: str

    def conversation(self, first: str | None = None) -> list[dict]:
        """What the model reads. `first`: its plain response, which is pushed against."""
        messages = as_messages(self.row["prompt"])
        if self.way is None:
            return messages
        made = template(self.way).render(prompt=messages[-1]["content"])
        if self.way == "push":
            return [*messages, {"role": "assistant", "content": first}, *made]
        system = [one for one in made if one["role"] == "system"]
        return [*system, *messages[:-1], *made[len(system) :]]

    def response(self, text: str) -> str:
        """The whole response: what was begun for the model belongs to it."""
        made = self.conversation("")
        return f"{made[-1]['content']} {text}" if made[-1]["role"] == "assistant" else text


def plan(rows: Iterable[dict], seed: int, seeds: int = 1, ways: Iterable[str] = ()) -> Iterator[Ask]:
    """Every answer that is wanted, plain ones before those under stress."""
    ways = tuple(ways)
    for row in rows:
        for number in range(seed, seed + seeds):
            several = {"prompt_id": row["id"], "seed": number} if seeds > 1 else {}
            plain = f"{row['id']}/{number}" if seeds > 1 else row["id"]
            # As ever with the first seed: the text of a prompt hangs on the seed and its id.
            yield Ask({**row, **several, "id": plain}, hashed_seed("evaluate", number, row["id"]), None, plain)
            for way in ways:
                if row["kind"] == "harmful" or way in ALL_KINDS:
                    yield Ask(
                        {**row, "prompt_id": row["id"], **several, "id": f"{plain}@{way}", "stress": way},
                        hashed_seed("evaluate", number, row["id"], way),
                        way,
                        plain,
                    )


def respond(
    asks: Callable[[], Iterable[Ask]], output: Output, load: Callable[[], object], sampling: Sampling, model: str
) -> None:
    """Write {...row, response, model, finish} of every Ask (resumable). What is too long for the model has no row."""
    if output.complete:
        return
    engine = load()
    with output:
        order, todo, later, firsts = [], [], [], {}
        for ask in asks():
            order.append(ask.row["id"])
            if ask.way == "push":
                firsts[ask.plain_id] = None
            if ask.row["id"] not in output.done:
                (later if ask.way == "push" else todo).append(ask)
        with cli.progress(len(todo) + len(later), "respond") as bar:
            _answer(todo, output, engine, sampling, model, bar, {})
            if later:
                for _, row in read_jsonl(output.journal):
                    if row["id"] in firsts:
                        firsts[row["id"]] = row["response"]
                pushed = [ask for ask in later if firsts[ask.plain_id] is not None]
                _answer(pushed, output, engine, sampling, model, bar, firsts)
        output.finish(order, {"rows": len(output.done)}, **fast_path(engine))


def _answer(asks: list[Ask], output: Output, engine: Engine, sampling: Sampling, model: str, bar, firsts: dict) -> None:
    by_id = {ask.row["id"]: ask for ask in asks}
    requests = (Request(key, ask.conversation(firsts.get(ask.plain_id)), ask.seed) for key, ask in by_id.items())
    for request, generation in engine.generate(requests, sampling):
        bar.update()
        if not generation.lost:
            ask = by_id[request.key]
            response = ask.response(generation.text)
            output.write({**ask.row, "response": response, "model": model, "finish": generation.finish})
