"""Engines over the network: any server with an OpenAI-compatible chat API, or several with the same model.

    engine = load_server("openai:qwen3", endpoints=("http://127.0.0.1:8000/v1",))
    request = Request("a", [{"role": "user", "content": "Hello"}], seed=1)
    for request, generation in engine.generate([request], Sampling()): ...

The same two calls as those of a local engine (engine.py). A failed request is sent again, to another replica if there
are several, until it is answered or refused. If no server answers any more, the run stops and what is done is kept.
What a server can do beyond the plain call is tested by asking it (references/engines.md lists the differences).

The key comes from the environment and goes only into the request's header: not into a manifest, a log or an error.
Leaves out streaming, tools, images, batch APIs, and the tokenizer: the server applies the chat template.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections.abc import Collection, Container, Coroutine, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cai.base import cli, run_settings
from cai.base.errors import CaiError, InputError, shorten
from cai.data.dialogue import cut_at_end_token, is_end_token
from cai.models.chat import join_turns
from cai.models.engine import Generation, Message, Request, RequestT, Sampling, fold_prefill, label_instruction
from cai.models.reasoning import strip_thinking

IN_FLIGHT = 64  # requests at once by default

TIMEOUT = 600.0  # seconds for one request

PATIENCE = 60.0  # seconds without an answer after which all servers count as gone

LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait

TRIES = 12  # of one request; if the server answers another one then, this row fails

GREETINGS = 6  # tries of the first request, within some seconds

DOWN_AFTER = 5  # failures in a row after which a replica rests, and then gets one request at a time

REFUSALS = 8  # refused rows without any answered row, after which the whole run is in question

TOP = (20, 5)  # log-probabilities to ask for: the most that OpenAI and vLLM allow, then the most of TGI

# Fields that a server may refuse by name, without harm to the answer. `stop` is applied here as well.
_OPTIONAL = ("chat_template_kwargs", "seed", "stop")

# Control tokens as the families of models spell them. No tokenizer here says which of them this model has, so all
# are broken up, as `Chat.neutralise` does for a local model: text from a record can't end a turn or begin another.
CONTROL = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]?>|<[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>"
    r"|</?think(?:ing)?>|\[/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
)

_TOO_LONG = re.compile(r"context|too long|too many tokens|max_new_tokens` must be|max_total_tokens", re.IGNORECASE)

_Body = dict[str, Any]  # of a request, or of its answer


class _RefusedError(Exception):
    """A server will not answer this conversation; the message gives its reason."""

    @property
    def is_too_long(self) -> bool:
        return bool(_TOO_LONG.search(str(self)))


class _NoAnswerError(Exception):
    """An attempt that failed, where the next may succeed.

    wait: seconds that the server asks for, or None.
    """

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass
class Replica:
    """One address and its state. Times are on the monotonic clock."""

    address: str
    in_flight: int = 0
    failures: int = 0  # in a row: each of an attempt that began after the one before had failed
    failed_at: float = 0.0
    rests_until: float = 0.0

    def is_ready(self, now: float) -> bool:
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
    """The engine of `openai:NAME` at its endpoints, after each has answered one small question.

    Args:
        endpoints: base addresses; several are replicas that serve the same model.
        batch_size: requests in flight at once, over all replicas.
        key_name: environment variable that holds the key, if the server wants one; None: the one of --key-name.
        timeout: seconds for one request.
        patience: seconds without an answer after which the run stops.
    Raises:
        InputError: not a valid URL, no answer, a wrong key or model name, or the openai client is not installed.
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
    """The base addresses, each ending with its path (`/v1` by default); sends no request.

    Raises InputError for a missing name, for an address that is not a valid URL, and for one that holds a secret: it
    would be written into the manifest.
    """
    where = "--endpoint"
    if not model.removeprefix("openai:"):
        raise InputError("openai: without a name", where="--model", expected="openai:NAME, as the server calls it")
    if not endpoints:
        raise InputError(f"no address for {model}", where=where, remedy="Name one: --endpoint http://localhost:8000/v1")
    addresses: list[str] = []
    for endpoint in endpoints:
        try:
            parts = urlsplit(endpoint)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            # Not shown: what can't be parsed may hold a password.
            raise InputError("not a valid URL", where=where, expected="http://HOST:PORT/v1 or https://…")
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
    """A model behind one or more servers. `load_server` makes one.

    Attributes:
        name, batch_size: the model as the caller named it; requests in flight at once.
        context: None; a server refuses what is too long for it.
        replicas: the addresses and their state.
    """

    context: int | None = None

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
        self._key, self._key_name, self._tags = key, key_name, run_settings.reasoning_tags()
        self._clients: dict[asyncio.AbstractEventLoop, dict[str, Any]] = {}
        # What the servers turned out to take and to give.
        self._dropped: set[str] = set()
        self._accepted: set[str] = set()
        self._max_tokens, self._top, self._takes_system = "max_tokens", TOP[0], True
        self._continues: bool | None = None
        self._scores: bool | None = None
        self._answered_rows = self._refused_rows = 0
        self._answered_at = self._told_to_wait_until = 0.0
        for address in addresses:
            host = urlsplit(address).hostname or ""
            is_loopback = host in ("localhost", "::1") or host.startswith("127.")
            if key and address.startswith("http:") and not is_loopback:
                cli.warn(f"the key in {key_name} goes to {address} unencrypted")

    # --- the two calls ----------------------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """Each request with its answer, as they come, not in order.

        The finish "failed" marks a conversation that no server would answer; its `reason` gives the cause. Each
        request is sent with its seed, but few servers draw the same text twice.

        Args:
            requests: read lazily, as places in flight become free.
            done: keys of requests that the caller has the answers of: they are not sent.
        """
        yield from self._run(
            (request, self._generate(request, sampling)) for request in requests if request.key not in done
        )

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """Each request with the log-probability of every label as what comes next, not in order.

        Probabilities of tokens that differ by spaces alone are added up. A label that the server does not list gets
        the lowest log-probability of the list, which is an upper bound of its own; where no label is listed, all are
        -inf. None: no server would answer the conversation, or it is too long.

        Raises InputError if the server gives no log-probabilities: see `scores_choices`.
        """
        if not self.scores_choices:
            raise InputError(
                "the server gives no log-probabilities",
                where=self.name,
                remedy="Let the judge write its answer, or take a server that does: references/engines.md",
            )
        yield from self._run((request, self._score(request, labels)) for request in requests)

    @property
    def scores_choices(self) -> bool:
        """Whether the server gives log-probabilities. Tested once: some servers accept the field and ignore it."""
        if self._scores is None:
            question = {"role": "user", "content": "Answer with one letter and nothing else: A or B."}
            try:
                [(_, answer)] = self._run([(None, self._ask({**_request([question], 1), **_LOGPROBS}))])
                self._scores = bool(_top_logprobs(answer))
            except _RefusedError:
                self._scores = False
        return self._scores

    # --- one row ----------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, sampling: Sampling) -> Generation:
        instruction = "Begin your answer with exactly these words, and go on from there:"
        body = await self._prepare(request, instruction, sampling.max_new_tokens)
        body |= {"temperature": sampling.temperature, "seed": request.seed & 0x7FFFFFFF}  # 32 bits, as llama.cpp takes
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        try:
            answer = await self._ask_row(body)
        except _RefusedError as refusal:
            return Generation("", "too_long" if refusal.is_too_long else "failed", 0, 0, str(refusal))
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        finish, reason = read_finish(choice)
        if finish == "failed":
            return Generation("", finish, *tokens, self._safe(reason))
        text = _text(choice["message"].get("content"))
        cuts = [position for stop in sampling.stop if (position := text.find(stop)) >= 0]
        text = cut_at_end_token(without_thinking(text[: min(cuts, default=None)], self._tags)).strip()
        if request.prefill and not _CONTINUE.keys() <= body.keys():
            text = text.removeprefix(request.prefill.strip()).strip()
        return Generation(text, "stop" if cuts else finish, *tokens)

    async def _score(self, request: Request, labels: Sequence[str]) -> list[float] | None:
        body = await self._prepare(request, label_instruction(labels), 1)
        try:
            answer = await self._ask_row({**body, **_LOGPROBS})
        except _RefusedError:
            return None
        tokens, (finish, _) = _top_logprobs(answer), read_finish(answer["choices"][0])
        if not tokens and finish == "failed":
            return None
        if not tokens:  # a replica unlike the one that was tested
            raise CaiError(
                f"{self.name}: a server gave no log-probabilities, though one did before. "
                "Give endpoints of one kind of server"
            )
        return label_logprobs(tokens, labels)

    async def _prepare(self, request: Request, instruction: str, max_tokens: int) -> _Body:
        """The body of a row's request.

        instruction: goes into the question, before the prefill, where the server can't continue a prefill.
        """
        if request.prefill and await self._can_continue():
            return {**_request(request.conversation, max_tokens), **_CONTINUE}
        return _request(fold_prefill(request, instruction), max_tokens)

    async def _can_continue(self) -> bool:
        """Whether the server continues an assistant's message at the end. Tested once.

        By the count of tokens: one more than without the message, its own, if it is left open; at least the end
        of a turn and the beginning of another besides, if it is closed. A server that counts nothing, or always the
        same, proves nothing.
        """
        if self._continues is None:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
            try:
                plain = await self._ask(_request(turns[:1], 1))
                prefilled = await self._ask({**_request(turns, 1), **_CONTINUE})
                before, after = map(_prompt_tokens, (plain, prefilled))
                continues = before > 0 and after > 0 and after - before <= 1
                if continues and after <= before:  # does it count at all?
                    longer = await self._ask(_request([{"role": "user", "content": "x " * 64}], 1))
                    continues = _prompt_tokens(longer) > before
            except _RefusedError:
                continues = False
            if self._continues is None:  # of several that test at once, the first decides
                self._continues = continues
                if not continues:
                    cli.warn(
                        f"{self.name}: the server can't go on from a prefilled answer; its words are put into the "
                        "question instead"
                    )
        return self._continues

    async def _ask_row(self, body: _Body) -> _Body:
        """`_ask` for a row. Raises CaiError if the server refuses not this row but every request."""
        try:
            answer = await self._ask(body)
        except _RefusedError as refusal:
            self._refused_rows += not refusal.is_too_long
            if self._refused_rows == REFUSALS and not self._answered_rows and not refusal.is_too_long:
                hello = {name: value for name, value in body.items() if name not in _CONTINUE}
                try:
                    await self._ask({**hello, "messages": [_HELLO]})
                except _RefusedError:
                    message = f"{self.name}: the server refuses every request; the last: {refusal}"
                    raise CaiError(message) from None
            raise
        self._answered_rows += 1
        return answer

    # --- requests ---------------------------------------------------------------------------------------------

    async def _ask(self, body: _Body) -> _Body:
        """The server's answer to a request, tried until there is one.

        Raises _RefusedError if the request is refused, CaiError if there will be no answer.
        """
        tries, last = 0, None
        while True:
            replica = await self._free_replica(last)
            began = time.monotonic()
            replica.in_flight += 1
            try:
                return await self._attempt(replica, body)
            except _NoAnswerError as failure:
                tries, last = tries + 1, replica
                self._note_failure(replica, began, failure.wait)
                gone = self._are_gone()
                if gone or tries >= TRIES:  # is it the server or the row?
                    if await self._is_alive(replica):
                        raise _RefusedError(
                            f"no answer in {tries} tries, while another question was answered; the last: {failure}"
                        ) from None
                    if gone:
                        raise CaiError(
                            f"{self.name}: no server has answered for {self.patience:g} s; the last: {failure}. "
                            "What is done is kept: start the server and run the same command again"
                        ) from None
            finally:
                replica.in_flight -= 1
            backoff = min(20.0, 0.25 * 2**tries) * random.uniform(0.5, 1.0)
            # Another replica may be free at once.
            await asyncio.sleep(min(backoff, 1.0) if len(self.replicas) > 1 else backoff)

    async def _attempt(self, replica: Replica, body: _Body) -> _Body:
        """One attempt at a request, sent again without each field that the server refuses by name."""
        while True:
            sent = self._adapt(body)
            try:
                answer = await self._send(replica, sent)
            except _RefusedError as refusal:
                self._note_answer(replica)
                if not self._learn(sent, str(refusal)):
                    raise
            else:
                self._note_answer(replica)
                self._accepted |= sent.keys() | {message["role"] for message in sent["messages"]}
                return answer

    def _adapt(self, body: _Body) -> _Body:
        """The request in the form that the servers take, as far as that is known."""
        adapted = {name: value for name, value in body.items() if name not in self._dropped}
        adapted["messages"] = join_turns(body["messages"], CONTROL, self._takes_system)
        adapted[self._max_tokens] = adapted.pop("max_tokens")
        if "top_logprobs" in body:
            adapted["top_logprobs"] = self._top
        return adapted

    async def _send(self, replica: Replica, body: _Body) -> _Body:
        """One exchange. Raises _RefusedError, _NoAnswerError, or CaiError for what no repetition fixes."""
        import openai

        client = self._clients[asyncio.get_running_loop()][replica.address]
        extra = {name: value for name, value in body.items() if name != "messages"}
        try:
            async with asyncio.timeout(self.timeout):  # the client's own timeout is for each step of the transfer
                raw = await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=body["messages"], extra_body=extra
                )
            return _check_answer(json.loads(raw.http_response.content))
        except openai.APIStatusError as error:
            raise self._explain_status(replica, error.status_code, error.response.headers, error.body) from None
        except (TimeoutError, openai.APITimeoutError):
            raise _NoAnswerError(f"{replica.address}: no answer within {self.timeout:g} s") from None
        except openai.OpenAIError as error:
            raise _NoAnswerError(f"{replica.address}: {self._safe(error.__cause__ or error)}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            reason = self._safe(error)
            raise _NoAnswerError(f"{replica.address}: the answer is no chat completion ({reason})") from None

    def _explain_status(self, replica: Replica, status: int, headers: Mapping[str, str], body: object) -> Exception:
        """The error of a status other than 200."""
        message = f"{replica.address}: {status} {self._safe(_error_text(body))}".rstrip()
        if 300 <= status < 400:
            # Never followed: the key and the conversation would go to an address that nobody named.
            target = self._safe(headers.get("location", "elsewhere"))
            return CaiError(
                f"{replica.address}: {status}, a redirect to {target}, which is not followed. If that is "
                "right, name it with --endpoint"
            )
        remedies = {
            401: f"The server does not accept {'the key in' if self._key else 'no key in'} {self._key_name}",
            402: "The account can't pay: run the same command again when it can",
            404: f"Check the address, and the model's name ({self.model})",
        }
        if status in remedies or (status == 403 and not self._answered_rows):
            return CaiError(f"{message}. {remedies.get(status, remedies[401])}")
        if status not in (408, 409, 425, 429) and status < 500:
            return _RefusedError(message)
        wait = retry_after(headers)
        if wait and wait > LONGEST_WAIT:
            return CaiError(f"{message}. It asks to wait {wait:.0f} s: run the same command again then")
        return _NoAnswerError(message, wait)

    def _learn(self, sent: _Body, refusal: str) -> bool:
        """Do without a field that the refusal names, if no request with it was ever taken. Returns whether there is
        one."""
        untaken = sent.keys() - self._accepted
        roles = {message["role"] for message in sent["messages"]} - self._accepted
        fields = (*_OPTIONAL, "max_tokens")
        field = next((name for name in fields if name in untaken and re.search(rf"\b{name}\b", refusal)), None)
        if field == "max_tokens":
            self._max_tokens = "max_completion_tokens"
        elif field:
            if field == "seed" and field not in self._dropped:
                cli.warn(f"{self.name}: the server takes no seed, so a run can't be repeated exactly")
            self._dropped.add(field)
        elif (
            "top_logprobs" in untaken
            and sent["top_logprobs"] > TOP[-1]
            and re.search(r"logprobs|top_n_tokens", refusal)
        ):
            self._top = TOP[-1]
        elif "system" in roles and re.search(r"system.{0,20}role|role.{0,20}system", refusal, re.IGNORECASE):
            self._takes_system = False
        else:
            return False
        return True

    # --- the state of the replicas ----------------------------------------------------------------------------

    async def _free_replica(self, last: Replica | None) -> Replica:
        """The least loaded replica that does not rest; another than the `last` if they are equal."""
        while True:
            now = time.monotonic()
            ready = [replica for replica in self.replicas if replica.is_ready(now)]
            if ready:
                return min(ready, key=lambda each: (each.failures >= DOWN_AFTER, each.in_flight, each is last))
            await asyncio.sleep(0.05)

    def _note_answer(self, replica: Replica) -> None:
        self._answered_at = time.monotonic()
        if replica.failures >= DOWN_AFTER:
            cli.note(f"{replica.address} answers again")
        replica.failures = 0

    def _note_failure(self, replica: Replica, began: float, wait: float | None) -> None:
        now = time.monotonic()
        # Failures come sooner than answers: many at once in the beginning count as one.
        if began >= replica.failed_at:
            replica.failures, replica.failed_at = replica.failures + 1, now
            if replica.failures == DOWN_AFTER:
                cli.warn(f"{replica.address}: {DOWN_AFTER} failures in a row; from now on it gets few requests")
        if wait is not None:
            replica.rests_until = max(replica.rests_until, now + wait)
            self._told_to_wait_until = max(self._told_to_wait_until, now + wait)
        elif replica.failures >= DOWN_AFTER and replica.rests_until <= now:
            replica.rests_until = now + min(8.0, 0.25 * 2 ** (replica.failures - DOWN_AFTER))

    def _are_gone(self) -> bool:
        """Whether no server has answered for `patience` seconds."""
        silence = time.monotonic() - max(self._answered_at, self._told_to_wait_until)
        return silence > self.patience and all(replica.failures >= DOWN_AFTER for replica in self.replicas)

    async def _is_alive(self, replica: Replica) -> bool:
        """Whether the replica answers the smallest of questions: then the row is at fault."""
        try:
            await self._send(replica, self._adapt(_GREETING))
        except (_NoAnswerError, CaiError):
            return False
        except _RefusedError:
            pass
        self._note_answer(replica)
        return True

    def greet(self) -> None:
        """Ask each replica one small question. Raises InputError if none answers, warns of those that don't."""

        async def meet_all() -> list[Exception | None]:
            return await asyncio.gather(*map(self._meet, self.replicas))

        with self._session() as runner:
            failures = runner.run(meet_all())
        if all(failures):
            raise InputError(
                "; ".join(dict.fromkeys(map(str, failures))),
                where=self.name,
                remedy="Is the server running, and is this its address? (references/engines.md)",
            )
        for replica, failure in zip(self.replicas, failures, strict=True):
            if failure:
                replica.failures, replica.rests_until = DOWN_AFTER, time.monotonic() + 8.0
                cli.warn(f"{failure}; going on with the others")

    async def _meet(self, replica: Replica) -> Exception | None:
        """None if the replica answers, else the error."""
        failure: Exception | None = None
        for attempt in range(GREETINGS):
            try:
                await self._attempt(replica, _GREETING)
                return None
            except (CaiError, _RefusedError) as error:
                return error
            except _NoAnswerError as error:
                failure = error
                await asyncio.sleep(max(0.2 * 2**attempt, min(error.wait or 0.0, 5.0)))
        return failure

    def give_up(self) -> None:
        """Wait for no server any more: the run stops at the next failures."""
        self.patience = 0.0

    # --- the loop they run in ---------------------------------------------------------------------------------

    def _run(self, jobs: Iterable[tuple[Any, Coroutine[Any, Any, Any]]]) -> Iterator[tuple[Any, Any]]:
        """(request, result) of each job as it ends; `batch_size` of them are under way at once."""
        jobs = iter(jobs)
        pending: dict[asyncio.Task[Any], Any] = {}
        self._answered_at = time.monotonic()
        with self._session() as runner:
            try:
                while True:
                    for request, job in islice(jobs, self.batch_size - len(pending)):
                        pending[runner.get_loop().create_task(job)] = request
                    if not pending:
                        return
                    ended, _ = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                    for task in sorted(ended, key=lambda task: task.exception() is not None):
                        yield pending.pop(task), task.result()  # raises what the job raised, after the other results
            finally:
                runner.run(_cancel(pending))

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
        """A server's text, fit for a line of ours: short, printable, and without the key."""
        text = str(value).replace(self._key, "***") if self._key else str(value)
        return shorten("".join(character if character.isprintable() else " " for character in text), 300)


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- the body of a request ------------------------------------------------------------------------------------


