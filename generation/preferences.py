"""Comparisons from completions: one or several models give K answers to each prompt; a judge, a reward model or both
score them.

Cui et al. 2023 (arXiv:2310.01377), section 2: the answers come from models of different strength, the judge rates each
answer on several aspects from 1 to 5 with a description of each rating, and the score of an answer is the mean.
Differences from the paper: each answer is rated in its own request, so there is no order of answers and no bias by it.
With both a judge and a reward model, only pairs that both order the same way are kept.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations

from generation.clients import Answer, Client, Conversation
from generation.progress import Progress
from generation.rows import Drops, GeneratedData, answer_fault, provenance, row_id

ASPECTS = {
    "instruction_following": "Does the answer do what was asked, all of it and in the asked form?",
    "truthfulness": "Is everything that the answer states true, and nothing invented?",
    "honesty": "Does the answer say what it does not know, with no more confidence than it has grounds for?",
    "helpfulness": "Is the answer useful, clear and complete for the person who asked?",
}
Prompt = tuple[str, Conversation]  # id, messages
Scorer = Callable[[Sequence[tuple[Conversation, str]]], list[float]]  # of (prompt, completion), all at once


def preferences(
    clients: dict[str, Client], prompts: Sequence[Prompt], *, judge: Client | None, reward_model: Scorer | None,
    num_completions: int, pairs: str, aspects: Sequence[str], min_margin: float, seed: int,
    temperature: float | None, max_tokens: int, progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns comparison rows whose chosen completion has the higher score, or demonstrations with pairs=best.

    Args:
        clients: the models that answer, by name; each gives `num_completions` answers.
        pairs: "best_worst" (one pair per prompt), "all" (every ordered pair) or "best" (a demonstration for each prompt
            whose best and worst completion are ordered: RAFT, Dong et al. 2023, arXiv:2304.06767, expert iteration).
        min_margin: a pair is ordered if its scores differ by this many points of the judge, or of the reward model if
            there is no judge.
    """
    check_settings(judge, reward_model, num_completions * len(clients), pairs, aspects)

    # ---- 1. K completions per prompt, each with its own seed
    drops, progress = Drops(), progress or Progress()
    steps = num_completions * len(clients) + (len(aspects) if judge else 0)
    # by text, because equal texts are one completion: the answer and its model
    completions: list[dict[str, tuple[Answer, str]]] = [{} for _ in prompts]
    for c, client in enumerate(clients.values()):
        for k in range(num_completions):
            progress.at(c * num_completions + k, steps, kept=0, drops=drops.counts)
            asked = [messages for _, messages in prompts]
            answers = client.ask(asked, temperature=temperature, max_tokens=max_tokens, seed=seed + k)
            for p, answer in enumerate(answers):
                text = answer.text.strip()
                fault = answer_fault(answer, whole=True) or ("repeated" if text in completions[p] else None)
                if fault:
                    drops.add(fault, text or answer.error, prompt=prompts[p][1], model=client.model)
                else:
                    completions[p][text] = answer, client.model

    # ---- 2. scores
    flat = [(p, text) for p, kept in enumerate(completions) for text in kept]
    answered = [(prompts[p][1], text) for p, text in flat]
    progress.at(steps - len(aspects) if judge else steps - 1, steps, kept=0, drops=drops.counts)
    ratings = rate(judge, answered, aspects=aspects, seed=seed) if judge else [{} for _ in flat]
    rewards = reward_model(answered) if reward_model else [None for _ in flat]
    scored: list[list[dict]] = [[] for _ in prompts]
    for (p, text), rating, reward in zip(flat, ratings, rewards, strict=True):
        if rating is None:
            drops.add("rating_not_parsed", text, prompt=prompts[p][1])
            continue
        scored[p].append(_entry(text, *completions[p][text], rating, reward))

    # ---- 3. pairs
    rows = []
    as_row = _demonstration if pairs == "best" else partial(pair_row, "preferences", ("aspects", "reward"))
    for prompt, entries in zip(prompts, scored, strict=True):
        for chosen, rejected in _pairs(entries, pairs):
            fault = _pair_fault(chosen, rejected, min_margin)
            if fault:
                drops.add(fault, chosen["text"], prompt=prompt[1], other=rejected["text"])
            else:
                rows.append(as_row(prompt, chosen, rejected, judge, seed))
        if len(entries) < 2:
            drops.add("fewer_than_two_completions", prompt=prompt[1])
    return GeneratedData(rows, drops, {"prompts": len(prompts), "completions": len(flat)})


# after a rating: no decimals, not "4/10", and not "1 to 5", which names the scale
OF_FIVE = r"(?![.,]\d|\s*(?:/|out of)\s*(?!5\b)\d|\s*(?:-|–|to)\s*\d)"


