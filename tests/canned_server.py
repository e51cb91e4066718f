"""A chat server on loopback that gives the same answer to every question, as some server somewhere gave it.

    with CannedServer({"finish_reason": "abort", "message": {...}}) as server: ... server.address

The greeting of `load_server` and the question whether a prefill is continued are answered plainly. With `fault` it
fails as flaky servers do, on chosen requests. Leaves out all that the tests do not need.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class CannedServer:
    """Runs in a thread while it is entered.

    Args:
        choice: the choice of each answer, or a function of the request's body that returns it.
        usage: of each answer, or a function of the request's body; None leaves it out.
        fault: what befalls a request, by its number from 0 and its body: a time in seconds that its answer takes,
            "hang" (no answer, the connection stays open), "half" (closed in the middle of the answer), "die" (no
            answer, and none to any later request), a status and a message, or None.
        models: what it answers to /models; None: 404.
    Attributes:
        requests: the bodies that came. ports: the client's port of each.
        faults: what befell each.
    """

    def __init__(self, choice, usage=None, fault=None, models=None):
        self.choice = choice if callable(choice) else lambda _body: choice
        self.usage = usage if callable(usage) else lambda _body: usage
        self.fault, self.models = fault or (lambda _number, _body: None), models
        self.requests: list[dict] = []
        self.ports: list[int] = []
        self.faults: list = []
        self._lock, self._port = threading.Lock(), 0

    def __enter__(self):
        self.start()
        return self

    def start(self) -> None:
        """Listen, after `stop` at the same port again."""
        outer, self._ended = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    fault = "closed" if outer._ended.is_set() else outer.fault(len(outer.requests), body)
                    outer.requests.append(body)
                    outer.ports.append(self.client_address[1])
                    outer.faults.append(fault)
                    if fault == "die":
                        outer.stop()
                if fault == "hang":
                    outer._ended.wait(60)
                if fault in ("hang", "die", "closed"):
                    self.close_connection = True
                elif isinstance(fault, tuple):
                    self.send(fault[0], {"error": {"message": fault[1]}})
                else:
                    time.sleep(fault if isinstance(fault, int | float) else 0)
                    self.send(200, outer.answer(body), cut=fault == "half")

            def do_GET(self):
                self.send(200 if outer.models else 404, outer.models or {})

            def send(self, status, body, cut=False):
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
                self.close_connection = self.close_connection or cut

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(OSError):  # the client gave up
                    super().handle()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if not self._ended.is_set():
            self._ended.set()
            self._server.shutdown()
            self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def answer(self, body: dict) -> dict:
        usage = self.usage(body)
        is_greeting = body["messages"][-1]["content"] == "Hello"
        plain = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}
        choice = {"index": 0, **(plain if is_greeting else self.choice(body))}
        return {"object": "chat.completion", "choices": [choice], **({"usage": usage} if usage else {})}
