"""The judge, or a reward model, as an HTTP service that other trainers ask for rewards: `judge.py --serve`.

    server = RewardServer("127.0.0.1:8000", ask, key=None)
    with server: server.work()                            # until Ctrl-C

The protocol is that of OpenRLHF 0.11 (`serve_rm.py`): POST /get_reward with {"query": [...], "prompts": [...],
"labels": [...]} answers {"rewards": [...], "scores": [...], "extra_logs": {}}. Requests of many clients are scored
together. A response without a score makes the whole request an error: there is never a number in its place. Leaves out
what the rewards are (serving.py), TLS, and any client beyond templates/launch/reward_function.py.
"""

import hmac
import json
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from cai.base import cli
from cai.base.errors import CaiError, InputError, shorten
from cai.data.dialogue import as_messages, cut_at_end_token

KEY_NAME = "CAI_SERVICE_KEY"

MOST_BYTES = 8 << 20  # of one request

MOST_TEXTS = 512  # responses in one request

MOST_QUEUED = 4096  # responses that wait for their score

MOST_CONNECTIONS = 256

IDLE = 60.0  # seconds that a client may be silent in the middle of a request, or between two

GATHER = 0.005  # seconds to wait for further requests of a batch

_ROLES = {"model": "assistant"}

# Conversations as chat templates render them: a turn of ChatML, Llama 3 and Gemma, and what comes around the turns.
_TURNS = (
    re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>\n?", re.DOTALL),
    re.compile(r"<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", re.DOTALL),
    re.compile(r"<start_of_turn>(user|model)\n(.*?)<end_of_turn>\n?", re.DOTALL),
)
_AROUND = re.compile(
    r"(?:<bos>|<s>|<\|begin_of_text\|>)?\s*(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>"
    r"|<start_of_turn>model)\s*(?:<think>\s*</think>\s*)?"
)
_CONTROL = re.compile(r"<\|[^\s|]{1,40}\|>|<(?:start|end)_of_turn>")


class RequestError(Exception):
    """A request that gets no rewards; status: of HTTP."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Text:
    """A response to score.

    prompt: messages. reference: a response to compare it with, or None. key: the row's id, or None.
    """

    prompt: list[dict[str, Any]]
    response: str
    reference: str | None = None
    key: str | None = None


Ask = Callable[[Sequence[Text]], list[float | RequestError]]


@dataclass
class _Job:
    """One request that waits for its rewards."""

    texts: list[Text]
    rewards: list[float | RequestError] = field(default_factory=list)
    is_done: threading.Event = field(default_factory=threading.Event)


def read_request(body: bytes) -> list[Text]:
    """The responses of a request. Raises RequestError for anything but the protocol's JSON."""
    try:
        content = json.loads(body)
        queries, prompts = content["query"], content["prompts"]
        size = len(queries)
        labels, keys = (content.get(name) or [None] * size for name in ("labels", "ids"))
        fields = [queries, prompts, labels, keys]
        if not all(isinstance(each, list) and len(each) == size for each in fields) or not size:
            raise ValueError("lists that are empty or differ in length")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = '{"query": [text, ...], "prompts": [text or messages, ...], "labels": [text, ...]}'
        raise RequestError(400, f"not a request for rewards ({shorten(repr(error))}); expected {expected}") from error
    if size > MOST_TEXTS:
        raise RequestError(413, f"{size} responses in one request; at most {MOST_TEXTS}")
    texts = []
    for number, (query, prompt, label, key) in enumerate(zip(*fields, strict=True)):
        try:
            texts.append(_read_text(query, prompt, label, key))
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(400, f"text {number}: {shorten(error)}") from error
    return texts


