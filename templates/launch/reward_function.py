"""Rewards from the service of `judge.py --serve`, for OpenRLHF and verl. Standard library only; copy it where you like.

    OpenRLHF 0.11:  --reward.remote_url reward_function.py
    verl:           reward.custom_reward_function.path=reward_function.py
                    reward.custom_reward_function.name=compute_score

Environment: CAI_REWARD_URL (default http://127.0.0.1:8000/get_reward), CAI_SERVICE_KEY if the service wants a key, and
CAI_REWARD_PATIENCE, the seconds for which a service that is down or busy is asked again (default 300). A response
without a score raises an exception: a number is never made up.
"""

import json
import math
import os
import time
import urllib.error
import urllib.request

# Addresses of the service are not asked for through a proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def request_rewards(queries, prompts, labels=None, ids=None):
    """The service's answer: {"rewards": [...], "scores": [...], "extra_logs": {}}, one number per query.

    Args:
        queries: where the prompt is text, prompt and response together; where it is messages, the response alone.
        prompts: texts in a chat template (ChatML, Llama 3, Gemma), or lists of messages.
        labels: reference responses that a judge compares with; None: those of the service's --against.
        ids: decide which principle is drawn; by default the texts do.
    Raises:
        RuntimeError: the service refused the request, or did not answer.
    """
    url = os.environ.get("CAI_REWARD_URL", "http://127.0.0.1:8000/get_reward")
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("CAI_SERVICE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    content = {"query": list(queries), "prompts": list(prompts), "labels": labels, "ids": ids}
    body = json.dumps({name: value for name, value in content.items() if value is not None}).encode()
    end, pause = time.monotonic() + float(os.environ.get("CAI_REWARD_PATIENCE", "300")), 0.1
    while True:
        try:
            with _OPENER.open(urllib.request.Request(url, body, headers), timeout=180) as response:
                answer = json.load(response)
            break
        except urllib.error.HTTPError as error:
            reason = error.read(2000).decode(errors="replace")
            if error.code != 503 or time.monotonic() > end:
                raise RuntimeError(f"{url}: {error.code} {reason}") from None
        except (OSError, ValueError) as error:  # down, being started again, or broken off in the middle
            if time.monotonic() > end:
                raise RuntimeError(f"{url} does not answer: {error}") from error
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
    rewards = answer["rewards"]
    if len(rewards) != len(content["query"]) or not all(map(math.isfinite, rewards)):
        raise RuntimeError(f"{url}: not one finite reward per query")
    return answer


def reward_func(queries, prompts, labels):
    """OpenRLHF's custom reward function."""
    return request_rewards(queries, prompts, list(labels))


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """verl's custom reward function. The row's `extra_info` has the messages as `prompt`; `ground_truth` is a reference
    response, or empty."""
    messages = (extra_info or {}).get("prompt")
    if messages is None:
        raise RuntimeError("extra_info has no `prompt`: the messages of the row, for the judge to read")
    prompt = [{"role": str(message["role"]), "content": str(message["content"])} for message in messages]
    return float(request_rewards([solution_str], [prompt], [str(ground_truth or "")])["rewards"][0])