def _request(conversation: Sequence[Message], max_tokens: int) -> _Body:
    """A request for the answer alone: no thinking, as for local models."""
    thinking = {"enable_thinking": False}
    return {"messages": conversation, "max_tokens": max_tokens, "chat_template_kwargs": thinking}


_HELLO = {"role": "user", "content": "Hello"}

_GREETING = {**_request([_HELLO], 16), "temperature": 1.0}

_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}

# Temperature 1: log-probabilities from before and after the temperature are then the same.
_LOGPROBS = {"temperature": 1.0, "logprobs": True, "top_logprobs": TOP[0]}


# --- the body of an answer ------------------------------------------------------------------------------------


def _check_answer(answer: Any) -> _Body:
    """A chat completion; ValueError, or what looking into it raises, if it is none."""
    if answer.get("error"):
        raise ValueError(_error_text(answer["error"]))
    _text(answer["choices"][0]["message"].get("content"))
    for name in ("prompt_tokens", "completion_tokens"):
        if not isinstance((answer.get("usage") or {}).get(name), int | None):
            raise ValueError(f"{name} is not a number")
    for entry in _top_logprobs(answer):
        if not isinstance(entry["token"], str) or not isinstance(entry["logprob"], int | float):
            raise ValueError("malformed log-probabilities")
    checked: _Body = answer
    return checked


