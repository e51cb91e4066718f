"""What answers over the network: any server with an OpenAI-compatible chat API, or several with the same model.

    engine = load_server("openai:qwen3", endpoints=("http://127.0.0.1:8000/v1",))
    request = Request("a", [{"role": "user", "content": "Hello"}], seed=1)
    for request, generation in engine.generate([request], Sampling()): ...

The same two calls as those of a local engine (engine.py). Requests fail, so each is tried again, elsewhere if there
are several replicas, until it is answered, refused, or nothing answers any more; then the run stops and what is done
is kept. What a server can do beyond the plain call is found out by asking it (references/engines.md lists them).

The key comes from the environment and goes nowhere but into the request's header: not into a manifest, a log or an
error. Leaves out streaming, tools, images, batch APIs, and the tokenizer: the server applies the chat template.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Collection, Container, Coroutine, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.models.chat import THINKING, strip_thinking
from cai.models.engine import Generation, Message, Request, RequestT, Sampling, fold_prefill, join_labels

IN_FLIGHT = 64  # requests at once where nobody says

TIMEOUT = 600.0  # seconds for one request

PATIENCE = 60.0  # seconds without one good answer after which the servers are taken for gone

LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait

TRIES = 12  # of one request; if another is answered then, it is this row that fails

GREETINGS = 6  # tries of the first request, within some seconds: is anybody there?

DOWN_AFTER = 5  # failures in a row after which a replica rests, and is then tried with one request at a time

REFUSALS = 8  # rows refused, and none answered: then it is not the rows

TOP = (20, 5)  # how many log-probabilities to ask for: what OpenAI and vLLM allow, then what TGI does

# Fields that a server may refuse by name, without harm to the answer. `stop` is applied here all the same.
_OPTIONAL = ("chat_template_kwargs", "seed", "stop")

# Control tokens as the families of models spell them. Here no tokenizer says which of them this model has, so all
# are broken up, as `Chat.neutralise` does for a local model: text from a record can't end a turn or begin another.
_CONTROL = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]?>|<[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>"
    r"|</?think(?:ing)?>|\[/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
)

_HELLO = {"role": "user", "content": "Hello"}

_TOO_LONG = re.compile(r"context|too long|too many tokens|max_new_tokens` must be|max_total_tokens", re.IGNORECASE)


class _RefusedError(Exception):
    """A server will not answer this conversation; the message says why."""


class _NoAnswerError(Exception):
    """An attempt that may go better the next time.

    wait: seconds that the server asks for, or None.
    """

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


@dataclass
class Replica:
    """One address, and how it fares."""

    address: str
    in_flight: int = 0
    failures: int = 0  # in a row: each of an attempt that began after the one before had failed
    failed_at: float = 0.0  # on the monotonic clock, as the next
    rests_until: float = 0.0

    def ready(self, now: float) -> bool:
        return self.rests_until <= now and (self.failures < DOWN_AFTER or not self.in_flight)


def load_server(
    model: str,
    *,
    endpoints: Sequence[str],
    batch_size: int | None = None,
    key_name: str | None = None,
    timeout: float = TIMEOUT,
    patience: float | None = None,
) -> "ServerEngine":
    """The engine of `openai:NAME` at its endpoints, after each was asked one small question.

    Args:
        endpoints: base addresses; several are replicas that serve the same model.
        batch_size: requests in flight at once, over all replicas.
        key_name: variable of the environment that holds the key, if the server wants one; None: what --key-name
            says.
        timeout: seconds for one request.
        patience: seconds without a good answer after which the run stops.
    Raises:
        InputError: a wrong address, nobody there, a wrong key or model name, or the client is not installed.
    """
    addresses = check_endpoints(model, endpoints)
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the openai client is not installed", where=model, remedy='Install it: pip install ".[openai]"'
        ) from error
    key_name = key_name or cli.key_name()
    engine = ServerEngine(
        model,
        addresses,
        batch_size or IN_FLIGHT,
        os.environ.get(key_name) or None,
        key_name,
        timeout,
        PATIENCE if patience is None else patience,
    )
    engine.greet()
    return engine


def check_endpoints(model: str, endpoints: Sequence[str]) -> list[str]:
    """The base addresses, each ending with its path (`/v1` where none is given); asks nothing of them.

    Raises InputError for a name or an address that is none, and for one that holds a secret: it would be written
    into the manifest.
    """
    where = "--endpoint"
    if not model.removeprefix("openai:"):
        raise InputError("openai: without a name", where="--model", expected="openai:NAME, as the server calls it")
    if not endpoints:
        raise InputError(f"no address for {model}", where=where, remedy="Name one: --endpoint http://localhost:8000/v1")
    addresses = []
    for given in endpoints:
        try:
            parts = urlsplit(given)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            # Not shown: what can't be taken apart may hold a password.
            raise InputError("an address that is none", where=where, expected="http://HOST:PORT/v1 or https://…")
        host = f"[{host}]" if ":" in host else host
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                f"the address of {host} has more than host and path",
                where=where,
                expected="no user, password or query: it is written into the manifest",
                remedy="Put a key into the environment, as OPENAI_API_KEY, or see --key-name",
            )
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        address = f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"
        if address in addresses:
            raise InputError(f"the same address twice: {address}", where=where, remedy="Name it once")
        addresses.append(address)
    return addresses


class ServerEngine:
    """A model behind one or more servers. Make one with `load_server`.

    Attributes:
        name, batch_size: the model as given; requests in flight at once.
        context: None; a server refuses what is too long for it.
        replicas: the addresses and how they fare.
    """

    context = None

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        batch_size: int,
        key: str | None = None,
        key_name: str = "OPENAI_API_KEY",
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ):
        self.name, self.batch_size, self.timeout, self.patience = name, batch_size, timeout, patience
        self.model = name.removeprefix("openai:")
        self.replicas = [Replica(address) for address in addresses]
        self._key, self._key_name = key, key_name
        self._clients: dict[asyncio.AbstractEventLoop, dict[str, Any]] = {}
        # What the servers were found to take and to give.
        self._dropped: set[str] = set()
        self._accepted: set[str] = set()
        self._max_tokens, self._top = "max_tokens", TOP[0]
        self._takes_system = True
        self._continues: bool | None = None
        self._scores: bool | None = None
        # How it went.
        self._rows = self._refusals = 0  # answered; refused
        self._last_good = self._asked_to_wait = 0.0
        for address in addresses:
            if key and urlsplit(address).scheme == "http" and not _is_loopback(urlsplit(address).hostname):
                cli.warn(f"the key in {key_name} goes to {address} unencrypted")

    # --- the two calls ----------------------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """Each request with its answer, as they come, not in order.

        A finish "failed" stands for a conversation that no server would answer; its `reason` says why. Each
        request is sent with its seed, which a server may use, and few draw the same twice.

        Args:
            requests: read lazily, as places in flight become free.
            done: keys of requests that the caller has the answers of: they are not sent.
        """
        yield from self._each(
            (request, self._generate(request, sampling)) for request in requests if request.key not in done
        )

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """Each request with the log-probability of every label as what comes next, not in order.

        Of tokens that differ by spaces alone the probabilities are added up. A label that is not among those
        listed gets the least of the list, which its own can't exceed; where none is listed, all are -inf. None
        stands for a conversation that no server would answer, or that is too long.

        Raises InputError if the server gives no log-probabilities: see `scores_choices`.
        """
        if not self.scores_choices:
            raise InputError(
                "the server gives no log-probabilities",
                where=self.name,
                remedy="Let the judge write its answer, or take a server that does: references/engines.md",
            )
        yield from self._each((request, self._score(request, labels)) for request in requests)

    @property
    def scores_choices(self) -> bool:
        """Whether the server gives log-probabilities. Asked once: some take the field and ignore it in silence."""
        if self._scores is None:
            asked = [{"role": "user", "content": "Answer with one letter and nothing else: A or B."}]
            try:
                [(_, answer)] = self._each([(None, self._ask(lambda: self._choice_body(asked)))])
                self._scores = bool(_listed(answer))
            except _RefusedError:
                self._scores = False
        return self._scores

    # --- one row ----------------------------------------------------------------------------------------------

    async def _prepare(self, request: Request, instruction: str) -> tuple[list[Message], bool]:
        """(the conversation as the server can take it, whether it goes on with the prefill).

        instruction: put into the question, before the prefill's words, where the server can't go on with it.
        """
        if not request.prefill:
            return list(request.conversation), False
        if await self._can_continue():
            return list(request.conversation), True
        return fold_prefill(request.conversation, f"{instruction}\n{request.prefill}"), False

    async def _generate(self, request: Request, sampling: Sampling) -> Generation:
        conversation, continues = await self._prepare(
            request, "Begin your answer with exactly these words, and go on from there:"
        )

        def body(conversation=conversation, continues=continues):
            made = self._body(conversation, sampling.max_new_tokens, continues)
            made["temperature"] = sampling.temperature
            if sampling.top_p < 1:
                made["top_p"] = sampling.top_p
            if sampling.stop and "stop" not in self._dropped:
                made["stop"] = list(sampling.stop)
            if "seed" not in self._dropped:
                made["seed"] = request.seed & 0x7FFFFFFF  # llama.cpp and Ollama take 32 bits
            return made

        try:
            answer = await self._ask(body)
        except _RefusedError as refusal:
            too_long = await self._refused(refusal, lambda: body([_HELLO], False))
            return Generation("", "too_long" if too_long else "failed", 0, 0, str(refusal))
        self._rows += 1
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        numbers = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        if choice.get("finish_reason") == "content_filter":
            return Generation("", "failed", *numbers, "the server's content filter")
        text = _text(choice["message"].get("content"))
        cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
        text = without_thinking(text[: min(cuts, default=None)])
        if request.prefill and not continues:
            text = text.removeprefix(request.prefill.strip()).strip()
        finish = "length" if choice.get("finish_reason") == "length" and not cuts else "stop"
        return Generation(text, finish, *numbers)

    async def _score(self, request: Request, labels: Sequence[str]) -> list[float] | None:
        conversation, continues = await self._prepare(
            request, f"Complete this sentence, with {join_labels(labels)} and nothing else:"
        )
        try:
            answer = await self._ask(lambda: self._choice_body(conversation, continues))
        except _RefusedError as refusal:
            await self._refused(refusal, lambda: self._choice_body([_HELLO]))
            return None
        self._rows += 1
        listed = _listed(answer)
        if not listed:  # a replica unlike the one that was asked first
            raise CaiError(
                f"{self.name}: a server gave no log-probabilities, though one did before. "
                "Give endpoints of one kind of server"
            )
        return label_logprobs(listed, labels)

    def _body(self, conversation: list[dict], max_tokens: int, continues: bool = False) -> dict:
        """A request: the conversation as this server takes it."""
        messages = []
        for message in conversation:
            role, content = message["role"], neutralise(message["content"])
            if role == "system" and not self._takes_system:
                role = "user"
            if messages and messages[-1]["role"] == role:
                content = messages.pop()["content"] + "\n\n" + content
            messages.append({"role": role, "content": content})
        body = {"messages": messages, self._max_tokens: max_tokens}
        if continues:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if "chat_template_kwargs" not in self._dropped:  # as for local models: the answer alone is wanted
            body["chat_template_kwargs"] = {"enable_thinking": False}
        return body

    def _choice_body(self, conversation: list[dict], continues: bool = False) -> dict:
        # Temperature 1: whether a server gives log-probabilities from before or after it, they are the same.
        return {
            **self._body(conversation, 1, continues),
            "temperature": 1.0,
            "logprobs": True,
            "top_logprobs": self._top,
        }

    async def _can_continue(self) -> bool:
        """Whether the server goes on from an assistant's message at the end. Asked once.

        By the count of tokens: one more than without the message, its own, if it is left open; at least the end
        of a turn and the beginning of another besides, if it is closed.
        """
        if self._continues is None:
            user, begun = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
            try:
                plain = await self._ask(lambda: self._body([user], 1))
                more = await self._ask(lambda: self._body([user, begun], 1, continues=True))
                counts = [(one.get("usage") or {}).get("prompt_tokens") for one in (plain, more)]
                found = None not in counts and counts[1] - counts[0] <= 1
            except _RefusedError:
                found = False
            if self._continues is None:  # of several that asked at once, the first says it
                self._continues = found
                if not found:
                    cli.warn(
                        f"{self.name}: the server can't go on from a begun answer; its words are put into the "
                        "question instead"
                    )
        return self._continues

    async def _refused(self, refusal: _RefusedError, hello: Callable[[], dict]) -> bool:
        """Note a row that was refused; returns whether it is too long. Raises CaiError if it is not the row.

        hello: makes the same request of a plain question, which is asked once, when nothing was answered so far.
        """
        if _TOO_LONG.search(str(refusal)):
            return True
        self._refusals += 1
        if self._refusals == REFUSALS and not self._rows:
            try:
                await self._ask(hello)
            except _RefusedError:
                raise CaiError(f"{self.name}: the server refuses every request; the last: {refusal}") from None
        return False

    # --- requests ---------------------------------------------------------------------------------------------

    async def _ask(self, body: Callable[[], dict]) -> dict:
        """The server's answer to a request, tried until there is one.

        Args:
            body: makes the request anew for each try, as the server is then known.
        Raises _RefusedError if the answer is no, CaiError if there will be none.
        """
        tries, last = 0, None
        while True:
            replica = await self._free(last)
            sent, began = body(), time.monotonic()
            replica.in_flight += 1
            try:
                answer = await self._send(replica, sent)
            except _RefusedError as refusal:
                self._went_well(replica)
                if self._learn(sent, str(refusal)):
                    continue
                raise
            except _NoAnswerError as failure:
                tries, last = tries + 1, replica
                self._went_badly(replica, began, failure.wait)
                gone = self._look_gone()
                if gone or tries >= TRIES:  # is it the server or the row?
                    if await self._alive(replica):
                        raise _RefusedError(
                            f"no answer in {tries} tries, while another question was answered; the last: {failure}"
                        ) from None
                    if gone:
                        raise self._gone(str(failure)) from None
            else:
                self._went_well(replica)
                self._accepted |= sent.keys() | {message["role"] for message in sent["messages"]}
                return answer
            finally:
                replica.in_flight -= 1
            backoff = min(20.0, 0.25 * 2**tries) * random.uniform(0.5, 1.0)
            # Elsewhere there may be nothing to wait for.
            await asyncio.sleep(min(backoff, 1.0) if len(self.replicas) > 1 else backoff)

    async def _send(self, replica: Replica, body: dict) -> dict:
        """One attempt. Raises _RefusedError, _NoAnswerError, or CaiError for what no repetition mends."""
        import openai

        client, body = self._clients[asyncio.get_running_loop()][replica.address], dict(body)
        try:
            async with asyncio.timeout(self.timeout):  # the client's own is for each step of the transfer
                raw = await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=body.pop("messages"), extra_body=body
                )
            return _checked(json.loads(raw.http_response.content))
        except openai.APIStatusError as error:
            raise self._of_status(replica, error.status_code, error.response.headers, error.body) from None
        except (TimeoutError, openai.APITimeoutError):
            raise _NoAnswerError(f"{replica.address}: no answer within {self.timeout:g} s") from None
        except openai.OpenAIError as error:
            raise _NoAnswerError(f"{replica.address}: {self._safe(error.__cause__ or error)}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            why = self._safe(error)
            raise _NoAnswerError(f"{replica.address}: what came back is no chat completion ({why})") from None

    def _of_status(self, replica: Replica, status: int, headers, body) -> Exception:
        """What a status other than 200 means."""
        said = f"{replica.address}: {status} {self._safe(_message(body))}".rstrip()
        if 300 <= status < 400:
            # Never followed: the key and the conversation would go where nobody has said.
            to = self._safe(headers.get("location", "elsewhere"))
            return CaiError(
                f"{replica.address}: {status}, a redirect to {to}, which is not followed. If that is "
                "right, name it with --endpoint"
            )
        if status == 401 or (status == 403 and not self._rows):
            held = "the key in" if self._key else "no key in"
            return CaiError(f"{said}. The server does not accept {held} {self._key_name}")
        if status == 402:
            return CaiError(f"{said}. The account can't pay: run the same command again when it can")
        if status == 404:
            return CaiError(f"{said}. Check the address, and the model's name ({self.model})")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(headers)
            if wait and wait > LONGEST_WAIT:
                return CaiError(f"{said}. It asks to wait {wait:.0f} s: run the same command again then")
            return _NoAnswerError(said, wait)
        return _RefusedError(said)

    def _learn(self, sent: dict, refusal: str) -> bool:
        """Do without a field that the refusal names, if no request with it was ever taken. Returns whether."""

        def named(field: str) -> bool:
            return field in sent and field not in self._accepted and bool(re.search(rf"\b{field}\b", refusal))

        for field in _OPTIONAL:
            if named(field):
                if field == "seed" and field not in self._dropped:
                    cli.warn(f"{self.name}: the server takes no seed, so a run can't be repeated exactly")
                self._dropped.add(field)
                return True
        if named("max_tokens"):
            self._max_tokens = "max_completion_tokens"
            return True
        if (
            re.search(r"logprobs|top_n_tokens", refusal)
            and sent.get("top_logprobs", 0) > TOP[-1]
            and "top_logprobs" not in self._accepted
        ):
            self._top = TOP[-1]
            return True
        roles = {message["role"] for message in sent["messages"]}
        if "system" in roles - self._accepted and re.search(r"system.{0,20}role|role.{0,20}system", refusal, re.I):
            self._takes_system = False
            return True
        return False

    async def _free(self, last: Replica | None) -> Replica:
        """The least loaded replica that does not rest; another than the `last` if they are equal."""
        while True:
            now = time.monotonic()
            ready = [replica for replica in self.replicas if replica.ready(now)]
            if ready:
                return min(ready, key=lambda one: (one.failures >= DOWN_AFTER, one.in_flight, one is last))
            await asyncio.sleep(0.05)

    def _went_well(self, replica: Replica) -> None:
        self._last_good = time.monotonic()
        if replica.failures >= DOWN_AFTER:
            cli.note(f"{replica.address} answers again")
        replica.failures = 0

    def _went_badly(self, replica: Replica, began: float, wait: float | None) -> None:
        now = time.monotonic()
        # Failures come sooner than answers, so that many at once in the beginning say nothing.
        if began >= replica.failed_at:
            replica.failures, replica.failed_at = replica.failures + 1, now
            if replica.failures == DOWN_AFTER:
                cli.warn(f"{replica.address}: {DOWN_AFTER} failures in a row; it is tried now and then")
        if wait is not None:
            replica.rests_until = max(replica.rests_until, now + wait)
            self._asked_to_wait = max(self._asked_to_wait, now + wait)
        elif replica.failures >= DOWN_AFTER and replica.rests_until <= now:
            replica.rests_until = now + min(8.0, 0.25 * 2 ** (replica.failures - DOWN_AFTER))

    def _look_gone(self) -> bool:
        """Whether nothing has answered for as long as our patience lasts."""
        since = max(self._last_good, self._asked_to_wait)
        down = all(replica.failures >= DOWN_AFTER for replica in self.replicas)
        return down and time.monotonic() - since > self.patience

    async def _alive(self, replica: Replica) -> bool:
        """Whether the smallest of questions is answered: then it is the row that can't be."""
        try:
            await self._send(replica, self._greeting())
        except (_NoAnswerError, CaiError):
            return False
        except _RefusedError:
            pass
        self._went_well(replica)
        return True

    def _gone(self, why: str) -> CaiError:
        return CaiError(
            f"{self.name}: no server has answered for {self.patience:g} s; the last: {why}. "
            "What is done is kept: start the server and run the same command again"
        )

    def _greeting(self) -> dict:
        return {**self._body([_HELLO], 16), "temperature": 1.0}

    def greet(self) -> None:
        """Ask each replica one small question. Raises InputError if none answers, warns of those that don't."""
        failures: list[Exception] = []

        async def all_of_them():
            return await asyncio.gather(*(self._meet(replica) for replica in self.replicas))

        with self._session() as runner:
            for replica, failure in zip(self.replicas, runner.run(all_of_them()), strict=True):
                if failure is not None:
                    failures.append(failure)
                    replica.failures, replica.rests_until = DOWN_AFTER, time.monotonic() + 8.0
        if len(failures) == len(self.replicas):
            raise InputError(
                "; ".join(dict.fromkeys(map(str, failures))),
                where=self.name,
                remedy="Is the server running, and is this its address? (references/engines.md)",
            )
        for failure in failures:
            cli.warn(f"{failure}; going on with the others")

    async def _meet(self, replica: Replica) -> Exception | None:
        """None if the replica answers, else what came instead."""
        failure = None
        for attempt in range(GREETINGS):
            await asyncio.sleep(0.1 * 2**attempt * bool(attempt))
            try:
                while True:
                    sent = self._greeting()
                    try:
                        await self._send(replica, sent)
                    except _RefusedError as refusal:
                        if self._learn(sent, str(refusal)):
                            continue
                        return refusal
                    self._accepted |= sent.keys()
                    return None
            except CaiError as error:
                return error
            except _NoAnswerError as error:
                failure = error
                await asyncio.sleep(min(error.wait or 0.0, 5.0))
        return failure

    # --- the loop they run in ---------------------------------------------------------------------------------

    def _each(self, jobs: Iterable[tuple[Any, Coroutine]]) -> Iterator[tuple[Any, Any]]:
        """(request, result) of each job as it ends; `batch_size` of them are under way at once."""
        jobs, pending = iter(jobs), set()
        self._last_good = time.monotonic()
        with self._session() as runner:
            try:
                while True:
                    for request, job in islice(jobs, self.batch_size - len(pending)):
                        pending.add(runner.get_loop().create_task(_run_job(request, job)))
                    if not pending:
                        return
                    ended, pending = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                    failures = [failure for task in ended if (failure := task.exception())]
                    yield from (task.result() for task in ended if not task.exception())
                    if failures:  # after what came with them
                        raise failures[0]
            finally:
                runner.run(_stop(pending))

    @contextmanager
    def _session(self) -> Iterator[asyncio.Runner]:
        """An event loop, and clients for as long as it lasts: connections belong to their loop."""
        import openai

        limits = openai.Timeout(self.timeout, connect=min(10.0, self.timeout))
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=limits)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self._clients[loop] = {
                replica.address: openai.AsyncOpenAI(
                    base_url=replica.address,
                    api_key=self._key or "none",
                    admin_api_key="",
                    max_retries=0,
                    timeout=limits,
                    http_client=http,
                )
                for replica in self.replicas
            }
            try:
                yield runner
            finally:
                del self._clients[loop]
                runner.run(http.aclose())

    def _safe(self, value: object) -> str:
        """What a server said, fit for a line of ours: short, printable, and without the key."""
        text = str(value)
        if self._key:
            text = text.replace(self._key, "***")
        return shorten("".join(c if c.isprintable() else " " for c in text), 300)


