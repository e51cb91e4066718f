"""An engine for tests: a program that takes vLLM's options and serves OpenAI's chat API, with canned texts.

    python tests/stub_engine.py serve FOLDER --port 8000 --served-model-name NAME
    STUB_ENGINE='{"state": "starts", "die_at": 5}' python tests/stub_engine.py serve ...

Started by its path it is an executable for --engine-path. STUB_ENGINE is a JSON object:
  die_at: the first process that is started kills itself at this request (1: the first after the greeting).
  dies_always: every process that is started does.
  state: a folder, in which every start leaves a file named by its process, with the command line.
  seconds: that each answer takes.
  fails: text to print before it ends with exit code 1 instead of serving. fails_first: the same, once.
  starts_child: start a child that leaves the process group and lives on.
  ignores_sigterm: SIGTERM has no effect.
Leaves out any model: an answer is made of the question's letters, and log-probabilities prefer the first label.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BEHAVIOUR = json.loads(os.environ.get("STUB_ENGINE", "{}"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--served-model-name", required=True)
    for option in ("--dtype", "--max-logprobs", "--max-model-len", "--generation-config"):
        parser.add_argument(option)
    for option in ("--tensor-parallel-size", "--data-parallel-size"):
        parser.add_argument(option, type=int, default=1)
    parser.add_argument("--enable-prefix-caching", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    return parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""
    answered = 0

    def send(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send({"data": [{"id": self.name}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != self.name:
            return self.send({"error": {"message": f"no model {body['model']}"}}, 404)
        question = body["messages"][-1]["content"]
        if question != "Hello":
            type(self).answered += 1
            if self.answered == BEHAVIOUR.get("die_at") and (BEHAVIOUR.get("dies_always") or is_first_start()):
                print("RuntimeError: CUDA error: device-side assert triggered", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(BEHAVIOUR.get("seconds", 0))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer(question)}}
        if body.get("logprobs"):
            top = [{"token": token, "logprob": value} for token, value in (("A", -0.4), ("B", -1.6))]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        tokens = sum(len(message["content"].split()) for message in body["messages"])
        self.send({"choices": [choice], "usage": {"prompt_tokens": tokens, "completion_tokens": 4}})

    def log_message(self, *_):
        pass


def answer(question: str) -> str:
    return f"Answer to {' '.join(question.split())[-40:]}"


def is_first_start() -> bool:
    return len(list(Path(BEHAVIOUR["state"]).iterdir())) == 1


def main():
    options = parse()
    (Path(BEHAVIOUR["state"]) / str(os.getpid())).write_text(json.dumps(sys.argv[1:]))
    if BEHAVIOUR.get("ignores_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if BEHAVIOUR.get("starts_child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        (Path(BEHAVIOUR["state"]) / str(child.pid)).write_text("child")
    if not Path(options.model).exists():
        sys.exit(f"OSError: {options.model} does not appear to have a file named config.json")
    if text := BEHAVIOUR.get("fails") or (is_first_start() and BEHAVIOUR.get("fails_first")):
        print(text, file=sys.stderr)
        sys.exit(1)
    Handler.name = options.served_model_name
    print(f"serving {options.model} on port {options.port}", flush=True)
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
