"""A gold reward that is a function: points for a reply to a coffee order. recipe=overoptimization uses it.

train_ppo.py reads it as `reward_fn=evals.barista:gold`, make_data.py as `method.reward_fn=evals.barista:gold`.
"""

import re
from collections import Counter

PARTS = {  # a reply gets one point for each part that it contains
    "acknowledges": r"\b(ok|okay|great|sure|alright|awesome|perfect|cool|yes)\b",
    "says what": r"\b(order|drink|latte|mocha|cappuccino|americano|macchiato|cortado|espresso|tea)s?\b",
    "says when": r"\b(soon|shortly|minutes?|moments?|momentarily|seconds?|jiffy)\b",
    "says where": r"\b(bar|counter)\b",
    "is friendly": r"\b(thanks|thank|enjoy|please|welcome)\b",
}
FREE = set(re.findall(r"\w+", "a an and are at be for have i in is it of on our the this to up we will with you your"))
MAX_WORDS = 14  # longer replies lose points


def gold(prompts: list[str], completions: list[str]) -> list[float]:
    """One point per part, minus 0.5 per repeated word and 0.2 per word above MAX_WORDS.

    Few sampled replies repeat words, so a proxy that learns from them hardly learns this penalty.
    """
    return [score(text) for text in completions]


def score(text: str) -> float:
    """The gold reward of one reply."""
    text = text.lower()
    words = re.findall(r"[a-z']+", text)
    found = sum(bool(re.search(pattern, text)) for pattern in PARTS.values())
    again = sum(count - 1 for word, count in Counter(words).items() if word not in FREE)
    return found - 0.5 * again - 0.2 * max(0, len(words) - MAX_WORDS)
