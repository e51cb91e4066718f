"""Requests over HTTP to one server or to replicas of it: one exchange at a time, and which replica is fit for it.

    transport = Transport("x", ["http://127.0.0.1:8000/v1"], key, "OPENAI_API_KEY", 120.0, 60.0, 64)
    with transport.session() as runner:
        answer = runner.run(transport.send(transport.replicas[0], body, Wait("text")))

An exchange ends with a checked answer, or with an error that says whether it is worth another try. Leaves out what is
asked, and how often (servers.py).
"""

import asyncio
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from cai.base import cli, requests
from cai.base.errors import CaiError, shorten
from cai.models.latency import Patience, SilenceError, Wait, Watch
from cai.models.server_answers import Body, check_answer, error_text, retry_after

LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait

DOWN_AFTER = 5  # failures in a row after which a replica rests, and then gets one request at a time

_TOO_LONG = re.compile(r"context|too long|too many tokens|max_new_tokens` must be|max_total_tokens", re.IGNORECASE)


class RefusedError(Exception):
    """A server will not answer this conversation; the message gives its reason."""

    @property
    def is_too_long(self) -> bool:
        return bool(_TOO_LONG.search(str(self)))


class NoAnswerError(Exception):
    """An attempt that failed, where the next may succeed.

    wait: seconds that the server asks for, or None. silence: what passed without an answer, if that was the failure.
    """

    def __init__(self, reason: str, wait: float | None = None, silence: SilenceError | None = None):
        super().__init__(reason)
        self.wait, self.silence = wait, silence

    @property
    def is_early(self) -> bool:
        """Whether the attempt was given up after a learned bound: the next one gets more time."""
        return self.silence is not None and self.silence.is_learned


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


@dataclass
class _Session:
    """What belongs to one event loop: the watch over the requests under way, and connections.

    pools: {whether each request gets a new connection: the connections}. clients: {the same: {address: its client}}.
    """

    watch: Watch
    pools: dict[bool, Any] = field(default_factory=dict)
    clients: dict[bool, dict[str, Any]] = field(default_factory=dict)


