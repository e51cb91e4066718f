"""Servers that a command starts for a model of this machine, uses through the client of servers.py, and stops.

    engine = serve("my-org/my-model", EngineChoice(engine="vllm"))
    for request, generation in engine.generate(requests, Sampling()): ...
    stop_engines()

Each server is the child of a supervisor, which ends it when this process ends, however it does. One that dies is
started again, twice; the client asks what was under way once more. One model is served at a time. Leaves out the
command lines (launchers.py) and everything about requests (servers.py).
"""

import atexit
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cai.base import cli, requests
from cai.base.engine_options import EngineChoice
from cai.base.errors import CaiError, InputError, shorten
from cai.models import launchers
from cai.models.engine import Generation, RequestT, Sampling
from cai.models.launchers import HOST, Serving
from cai.models.servers import IN_FLIGHT, load_server

RESTARTS = 2  # of each server

PORTS = 3  # ports tried, where another program takes the free one before the server does

GRACE = 5.0  # seconds between SIGTERM and SIGKILL

REQUEST_TIMEOUT = 600.0  # seconds: whether the engine lives is known, and on a CPU answers are slow

START_LIMIT = 3600.0  # seconds until the model is loaded

NOTE_EVERY = 30.0  # seconds between two lines of progress while it is

LOG_LINES = 200  # of each server, kept in memory

# Keys are for servers elsewhere: these variables would make an engine ask for one, or are no business of its.
_KEYS = ("VLLM_API_KEY", "LLAMA_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")

_NO_KEY = "CAI_ENGINE_KEY"  # never set

_SUPERVISOR = Path(__file__).with_name("supervisor.py")

_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE|couldn't bind|bind.{0,40}failed", re.IGNORECASE)

# What a log says, and what to do then.
_REMEDIES = (
    (r"no space left|errno 28|disk quota", "Make room on the disk (its caches are below ~/.cache and in /dev/shm)"),
    (
        r"unrecognized argument|no such option|unknown argument|invalid argument|invalid choice|error: argument",
        "Check --engine-args, and whether this version has the options of references/engines.md",
    ),
    (
        r"out of memory|OutOfMemory|no available memory|larger than the (available|maximum).{0,40}KV|allocate memory",
        "Spread the model over more GPUs (--tensor-parallel-size), or shorten its context: "
        "--engine-args '--max-model-len 4096'",
    ),
    (
        r"not supported for now|unrecognized model|are not supported|does not recognize this architecture"
        r"|unknown model architecture|no module or parameter named|error loading model|can't load|cannot load",
        "The engine can't read this model: leave --engine out, or take another engine",
    ),
    (
        r"ModuleNotFoundError|ImportError|cannot open shared object",
        "Repair the engine's environment, or install it again",
    ),
)


