"""Rewards over HTTP: the protocol, its errors, many clients, and the numbers of judge.py."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import rewards as bench

from cai.base.errors import InputError
from cai.constitution import files
from cai.data.reading import AS_THEY_ARE
from cai.models.loading import load_chat, load_engine, load_reward_model
from cai.models.scorer import load_scorer
from cai.steps import judges, judging, service, serving
from cai.steps.principles import Chooser

MESSAGES = [{"role": "user", "content": "How do I open the gate?"}]


@contextmanager
def serving_with(ask, **arguments):
    """A server on loopback whose work is done in a thread; gives it and the module of the trainers' side."""
    is_over = threading.Event()
    with service.RewardServer("0", ask, name="x", **arguments) as server:
        worker = threading.Thread(target=server.work, args=(is_over.is_set,))
        worker.start()
        try:
            yield server, bench.load_client(server.url.rpartition(":")[2])
        finally:
            is_over.set()
            worker.join()


def count_letters(texts):
    """A reward that a test can check; no score for a text that says so."""
    error = service.RequestError(422, "too long")
    return [error if text.response == "fail" else float(len(text.response)) for text in texts]


def send(server, body, headers=None, path="/get_reward", method="POST"):
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers or {})
    response = connection.getresponse()
    return response.status, json.loads(response.read() or b"{}")


def request(response="abc", **more):
    return {"query": [response], "prompts": [MESSAGES], **more}


# --- the protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma3"])
def test_a_rendered_prompt_is_read_as_the_messages_it_was(family):
    """As OpenRLHF sends them: prompt and query in the policy's chat template."""
    chat = load_chat(str(models.folder(family)))
    turns = [*MESSAGES, {"role": "assistant", "content": "Lift\n\nthe bar."}, {"role": "user", "content": "And then?"}]
    for messages in (MESSAGES, turns):
        prompt = chat.render(messages)
        [text] = service.read_request(
            json.dumps({"query": [f"{prompt}Push it.{chat.stop_text or ''}"], "prompts": [prompt], "labels": ["Wait."]})
            .encode()
        )  # fmt: skip
        assert [turn for turn in text.prompt if turn["role"] != "system"] == messages
        assert text.response == "Push it." and text.reference == "Wait."


def test_a_plain_prompt_is_the_users_message():
    body = {"query": ["How?\n\nSo."], "prompts": ["How?"], "labels": [""], "ids": ["r1"]}
    [text] = service.read_request(json.dumps(body).encode())
    assert text == service.Text([{"role": "user", "content": "How?"}], "So.", None, "r1")


