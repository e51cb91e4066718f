"""A proxy that spoils some of what goes through it, to stand between a client and a real server.

    python tests/faulty_proxy.py --upstream http://127.0.0.1:8000 --port 8100 --rate 0.2 --seed 0

In a test: `with FaultyProxy("http://127.0.0.1:8000", rate=0.2, seed=0) as proxy: ... proxy.address, proxy.counts`.
The faults are drawn one after the other from a seeded generator, as requests come. Speaks as much HTTP/1.1 as one
request a connection takes; leaves out TLS, chunked requests, and being fast.
"""

import argparse
import asyncio
import random
import threading
from collections import Counter
from urllib.parse import urlsplit

FAULTS = ("drop", "delay", "limit", "error", "half", "garbage", "wrong")


class FaultyProxy:
    """Runs in a thread of its own while it is entered.

    Args:
        rate: share of the requests that are spoiled.
        faults: of FAULTS, or "location URL" (a redirect), or "status N" (an error that echoes the request's headers).
        delay: seconds that a "delay" lasts before the request is passed on.
        dies_after, spoils_after: requests after which all are dropped; before which none is spoiled.
        gather: requests that are not alone wait until so many have once been under way together.
    Attributes:
        address: where it listens, as `http://127.0.0.1:PORT`.
        counts: how often each fault was done; under "passed" what went through, under "most" the most at once.
        headers: of the last request.
    """

    def __init__(
        self,
        upstream: str,
        *,
        rate: float = 0.2,
        seed: int = 0,
        faults=FAULTS,
        delay: float = 1.0,
        port: int = 0,
        dies_after: int | None = None,
        spoils_after: int = 0,
        gather: int = 0,
    ):
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.rate, self.faults, self.delay, self.port = rate, tuple(faults), delay, port
        self.dies_after, self.spoils_after, self.gather = dies_after, spoils_after, gather
        self.draws = random.Random(seed)
        self.counts: Counter = Counter()
        self.under_way, self.headers = 0, {}

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _handle(self, reader, writer) -> None:
        self.under_way += 1
        self.counts["most"] = max(self.counts["most"], self.under_way)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
            self.headers = headers = {name.lower(): value for name, value in headers.items()}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            while self.under_way > 1 and self.counts["most"] < self.gather:
                await asyncio.sleep(0.01)
            fault = self._draw()
            self.counts[fault] += 1
            writer.write(await self._reply(fault, lines, headers, body))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side went away, or the proxy is stopped
        finally:
            self.under_way -= 1
            writer.close()

    def _draw(self) -> str:
        came = self.counts["passed"]
        if self.dies_after is not None and came >= self.dies_after:
            return "drop"
        spoiled = self.draws.random() < self.rate and came >= self.spoils_after
        return self.draws.choice(self.faults) if spoiled else "passed"

    async def _reply(self, fault: str, lines: list[str], headers: dict, body: bytes) -> bytes:
        if fault == "drop":
            return b""
        if fault == "limit":
            return _response("429 Too Many Requests", b'{"error": {"message": "slow down"}}', "Retry-After: 1")
        if fault == "error":
            return _response("500 Internal Server Error", b"Internal Server Error", kind="text/plain")
        if fault == "garbage":
            return _response("200 OK", b'{"choices": [{"mess\xff\x00 \x1b[31m')
        if fault == "wrong":
            return _response("200 OK", b'{"choices": [{"message": {"content": 7}}], "usage": []}')
        if fault.startswith("location "):
            return _response("307 Temporary Redirect", b"", f"Location: {fault.removeprefix('location ')}")
        if fault.startswith("status "):
            message = f'{{"error": {{"message": "you sent {headers.get("authorization", "")}"}}}}'
            return _response(f"{fault.removeprefix('status ')} No", message.encode())
        if fault == "delay":
            await asyncio.sleep(self.delay)
        answer = await self._pass_on(lines, body)
        return answer[: len(answer) - len(answer) // 3] if fault == "half" else answer

    async def _pass_on(self, lines: list[str], body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self.upstream)
        kept = [line for line in lines[1:] if line and not line.lower().startswith(("connection:", "accept-encoding:"))]
        writer.write("\r\n".join([lines[0], *kept, "Connection: close", "", ""]).encode("latin-1") + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        return answer


def _response(status: str, body: bytes, *more: str, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with FaultyProxy(options.upstream, rate=options.rate, seed=options.seed, port=options.port) as running:
        print(running.address, flush=True)
        running._thread.join()