class Transport:
    """The way to a model's servers.

    Args:
        model: its name at the servers.
        key, key_name: sent with each request; the environment variable that it is from.
        longest: seconds, at most, for one answer. patience: seconds without any answer after which all are gone.
        connections: most requests at once.
    Attributes:
        replicas: the addresses and their state.
        report: the requests of the command.
        has_answered: whether a row was answered.
    """

    def __init__(
        self,
        model: str,
        addresses: Collection[str],
        key: str | None,
        key_name: str,
        longest: float,
        patience: float,
        connections: int,
    ):
        self.model, self.replicas = model, [Replica(address) for address in addresses]
        self.waiting, self.patience, self.connections = Patience(longest), patience, connections
        self.report, self.has_answered = requests.request_report(), False
        self._key, self._key_name = key, key_name
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._answered_at = self._told_to_wait_until = self._emptied_at = 0.0
        self._warned_of_silence = False
        for address in addresses:
            self._warn_of_open_key(address)

    def _warn_of_open_key(self, address: str) -> None:
        host = urlsplit(address).hostname or ""
        is_loopback = host in ("localhost", "::1") or host.startswith("127.")
        if self._key and address.startswith("http:") and not is_loopback:
            cli.warn(f"the key in {self._key_name} goes to {address} unencrypted")

    # --- one exchange -----------------------------------------------------------------------------------------

    async def send(self, replica: Replica, body: Body, wait: Wait, fresh: bool) -> Body:
        """One exchange. Raises RefusedError, NoAnswerError, or CaiError for what no repetition fixes."""
        import openai

        session = self._sessions[asyncio.get_running_loop()]
        client = self._connect(session, fresh, replica.address)
        extra = {name: value for name, value in body.items() if name != "messages"}
        try:
            async with session.watch.limit(wait):
                raw = await client.chat.completions.with_raw_response.create(
                    model=self.model, messages=body["messages"], extra_body=extra
                )
            return check_answer(json.loads(raw.http_response.content))
        except openai.APIStatusError as error:
            raise self._explain_status(replica, error.status_code, error.response.headers, error.body) from None
        except SilenceError as silence:
            why = " (the others came sooner)" if silence.is_learned else " (--request-timeout)"
            why = "" if wait.most else why
            raise NoAnswerError(f"{replica.address}: {silence}{why}", silence=silence) from None
        except openai.OpenAIError as error:
            raise NoAnswerError(f"{replica.address}: {self.safe(error.__cause__ or error)}") from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            reason = self.safe(error)
            raise NoAnswerError(f"{replica.address}: the answer is no chat completion ({reason})") from None

    def _explain_status(self, replica: Replica, status: int, headers: Mapping[str, str], body: object) -> Exception:
        """The error of a status other than 200."""
        message = f"{replica.address}: {status} {self.safe(error_text(body))}".rstrip()
        if 300 <= status < 400:
            # Never followed: the key and the conversation would go to an address that nobody named.
            target = self.safe(headers.get("location", "elsewhere"))
            return CaiError(
                f"{replica.address}: {status}, a redirect to {target}, which is not followed. If that is "
                "right, name it with --endpoint"
            )
        remedies = {
            401: f"The server does not accept {'the key in' if self._key else 'no key in'} {self._key_name}",
            402: "The account can't pay: run the same command again when it can",
            404: f"Check the address, and the model's name ({self.model})",
        }
        if status in remedies or (status == 403 and not self.has_answered):
            return CaiError(f"{message}. {remedies.get(status, remedies[401])}")
        if status not in (408, 409, 425, 429) and status < 500:
            return RefusedError(message)
        wait = retry_after(headers)
        if wait and wait > LONGEST_WAIT:
            return CaiError(f"{message}. It asks to wait {wait:.0f} s: run the same command again then")
        return NoAnswerError(message, wait)

    async def list_models(self, replica: Replica, seconds: float) -> Any:
        """What a server answers to /models, within so many seconds; raises whatever goes wrong."""
        client = self._connect(self._sessions[asyncio.get_running_loop()], False, replica.address)
        async with asyncio.timeout(seconds):
            raw = await client.models.with_raw_response.list()
        return json.loads(raw.http_response.content)

    # --- the state of the replicas ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Count the silence of the servers from now on."""
        self._answered_at = time.monotonic()

    async def free_replica(self, last: Replica | None) -> Replica:
        """The least loaded replica that does not rest; another than the `last` if they are equal.

        Raises CaiError if there has been no replica for `patience` seconds.
        """
        while True:
            now = time.monotonic()
            if not self.replicas and now - max(self._answered_at, self._emptied_at) > self.patience:
                raise CaiError(
                    f"{self.model}: no replica for {self.patience:g} s. What is done is kept: start one, and run the "
                    "same command again"
                )
            ready = [replica for replica in self.replicas if replica.is_ready(now)]
            if ready:
                return min(ready, key=lambda each: (each.failures >= DOWN_AFTER, each.in_flight, each is last))
            await asyncio.sleep(0.05)

    def add(self, replica: Replica) -> None:
        """Take a further replica into use."""
        self._warn_of_open_key(replica.address)
        self.replicas.append(replica)

    def retire(self, replica: Replica) -> None:
        """Send a replica nothing more. Its requests under way may end, or are sent again to others."""
        self.replicas.remove(replica)
        self._emptied_at = time.monotonic()

    def note_answer(self, replica: Replica) -> None:
        """Count an answer, or a refusal, as a sign of life."""
        self._answered_at = time.monotonic()
        if replica.failures >= DOWN_AFTER:
            cli.note(f"{replica.address} answers again")
        replica.failures = 0

    def note_failure(self, replica: Replica, began: float, failure: NoAnswerError) -> None:
        """Count a failed attempt that began at a time of the monotonic clock; the replica may have to rest."""
        now, wait = time.monotonic(), failure.wait
        if failure.silence and not failure.is_early and not self._warned_of_silence:
            self._warned_of_silence = True
            cli.warn(
                f"{failure}; asked again. If answers take that long, raise --request-timeout or lower --batch-size"
            )
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

    def are_gone(self) -> bool:
        """Whether no server has answered for `patience` seconds."""
        silence = time.monotonic() - max(self._answered_at, self._told_to_wait_until)
        return silence > self.patience and all(replica.failures >= DOWN_AFTER for replica in self.replicas)

    # --- connections ------------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[asyncio.Runner]:
        """An event loop, and what belongs to it for as long as it lasts."""
        session = _Session(Watch(self.waiting, self._show_waiting))
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self._sessions[loop] = session
            watching = loop.create_task(session.watch.run())
            try:
                yield runner
            finally:
                del self._sessions[loop]
                runner.run(cancel_all([watching]))
                for pool in session.pools.values():
                    runner.run(pool.aclose())
                self.report.counts.waiting = 0

    def _connect(self, session: _Session, fresh: bool, address: str) -> Any:
        """The client of a session for an address, made when it is first needed."""
        import openai

        # How long an answer may take is the watch's business.
        timeout = openai.Timeout(None, connect=min(10.0, self.waiting.longest))
        if fresh not in session.pools:
            kept = 0 if fresh else self.connections
            limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_keepalive_connections=kept)
            pool = openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout, limits=limits)
            session.pools[fresh], session.clients[fresh] = pool, {}
        clients = session.clients[fresh]
        if address not in clients:
            clients[address] = openai.AsyncOpenAI(
                base_url=address,
                api_key=self._key or "none",
                admin_api_key="",
                max_retries=0,
                timeout=timeout,
                http_client=session.pools[fresh],
            )
        return clients[address]

    def _show_waiting(self, longest: float) -> None:
        """Put the requests under way into the progress line. longest: seconds that the oldest has waited."""
        counts = self.report.counts
        counts.waiting = sum(replica.in_flight for replica in self.replicas)
        cli.show_in_progress(counts.describe(longest))

    def safe(self, value: object) -> str:
        """A server's text, fit for a line of ours: short, printable, and without the key."""
        text = str(value).replace(self._key, "***") if self._key else str(value)
        return shorten("".join(character if character.isprintable() else " " for character in text), 300)


async def cancel_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
