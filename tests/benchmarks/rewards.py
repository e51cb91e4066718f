"""The reward service under load: many clients, some that break off, a kill in the middle.

    python tests/benchmarks/rewards.py --requests 2000 --clients 32

`judge.py` judges pairs of responses; then `judge.py --serve` is asked for the same pairs, one request per pair, by
clients that use templates/launch/reward_function.py. Before every fifth request a client breaks one off, in the middle
of what it sends or before the answer. Half-way the service is killed and started again. Prints the largest difference
to judge.py's own probabilities, the rate, and the service's memory.
"""

import http.client
import importlib.util
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
BROKEN = 5  # before every so many requests one is broken off


def load_client(port: int):
    """The module that trainers use."""
    spec = importlib.util.spec_from_file_location(
        "reward_function", ROOT / "templates" / "launch" / "reward_function.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ["CAI_REWARD_URL"] = f"http://127.0.0.1:{port}/get_reward"
    return module


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Service:
    """`judge.py --serve` in a process of its own."""

    def __init__(self, *options: object, port: int | None = None, env: dict | None = None):
        self.port = port or free_port()
        self.line = [sys.executable, str(ROOT / "scripts" / "judge.py"), "--serve", str(self.port), "--json"]
        self.line += [str(option) for option in options]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}

    def __enter__(self):
        self.start()
        return self

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.line, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "answers at" in line:
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise RuntimeError("".join(said))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> dict:
        """End it as Ctrl-C does; returns its summary."""
        self.process.terminate()
        summary, _ = self.process.communicate(timeout=60)
        return json.loads(summary)

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

    @property
    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def write_pairs(path: Path, count: int) -> list[dict]:
    rows = [
        {
            "id": f"pair-{n}",
            "prompt": f"How do I open gate {n}?" + " Please." * (n % 7),
            "response_a": f"Ask the owner of gate {n}, and wait." + " Then ask again." * (n % 3),
            "response_b": f"Push it {n} times." + " Harder." * (n % 5),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def break_off(port: int, row: dict, in_the_middle: bool) -> None:
    """Send a request, or half of it, and close the connection."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    body = json.dumps({"query": [row["response_a"]], "prompts": [prompt], "labels": [row["response_b"]]})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest("POST", "/get_reward")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        connection.send(body[: len(body) // 2 if in_the_middle else None].encode())
    except OSError:
        pass  # the service is down at this moment
    finally:
        connection.close()


def measure(folder: Path, requests: int, clients: int, options: list, kill: bool = True) -> dict:
    """Judge pairs, ask the service for the same, and compare."""
    pairs, output = folder / "pairs.jsonl", folder / "judged.jsonl"
    rows = write_pairs(pairs, requests)
    line = [sys.executable, str(ROOT / "scripts" / "judge.py"), "--input", str(pairs), "--output", str(output)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CAI_QUALIFICATION": "off"}
    subprocess.run([*line, *map(str, options)], check=True, env=env, capture_output=True)
    expected = {row["id"]: row["p_a"] for row in map(json.loads, output.read_text().splitlines())}
    waiting, rewards, failures = queue.Queue(), {}, []
    for number, row in enumerate(rows):
        waiting.put((number, row))
    with Service(*options) as service:
        client, memory = load_client(service.port), []

        def work():
            while True:
                try:
                    number, row = waiting.get_nowait()
                except queue.Empty:
                    return
                if number % BROKEN == 0:
                    break_off(service.port, row, in_the_middle=number % (2 * BROKEN) == 0)
                prompt = [{"role": "user", "content": row["prompt"]}]
                try:
                    answer = client.request_rewards([row["response_a"]], [prompt], [row["response_b"]], [row["id"]])
                    rewards[row["id"]] = answer["rewards"][0]
                except Exception as error:
                    failures.append(f"{row['id']}: {error}")

        began = time.monotonic()
        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        is_killed = not kill
        while any(thread.is_alive() for thread in threads):
            if len(rewards) > requests // 10:
                memory.append((len(rewards), service.memory_mb))
            if not is_killed and len(rewards) > requests // 2:
                is_killed = True
                service.kill()
                service.start()
                memory.clear()  # of a process that is gone
            time.sleep(0.1)
        seconds = time.monotonic() - began
        last = service.memory_mb
        summary = service.stop()
    memory_mb = {}
    for percent in (20, 40, 60, 80):
        memory_mb |= next(({f"{percent} %": round(mb)} for count, mb in memory if count > percent / 100 * requests), {})
    return {
        "requests": requests,
        "clients": clients,
        "failed": len(failures),
        "failures": failures[:3],
        "largest_difference": max(abs(rewards[row_id] - expected[row_id]) for row_id in rewards) if rewards else None,
        "answered": len(rewards),
        "requests_per_s": round(requests / seconds, 1),
        "memory_mb": {**memory_mb, "100 %": round(last)},
        "summary": summary,
    }


@click.command()
@click.option("--requests", default=2000, show_default=True)
@click.option("--clients", default=32, show_default=True)
@click.option("--model", default="tiny", show_default=True)
@click.option("--no-kill", is_flag=True, help="Let one process answer them all, to see its memory.")
def main(requests, clients, model, no_kill):
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", model, "--constitution", "harmlessness", "--dtype", "float32"]
        result = measure(Path(folder), requests, clients, options, kill=not no_kill)
    print(json.dumps(result))
    if result["failed"] or result["answered"] != requests or result["largest_difference"] > 5e-6:
        sys.exit("the service does not give what judge.py gives")


if __name__ == "__main__":
    main()