def check_settings(judge, reward_model, num_completions: int, pairs: str, aspects: Sequence[str]) -> None:
    """Raises ValueError if the settings cannot give a comparison."""
    if judge is None and reward_model is None:
        raise ValueError("nothing ranks: give client@judge_client=openai (a judge), method.reward_model=PATH, or both")
    if num_completions < 2:
        raise ValueError(f"{num_completions} completion a prompt gives no pair; set method.num_completions=4, say")
    if pairs not in ("best_worst", "all", "best"):
        raise ValueError(f"method.pairs={pairs!r}; known: best_worst, all, best")
    if not aspects or set(aspects) - set(ASPECTS):
        raise ValueError(f"method.aspects={list(aspects)} must name one or more of: {', '.join(ASPECTS)}")


def rate(
    judge: Client, answered: Sequence[tuple[Conversation, str]], *, aspects: Sequence[str], seed: int
) -> list[dict[str, int] | None]:
    """A rating of 1 to 5 per aspect for each (prompt, completion); None if a rating could not be read."""
    ratings: list[dict[str, int] | None] = [{} for _ in answered]
    for aspect in aspects:
        asked = [ask_rating(messages, text, aspect) for messages, text in answered]
        answers = judge.ask(asked, temperature=0.0, max_tokens=256, seed=seed)
        for i, answer in enumerate(answers):
            rating = None if answer_fault(answer, whole=True) else read_rating(answer)
            if rating is None or ratings[i] is None:
                ratings[i] = None
            else:
                ratings[i][aspect] = rating
    return ratings


def ask_rating(messages: Conversation, completion: str, aspect: str) -> Conversation:
    """The judge's prompt for one aspect of one completion."""
    talk = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)
    text = (
        f"Rate the last answer of an assistant on one aspect. {ASPECTS[aspect]}\n"
        "5: without fault. 4: small faults. 3: half of it. 2: large faults. 1: not at all.\n\n"
        f"--- conversation ---\n{talk}\n\n--- answer to rate ---\n{completion}\n\n--- end ---\n\n"
        "Write one sentence of reason, then the rating on a line of its own as `Rating: [[N]]` with N from 1 to 5."
    )
    return [{"role": "user", "content": text}]


def read_rating(answer: Answer) -> int | None:
    """The last `[[N]]`, or `Rating: N`, with N from 1 to 5; None if there is none, or it is of another scale."""
    marks = rf"\[\[\s*([1-5])\s*\]\]{OF_FIVE}|\brating\W{{0,4}}([1-5])\b{OF_FIVE}"
    found = re.findall(marks, answer.text, re.IGNORECASE)
    return int(next(filter(None, found[-1]))) if found else None


def _entry(text: str, answer: Answer, model: str, rating: dict[str, int], reward: float | None) -> dict:
    """A completion with what was measured of it. Its score is the mean of the ratings, or else the reward."""
    entry = {"text": text, "model": model, "aspects": rating, "reward": reward, "reasoning": answer.reasoning}
    return entry | {"score": sum(rating.values()) / len(rating) if rating else reward}


def _pairs(entries: list[dict], pairs: str):
    ordered = sorted(entries, key=lambda entry: -entry["score"])  # stable: equal scores keep the order they came in
    if pairs == "all" or len(ordered) < 2:
        return list(combinations(ordered, 2))
    return [(ordered[0], ordered[-1])]


def _pair_fault(chosen: dict, rejected: dict, min_margin: float) -> str | None:
    margin = chosen["score"] - rejected["score"]
    if margin <= 0 or margin < min_margin:
        return "tie"
    if chosen["aspects"] and chosen["reward"] is not None and chosen["reward"] <= rejected["reward"]:
        return "judge_and_reward_model_disagree"
    return None


def _demonstration(prompt: Prompt, chosen: dict, rejected: dict, judge: Client | None, seed: int) -> dict:
    prompt_id, messages = prompt
    return {
        "id": row_id("best_of", [messages, chosen["text"]]),
        "prompt": messages,
        "completion": chosen["text"],
        "score": chosen["score"],
        "judge": judge.model if judge else None,
        "provenance": provenance("best_of", [messages], [chosen["model"]], seed, [prompt_id]),
    }


def pair_row(
    method: str, scores: Sequence[str], prompt: Prompt, chosen: dict, rejected: dict, judge: Client | None, seed: int
) -> dict:
    """A comparison with its margin, the figures of both sides that `scores` names, and its provenance."""
    prompt_id, messages = prompt
    asked = [messages, chosen["text"], rejected["text"]]
    thought = {"chosen": chosen.get("reasoning"), "rejected": rejected.get("reasoning")}
    return {
        "id": row_id(method, asked),
        "prompt": messages,
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "margin": chosen["score"] - rejected["score"],
        "chosen_scores": {key: chosen[key] for key in scores},
        "rejected_scores": {key: rejected[key] for key in scores},
        "judge": judge.model if judge else None,
        **({"reasoning": thought} if any(thought.values()) else {}),
        "provenance": provenance(method, [messages], [chosen["model"], rejected["model"]], seed, [prompt_id]),
    }
