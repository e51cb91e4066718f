"""A chat server on loopback that gives the same answer to every question, as some server somewhere gave it.

    with CannedServer({"finish_reason": "abort", "message": {...}}) as server: ... server.address

The greeting of `load_server` and the question whether a prefill is continued are answered plainly. Leaves out all that
the tests do not need.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class CannedServer:
    """Runs in a thread while it is entered.

    Args:
        choice: the choice of each answer, or a function of the request's body that returns it.
        usage: of each answer, or a function of the request's body; None leaves it out.
    Attributes:
        requests: the bodies that came.
    """

    def __init__(self, choice, usage=None):
        self.choice = choice if callable(choice) else lambda _body: choice
        self.usage = usage if callable(usage) else lambda _body: usage
        self.requests: list[dict] = []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                content = json.dumps(outer.answer(body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, body: dict) -> dict:
        usage = self.usage(body)
        is_greeting = body["messages"][-1]["content"] == "Hello"
        plain = {"finish_reason": "stop", "message": {"role": "assistant", "content": "Hello."}}
        choice = {"index": 0, **(plain if is_greeting else self.choice(body))}
        return {"object": "chat.completion", "choices": [choice], **({"usage": usage} if usage else {})}
