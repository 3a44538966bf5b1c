"""UltraFeedback: models of different strength answer under different principles; a judge rates on four aspects.

Cui et al. 2023 (arXiv:2310.01377), section 2: for each prompt `num_completions` models are drawn from a pool, and the
system prompt of each names one principle. The judge sees all answers to a prompt and rates each from 1 to 5, one aspect
at a time, with a reason. Zephyr (Tunstall et al. 2023, arXiv:2310.16944, section 3) makes pairs: the answer with the
highest mean rating against a random one of the others.
Difference from the paper: for each aspect the judge sees the answers in a new random order, so that no place always has
the advantage. `method=preferences` rates each answer alone.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from random import Random

from generation.clients import Answer, Client, Conversation
from generation.preferences import ASPECTS, OF_FIVE, Prompt, pair_row
from generation.progress import Progress
from generation.rows import Drops, GeneratedData, answer_fault
from runtime.config import check_choice, check_whole

PRINCIPLES = {
    "helpfulness": "Be as useful as you can: give what the person needs, as they asked for it, complete and clear.",
    "truthfulness": "State only what is true. Invent nothing; where a premise of the question is wrong, say so.",
    "honesty": "Say how sure you are. Where you do not know, say that you do not know.",
    "harmlessness": "Help without doing harm: be considerate, fair and careful with what could hurt somebody.",
    "instruction_following": "Follow every instruction to the letter, including length, format and language.",
    "brevity": "Answer in as few words as the question allows.",
}


def ultrafeedback(
    clients: dict[str, Client], prompts: Sequence[Prompt], *, judge: Client, num_completions: int,
    principles: Sequence[str], aspects: Sequence[str], pairs: str, min_margin: float, seed: int,
    temperature: float | None, max_tokens: int, judge_max_tokens: int, progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns comparison rows with the ratings of both completions.

    Args:
        clients: the pool of models, by name. The answers to a prompt come from as many different models as possible.
        principles: names in PRINCIPLES; one is drawn for each answer.
        pairs: "best_random" (Zephyr's) or "all" (every pair whose means differ by `min_margin` or more).
        judge_max_tokens: limit of the judge's answer, with reasons and ratings.
    """
    check_whole(2, method__num_completions=num_completions)
    check_choice("method.pairs", pairs, ("best_random", "all"))
    _check_names("principles", principles, PRINCIPLES)
    _check_names("aspects", aspects, ASPECTS)
    random, drops, progress = Random(seed), Drops(), progress or Progress()
    steps = num_completions + len(aspects)

    # ---- 1. draw models and principles; the models answer
    pool = list(clients.values())
    drawn = [_draw_models(pool, num_completions, random) for _ in prompts]
    heeded = [[random.choice(list(principles)) for _ in range(num_completions)] for _ in prompts]
    entries: list[list[dict]] = [[] for _ in prompts]
    for k in range(num_completions):
        progress.at(k, steps, kept=0, drops=drops.counts)
        for client in pool:
            own = [p for p in range(len(prompts)) if drawn[p][k] is client]
            asked = [under_principle(prompts[p][1], heeded[p][k]) for p in own]
            answers = client.ask(asked, temperature=temperature, max_tokens=max_tokens, seed=seed + k)
            for p, answer in zip(own, answers, strict=True):
                if fault := _fault(answer, entries[p]):
                    drops.add(fault, answer.text.strip() or answer.error, prompt=prompts[p][1], model=client.model)
                else:
                    about = {"model": client.model, "principle": heeded[p][k], "aspects": {}}
                    entries[p].append({"text": answer.text.strip(), **about})

    # ---- 2. the judge rates all answers to a prompt together, one aspect at a time
    judged = [p for p, found in enumerate(entries) if len(found) > 1]
    for p in set(range(len(prompts))) - set(judged):
        drops.add("fewer_than_two_completions", prompt=prompts[p][1])
    for a, aspect in enumerate(aspects):
        progress.at(num_completions + a, steps, kept=0, drops=drops.counts)
        orders = {p: random.sample(entries[p], len(entries[p])) for p in judged}
        rated = _rate(judge, prompts, orders, aspect, drops, max_tokens=judge_max_tokens, seed=seed)
        for p, ratings in rated.items():
            for entry, rating in zip(orders[p], ratings, strict=True):
                entry["aspects"][aspect] = rating

    # ---- 3. pairs of the answers that have all ratings
    rows = []
    as_row = partial(pair_row, "ultrafeedback", ("aspects", "principle"))
    for p in judged:
        for chosen, rejected in _pairs(_by_score(entries[p], len(aspects)), pairs, random):
            if chosen["score"] - rejected["score"] < max(min_margin, 1e-9):
                drops.add("tie", chosen["text"], other=rejected["text"], prompt=prompts[p][1])
            else:
                rows.append(as_row(prompts[p], chosen, rejected, judge, seed))
    return GeneratedData(rows, drops, {"prompts": len(prompts), "completions": sum(map(len, entries))})


