"""A chat server on our own local engine, for what `transformers serve` lacks: log-probabilities, going on from
a begun answer, and refusing fields by name as hosted APIs do.

    with SmallServer("tiny", refuses={"seed"}) as server: ... server.address

One request at a time, on loopback. Leaves out all that the tests do not need.
"""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cai.models.engine import Request, Sampling
from cai.models.loading import load_engine

# One for all servers: they share this process's engine, and an answer may be under way after its server has ended.
_LOCK = threading.Lock()


class SmallServer:
    """Runs in threads of its own while it is entered.

    Args:
        refuses: {name of a field: message}; a request with the field is answered with 400 and the message.
        most_top: the most log-probabilities it gives; more are refused.
        continues: whether `continue_final_message` is heeded; where not, it is ignored in silence.
        context: tokens of prompt and answer; more are refused.
        poison: a word; a conversation with it is answered with 500, always.
    Attributes:
        requests: the bodies that came.
    """

    def __init__(self, model="tiny", *, refuses=None, most_top=20, continues=True, context=512, poison=None):
        self.engine = load_engine(str(model), device="cpu", dtype="float32")
        self.refuses, self.most_top, self.continues = refuses or {}, most_top, continues
        self.context, self.poison = context, poison
        self.requests: list[dict] = []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with _LOCK:
                    outer.requests.append(body)
                    status, answer = outer.answer(body)
                body_bytes = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body_bytes)))
                self.end_headers()
                self.wfile.write(body_bytes)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, body: dict) -> tuple[int, dict]:
        for field, message in self.refuses.items():
            if field in body or any(field == message["role"] for message in body["messages"]):
                return 400, {"error": {"message": message}}
        if body.get("top_logprobs", 0) > self.most_top:
            return 400, {"error": {"message": f"top_logprobs must be at most {self.most_top}"}}
        messages = body["messages"]
        if self.poison and self.poison in messages[-1]["content"]:
            return 500, {"error": {"message": "something went wrong"}}
        if messages[-1]["role"] == "assistant" and not (self.continues and body.get("continue_final_message")):
            # As a template closes it: an empty turn of the user's stands for its end.
            messages = [*messages, {"role": "user", "content": ""}]
        wanted = body.get("max_tokens") or body.get("max_completion_tokens")
        ids = self.engine.chat.encode(self.engine.chat.render(messages))
        if len(ids) + wanted > self.context:
            return 400, {"error": {"message": f"This model's maximum context length is {self.context} tokens"}}
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": ""}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [self._first(ids, body["top_logprobs"])]}
            new_tokens = 1
        else:
            sampling = Sampling(wanted, body.get("temperature", 1.0))
            [(_, answer)] = self.engine.generate([Request("", messages, body.get("seed", 0))], sampling)
            choice |= {"finish_reason": answer.finish, "message": {"role": "assistant", "content": answer.text}}
            new_tokens = answer.tokens
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": new_tokens}}

    def _first(self, ids: list[int], most: int) -> dict:
        """The likeliest next tokens, by a plain forward pass."""
        import torch

        with torch.inference_mode():
            logs = self.engine.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        top = logs.topk(most)
        listed = [
            {"token": self.engine.tokenizer.decode([token]), "logprob": value if math.isfinite(value) else -9999.0}
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        return {**listed[0], "top_logprobs": listed}