class Server:
    """One server with its supervisor. It starts at once, and again when it dies.

    Attributes:
        port, log: where it listens; the last lines of its output.
        restarts: how often it was started again. is_dead: it has died once too often.
        was_ready: whether it has answered; before that it is not started again.
    """

    def __init__(self, launcher: launchers.Launcher, serving: dict[str, Any], environment: dict[str, str]):
        self.launcher, self.serving, self.environment = launcher, serving, environment
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.restarts, self.is_dead, self.was_ready, self.is_stopping = 0, False, False, False
        self.code, self._lock = 0, threading.Lock()
        self.choose_port()
        self.start()

    def choose_port(self) -> None:
        """A free port; the system does not give it away again soon, but it can't be kept for the server."""
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port: int = free.getsockname()[1]

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    @property
    def command(self) -> list[str]:
        return self.launcher.command(Serving(**self.serving, port=self.port))

    def start(self) -> None:
        """Start the process, its supervisor and the thread that follows them."""
        supervisor = [sys.executable, "-P", str(_SUPERVISOR), str(os.getpid()), str(GRACE)]
        try:
            self._process = subprocess.Popen(
                [*supervisor, *self.command],
                stdin=subprocess.PIPE,  # closed when this process ends
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        except OSError as error:
            raise CaiError(f"{self.launcher.choice.label} can't be started: {error}") from error
        self.follower = threading.Thread(target=self._follow, args=[self._process], daemon=True)
        self.follower.start()

    def _follow(self, process: Any) -> None:
        """Read the log until the process has ended, and start it again."""
        while line := process.stdout.readline(4000):
            text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode(errors="replace"))
            if text := "".join(letter for letter in text if letter.isprintable()).rstrip():
                self.log.append(text)
        self.code = process.wait()
        with self._lock:
            if self.is_stopping or not self.was_ready:
                return
            death = f"{self.launcher.choice.label} on port {self.port} has {self.describe_end()}"
            if self.restarts == RESTARTS:
                self.is_dead = True
                cli.warn(f"{death}; it is not started again")
                return
            self.restarts += 1
            cli.warn(f"{death}; it is started again ({self.restarts} of {RESTARTS})")
            try:
                self.start()
            except CaiError as error:
                self.log.append(str(error))
                self.is_dead = True

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def describe_end(self) -> str:
        """How it ended, in words."""
        if self.code <= 128:
            return f"ended with exit code {self.code}"
        with contextlib.suppress(ValueError):
            return f"been ended by {signal.Signals(self.code - 128).name}"
        return f"ended with exit code {self.code}"

    def is_ready(self) -> bool:
        """Whether it answers, and with our model: another server may have the port."""
        status, _ = _get(f"http://{HOST}:{self.port}{self.launcher.health}")
        if status == 200 and self.launcher.takes_name:
            status, body = _get(f"{self.address}/models")
            status = 200 if json.dumps(self.serving["name"]) in body else 404
        self.was_ready = self.was_ready or (status == 200 and not self.has_ended)
        return self.was_ready

    def stop(self) -> None:
        """Stop it, and return when it has gone."""
        with self._lock:
            self.is_stopping = True
        with contextlib.suppress(OSError):
            self._process.terminate()  # a process forked from this one may hold the pipe, too
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(GRACE + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_lines(self) -> str:
        """The end of its log, after the errors further up that it reports."""
        lines = list(self.log)
        errors = [line for line in lines[:-8] if re.search(r"\b\w*(Error|Exception)\b.*: |\berror:", line)]
        return "\n  ".join(["", *(shorten(line, 300) for line in [*dict.fromkeys(errors[-4:]), *lines[-8:]])])

    def remedy(self) -> str:
        """What to do about its end, by its log."""
        text = "\n".join(self.log)
        if self.code - 128 == signal.SIGILL or "illegal instruction" in text.lower():
            return "This build of the engine does not run on this processor: install another one"
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, text, re.IGNORECASE):
                return remedy
        return f"Start it yourself to see its whole log: {shlex.join(self.command)}"