async def _stop(tasks: Collection[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _run_job(request: Any, job: Coroutine) -> tuple[Any, Any]:
    return request, await job


# --- what is sent and what comes back -------------------------------------------------------------------------


def neutralise(text: str) -> str:
    """`text` with what looks like a control token of any family broken up by a space."""
    while _CONTROL.search(text):
        text = _CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


def label_logprobs(listed: Sequence[dict], labels: Sequence[str]) -> list[float]:
    """Log-probability of each label, from the tokens that a server lists as the likeliest.

    Args:
        listed: `{"token": ..., "logprob": ...}`, over the whole vocabulary, so that the sum is at most 1.
    """
    found: dict[str, list[float]] = {label: [] for label in labels}
    for one in listed:
        word = one["token"].strip(" \n\t\u2581\u0120")  # with the space as SentencePiece and GPT-2 write it
        if word in found:
            found[word].append(float(one["logprob"]))
    if not any(found.values()):
        return [-math.inf] * len(labels)
    least = min(float(one["logprob"]) for one in listed)
    return [min(0.0, _log_sum(said)) if said else least for said in found.values()]


def _log_sum(logs: list[float]) -> float:
    most = max(logs)
    return most if most == -math.inf else most + math.log(sum(math.exp(one - most) for one in logs))


def _checked(answer) -> dict:
    """A chat completion; ValueError, or what looking into it raises, if it is none."""
    if answer.get("error"):
        raise ValueError(_message(answer["error"]))
    choice = answer["choices"][0]
    _text(choice["message"].get("content"))
    for name in ("prompt_tokens", "completion_tokens"):
        if not isinstance((answer.get("usage") or {}).get(name), int | None):
            raise ValueError(f"{name} is no number")
    for one in _listed(answer):
        if not isinstance(one["token"], str) or not isinstance(one["logprob"], int | float):
            raise ValueError("log-probabilities that are none")
    return answer


def _text(content) -> str:
    """The text of a message: of a string, of parts as some servers of reasoning models send them, or of nothing."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise ValueError("the content is no text")
    (content or "").encode()  # half a character is an error, too
    return content or ""


def _listed(answer: dict) -> list[dict]:
    """The likeliest first tokens with their log-probabilities; [] if the server gave none."""
    first = ((answer["choices"][0].get("logprobs") or {}).get("content") or [{}])[0]
    return [one for one in first.get("top_logprobs") or [] if one["logprob"] is not None]


def without_thinking(text: str) -> str:
    """An answer without reasoning, also where the prompt has opened it and only the end is in the answer."""
    for opening, closing in THINKING:
        before, closed, after = text.partition(closing)
        if closed and opening not in before:
            text = after
    return strip_thinking(text).strip()


def _message(body) -> str:
    """What an error's body says."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or "")


def retry_after(headers) -> float | None:
    """Seconds that a server asks to wait: a number, or the date it names; None if it asks for nothing readable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        given = headers.get(name)
        if given is None:
            continue
        try:
            wait = float(given) / unit
        except ValueError:
            date = email.utils.parsedate_tz(given)
            if date is None:
                continue
            wait = email.utils.mktime_tz(date) - time.time()
        if math.isfinite(wait):
            return max(0.0, wait)
    return None


def _is_loopback(host: str | None) -> bool:
    return host in ("localhost", "::1") or (host or "").startswith("127.")