def _text(content: Any) -> str:
    """The text of a message: of a string, of parts as some servers of reasoning models send them, or of nothing."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str | None):
        raise ValueError("the content is not text")
    (content or "").encode()  # half a character is an error, too
    return content or ""


def _prompt_tokens(answer: _Body) -> int:
    """The tokens of the prompt by an answer's usage; 0 where it has none."""
    return (answer.get("usage") or {}).get("prompt_tokens") or 0


# What servers call an answer that came to its end, and one that was cut at its longest length. Only these are answers:
# an error, an abort, a filter or no reason at all leaves a text that nobody knows to be whole.
_ENDED = {
    *("stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "stop_str", "complete"),
    *("completed", "finished", "eos_token_id", "end_of_text", "end_of_sequence"),
}

_CUT = {
    *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "max_completion_tokens"),
    *("model_length", "token_limit", "max_token", "limit", "model_context_window_exceeded", "max_tokens_reached"),
}


def read_finish(choice: _Body) -> tuple[str, str]:
    """(finish, reason) of a choice: "stop", "length", or "failed" with the reason.

    Only `stop`, its synonyms and an end token are a stop. Spellings differ by case, `-`, and the prefix
    `FINISH_REASON_`.
    """
    raw = choice.get("finish_reason")
    if isinstance(raw, str):
        word = re.sub(r"[\s-]+", "_", raw.strip().lower()).removeprefix("finish_reason_").removeprefix("finishreason.")
        if word in _ENDED or is_end_token(raw.strip()):
            return "stop", ""
        if word in _CUT:
            return "length", ""
    error = choice.get("error")
    detail = f": {_error_text(error)}" if error else ""
    return "failed", f"the server's finish reason is {json.dumps(raw, ensure_ascii=False)}{detail}"