BAD = {
    "no JSON": (b"{", "not a request"),
    "a list": (b"[]", "not a request"),
    "no prompts": ({"query": ["a"]}, "prompts"),
    "lengths": ({"query": ["a", "b"], "prompts": ["a"]}, "differ in length"),
    "empty": ({"query": [], "prompts": []}, "differ in length"),
    "query of another prompt": ({"query": ["a"], "prompts": ["b"]}, "does not begin with its prompt"),
    "a number": ({"query": [3], "prompts": [MESSAGES]}, "not a text"),
    "unknown template": ({"query": ["<|x|>a"], "prompts": ["<|x|>"]}, "unknown chat template"),
    "text between turns": (
        {"query": ["<|im_start|>user\na<|im_end|>\nb"], "prompts": ["<|im_start|>user\na<|im_end|>\nb"]},
        "unknown chat template",
    ),
    "a role": ({"query": ["a"], "prompts": [[{"role": "boss", "content": "x"}]]}, "the role 'boss'"),
    "no user": ({"query": ["a"], "prompts": [[*MESSAGES, {"role": "assistant", "content": "x"}]]}, "does not end"),
    "no content": ({"query": ["a"], "prompts": [[{"role": "user"}]]}, "no content"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_request_is_refused(fault):
    body, message = BAD[fault]
    with pytest.raises(service.RequestError, match=message) as caught:
        service.read_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400


def test_errors_have_their_status_and_no_number(monkeypatch):
    monkeypatch.setattr(service, "MOST_BYTES", 3000)
    monkeypatch.setattr(service, "MOST_TEXTS", 4)
    with serving_with(count_letters, key="s3cret") as (server, _):
        allowed = {"Authorization": "Bearer s3cret"}
        assert send(server, request()) == (401, {"error": "the key is missing or wrong: Authorization: Bearer, as in "
                                                          "CAI_SERVICE_KEY"})  # fmt: skip
        assert send(server, request(), {"Authorization": "Bearer s3cre"})[0] == 401
        assert send(server, request(), allowed) == (200, {"rewards": [3.0], "scores": [3.0], "extra_logs": {}})
        assert send(server, request(), allowed, path="/score")[0] == 404
        assert send(server, b"{", allowed)[0] == 400
        assert send(server, request("x" * 3000), allowed)[0] == 413
        assert send(server, {"query": ["a"] * 5, "prompts": [MESSAGES] * 5}, allowed)[0] == 413
        assert send(server, b"", {**allowed, "Transfer-Encoding": "chunked"})[0] == 411
        status, answer = send(server, {"query": ["a", "fail"], "prompts": [MESSAGES] * 2}, allowed)
        assert status == 422 and answer.keys() == {"error"} and "1 of 2 responses have no score" in answer["error"]
        assert send(server, b"", path="/health", method="GET") == (200, {"status": "ok", "model": "x"})
    assert server.counts["answered"] == 1 and server.counts["failed"] == 1


def test_a_full_queue_is_503_and_the_client_asks_again(monkeypatch):
    monkeypatch.setattr(service, "MOST_QUEUED", 2)
    is_free = threading.Event()

    def ask(texts):
        assert is_free.wait(30)
        return count_letters(texts)

    with serving_with(ask) as (server, client):
        first = threading.Thread(target=send, args=(server, {"query": ["a", "b"], "prompts": [MESSAGES] * 2}))
        first.start()
        while not server._queued:
            time.sleep(0.01)
        assert send(server, request())[0] == 503
        rewards = []
        asking = threading.Thread(target=lambda: rewards.append(client.request_rewards(["abcd"], [MESSAGES])))
        asking.start()
        is_free.set()
        asking.join(30)
        first.join(30)
    assert rewards[0]["rewards"] == [4.0]


def test_requests_of_many_clients_are_scored_together_and_clients_that_go_do_no_harm():
    sizes = []

    def ask(texts):
        sizes.append(len(texts))
        time.sleep(0.02)
        return count_letters(texts)

    with serving_with(ask, batch=16) as (server, client):
        port = int(server.url.rpartition(":")[2])
        row = {"prompt": "How?", "response_a": "How? So.", "response_b": "Wait."}
        for n in range(6):
            bench.break_off(port, row, in_the_middle=n % 2 == 0)
        results = {}

        def work(n):
            results[n] = client.request_rewards(["x" * n], [MESSAGES])["rewards"]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == {n: [float(n)] for n in range(40)}
    assert max(sizes) > 1 and max(sizes) <= 16


def test_the_client_raises_what_is_no_score(monkeypatch):
    monkeypatch.setenv("CAI_REWARD_PATIENCE", "0.2")
    with serving_with(count_letters) as (_, client):
        assert client.reward_func(["How?So."], ["How?"], ["Wait."])["rewards"] == [3.0]
        assert client.compute_score("cai", "four", "", {"prompt": MESSAGES}) == 4.0
        with pytest.raises(RuntimeError, match=r"422 .*too long"):
            client.compute_score("cai", "fail", "", {"prompt": MESSAGES})
        with pytest.raises(RuntimeError, match="extra_info has no `prompt`"):
            client.compute_score("cai", "four", "", {})
    with pytest.raises(RuntimeError, match="does not answer"):
        client.compute_score("cai", "four", "", {"prompt": MESSAGES})


@pytest.mark.parametrize(("address", "message"), [("0.0.0.0:0", "no key"), ("x", "no address"), ("1:70000", "no")])
def test_bad_addresses_are_refused(address, message):
    with pytest.raises(InputError, match=message):
        service.RewardServer(address, count_letters)


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(InputError, match="cannot listen"),
            service.RewardServer(str(taken.getsockname()[1]), count_letters),
        ):
            pass


# --- the rewards --------------------------------------------------------------------------------------------------


@pytest.fixture
def judge():
    engine = load_engine("tiny", dtype="float32")
    rules = files.load_constitution("harmlessness")
    settings = SimpleNamespace(sampling=None, seed=0)
    chooser = Chooser(rules, "draw", 0, None)
    forms = {"template": "preference", "answer_template": "preference_answer", "most_examples": 0, "cot": False}
    return engine, chooser, settings, forms


def test_a_reward_models_reward_is_its_score(tmp_path):
    """Over HTTP, through the function that trainers call."""
    folder = tmp_path / "reward"
    model = str(models.folder("llama"))
    load_reward_model(model, "cpu").save_pretrained(folder)
    load_chat(model).tokenizer.save_pretrained(folder)
    scores = load_scorer(str(folder), device="cpu")
    responses = ["Push it.", "Wait for the owner, and ask for a key.", "No."]
    with serving_with(serving.ModelRewards(scores)) as (_, client):
        answer = client.request_rewards(responses, [MESSAGES] * 3)
    expected = scores([MESSAGES] * 3, responses)
    assert answer["rewards"] == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 3
    [too_long] = serving.ModelRewards(scores)([service.Text(MESSAGES, "word " * 4000)])
    assert too_long.status == 422


def test_a_judges_reward_is_the_probability_of_judge_py(judge, tmp_path):
    engine, chooser, settings, forms = judge
    rows = bench.write_pairs(tmp_path / "pairs.jsonl", 12)
    plain = judges.make_question(chooser, settings, **forms)
    judged = {row["id"]: judging.soft_label(verdicts) for row, verdicts in judging.judge(engine, rows, plain)}
    expected = {row["id"]: judged[row["id"]] for row in rows}
    reference = {serving.prompt_key([{"role": "user", "content": rows[0]["prompt"]}]): rows[0]["response_b"]}
    question = judges.make_question(chooser, settings, **forms, key="key")
    ask = serving.JudgeRewards(engine, question, references=reference)
    texts = [
        service.Text([{"role": "user", "content": row["prompt"]}], row["response_a"], row["response_b"], row["id"])
        for row in rows
    ]
    assert ask(texts) == pytest.approx(list(expected.values()), abs=5e-6)
    assert ask([texts[3], texts[3]]) == pytest.approx([expected["pair-3"]] * 2, abs=5e-6)
    without, unknown = (service.Text(texts[n].prompt, texts[n].response, None, f"pair-{n}") for n in (0, 1))
    found, refused = ask([without, unknown])
    assert found == pytest.approx(expected["pair-0"], abs=5e-6), "the reference of --against"
    assert refused.status == 400 and "nothing to compare it with" in str(refused)
    assert ask([service.Text(MESSAGES, "Same.", "Same.")]) == [0.5]
    [too_long] = ask([service.Text(MESSAGES, "word " * 4000, "Wait.")])
    assert too_long.status == 422
    # An engine that loses what it was asked: an error, not a number.
    silent = SimpleNamespace(name="x", batch_size=4, scores_choices=True, score=lambda *_: iter(()))
    [lost] = serving.JudgeRewards(silent, question)([texts[0]])
    assert lost.status == 500 and "no answer" in str(lost)


def test_two_references_to_one_prompt_are_refused(tmp_path):
    path = tmp_path / "references.jsonl"
    rows = [{"prompt": "How?", "response": "So."}, {"prompt": "Why?", "response": "So."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(serving.read_references(str(path), AS_THEY_ARE)) == 2
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "How?", "response": "Not so."}]))
    with pytest.raises(InputError, match="another response to a prompt"):
        serving.read_references(str(path), AS_THEY_ARE)


def test_options_without_effect_are_refused(invoke, tmp_path):
    for options, message in (
        (("--serve", "0", "--model", "tiny", "--output", tmp_path / "x"), "--output would have no effect"),
        (("--serve", "0"), "--serve needs --model"),
        (("--serve", "0", "--model", "tiny", "--principles", "match"), "draw, all or each"),
        (("--model", "tiny", "--input", Path(__file__)), "Missing option '--output'"),
    ):
        result = invoke("judge", *options)
        assert result.exit_code == 2 and message in result.stderr, result.stderr


@pytest.mark.slow
def test_a_service_is_killed_and_started_again_under_load(tmp_path):
    """The benchmark does it with 2,000 requests of 32 clients."""
    options = ["--model", "tiny", "--constitution", "harmlessness", "--dtype", "float32"]
    result = bench.measure(tmp_path, 40, 6, options)
    assert result["failed"] == 0 and result["answered"] == 40, result
    assert result["largest_difference"] < 5e-6
    assert result["summary"]["broken_off"] + result["summary"]["refused"] > 0
