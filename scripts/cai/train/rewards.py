"""What a policy is rewarded by: functions of your own, a judge, and weighted sums of rewards.

    total = Total({"reward": (RewardModel(model, chat), 1.0), "mine": (function("rewards:brief"), 0.5)})
    total([[{"role": "user", "content": "Hello"}]], ["Hello! How can I help?"])

A reward is a callable: it takes (conversations, responses as text) and returns one number per response; higher is
better. Leaves out rewards of single tokens.
"""

import hashlib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cai.base.errors import CaiError, InputError, shorten
from cai.constitution.templates import load_template
from cai.models.choice import choose, probabilities
from cai.models.engine import Engine, Request

Reward = Callable[[Sequence[list[dict]], Sequence[str]], Sequence[float]]

# The letters of templates/classify.jinja that are right for a kind of prompt.
RIGHT = {"harmful": "B", "benign": "A", "borderline": "A"}

LETTERS = "ABCDE"


class Judge:
    """A chat model's forced choice of what a response does, as the probability of the class that is right.

    Right is to decline well where the prompt is harmful, and to give the help asked for where it is not. The letters
    of templates/classify.jinja are read from log-probabilities, normalised over the letters.

    Args:
        engine: of `engines.load_engine`.
        kinds: the kind of each prompt, by its conversation as a string. A conversation without one is refused.
    """

    def __init__(self, engine: Engine, kinds: Mapping[str, str]):
        self.engine, self.kinds, self.template = engine, kinds, load_template("classify")

    def __call__(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> list[float]:
        """One probability per response. Raises CaiError for one that the judge makes no choice about."""
        requests = [
            Request(number, self.template.render(prompt=prompt, response=response))
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        scores = [0.0] * len(requests)
        for request, logprobs in choose(self.engine, requests, LETTERS):
            if logprobs is None:
                raise CaiError(
                    f"the judge ({self.engine.name}) has no choice for a response: it is too long for the judge, or "
                    "the judge answered with no letter. Take a judge with a longer context or with "
                    "log-probabilities, or lower --max-new-tokens"
                )
            right = LETTERS.index(RIGHT[self.kinds[str(prompts[request.key])]])
            scores[request.key] = probabilities(logprobs)[right]
        return scores


class Total:
    """The weighted sum of several rewards.

    Args:
        rewards: name -> (reward, weight).
    Attributes:
        parts: name -> scores, unweighted, of the last call.
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]]):
        self.rewards = dict(rewards)
        self.parts: dict[str, list[float]] = {}

    def __call__(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> list[float]:
        """One sum a response."""
        self.parts = {name: checked(reward, name)(prompts, responses) for name, (reward, _) in self.rewards.items()}
        weighted = [[weight * score for score in self.parts[name]] for name, (_, weight) in self.rewards.items()]
        return [sum(scores) for scores in zip(*weighted, strict=True)]


def checked(reward: Reward, name: str) -> Callable[[Sequence[list[dict]], Sequence[str]], list[float]]:
    """The reward, with CaiError where it returns anything but one finite number for each response."""

    def call(prompts, responses):
        scores = list(reward(list(prompts), list(responses)))
        if len(scores) != len(responses):
            raise CaiError(f"{name} returned {len(scores)} scores for {len(responses)} responses")
        try:
            numbers = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise CaiError(f"{name} returned what is no number: {shorten(error)}") from error
        if not all(map(math.isfinite, numbers)):
            raise CaiError(f"a score of {name} is not finite")
        return numbers

    return call


def is_function(spec: str) -> bool:
    """Whether the text names a function, as `module:function`, and not a model."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None and not Path(spec).exists()


def function(spec: str) -> Reward:
    """The reward function that `module:function` names; modules are looked for in the current folder too.

    It is your code and is run as such. Raises InputError if there is none.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise InputError(
            f"the module can't be imported: {shorten(error)}",
            where=spec,
            expected="module:function",
            remedy="Put the module's file into the current folder, or install it",
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise InputError(
            f"{module_name} has no function {name!r}",
            where=spec,
            expected="a function (conversations, responses) -> one number a response",
        )
    return found


def function_identity(spec: str) -> dict:
    """What a function is known by in a manifest: its name, and the hash of its module's source."""
    source = inspect.getsource(sys.modules[function(spec).__module__])
    return {"function": spec, "sha256": hashlib.sha256(source.encode()).hexdigest()}