def _top_logprobs(answer: _Body) -> list[_Body]:
    """The likeliest first tokens with their log-probabilities; [] if the server gave none."""
    first = ((answer["choices"][0].get("logprobs") or {}).get("content") or [{}])[0]
    return [entry for entry in first.get("top_logprobs") or [] if entry["logprob"] is not None]


def label_logprobs(tokens: Sequence[_Body], labels: Sequence[str]) -> list[float]:
    """Log-probability of each label, from the tokens that a server lists as the likeliest.

    Args:
        tokens: `{"token": ..., "logprob": ...}`, over the whole vocabulary, so that probabilities add up to 1 at most.
    """
    # A space before a token as SentencePiece and GPT-2 write it.
    words = [(entry["token"].strip(" \n\t\u2581\u0120"), float(entry["logprob"])) for entry in tokens]
    by_label = [[logprob for word, logprob in words if word == label] for label in labels]
    if not any(by_label):
        return [-math.inf] * len(labels)
    lowest = min(logprob for _, logprob in words)
    return [min(0.0, float(np.logaddexp.reduce(logprobs))) if logprobs else lowest for logprobs in by_label]


def without_thinking(text: str, tags: Sequence[tuple[str, str]] = ()) -> str:
    """An answer without reasoning, also where the prompt opened it and the answer has its end only."""
    return strip_thinking(text, tags=tags).strip()


def _error_text(body: object) -> str:
    """The message in an error's body."""
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return str(body or "")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, by a number or a date; None if it asks for nothing readable."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        try:
            wait = float(value) / unit
        except ValueError:
            date = email.utils.parsedate_tz(value)
            wait = email.utils.mktime_tz(date) - time.time() if date else math.nan
        if math.isfinite(wait):
            return max(0.0, wait)
    return None