def under_principle(messages: Conversation, principle: str) -> Conversation:
    """The prompt with the principle as its system message, or at the end of its system message."""
    system, rest = (
        ("", messages) if messages[0]["role"] != "system" else (messages[0]["content"] + "\n\n", messages[1:])
    )
    return [{"role": "system", "content": system + PRINCIPLES[principle]}, *rest]


def ask_ratings(messages: Conversation, texts: Sequence[str], aspect: str) -> Conversation:
    """The judge's prompt: all answers to a prompt, one aspect; the reply is JSON."""
    talk = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)
    shown = "\n\n".join(f"--- answer {n} ---\n{text}" for n, text in enumerate(texts, 1))
    text = (
        f"Rate {len(texts)} answers to one conversation on one aspect, each for itself. {ASPECTS[aspect]}\n"
        "5: without fault. 4: small faults. 3: half of it. 2: large faults. 1: not at all.\n\n"
        f"--- conversation ---\n{talk}\n\n{shown}\n\n--- end ---\n\n"
        'Answer with JSON alone: {"reasons": [one sentence for each answer], "ratings": [a whole number from 1 to 5 '
        f"for each of the {len(texts)} answers, in their order]}}"
    )
    return [{"role": "user", "content": text}]


def ratings_schema(count: int) -> dict:
    """The JSON schema of the judge's reply: a short reason and a rating for each answer."""
    reasons = {"type": "array", "items": {"type": "string", "maxLength": 300}}
    ratings = {"type": "array", "items": {"type": "integer", "enum": [1, 2, 3, 4, 5]}}
    lists = {"reasons": reasons, "ratings": ratings}
    return {
        "type": "object",
        "properties": {name: one | {"minItems": count, "maxItems": count} for name, one in lists.items()},
        "required": list(lists),
        "additionalProperties": False,
    }


def read_ratings(answer: Answer, count: int) -> list[int] | None:
    """`count` ratings from 1 to 5: from JSON in the answer, or from lines like `Answer 2: 4`. Otherwise None."""
    if answer_fault(answer, whole=True):
        return None
    found = re.search(r"\{.*\}", answer.text, re.DOTALL)
    try:
        ratings = json.loads(found.group())["ratings"] if found else None
    except (ValueError, RecursionError, LookupError, TypeError):
        ratings = None
    if ratings is None and not found:
        line = rf"answer\s*(\d{{1,2}})\W[^\n\d]*\b([1-5])\b{OF_FIVE}"
        lines = dict(re.findall(line, answer.text, re.IGNORECASE))
        ratings = [int(lines[str(n)]) for n in range(1, count + 1) if str(n) in lines]
    good = isinstance(ratings, list) and len(ratings) == count
    return ratings if good and all(type(one) is int and 1 <= one <= 5 for one in ratings) else None


def _check_names(key: str, names: Sequence[str], known: dict[str, str]) -> None:
    if not names or set(names) - set(known):
        raise ValueError(f"method.{key}={list(names)} must name one or more of: {', '.join(known)}")


def _draw_models(pool: list[Client], count: int, random: Random) -> list[Client]:
    """As many different models as possible."""
    return [pool[i % len(pool)] for i in random.sample(range(max(len(pool), count)), count)]


def _fault(answer: Answer, entries: list[dict]) -> str | None:
    repeated = any(entry["text"] == answer.text.strip() for entry in entries)
    return answer_fault(answer, whole=True) or ("repeated" if repeated else None)


def _rate(
    judge: Client, prompts: Sequence[Prompt], orders: dict[int, list[dict]], aspect: str, drops: Drops,
    *, max_tokens: int, seed: int,
) -> dict[int, list[int]]:  # fmt: skip
    """number of the prompt -> the ratings of its completions, in the order in which the judge read them."""
    rated: dict[int, list[int]] = {}
    for count in sorted({len(order) for order in orders.values()}):
        some = [p for p, order in orders.items() if len(order) == count]
        asked = [ask_ratings(prompts[p][1], [entry["text"] for entry in orders[p]], aspect) for p in some]
        schema = ratings_schema(count)
        answers = judge.ask(asked, temperature=0.0, max_tokens=max_tokens, schema=schema, seed=seed)
        for p, answer in zip(some, answers, strict=True):
            if ratings := read_ratings(answer, count):
                rated[p] = ratings
            else:
                drops.add("ratings_not_parsed", answer.text or answer.error, prompt=prompts[p][1], aspect=aspect)
    return rated


def _by_score(entries: list[dict], num_aspects: int) -> list[dict]:
    """The answers that have all ratings, with their mean as `score`, best first."""
    whole = [entry for entry in entries if len(entry["aspects"]) == num_aspects]
    for entry in whole:
        entry["score"] = sum(entry["aspects"].values()) / num_aspects
    return sorted(whole, key=lambda entry: -entry["score"])  # stable


def _pairs(entries: list[dict], pairs: str, random: Random) -> list[tuple[dict, dict]]:
    if len(entries) < 2:
        return []
    if pairs == "best_random":
        return [(entries[0], random.choice(entries[1:]))]
    return [(better, worse) for i, better in enumerate(entries) for worse in entries[i + 1 :]]
