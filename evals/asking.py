"""Ask a judge model about items: the cost before asking, cached answers, and new answers."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from omegaconf import DictConfig

from data.chat import encode_prompt
from data.chat_template import TextMarkerSaid
from evals.judge_items import Item, check_fits, choose_template, item_messages
from evals.prompts import load_templates, parser_of
from generation.build_client import build_client
from generation.clients import Answer, Client
from generation.local_client import LocalClient


@dataclass(frozen=True)
class Judging:
    """Who judges and how: the config groups `judge` and `client`, the mode (pairwise, single) and the seed."""

    judge: DictConfig
    client: DictConfig | None
    mode: str
    seed: int = 0


def judge_client(client: DictConfig | None) -> Client:
    """The client for `judge=llm` and the other judges that ask a model.

    Raises:
        ValueError: no client is given.
    """
    if client is None:
        raise ValueError(
            "task=judge asks a model: give client=openai | local | scripted, or judge=reward_model | logprobs"
        )
    return build_client(client)


def ask_judge(client: Client, items: Sequence[Item], judging: Judging) -> tuple[list[tuple[Answer, Callable]], dict]:
    """([(answer, parser of its verdict) for every item], cost).

    Raises:
        ValueError: a template, rule or prompt does not fit the judge. No request has been sent then.
    """
    templates = load_templates(judging.judge.template, judging.mode)
    parsers = parser_of(judging.judge.rule, templates)
    answers, usage = ask_items(client, items, judging)
    read = [parsers[choose_template(item, templates).output_format] for item in items]
    return list(zip(answers, read, strict=True)), usage


def ask_items(client: Client, items: Sequence[Item], judging: Judging) -> tuple[list[Answer], dict]:
    """(the client's answer to every item, its cost in money and time). The cost bound is printed before."""
    conversations, settings = _questions(client, items, judging)
    plan = _plan(client, conversations, settings, judging)
    print(plan_sentence(client.model, plan), flush=True)
    begun = time.monotonic()
    answers = client.ask(conversations, **settings)
    return answers, asdict(client.usage) | plan | {"seconds": time.monotonic() - begun}


def plan_judge(judging: Judging, items: Sequence[Item]) -> dict:
    """task.plan=true: the number of questions, the number in the cache, and the cost bound. No request is sent."""
    if judging.judge.kind in ("reward_model", "logprobs"):
        print(f"{len(items)} pairs or answers, read by {judging.judge.path}: no request, no cost")
        return {"questions": len(items), "to_ask": 0, "cost_bound": 0.0}
    client = judge_client(judging.client)
    plan = _plan(client, *_questions(client, items, judging), judging)
    print(plan_sentence(client.model, plan))
    return plan


def plan_sentence(model: str, plan: dict) -> str:
    """The plan on one line."""
    pace = "" if plan["minutes_at_least"] is None else f", {plan['minutes_at_least']:.1f} minutes or more"
    return (
        f"{plan['questions']} questions to {model}: {plan['to_ask']} need a request, the others are in the cache or "
        "repeat another; "
        f"at most {plan['cost_bound']:.4f} in currency units (client.*_price){pace}"
    )


def _questions(client: Client, items: Sequence[Item], judging: Judging) -> tuple[list, dict]:
    """(the conversations, the settings of the requests)."""
    judge, templates = judging.judge, load_templates(judging.judge.template, judging.mode)
    conversations = [item_messages(item, choose_template(item, templates)) for item in items]
    check_window(client, items, conversations, judge.max_tokens)
    settings = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, "seed": judging.seed}
    return conversations, settings | {"top_logprobs": judge.get("top_logprobs", 0)}


def _plan(client: Client, conversations: list, settings: dict, judging: Judging) -> dict:
    todo = client.not_answered(conversations, **settings)
    pace = judging.client.get("requests_per_minute")
    return {
        "questions": len(conversations),
        "to_ask": len(todo),
        "cost_bound": client.cost_bound(todo, max_tokens=settings["max_tokens"]),
        "minutes_at_least": len(todo) / pace if pace else None,
    }


def check_window(client: Client, items: Sequence[Item], conversations: Sequence[list[dict]], max_tokens: int) -> None:
    """Raise ValueError if prompts do not fit the window of a local judge, which must read both answers.

    The window of a server is unknown here. If a server refuses such a request, the verdict counts as an error.
    """
    if not isinstance(client, LocalClient):
        return
    window = client.policy.config.max_length - max_tokens
    lengths = []
    for talk in conversations:
        try:
            lengths.append(len(encode_prompt(talk, client.tokenizer, max_length=sys.maxsize)))
        except TextMarkerSaid:  # counted as refused when it is asked
            lengths.append(0)
    check_fits([item.name for item in items], lengths, window, "the judge's window (judge.max_tokens is part of it)")
