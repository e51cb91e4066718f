"""Engines over the network: any server with an OpenAI-compatible chat API, or several with the same model.

    engine = load_server("openai:qwen3", endpoints=("http://127.0.0.1:8000/v1",))
    request = Request("a", [{"role": "user", "content": "Hello"}], seed=1)
    for request, generation in engine.generate([request], Sampling()): ...

The same two calls as those of a local engine (engine.py). A failed request is sent again on a new connection, to
another replica if there are several, until it is answered or refused. One that hangs is given up after a time that the
other answers teach (latency.py). If no server answers any more, the run stops and what is done is kept. What a server
can do beyond the plain call is tested by asking it (references/engines.md lists the differences).

The key comes from the environment and goes only into the request's header: not into a manifest, a log or an error.
Leaves out the exchange itself (transport.py), the reading of answers (server_answers.py), streaming, tools, images,
batch APIs, and the tokenizer: the server applies the chat template.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Container, Coroutine, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from cai.base import cli, requests, run_settings
from cai.base.errors import CaiError, InputError
from cai.data.dialogue import cut_at_end_token
from cai.models.chat import join_turns
from cai.models.endpoints import EndpointsFile, check_endpoints
from cai.models.engine import Generation, Message, Request, RequestT, Sampling, fold_prefill, label_instruction
from cai.models.latency import Wait
from cai.models.server_answers import (
    Body,
    count_prompt,
    label_logprobs,
    message_text,
    read_finish,
    top_logprobs,
    without_thinking,
)
from cai.models.transport import DOWN_AFTER, NoAnswerError, RefusedError, Replica, Transport, cancel_all

IN_FLIGHT = 64  # requests at once by default

PATIENCE = 60.0  # seconds without an answer after which all servers count as gone

TRIES = 12  # of one request; if the server answers another one then, this row fails

SILENT_TRIES = 3  # that end because no answer came in the longest time; they count as `TRIES` together

GREETINGS = 6  # tries of the first request, within some seconds

POLL = 2.0  # seconds between two looks at the file of --endpoints-file

SEED_TRIES = 3  # requests with a seed that fail, while plain ones are answered, before seeds are left out

SEED_WAIT = 20.0  # seconds, at least, for the answer to the first request with a seed

LONG_STEP = 4200  # tokens that vLLM on a CPU can't read in one step or two, with its default of 2048 for one

REFUSALS = 8  # refused rows without any answered row, after which the whole run is in question

TOP = (20, 5)  # log-probabilities to ask for: the most that OpenAI and vLLM allow, then the most of TGI

# Fields that a server may refuse by name, without harm to the answer. `stop` is applied here as well.
_OPTIONAL = ("chat_template_kwargs", "seed", "stop")

# Control tokens as the families of models spell them. No tokenizer here says which of them this model has, so all
# are broken up, as `Chat.neutralise` does for a local model: text from a record can't end a turn or begin another.
CONTROL = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]?>|<[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|(?:start|end)_of_turn)>"
    r"|</?think(?:ing)?>|\[/?(?:INST|THINK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
)

_ENGINE_DIED = re.compile(r"EngineCore|EngineDead|EngineGenerateError")  # vLLM's words


def load_server(
    model: str,
    *,
    endpoints: Sequence[str],
    batch_size: int | None = None,
    key_name: str | None = None,
    timeout: float | None = None,
    patience: float | None = None,
    seeds: bool = True,
) -> "ServerEngine":
    """The engine of `openai:NAME` at its endpoints, after each has answered one small question.

    Args:
        endpoints: base addresses; several are replicas that serve the same model. Without any, those of
            --endpoints-file, which come and go.
        batch_size: requests in flight at once, over all replicas.
        key_name: environment variable that holds the key, if the server wants one; None: the one of --key-name.
        timeout: seconds, at most, for one answer; None: those of --request-timeout.
        patience: seconds without an answer after which the run stops.
        seeds: False for a server that does not stand a seed, such as one that died on it: none is sent.
    Raises:
        InputError: not a valid URL, no answer, a wrong key or model name, or the openai client is not installed.
    """
    path = requests.endpoints_file()
    file = EndpointsFile(path) if path and not endpoints else None
    addresses = file.read_all() if file else check_endpoints(model, endpoints)
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the openai client is not installed", where=model, remedy='Install it: pip install ".[openai]"'
        ) from error
    key_name = key_name or cli.key_name()
    engine = ServerEngine(
        model,
        addresses,
        batch_size or IN_FLIGHT,
        os.environ.get(key_name) or None,
        key_name,
        timeout or requests.request_timeout(),
        PATIENCE if patience is None else patience,
        file,
    )
    if not requests.sends_seeds():
        engine.leave_out_seeds("--no-server-seed")
    elif not seeds:
        engine.leave_out_seeds("the engine does not stand them")
    engine.greet()
    return engine


class ServerEngine:
    """A model behind one or more servers. `load_server` makes one.

    Attributes:
        name, batch_size: the model as the caller named it; requests in flight at once.
        context: None; a server refuses what is too long for it.
        replicas: the addresses and their state.
    """

    context: int | None = None

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        batch_size: int,
        key: str | None = None,
        key_name: str = "OPENAI_API_KEY",
        timeout: float = requests.TIMEOUT,
        patience: float = PATIENCE,
        file: EndpointsFile | None = None,
    ):
        self.name, self.batch_size, self.model = name, batch_size, name.removeprefix("openai:")
        self._servers = Transport(self.model, addresses, key, key_name, timeout, patience, batch_size)
        self.replicas, self._report = self._servers.replicas, self._servers.report
        self._tags, self._file = run_settings.reasoning_tags(), file
        # What the servers turned out to take and to give.
        self._dropped: set[str] = set()
        self._unseeded, self._samples = "", False  # why no seed is sent; whether texts are sampled
        self._accepted: set[str] = set()
        self._max_tokens, self._top, self._takes_system = "max_tokens", TOP[0], True
        self._slowest_greeting = 0.0
        self._continues: bool | None = None
        self._scores: bool | None = None
        self._refused_rows = 0

    # --- the two calls ----------------------------------------------------------------------------------------

    def generate(
        self, requests: Iterable[RequestT], sampling: Sampling, done: Container[Hashable] = ()
    ) -> Iterator[tuple[RequestT, Generation]]:
        """Each request with its answer, as they come, not in order.

        The finish "failed" marks a conversation that no server would answer; its `reason` gives the cause. Where the
        text is sampled each request is sent with its seed, but few servers draw the same text twice.

        Args:
            requests: read lazily, as places in flight become free.
            done: keys of requests that the caller has the answers of: they are not sent.
        Raises:
            InputError: the server dies on a seed; see `check_seeds`.
        """
        if sampling.temperature > 0:
            self.check_seeds()
        yield from self._run(
            (request, self._generate(request, sampling)) for request in requests if request.key not in done
        )

    def score(
        self, requests: Iterable[RequestT], labels: Sequence[str]
    ) -> Iterator[tuple[RequestT, list[float] | None]]:
        """Each request with the log-probability of every label as what comes next, not in order.

        Probabilities of tokens that differ by spaces alone are added up. A label that the server does not list gets
        the lowest log-probability of the list, which is an upper bound of its own; where no label is listed, all are
        -inf. None: no server would answer the conversation, or it is too long.

        Raises InputError if the server gives no log-probabilities: see `scores_choices`.
        """
        if not self.scores_choices:
            raise InputError(
                "the server gives no log-probabilities",
                where=self.name,
                remedy="Let the judge write its answer, or take a server that does: references/engines.md",
            )
        yield from self._run((request, self._score(request, labels)) for request in requests)

    @property
    def scores_choices(self) -> bool:
        """Whether the server gives log-probabilities. Tested once: some servers accept the field and ignore it."""
        if self._scores is None:
            question = {"role": "user", "content": "Answer with one letter and nothing else: A or B."}
            try:
                [(_, answer)] = self._run([(None, self._ask({**_request([question], 1), **_LOGPROBS}))])
                self._scores = bool(top_logprobs(answer))
            except RefusedError:
                self._scores = False
        return self._scores

    # --- one row ----------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, sampling: Sampling) -> Generation:
        instruction = "Begin your answer with exactly these words, and go on from there:"
        body = await self._prepare(request, instruction, sampling.max_new_tokens)
        body["temperature"] = sampling.temperature
        if sampling.temperature > 0:
            body["seed"] = request.seed & 0x7FFFFFFF  # 32 bits, as llama.cpp takes
        if sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        try:
            answer = await self._ask_row(body)
        except RefusedError as refusal:
            return Generation("", "too_long" if refusal.is_too_long else "failed", 0, 0, str(refusal))
        if "seed" in body and "seed" in self._dropped:
            self._report.unseeded = self._unseeded
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        finish, reason = read_finish(choice)
        if finish == "failed":
            return Generation("", finish, *tokens, self._servers.safe(reason))
        text = message_text(choice["message"].get("content"))
        cuts = [position for stop in sampling.stop if (position := text.find(stop)) >= 0]
        text = cut_at_end_token(without_thinking(text[: min(cuts, default=None)], self._tags)).strip()
        if request.prefill and not _CONTINUE.keys() <= body.keys():
            text = text.removeprefix(request.prefill.strip()).strip()
        return Generation(text, "stop" if cuts else finish, *tokens)

    async def _score(self, request: Request, labels: Sequence[str]) -> list[float] | None:
        body = await self._prepare(request, label_instruction(labels), 1)
        try:
            answer = await self._ask_row({**body, **_LOGPROBS})
        except RefusedError:
            return None
        tokens, (finish, _) = top_logprobs(answer), read_finish(answer["choices"][0])
        if not tokens and finish == "failed":
            return None
        if not tokens:  # a replica unlike the one that was tested
            raise CaiError(
                f"{self.name}: a server gave no log-probabilities, though one did before. "
                "Give endpoints of one kind of server"
            )
        return label_logprobs(tokens, labels)

    async def _prepare(self, request: Request, instruction: str, max_tokens: int) -> Body:
        """The body of a row's request.

        instruction: goes into the question, before the prefill, where the server can't continue a prefill.
        """
        if request.prefill and await self._can_continue():
            return {**_request(request.conversation, max_tokens), **_CONTINUE}
        return _request(fold_prefill(request, instruction), max_tokens)

    async def _can_continue(self) -> bool:
        """Whether the server continues an assistant's message at the end. Tested once.

        By the count of tokens: one more than without the message, its own, if it is left open; at least the end
        of a turn and the beginning of another besides, if it is closed. A server that counts nothing, or always the
        same, proves nothing.
        """
        if self._continues is None:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
            try:
                plain = await self._ask(_request(turns[:1], 1))
                prefilled = await self._ask({**_request(turns, 1), **_CONTINUE})
                before, after = map(count_prompt, (plain, prefilled))
                continues = before > 0 and after > 0 and after - before <= 1
                if continues and after <= before:  # does it count at all?
                    longer = await self._ask(_request([{"role": "user", "content": "x " * 64}], 1))
                    continues = count_prompt(longer) > before
            except RefusedError:
                continues = False
            if self._continues is None:  # of several that test at once, the first decides
                self._continues = continues
                if not continues:
                    cli.warn(
                        f"{self.name}: the server can't go on from a prefilled answer; its words are put into the "
                        "question instead"
                    )
        return self._continues

    async def _ask_row(self, body: Body) -> Body:
        """`_ask` for a row. Raises CaiError if the server refuses not this row but every request."""
        try:
            answer = await self._ask(body)
        except RefusedError as refusal:
            self._report.counts.failed += 1
            self._refused_rows += not refusal.is_too_long
            if self._refused_rows == REFUSALS and not self._servers.has_answered and not refusal.is_too_long:
                hello = {name: value for name, value in body.items() if name not in _CONTINUE}
                try:
                    await self._ask({**hello, "messages": [_HELLO]})
                except RefusedError:
                    message = f"{self.name}: the server refuses every request; the last: {refusal}"
                    raise CaiError(message) from None
            raise
        self._servers.has_answered = True
        return answer

    # --- requests ---------------------------------------------------------------------------------------------

    async def _ask(self, body: Body) -> Body:
        """The server's answer to a request, tried until there is one.

        Raises RefusedError if the request is refused, CaiError if there will be no answer.
        """
        tries, last, wait, counts = 0, None, _begin_wait(body), self._report.counts
        while True:
            replica = await self._servers.free_replica(last)
            began = time.monotonic()
            replica.in_flight += 1
            try:
                answer = await self._attempt(replica, body, wait, fresh=last is not None)
                counts.answered += 1
                return answer
            except NoAnswerError as error:
                failure, last, tries = error, replica, tries + _count_tries(error)
                self._servers.note_failure(replica, began, failure)
                self._note_engine_failure(body, failure)
            finally:
                replica.in_flight -= 1
            if self._servers.are_gone() or tries >= TRIES:
                await self._settle(replica, failure, tries)
            counts.retried += 1
            counts.silent += failure.silence is not None
            if failure.silence:
                continue  # there was a pause already
            backoff = min(20.0, 0.25 * 2**tries) * random.uniform(0.5, 1.0)
            # Another replica may be free at once.
            await asyncio.sleep(min(backoff, 1.0) if len(self.replicas) > 1 else backoff)

    async def _settle(self, replica: Replica, failure: NoAnswerError, tries: int) -> None:
        """Decide whether the server or the row is at fault, after many failures or much silence.

        Raises CaiError if the server is gone, RefusedError if it answers another question. Returns if the request is
        to be sent again: where it was not given all the time that there is, or the server may come back.
        """
        gone = self._servers.are_gone()
        if await self._is_alive(replica):
            if failure.is_early:
                return
            raise RefusedError(
                f"no answer in {max(1, tries)} tries, while another question was answered; the last: {failure}"
                if failure.silence is None
                else f"{failure}, while another question was answered"
            )
        if gone:
            option = ", with --no-server-seed" if "died" in self._unseeded else ""
            raise CaiError(
                f"{self.name}: no server has answered for {self._servers.patience:g} s; the last: {failure}. "
                f"What is done is kept: start the server and run the same command again{option}"
            )

    async def _attempt(self, replica: Replica, body: Body, wait: Wait, *, fresh: bool = False) -> Body:
        """One attempt at a request, sent again without each field that the server refuses by name.

        fresh: on a connection of its own, because an older one may be what hangs.
        """
        while True:
            sent = self._adapt(body)
            try:
                answer = await self._servers.send(replica, sent, wait, fresh)
            except RefusedError as refusal:
                self._servers.note_answer(replica)
                if not self._learn(sent, str(refusal)):
                    raise
            else:
                self._servers.note_answer(replica)
                self._accepted |= sent.keys() | {message["role"] for message in sent["messages"]}
                return answer

    def _adapt(self, body: Body) -> Body:
        """The request in the form that the servers take, as far as that is known."""
        adapted = {name: value for name, value in body.items() if name not in self._dropped}
        adapted["messages"] = join_turns(body["messages"], CONTROL, self._takes_system)
        adapted[self._max_tokens] = adapted.pop("max_tokens")
        if "top_logprobs" in body:
            adapted["top_logprobs"] = self._top
        return adapted

    def _learn(self, sent: Body, refusal: str) -> bool:
        """Do without a field that the refusal names, if no request with it was ever taken. Returns whether there is
        one."""
        untaken = sent.keys() - self._accepted
        roles = {message["role"] for message in sent["messages"]} - self._accepted
        fields = (*_OPTIONAL, "max_tokens")
        field = next((name for name in fields if name in untaken and re.search(rf"\b{name}\b", refusal)), None)
        if field == "max_tokens":
            self._max_tokens = "max_completion_tokens"
        elif field:
            if field == "seed" and field not in self._dropped:
                self.leave_out_seeds("the server refuses them")
            self._dropped.add(field)
        elif (
            "top_logprobs" in untaken
            and sent["top_logprobs"] > TOP[-1]
            and re.search(r"logprobs|top_n_tokens", refusal)
        ):
            self._top = TOP[-1]
        elif "system" in roles and re.search(r"system.{0,20}role|role.{0,20}system", refusal, re.IGNORECASE):
            self._takes_system = False
        else:
            return False
        return True

    # --- the state of the replicas ----------------------------------------------------------------------------

    async def _is_alive(self, replica: Replica) -> bool:
        """Whether the replica answers the smallest of questions: then the row is at fault."""
        try:
            await self._servers.send(replica, self._adapt(_GREETING), _begin_wait(_GREETING), True)
        except (NoAnswerError, CaiError):
            return False
        except RefusedError:
            pass
        self._servers.note_answer(replica)
        return True

    def greet(self) -> None:
        """Ask each replica one small question. Raises InputError if none answers, warns of those that don't."""

        async def meet_all() -> list[Exception | None]:
            return await asyncio.gather(*map(self._meet, self.replicas))

        with self._servers.session() as runner:
            failures = runner.run(meet_all())
        if all(failures):
            raise InputError(
                "; ".join(dict.fromkeys(map(str, failures))),
                where=self.name,
                remedy="Is the server running, and is this its address? (references/engines.md)",
            )
        for replica, failure in zip(list(self.replicas), failures, strict=True):
            if failure:
                replica.failures, replica.rests_until = DOWN_AFTER, time.monotonic() + 8.0
                cli.warn(f"{failure}; going on with the others")
                if self._file:  # it is greeted again, as a new one
                    self._servers.retire(replica)
                    self._file.forget()

    async def _follow_file(self, file: EndpointsFile) -> None:
        """Take replicas that are added to the file into use once they answer, and retire those that are removed."""
        greetings: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                if (addresses := file.read_changed()) is not None:
                    for replica in [each for each in self.replicas if each.address not in addresses]:
                        self._servers.retire(replica)
                        cli.note(
                            f"{replica.address} was removed from {file.path}; {len(self.replicas)} replicas are left"
                        )
                    for address in greetings.keys() - {*addresses}:
                        greetings.pop(address).cancel()
                    known = {replica.address for replica in self.replicas} | greetings.keys()
                    for address in addresses:
                        if address not in known:
                            greetings[address] = asyncio.create_task(self._welcome(address))
                for address in [address for address, task in greetings.items() if task.done()]:
                    greetings.pop(address).result()  # raises what is no fault of the replica
                await asyncio.sleep(POLL)
        finally:
            file.forget()  # what was not welcomed is new for the next run
            await cancel_all(greetings.values())

    async def _welcome(self, address: str) -> None:
        """Greet a new replica until it answers, and take it into use."""
        replica, failure = Replica(address), None
        while (error := await self._meet(replica, SEED_WAIT)) is not None:
            if failure is None:
                cli.warn(f"{error}; a new replica that does not answer yet")
            failure = error
            await asyncio.sleep(2 * POLL)
        self._servers.add(replica)
        cli.note(f"{address} is a new replica; there are {len(self.replicas)}")

    async def _meet(self, replica: Replica, most: float | None = None) -> Exception | None:
        """None if the replica answers a plain question, else the error. most: seconds for one answer."""
        failure: Exception | None = None
        silences = 0
        for attempt in range(GREETINGS):
            began = time.monotonic()
            try:
                await self._attempt(replica, _GREETING, _begin_wait(_GREETING, most), fresh=attempt > 0)
                self._slowest_greeting = max(self._slowest_greeting, time.monotonic() - began)
                return None
            except (CaiError, RefusedError) as error:
                return error
            except NoAnswerError as error:
                failure, silences = error, silences + (error.silence is not None)
                if silences == SILENT_TRIES:
                    break
                if error.silence:
                    cli.note(f"{error}; asked again")
                await asyncio.sleep(max(0.2 * 2**attempt, min(error.wait or 0.0, 5.0)))
        return failure

    def probe(self) -> dict[str, bool]:
        """What the server can do: whether it gives log-probabilities, continues a prefilled answer, gets seeds."""
        [(_, continues)] = self._run([(None, self._can_continue())])
        scores = self.scores_choices
        return {"log_probabilities": scores, "continues_prefill": continues, "seeds": "seed" not in self._dropped}

    def give_up(self) -> None:
        """Wait for no server any more: the run stops at the next failures."""
        self._servers.patience = 0.0

    # --- seeds ------------------------------------------------------------------------------------------------

    def leave_out_seeds(self, reason: str) -> None:
        """Send no seed from now on. Texts that are sampled can't be repeated then, of which the first of them warns."""
        self._dropped.add("seed")
        self._unseeded = reason
        if self._samples:
            cli.warn(f"{self.name}: requests carry no seed ({reason}), so sampled texts can't be repeated exactly")

    def check_seeds(self) -> None:
        """Ask one replica for a sampled text with a seed, unless it is known whether seeds can be sent.

        Some servers die on a seed (vLLM on a CPU), and then the failure is no row's. Seeds are left out where the
        server refuses them, where it fails on them and answers plain questions before and after, and where another
        replica is there to go on with.

        Raises InputError if no server answers any more.
        """
        first, self._samples = not self._samples, True
        if self._unseeded and first:
            self.leave_out_seeds(self._unseeded)
        elif "seed" not in self._dropped | self._accepted:
            with self._servers.session() as runner:
                runner.run(self._try_seed())

    async def _try_seed(self) -> None:
        ready = [replica for replica in self.replicas if replica.failures < DOWN_AFTER] or list(self.replicas)
        replica, most = ready[0], max(SEED_WAIT, 4 * self._slowest_greeting)
        failure = await self._fail_on_seeds(replica, [{**_GREETING, "seed": 1}], most)
        if failure is None and "seed" not in self._dropped:
            failure = await self._fail_on_seeds(replica, await self._list_long_questions(replica), None)
        if failure is None:
            return
        if await self._meet(replica, most) is None:
            self.leave_out_seeds(f"the server answers plain requests, and none of {SEED_TRIES} with a seed: {failure}")
            return
        for other in ready[1:]:
            if await self._meet(other, most) is None:
                replica.failures, replica.rests_until = DOWN_AFTER, time.monotonic() + 8.0
                self.leave_out_seeds(f"a replica stopped answering after a request with a seed: {failure}")
                return
        if await self._comes_back(replica, most):
            self.leave_out_seeds(f"the server died of one, and was started again: {failure}")
            return
        raise InputError(
            f"{replica.address} answered, and stopped after a request with a seed, as vLLM does on a CPU ({failure})",
            where=self.name,
            remedy="Start the server again, and give --no-server-seed; sampled texts can't be repeated then",
        )

    async def _comes_back(self, replica: Replica, most: float) -> bool:
        """Whether somebody starts the server again, within the time after which one that is silent counts as gone."""
        cli.note(
            f"{replica.address} stopped after a request with a seed; waiting {self._servers.patience:g} s for it to "
            "come back"
        )
        began = time.monotonic()
        while await self._meet(replica, most) is not None:
            if time.monotonic() - began > self._servers.patience:
                return False
        return True

    async def _fail_on_seeds(
        self, replica: Replica, bodies: Sequence[Body], most: float | None
    ) -> NoAnswerError | None:
        """The failure of requests with a seed that are sent together; None if all of them are answered or refused.

        They are sent again if they fail and a plain request is answered: the connection may have been at fault. Where
        they took the longest wait the server is slow, and nothing is known of seeds.
        """
        failures: list[NoAnswerError] = []
        for attempt in range(SEED_TRIES):
            waits = [_begin_wait(body, most) for body in bodies]
            attempts = (self._attempt(replica, *each, fresh=attempt > 0) for each in zip(bodies, waits, strict=True))
            results = await asyncio.gather(*attempts, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, NoAnswerError | RefusedError):
                    raise result
            failures = [result for result in results if isinstance(result, NoAnswerError)]
            if not failures or await self._meet(replica, most) is not None:
                break
            if all(failure.silence and not failure.is_early for failure in failures):
                return None
        return failures[0] if failures else None

    async def _list_long_questions(self, replica: Replica) -> list[Body]:
        """Requests with a seed that vLLM can't read in one step; none for another server, which stands a seed once it
        has answered one.

        vLLM on a CPU dies where it is in the middle of a prompt with a seed at the end of a step: it sets the offset
        of a generator, and those of a CPU have none (0.32, `set_offset` in gpu_model_runner.py). A step takes 2048
        tokens there by default.
        """
        try:
            listed = (await self._servers.list_models(replica, SEED_WAIT))["data"]
            entry = next(each for each in listed if each["id"] == self.model)
            if entry["owned_by"] != "vllm":
                return []
            words = min(700, int(entry["max_model_len"]) // 2)
        except Exception:  # whatever it is, it is not vLLM's list of models
            return []
        if words < 100:
            return []  # too many questions would have to be asked
        count = -(-LONG_STEP // words)
        question = {"role": "user", "content": " lake" * words}
        return [
            {**_request([{**question, "content": f"{n}{question['content']}"}], 1), "temperature": 1.0, "seed": n}
            for n in range(count)
        ]

    def _note_engine_failure(self, body: Body, failure: NoAnswerError) -> None:
        """Leave seeds out where vLLM reports that its engine has died, and a request with a seed was with it."""
        if "seed" in body and "seed" not in self._dropped and _ENGINE_DIED.search(str(failure)):
            self.leave_out_seeds(f"the server died while requests had seeds: {failure}")

    # --- the loop they run in ---------------------------------------------------------------------------------

    def _run(self, jobs: Iterable[tuple[Any, Coroutine[Any, Any, Any]]]) -> Iterator[tuple[Any, Any]]:
        """(request, result) of each job as it ends; `batch_size` of them are under way at once."""
        jobs = iter(jobs)
        pending: dict[asyncio.Task[Any], Any] = {}
        self._servers.begin()
        with self._servers.session() as runner:
            following = [runner.get_loop().create_task(self._follow_file(self._file))] if self._file else []
            try:
                while True:
                    for request, job in islice(jobs, self.batch_size - len(pending)):
                        pending[runner.get_loop().create_task(job)] = request
                    if not pending:
                        return
                    ended, _ = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                    for task in sorted(ended, key=lambda task: task.exception() is not None):
                        yield pending.pop(task), task.result()  # raises what the job raised, after the other results
            finally:
                runner.run(cancel_all([*pending, *following]))


def _count_tries(failure: NoAnswerError) -> int:
    """How many of the `TRIES` of a request an attempt takes: none if it was given up early."""
    if failure.silence is None:
        return 1
    return 0 if failure.is_early else -(-TRIES // SILENT_TRIES)


def _begin_wait(body: Body, most: float | None = None) -> Wait:
    """The wait for the answer to a request. Those with the same bound on new tokens are of a kind.

    most: see `Wait`.
    """
    length = sum(len(message["content"]) for message in body["messages"])
    return Wait(("logprobs" in body, body["max_tokens"]), length, most)


# --- the body of a request ------------------------------------------------------------------------------------


def _request(conversation: Sequence[Message], max_tokens: int) -> Body:
    """A request for the answer alone: no thinking, as for local models."""
    thinking = {"enable_thinking": False}
    return {"messages": conversation, "max_tokens": max_tokens, "chat_template_kwargs": thinking}


_HELLO = {"role": "user", "content": "Hello"}

_GREETING = {**_request([_HELLO], 16), "temperature": 1.0}

_CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}

# Temperature 1: log-probabilities from before and after the temperature are then the same.
_LOGPROBS = {"temperature": 1.0, "logprobs": True, "top_logprobs": TOP[0]}
