"""AlpacaEval 2's verdict: the shares of the two identifiers in a served judge's probabilities of its first token.

    preference for the second answer = P(M) / (P(m) + P(M))     (alpaca_eval 0.6.6, `logprob_parser`; one token)

An identifier that is not among the `top_logprobs` most likely tokens counts 0. If neither is, there is no verdict. With
a local policy both probabilities are exact: judge=logprobs.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence

from data.records import Verdict
from evals.judge_items import Item, pair_verdict
from generation.clients import Answer

IDENTIFIERS = ("m", "M")  # of the answer that is shown first, and of the other


def second_share(answer: Answer) -> tuple[float | None, str]:
    """(P(M) / (P(m) + P(M)) at the answer's first token, "") or (None, the reason)."""
    if answer.missing:
        return None, answer.finish_reason
    if not answer.top_logprobs:
        return None, {"content_filter": "filtered"}.get(answer.finish_reason, "no first token")
    logprobs = json.loads(answer.top_logprobs)
    m, M = (math.exp(logprobs[name]) if name in logprobs else 0.0 for name in IDENTIFIERS)
    return (M / (m + M), "") if m + M > 0 else (None, "neither m nor M is among the likely tokens")


def share_verdict(item: Item, judge: str, share: float | None, text: str) -> Verdict:
    """The verdict from the share of the answer shown second. None is an error."""
    winner = "error" if share is None else "tie" if share == 0.5 else "b" if share > 0.5 else "a"
    verdict = pair_verdict(item, judge, text, (winner, 1.0), item.shown)
    preference = share if share is None or item.shown == "a" else 1 - share
    return dataclasses.replace(verdict, preference=preference)


def share_verdicts(items: Sequence[Item], answers: Sequence[Answer], judge: str) -> tuple[list[Verdict], Counter]:
    """(a verdict with preference for every item, {reason: number of errors})."""
    found = [second_share(answer) for answer in answers]
    verdicts = [
        share_verdict(item, judge, share, answer.text or answer.error if share is None else f"P(M) {share:.4f}")
        for item, answer, (share, _) in zip(items, answers, found, strict=True)
    ]
    return verdicts, Counter(why for share, why in found if share is None)
