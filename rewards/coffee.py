"""reward=coffee: would a customer at the coffee counter take this reply? 1 or 0. The gold measure of recipe=coffee.

A reply must be said as people say it (no word that nobody says, no words that do not go together, nothing said twice,
nothing broken off), name no drink and no addition that was not ordered, and do what the moment asks for. The moment is
read from what the customer said last:

    order      a drink is named: the reply asks whether the order is right, accepts it, or offers something else
    confirmed  the order was found right: the reply says that it is on its way, and does not ask again
    menu       the menu is wanted: the reply shows it, or asks what it shall be
    question   about drinks: the reply speaks of what was asked; what is in a drink must be right
    elsewhere  about anything else: the reply says that it does not know, or offers a drink
    other      only that it is said well is checked

The rule was written down before a policy was trained on it. What a reader found of replies, one by one, and how far the
rule agrees with that: docs/recipes.md.
"""

import functools
import re
from collections import Counter
from pathlib import Path

from data import formats
from data.records import BadRows, read_records

DATA = Path(__file__).parents[1] / "data" / "embedded"
SPOKEN = {  # how people speak, at the counter and elsewhere; no held-out dialogue among them
    "sft_coffee_train.jsonl.gz@train": formats.examples, "sft_oasst_train.jsonl.gz": formats.examples,
    "sft_rasbt_train.jsonl.gz": formats.examples, "pref_hh_helpful_train.jsonl.gz": formats.preferences,
}  # fmt: skip
PAIRS, TRIPLES = 0.2, 0.25  # share of the pairs, and of the triples, of a reply's words that nobody says, at most
WORD = r"[a-z0-9%'-]+"


def any_of(patterns: str) -> re.Pattern:
    """One of the patterns, which a bar or the end of a line parts, with a word's bounds around it."""
    either = "|".join(line.strip() for line in patterns.strip().splitlines())
    return re.compile(rf"\b(?:{either})(?!\w)")


def kinds(patterns: dict[str, str]) -> dict[str, re.Pattern]:
    """Patterns of the beginning of a word, by what they stand for; people spell them in many ways."""
    return {name: re.compile(rf"\b(?:{pattern})") for name, pattern in patterns.items()}


DRINKS = kinds({
    "latte": "latt", "mocha": "moch|mocca", "cappuccino": r"capp?[uoa]c?c|cappn|capps?\b", "americano": "americ",
    "macchiato": "mac+h?iat|machiat", "cortado": "cort[aoi]?d|corado|corta", "espresso": "e[sx]pres",
    "steamer": "steamer", "brew": "cold[- ]?brew|brewed", "hot chocolate": "hot choc|hot cocoa",
    "flat white": "flat white|white flat", "fog": "london fog", "tea": r"teas?\b|earl gr|jin xuan|rooibos",
})  # fmt: skip
ADDITIONS = kinds({
    "almond": "almond", "oat": "oat", "soy": "soy", "whole": "whole milk", "2%": "2 ?%|two percent|2 percent",
    "non-fat": "non-? ?fat|skim", "lactose": "lactose", "decaf": "decaf", "iced": r"iced?\b", "vanilla": "vanilla",
    "hazelnut": "hazel", "caramel": "caramel|carmel", "honey": "honey", "chocolate": "chocolate", "foam": "foam",
    "single": "single", "double": "double?(?![- ]?check)", "triple": "tripl", "quad": "quad", "chai": "chai",
    "matcha": "matcha", "sugar": "sugar", "cream": "cream|half and half",
})  # fmt: skip
RECIPES = {  # what the data say is in a drink
    "steamer": "milk|foam", "americano": "water|espresso", "brew": "coffee|concentrate|ice",
    "latte": "milk|espresso|foam", "mocha": "chocolate|espresso|milk", "cappuccino": "milk|espresso|foam",
    "macchiato": "milk|espresso|foam", "cortado": "milk|espresso", "espresso": "coffee|shot",
}  # fmt: skip

