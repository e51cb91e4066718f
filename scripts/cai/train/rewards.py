"""What a policy is rewarded by: reward models, your own functions, a judge, and weighted sums of them.

    reward = Total({"reward": (load_scorer("runs/reward"), 1.0), "mine": (load_function("rewards:brief"), 0.5)})
    reward([[{"role": "user", "content": "Hello"}]], ["Hello! How can I help?"])

A reward is a callable: it takes (conversations, responses as text) and returns one number per response; higher is
better. None stands for a response that is too long for a reward model's context: GRPO and RLOO leave it out of its
group, PPO gives it the lowest score of its update (`fill_overlong`). Leaves out rewards of single tokens.
"""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from cai.base import hashing
from cai.base.errors import CaiError, InputError, shorten
from cai.constitution.templates import load_template
from cai.models import choice, loading, scorer
from cai.models.chat import Chat
from cai.models.engine import Engine, Request
from cai.train import common
from cai.train.prompts import Prompt

Reward = Callable[[Sequence[list[dict]], Sequence[str]], Sequence[float | None]]

# The letters of templates/classify.jinja, and those that are right for a kind of prompt.
LETTERS = "ABCDE"
RIGHT = {"harmful": "B", "benign": "A", "borderline": "A"}


class Judge:
    """A chat model's forced choice of what a response does, as the probability of the class that is right.

    Right is to decline well where the prompt is harmful, and to give the help asked for where it is not. The letters
    of templates/classify.jinja are read from log-probabilities, normalised over the letters.

    Args:
        engine: from `loading.load_engine`.
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
        for request, logprobs in choice.choose(self.engine, requests, LETTERS):
            if logprobs is None:
                raise CaiError(
                    f"the judge ({self.engine.name}) has no choice for a response: it is too long for the judge, or "
                    "the judge answered with no letter. Take a judge with a longer context or with "
                    "log-probabilities, or lower --max-new-tokens"
                )
            right = LETTERS.index(RIGHT[self.kinds[str(prompts[request.key])]])
            scores[request.key] = choice.probabilities(logprobs)[right]
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
        self.parts: dict[str, list[float | None]] = {}

    def __call__(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> list[float | None]:
        """One sum per response, None where one of its parts is None."""
        self.parts = {
            name: compute_scores(reward, name, prompts, responses) for name, (reward, _) in self.rewards.items()
        }
        weights = [weight for _, weight in self.rewards.values()]
        return [
            None if None in scores else sum(weight * score for weight, score in zip(weights, scores, strict=True))
            for scores in zip(*self.parts.values(), strict=True)
        ]


def compute_scores(
    reward: Reward, name: str, prompts: Sequence[list[dict]], responses: Sequence[str]
) -> list[float | None]:
    """The scores of a reward, one per response.

    Args:
        name: what an error calls the reward.
    Raises:
        CaiError: too few or too many scores, or one that is not a finite number. None is allowed from a `Scorer`, and
            from a `Total` of which one is a part.
    """
    scores = list(reward(list(prompts), list(responses)))
    if len(scores) != len(responses):
        raise CaiError(f"{name} returned {len(scores)} scores for {len(responses)} responses")
    may_be_none = isinstance(reward, scorer.Scorer | Total)
    try:
        numbers = [None if score is None and may_be_none else float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise CaiError(f"{name} returned a score that is not a number: {shorten(error)}") from error
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise CaiError(f"a score of {name} is not finite")
    return numbers


def fill_overlong(scores: Sequence[float | None]) -> list[float]:
    """The scores with the lowest of them in place of each None. Raises CaiError if all of them are None."""
    known = [score for score in scores if score is not None]
    if not known:
        raise CaiError(
            "every response is too long for the context of a reward model. Lower --max-new-tokens, or take a reward "
            "model with a longer context"
        )
    return [min(known) if score is None else score for score in scores]


# --- functions -----------------------------------------------------------------------------------------------


def is_function(spec: str) -> bool:
    """Whether the text names a function, as `module:function`, and not a model."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None and not Path(spec).exists()


def load_function(spec: str) -> Reward:
    """The reward function that `module:function` names; modules are looked for in the current folder too.

    It is your code and is run as such. Raises InputError if there is none.
    """
    module_name, _, name = spec.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise InputError(
            f"the module can't be imported: {shorten(error)}",
            where=spec,
            expected="module:function",
            remedy="Put the module's file into the current folder, or install it",
        ) from error
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise InputError(
            f"{module_name} has no function {name!r}",
            where=spec,
            expected="a function (conversations, responses) -> one number per response",
        )
    return function


def identify(spec: str) -> str | dict:
    """What a manifest knows a reward or a judge by: a model's identity; a function's name and its module's source."""
    if not is_function(spec):
        return hashing.identity(spec)
    module = sys.modules[load_function(spec).__module__]
    return {"function": spec, "sha256": hashing.sha256_text(inspect.getsource(module))}