def _read_text(query: Any, prompt: Any, label: Any, key: Any) -> Text:
    """One response. Where the prompt is text, the query begins with it; where it is messages, the query is the
    response alone. Raises ValueError for what is neither."""
    if not isinstance(query, str):
        raise ValueError("the query is not a text")
    if isinstance(prompt, str):
        if not query.startswith(prompt):
            raise ValueError("the query does not begin with its prompt")
        query, messages = query[len(prompt) :], parse_rendered(prompt)
    else:
        messages = prompt
    if not isinstance(messages, list) or not messages:
        raise ValueError("the prompt is neither a text nor a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("a message of the prompt has no content")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"the role {shorten(message.get('role'))!r} in the prompt")
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt does not end with the user's message")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    reference = label if isinstance(label, str) and label.strip() else None
    return Text(messages, cut_at_end_token(query).strip(), reference, None if key is None else str(key))


def parse_rendered(prompt: str) -> list[dict[str, Any]]:
    """The messages of a prompt as the chat templates of ChatML, Llama 3 and Gemma render it; of a text without control
    tokens, one message or those of a transcript.

    Raises ValueError for a text with other control tokens: what it means is not guessed.
    """
    if not _CONTROL.search(prompt):
        return as_messages(prompt)
    for turn in _TURNS:
        if turns := turn.findall(prompt):
            rest = turn.sub("", prompt)
            if not _AROUND.fullmatch(rest):
                break
            return [{"role": _ROLES.get(role, role), "content": content.strip()} for role, content in turns]
    raise ValueError("a prompt in an unknown chat template; send messages (templates/launch/reward_function.py does)")


class RewardServer:
    """The HTTP server in threads of its own, and the loop that scores, which the caller runs (`work`).

    Args:
        address: HOST:PORT or PORT, on loopback unless a host is named; port 0 takes a free one.
        ask: the rewards of a batch, or the error of each text that has none.
        batch: most responses in one call of `ask`.
        key: what a client has to send as `Authorization: Bearer KEY`; None: nothing.
    Attributes:
        url: where it listens, after entering.
        counts: requests that were answered, refused, failed, and broken off by the client.

    Raises InputError for an address that can't be taken, and for one beyond loopback without a key.
    """

    def __init__(self, address: str, ask: Ask, *, batch: int = 256, key: str | None = None, name: str = ""):
        host, _, port = address.rpartition(":")
        host = host.strip("[]") or "127.0.0.1"
        if not port.isdigit() or int(port) > 65535:
            raise InputError(f"{address!r} is no address", where="--serve", expected="PORT or HOST:PORT")
        if not key and host not in ("localhost", "::1") and not host.startswith("127."):
            raise InputError(
                f"{host} can be reached from other machines, and no key is set",
                where="--serve",
                remedy=f"Put a key into {KEY_NAME}, or serve on loopback",
            )
        self._host, self._port, self._ask, self._batch, self._key = host, int(port), ask, batch, key
        self.name, self.counts = name, dict.fromkeys(("answered", "refused", "failed", "broken_off", "scored"), 0)
        self._jobs: queue.Queue[_Job] = queue.Queue()
        self._queued, self._lock = 0, threading.Lock()
        self.slots = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def __enter__(self) -> Self:
        try:
            self._server = _Server((self._host, self._port), self)
        except OSError as error:
            raise InputError(
                f"cannot listen on {self._host}:{self._port} ({error.strerror or error})",
                where="--serve",
                remedy="Stop what listens there, or take another port",
            ) from error
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- the loop that scores ---------------------------------------------------------------------------------

    def work(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Score what is asked for, batch after batch, until `is_over` or an interrupt."""
        while not is_over():
            with suppress(queue.Empty):
                self._score(self._take_batch(self._jobs.get(timeout=0.2)))

    def _take_batch(self, first: _Job) -> list[_Job]:
        """The first job, and those that come at once, up to a batch of responses."""
        jobs, size, end = [first], len(first.texts), time.monotonic() + GATHER
        while size < self._batch:
            try:
                job = self._jobs.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            jobs.append(job)
            size += len(job.texts)
        return jobs

    def _score(self, jobs: list[_Job]) -> None:
        texts = [text for job in jobs for text in job.texts]
        try:
            rewards = self._ask(texts)
        except CaiError as error:
            cli.warn(f"{len(texts)} responses have no score: {error}")
            rewards = [RequestError(500, str(error))] * len(texts)
        rewards = iter(rewards)
        for job in jobs:
            job.rewards = [next(rewards) for _ in job.texts]
            job.is_done.set()
        with self._lock:
            self._queued -= len(texts)

    # --- requests, in threads of the server -------------------------------------------------------------------

    def reward(self, body: bytes) -> dict[str, Any]:
        """The answer to a request. Raises RequestError if there is none."""
        job = _Job(read_request(body))
        with self._lock:
            if self._queued + len(job.texts) > MOST_QUEUED:
                raise RequestError(503, f"{self._queued} responses wait for their score; ask again later")
            self._queued += len(job.texts)
        self._jobs.put(job)
        job.is_done.wait()
        failures = [(n, reward) for n, reward in enumerate(job.rewards) if isinstance(reward, RequestError)]
        if failures:
            number, failure = failures[0]
            raise RequestError(
                failure.status, f"{len(failures)} of {len(job.texts)} responses have no score; text {number}: {failure}"
            )
        self.count("scored", len(job.texts))
        return {"rewards": job.rewards, "scores": job.rewards, "extra_logs": {}}

    def is_allowed(self, header: str) -> bool:
        return self._key is None or hmac.compare_digest(header.encode(), f"Bearer {self._key}".encode())

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.counts[name] += number


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], rewards: RewardServer):
        self.rewards = rewards
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.rewards.slots.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.rewards.slots.release()

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        self.rewards.count("broken_off")
        if not isinstance(error := sys.exception(), OSError):  # not of the connection: a fault of ours
            cli.warn(f"a request was not answered: {error!r}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", IDLE
    server_version, sys_version = "cai", ""
    server: _Server

    def do_GET(self) -> None:
        if self.path != "/health":
            self._send(404, {"error": "GET /health and POST /get_reward are here"})
            return
        self._send(200, {"status": "ok", "model": self.server.rewards.name})

    def do_POST(self) -> None:
        rewards = self.server.rewards
        try:
            answer = rewards.reward(self._read_body())
        except RequestError as error:
            rewards.count("failed" if error.status in (422, 500) else "refused")
            self._send(error.status, {"error": str(error)})
        else:
            self._send(200, answer)
            rewards.count("answered")

    def _read_body(self) -> bytes:
        """The body of a request. Raises RequestError for one that is refused without being read."""
        self.close_connection = True  # what is refused may not have been read
        if not self.server.rewards.is_allowed(self.headers.get("Authorization", "")):
            raise RequestError(401, f"the key is missing or wrong: Authorization: Bearer, as in {KEY_NAME}")
        if self.path.split("?")[0] != "/get_reward":
            raise RequestError(404, "POST /get_reward is here")
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise RequestError(411, "a request needs its Content-Length")
        if int(length) > MOST_BYTES:
            raise RequestError(413, f"{length} bytes; at most {MOST_BYTES}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client has gone")
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        return body

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