# ---- what the customer says
GREETS = re.compile(r"^(?:hello|hi|hey)?\W*(?:how are you|how's it going|how is it going)")
YES = any_of("""
    yes|yeah|yea|yep|yup|sure|ok|okay|correct|right|good|great|fine|perfect|exactly|exact|works?|confirm\\w*|it is
    it does|that's it|that is it|got it|terrific|everything|wonderful|awesome|thanks|thank you
""")
NO = re.compile(r"^(?:no|nope|not)\b|n't\b|\bbut\b|\binstead\b|\bchange\b")
CHANGES = any_of("can i get|could i get|change|can you add|make it|instead|wanted|rather")
ASKS = re.compile(r"\?|\b(?:what|which|how|when|where|why|who|tell me|wondering|do you|are there|is there)\b")
ASKS_FOR_FACTS = any_of("what|which|do you|are there|is there|how")
ASKS_FOR_KINDS = any_of("what|which|kinds?|types?|sorts?|varieties")
ASKS_FOR_CONTENTS = re.compile(r"\b(?:what(?:'s|s)?|ingredients?|made|contents?|inside)\b.*\b(?:in|of|is|are)\b")
ORDERS = any_of("""
    i'd|i'll|i will|i would|i want|i need|i think|i like|give me|gimme|get|let's|let me|may i|can i|could i|can we|have
    make me|please|order|one|two|three|to go
""")
TOPICS = any_of("""
    coffees?|teas?|drinks?|beverages?|milks?|sweeteners?|syrups?|honey|flavou?rs?|menu|sizes?|cups?|chocolate|foam
    caffeine|sugar|chai|matcha|ice|lids?|herbal|black|green
""")

# ---- what the reply says
CONFIRM = any_of("""
    confirm\\w*|correct\\w*|right(?!\\s+(?:out|up|away|over|to|there))|check(?! (?:out|back))|look good|looks? ok|review
    verify|make sure|accura\\w+|approv\\w+|look over|take a look|details|complete
""")
ASKS_AGAIN = re.compile(r"\b(?:confirm(?!ed)|check|correct|verify|review)")
READY = any_of("""
    ready|soon|shortly|right now|make that|make it|momentarily|minutes?|moments?|seconds?|sec|jiffy|right out|right up
    right away|right over|coming|be up|be out|done|finished|pick up|pick it up|pick your order up|bar|sent|send|sending
    placed|placing|submit\\w*|start\\w*|working|making|prepar\\w+|on its way|on the way|brewing|waiting|called?|put it
    put that|put your|work on
""")
ACCEPT = any_of("got it|coming|added|add|put|entered|placed|have that|take your order|great choice|good choice")
DECLINE = any_of("""
    sorry|afraid|don't|dont|do not|doesn't|can't|cannot|no(?! (?:problem|time))|not|isn't|aren't|unable|nothing
    unfortunately|instead|unavailable|matches
""")
OFFER = re.compile(r"\?|\b(?:instead|help|did you mean)\b")
IGNORANT = any_of("""
    sorry|afraid|don't|do not|can't|cannot|not|no|no idea|unable|haven't|unsure|outside|help you|get you|only|comment
""")
MENU = any_of("""
    menu|there you|here it|here you|here is|take a look|what can|what would|what will|what could|let me know|certainly
    of course|sure
""")
OFFERS_KINDS = any_of("menu|we have|we offer|we serve|we carry|we sell|which")
FOR_ORDERS = re.compile(r"\b(?:ready|be (?:out|up)|soon|shortly)\b|\bconfirm|\b(?:correct|right|order)\b.*\?")
ANSWERS = re.compile(r"^\W*(?:yes|yeah|sure|of course|no|sorry|i'm sorry|we|our|unfortunately)\b")
DANGLING = any_of("a|an|the|and|or|of|to|at|for|your|my|our|their|i|i'll|we'll|if|as|by|from|with|but|very|than")
COMMON = any_of("a|an|the|and|or|of|to|at|in|on|with|for|your|you|i|we|is|are|be|it|that|will|up")


def coffee(prompts: list[str], completions: list[str]) -> list[float]:
    """1.0 or 0.0 a completion."""
    return [score(turns(prompt), said) for prompt, said in zip(prompts, completions, strict=True)]


def turns(prompt: str) -> list[str]:
    """What was said so far, the customer's last words last; roles are words, or those of a chat template."""
    parts = re.split(r"(?:^|\n\n)(?:system|user|assistant): |(?:<s>|<\|\w+\|>)+", prompt)
    return [part for part in parts if part.strip()] if len(parts) > 1 else [prompt]


def score(said: list[str], reply: str) -> float:
    """The gold measure of one reply to what was said."""
    return float(not broken(said, reply) and serves(said, plain(reply)))


def plain(text: str) -> str:
    """Small letters, straight apostrophes, one space between words."""
    return " ".join(text.lower().replace("’", "'").split())


def found(kinds: dict[str, re.Pattern], text: str) -> set[str]:
    """The names whose pattern is in the text."""
    return {name for name, pattern in kinds.items() if pattern.search(text)}


# ---- is it said as people say it?


def pieces(text: str) -> list[str]:
    """Words, and a full stop where a sentence ends; drinks and additions stand for their kind."""
    parts = ["."]
    for part in re.findall(rf"{WORD}|[.!?]", plain(text)):
        if found(DRINKS, part):
            part = "<drink>"
        elif found(ADDITIONS, part):
            part = "<addition>"
        parts += ["."] if part in ".!?" and parts[-1] != "." else [] if part in ".!?" else [part]
    return [*parts, *(["."] if parts[-1] != "." else [])]