def _get(url: str) -> tuple[int, str]:
    """(status, text) of a page on this machine, without any proxy; (0, "") where there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status, answer.read(1 << 20).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (OSError, ValueError):
        return 0, ""


class ManagedEngine:
    """A model behind servers that this process has started. `serve` makes one.

    It has the attributes of the client (`ServerEngine`) besides.
    """

    context: int | None = None

    def __init__(self, model: str, choice: EngineChoice, dtype: str, device: str | None):
        self.name, self.choice, self.dtype, self.device = model, choice, dtype, device
        self.launcher = launchers.find_launcher(choice)
        self.served = launchers.served_model(model, choice)
        self.batch_size = IN_FLIGHT
        self.servers: list[Server] = []
        self.abilities: dict[str, bool] = {}
        self._client: Any = None
        self._context: Any = None  # click's, of the command that the client counts for

    @property
    def scores_choices(self) -> bool:
        """Whether it gives log-probabilities."""
        with self._explain_death():
            return bool(self._client_of_running().scores_choices)

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """As for `ServerEngine`. CaiError with the end of the log if the servers have died too often."""
        with self._explain_death():
            yield from self._client_of_running().generate(requests, sampling, done)

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """As for `ServerEngine`. CaiError with the end of the log if the servers have died too often."""
        with self._explain_death():
            yield from self._client_of_running().score(requests, labels)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._client_of_running(), name)

    @property
    def manifest_fields(self) -> dict[str, Any]:
        """For the manifest: the engine, its version and its command line, without the port and the served name."""
        serving = Serving(self.served, "{name}", "{port}", self.dtype, self.device)
        fields = {
            "name": self.choice.name,
            "version": self.launcher.version,
            "command": shlex.join(self.launcher.command(serving)),
            "replicas": self.choice.replicas,
            "restarts": sum(server.restarts for server in self.servers),
            **self.abilities,
        }
        return {"engine": fields}

    def use(self, batch_size: int | None) -> None:
        """Start the servers if they do not run. batch_size: requests in flight; None: the client's default for each."""
        self.batch_size = batch_size or IN_FLIGHT * self.choice.replicas
        self._client_of_running()
        if self._context is not click.get_current_context(silent=True):
            self._connect()  # another step of run.py
        self._client.batch_size = self.batch_size

    # --- starting and stopping --------------------------------------------------------------------------------

    def _client_of_running(self) -> Any:
        """The client; the servers are started if they do not run."""
        global _running
        if _running is not self:
            stop_engines()
            _running = self
            _stop_at_end()
            try:
                self._start()
            except BaseException:
                stop_engines()
                raise
        return self._client

    def _start(self) -> None:
        name = f"{Path(self.name).name[:40] or 'model'}-{secrets.token_hex(4)}" if self.launcher.takes_name else None
        serving = {"model": self.served, "name": name or self.served, "dtype": self.dtype, "device": self.device}
        choice = self.choice
        _leave_out_proxies()
        environments = list(_environments(choice, self.device))
        count = f"{choice.replicas} servers" if choice.replicas > 1 else "a server"
        cli.note(f"starting {count} of {self.launcher.label} for {self.name}")
        began = time.monotonic()
        self.servers.clear()
        for environment in environments:
            self.servers.append(Server(self.launcher, serving, environment))
        for server in self.servers:
            self._wait_until_ready(server, began)
        self._connect()
        with self._explain_death():
            self.abilities = self._client.probe()
        words = ", ".join(f"{name.replace('_', ' ')} {'yes' if can else 'no'}" for name, can in self.abilities.items())
        cli.note(f"{self.launcher.label} serves {self.name} after {time.monotonic() - began:.0f} s ({words})")

    def _connect(self) -> None:
        """Make the client of the running command, which counts its requests."""
        self._context = click.get_current_context(silent=True)
        is_typed = "--request-timeout" in requests.command_options()
        try:
            # Patience for a restart, until `_give_up_when_dead` takes it away.
            self._client = load_server(
                f"openai:{self.servers[0].serving['name']}",
                endpoints=[server.address for server in self.servers],
                batch_size=self.batch_size,
                key_name=_NO_KEY,
                timeout=None if is_typed else REQUEST_TIMEOUT,
                patience=START_LIMIT,
                seeds=self._stands_seeds,
            )
        except CaiError as error:
            ended = [server for server in self.servers if server.has_ended or server.restarts]
            if not ended:
                raise
            raise self._start_error(ended[0], "it answered first, and not to the first question") from error
        self._client.name = f"{self.name} ({self.choice.label})"
        threading.Thread(target=self._give_up_when_dead, args=[self._client, self.servers], daemon=True).start()

    @property
    def _stands_seeds(self) -> bool:
        """Whether requests may carry seeds: vLLM on a CPU dies on them (0.32)."""
        on_cpu = "cpu" in self.launcher.version or not visible_gpus(self.device)
        return not (self.choice.engine == "vllm" and on_cpu)

    def _wait_until_ready(self, server: Server, began: float) -> None:
        """Return when the server answers. Raises InputError if it ends before."""
        ports, noted = 1, time.monotonic()
        while not server.is_ready():
            now = time.monotonic()
            if server.has_ended:
                server.follower.join(5)  # it reads the log
                if ports == PORTS or not _PORT_TAKEN.search("\n".join(server.log)):
                    raise self._start_error(server)
                ports += 1
                server.log.clear()
                server.choose_port()
                server.start()
            if now - began > START_LIMIT:
                raise self._start_error(server, f"it has not answered for {START_LIMIT:.0f} s")
            if now - noted > NOTE_EVERY:
                noted = now
                last = f": {shorten(server.log[-1], 120)}" if server.log else ""
                cli.note(f"{self.choice.label} has been starting for {now - began:.0f} s{last}")
            time.sleep(0.1)

    def _start_error(self, server: Server, reason: str = "") -> InputError:
        reason = reason or f"it has {server.describe_end()}"
        return InputError(
            f"{self.launcher.label} does not serve {self.name}: {reason}. The last lines of its "
            f"log:{server.last_lines()}\n",
            where="--engine" if self.choice.engine else "--engine-command",
            remedy=server.remedy(),
        )

    @staticmethod
    def _give_up_when_dead(client: Any, servers: list[Server]) -> None:
        """Take the client's patience when no server will come back."""
        while not all(server.is_dead for server in servers):
            if all(server.is_stopping for server in servers):
                return
            time.sleep(0.2)
        client.give_up()

    @contextlib.contextmanager
    def _explain_death(self) -> Iterator[None]:
        """Replace what the client raises where the servers have died by what is known of that."""
        try:
            yield
        except CaiError as error:
            dead = next((server for server in self.servers if server.is_dead), None)
            if dead is None or not all(server.is_dead for server in self.servers):
                raise
            raise CaiError(
                f"{self.choice.label} has {dead.describe_end()}, after it was started again {RESTARTS} times. The last "
                f"lines of its log:{dead.last_lines()}\n{dead.remedy()}. What is done is kept: the same command "
                "continues"
            ) from error

    def stop(self) -> None:
        """Stop all servers."""
        threads = [threading.Thread(target=server.stop) for server in self.servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


_running: ManagedEngine | None = None

_known: dict[tuple[Any, ...], ManagedEngine] = {}


def serve(
    model: str,
    choice: EngineChoice,
    *,
    key: Hashable = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> ManagedEngine:
    """The engine of a model of this machine, which answers; that of the last call if it is the same.

    Args:
        key: what identifies the model's content besides its name.
        batch_size: requests in flight, over all servers; None: the client's default for each.
    Raises:
        InputError: no such engine, a model that it can't read, or an option that would have no effect.
    """
    if os.name != "posix":
        raise InputError("engines can't be started on this system", where="--engine", expected="Linux or macOS")
    if batch_tokens:
        raise InputError("it would have no effect", where="--batch-tokens", remedy="The engine bounds its batches")
    known = (model, choice, key, device, dtype)
    if known not in _known:
        _known.clear()
        _known[known] = ManagedEngine(model, choice, dtype, device)
    engine = _known[known]
    engine.use(batch_size)
    return engine


def _leave_out_proxies() -> None:
    """Let requests to this machine go past a proxy of the environment, which the client would ask."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if HOST not in hosts.split(",") and any(name.lower() in ("http_proxy", "all_proxy") for name in os.environ):
        os.environ["no_proxy"] = ",".join(filter(None, [hosts, HOST]))


def stop_engines() -> None:
    """Stop the servers that run, if any."""
    global _running
    engine, _running = _running, None
    if engine:
        engine.stop()


def _stop_at_end() -> None:
    """Stop the servers when the command ends that was called first: run.py's steps share them."""
    context = click.get_current_context(silent=True)
    if context:
        context.find_root().call_on_close(stop_engines)
    atexit.register(stop_engines)


def _environments(choice: EngineChoice, device: str | None) -> Iterator[dict[str, str]]:
    """The environment of each server: without keys, and with the GPUs that are its own.

    Raises InputError for too few GPUs. Without any, the servers share the CPU.
    """
    base = {name: value for name, value in os.environ.items() if name not in (*_KEYS, cli.key_name())}
    base |= {"PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": base.get("VLLM_NO_USAGE_STATS", "1")}
    gpus, size = visible_gpus(device), choice.gpus // choice.replicas
    if len(gpus) < size * choice.replicas and (gpus or size > 1):
        raise InputError(
            f"{choice.replicas} x {size} GPUs are needed, and {len(gpus)} are visible",
            where="--replicas" if choice.replicas > 1 else "--tensor-parallel-size",
            remedy="Take fewer, or check CUDA_VISIBLE_DEVICES",
        )
    for number in range(choice.replicas):
        chosen = gpus[number * size : (number + 1) * size]
        yield {**base, "CUDA_VISIBLE_DEVICES": ",".join(chosen)} if gpus or device else dict(base)


def _has_gpu_driver() -> bool:
    return any(map(shutil.which, ("nvidia-smi", "rocm-smi", "amd-smi"))) or any(Path("/dev").glob("nvidia[0-9]*"))


_kept_gpus: list[str] = []


def keep_gpus(names: Iterable[str]) -> None:
    """Note the GPUs that engines may use, before this process restricts itself to one of them for training."""
    _kept_gpus[:] = names


def visible_gpus(device: str | None) -> list[str]:
    """The GPUs that engines may use, as CUDA_VISIBLE_DEVICES names them: that of --device, or all that are visible."""
    if _kept_gpus and device in (None, "cuda"):
        return _kept_gpus
    if device == "cpu" or not (_has_gpu_driver() or "CUDA_VISIBLE_DEVICES" in os.environ):
        return []
    import torch  # seconds, which a machine without GPUs need not spend

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(index) for index in range(torch.cuda.device_count())]
    match = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    if match is None:
        raise InputError(f"{device!r} for an engine", where="--device", expected="cpu, cuda or cuda:1")
    if match[1] is None:
        return names
    if int(match[1]) >= len(names):
        raise InputError(f"no such device: {device}", where="--device", remedy=f"{len(names)} GPUs are visible here")
    return [names[int(match[1])]]