# --- rewards and judges by their names ------------------------------------------------------------------------


def read_rewards(specs: Sequence[str], weights: Sequence[float], value_head: bool) -> dict[str, float]:
    """{reward: weight} of --reward-model and --reward-weight, 1 by default; each a model or a function that exists.

    Raises InputError for another number of weights, a reward named twice, and, without --value-head, for rewards of
    which none is a model that the value model could begin as.
    """
    if weights and len(weights) != len(specs):
        raise InputError(
            f"{len(weights)} weights for {len(specs)} rewards",
            where="--reward-weight",
            expected="one for each --reward-model, in their order",
        )
    if len(set(specs)) < len(specs):
        raise InputError("the same reward twice", where="--reward-model", remedy="Name it once, with its weight")
    for spec in specs:
        if is_function(spec):
            load_function(spec)
        else:
            scorer.check_reward_model(spec)
            if not value_head and spec == next(other for other in specs if not is_function(other)):
                loading.check_model(spec, classifier=True, training=True)  # the value model begins as it
    if not value_head and all(map(is_function, specs)):
        raise InputError(
            "a value model can't begin as a function",
            where="--reward-model",
            expected="a reward model among the rewards, or --value-head",
            remedy="Add --value-head",
        )
    return dict(zip_longest(specs, weights, fillvalue=1.0))


def identify_rewards(weights: Mapping[str, float]) -> str | dict | list:
    """What a manifest knows the rewards by: [identity, weight] of each; of a single one with weight 1 its identity."""
    identities = [[identify(spec), weight] for spec, weight in weights.items()]
    return identities[0][0] if len(identities) == 1 and identities[0][1] == 1 else identities


def load_reward(spec: str, chat: Chat | None = None, **loading_options) -> Reward:
    """A reward model as a `Scorer`, or the function that `module:function` names.

    Args:
        chat: the policy's, whose tokenizer the model must have; None for a model that may have its own.
        loading_options: of `load_scorer`.
    """
    if is_function(spec):
        return load_function(spec)
    if chat is not None:
        check_tokenizer(spec, chat)
    return scorer.load_scorer(spec, **loading_options)


def load_total(weights: Mapping[str, float], chat: Chat, **loading_options) -> Total:
    """The weighted sum of rewards, under the names of their folders, numbered where two have the same."""
    names = [spec if is_function(spec) else Path(spec).name for spec in weights]
    names = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    loaded = [(load_reward(spec, chat, **loading_options), weight) for spec, weight in weights.items()]
    return Total(dict(zip(names, loaded, strict=True)))


def load_value_model(weights: Mapping[str, float], options):
    """The first reward model among the rewards, to train as the value model.

    Args:
        options: have device, dtype, lora and first_layer.
    Raises:
        InputError: its head is not a linear layer named `score`.
    """
    name = next(spec for spec in weights if not is_function(spec))
    value_model = loading.load_reward_model(name, options.device, options.dtype, lora=options.lora)
    if not hasattr(value_model, "score"):
        raise InputError(
            f"{type(value_model).__name__} has no linear head named `score`",
            where=name,
            expected="a decoder with a classification head",
            remedy="Train one with reward_model.py",
        )
    return common.freeze_before(value_model, options.first_layer)


def load_judge(spec: str, prompts: Sequence[Prompt], **loading_options) -> Reward:
    """A function, a reward model, or a chat model as a `Judge`.

    Raises InputError if a prompt has no kind and the judge is a chat model, which is asked by the kind.
    """
    if is_function(spec) or loading.is_classifier(spec):
        return load_reward(spec, **loading_options)
    unknown = [prompt for prompt in prompts if prompt.kind not in RIGHT]
    if unknown:
        raise InputError(
            f"{len(unknown)} of {len(prompts)} prompts have no kind, such as "
            f"{shorten(unknown[0].messages[-1]['content'])!r}",
            where="--judge",
            expected=f"one of {', '.join(RIGHT)}: a chat model is asked whether a response is right for it",
            remedy="Add the kinds, or take a reward model or a function as the judge",
        )
    engine = loading.load_engine(spec, **loading_options)
    return Judge(engine, {str(prompt.messages): prompt.kind for prompt in prompts})


def check_tokenizer(name: str, chat: Chat) -> None:
    """Raise InputError unless the model has the policy's tokenizer.

    Args:
        chat: the policy's.
    """
    if loading.load_chat(name).tokenizer.get_vocab() != chat.tokenizer.get_vocab():
        raise InputError(
            "another tokenizer than the policy's",
            where=name,
            expected=f"the tokenizer of {chat.name}",
            remedy="Train it from the policy's own checkpoint",
        )