@functools.cache
def known() -> tuple[set[str], ...]:
    """The words, the pairs and the triples of words that follow each other, of all that is said in SPOKEN."""
    read = (read_records(DATA / name, parse, BadRows("skip")) for name, parse in SPOKEN.items())
    rows = [pieces(text) for records in read for record in records for text in record.texts()]
    return tuple({run for row in rows for run in runs_of(row, n)} for n in (1, 2, 3))


def runs_of(words: list[str], n: int) -> list[tuple[str, ...]]:
    """Every n words that follow each other."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def broken(said: list[str], reply: str) -> bool:
    """Whether the reply is no sentence that people say: unknown words or pairs of words, a repetition, no end."""
    words, pairs, triples = known()
    row, spoken = pieces(reply), re.findall(WORD, plain(reply))
    new = {word for (word,) in runs_of(row, 1) if (word,) not in words} - set(re.findall(WORD, plain(" ".join(said))))
    rare = [sum(run not in seen for run in runs_of(row, n)) for n, seen in ((2, pairs), (3, triples))]
    counts = Counter(word for word in spoken if not COMMON.fullmatch(word))
    again = max(Counter(runs_of(spoken, 3)).values(), default=0) > 1 or max(counts.values(), default=0) > 2
    again = again or any(one == two for one, two in runs_of(spoken, 2))
    unusual = rare[0] > PAIRS * len(row) or rare[1] > TRIPLES * len(row)
    return not spoken or "\ufffd" in reply or bool(new) or unusual or again or bool(DANGLING.fullmatch(spoken[-1]))


# ---- does it do what the moment asks for?


def moment(said: list[str]) -> str:
    """What the customer's last words want; see above."""
    text, answered = plain(said[-1]), len(said) > 1
    names = bool(found(DRINKS, text))
    if GREETS.search(text):
        return "other"
    if re.search(r"\bmenu\b", text):
        return "menu"
    if answered and not names and not NO.search(text) and not text.endswith("?") and YES.search(text):
        return "confirmed"
    if answered and CHANGES.search(text) or names and ORDERS.search(text) and not ASKS_FOR_FACTS.search(text):
        return "order"
    if ASKS.search(text):
        return "question" if names or found(ADDITIONS, text) or TOPICS.search(text) else "elsewhere"
    return "order" if names else "other"


def serves(said: list[str], reply: str) -> bool:
    """Whether a reply that is well said (in small letters) does what the moment asks for."""
    kind, ordered = moment(said), plain(" ".join(said[-1::-2]))  # all that the customer said
    declines, confirms, is_ready = (bool(words.search(reply)) for words in (DECLINE, CONFIRM, READY))
    if kind == "order" and declines and not confirms and not is_ready:
        return bool(OFFER.search(reply))
    if kind in ("order", "confirmed"):
        added = found(ADDITIONS, reply) - found(ADDITIONS, ordered) - {"chocolate"}
        if declines or added or found(DRINKS, reply) - found(DRINKS, ordered):
            return False
        if kind == "confirmed":
            return is_ready and not ASKS_AGAIN.search(reply)
        return confirms or is_ready or "?" in reply or bool(ACCEPT.search(reply))
    if kind == "menu":
        ready = re.search(r"\bready\b(?! to)|\bcoffee bar\b", reply)
        return not confirms and not ready and bool(MENU.search(reply))
    if kind == "elsewhere":
        asks_again = confirms and "?" in reply and not declines
        return not asks_again and "ready" not in reply and bool(IGNORANT.search(reply))
    return answers(plain(said[-1]), reply) if kind == "question" else True


def answers(question: str, reply: str) -> bool:
    """Whether it is a reply to this question about drinks, and not what is said to an order."""
    recipes = [RECIPES[name] for name in found(DRINKS, question) if name in RECIPES]
    if FOR_ORDERS.search(reply):
        return False
    if recipes and ASKS_FOR_CONTENTS.search(question):
        return any(re.search(rf"\b(?:{recipe})", reply) for recipe in recipes)
    shared = set(TOPICS.findall(question)) & set(TOPICS.findall(reply)) or found(DRINKS, question) & found(
        DRINKS, reply
    )
    if ASKS_FOR_KINDS.search(question):
        return bool(shared or found(DRINKS, reply) or found(ADDITIONS, reply) or OFFERS_KINDS.search(reply))
    return bool(shared or found(ADDITIONS, question) & found(ADDITIONS, reply) or ANSWERS.search(reply))
