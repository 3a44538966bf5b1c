"""reward=coffee: 1 if a customer at the coffee counter would accept this reply, else 0. The gold measure of
recipe=coffee.

A reply must use only words and pairs of words that people use in the data, must not repeat itself, and must have an
end. It must not name a drink or an addition that was not ordered. It must fit the situation, which is read from the
customer's last message:

    order      a drink is named: the reply asks whether the order is right, accepts it, or offers something else
    confirmed  the customer confirmed the order: the reply says that it is being made, and does not ask again
    menu       the customer wants the menu: the reply shows it, or asks for the order
    question   a question about drinks: the reply is about the drinks in question, and their contents are right
    elsewhere  about anything else: the reply says that it does not know, or offers a drink
    other      only the wording is checked

The rule was written before a policy was trained on it. A reader's verdicts on single replies, and their agreement with
the rule, are in docs/recipes.md.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data import formats
from data.records import BadRows, Record, read_records

DATA = Path(__file__).parents[1] / "data" / "embedded"
# what people say in the data; without the held-out dialogues
SPOKEN: dict[str, Callable[[dict], Sequence[Record]]] = {
    "sft_coffee_train.jsonl.gz@train": formats.examples,
    "sft_oasst_train.jsonl.gz": formats.examples,
    "sft_rasbt_train.jsonl.gz": formats.examples,
    "pref_hh_helpful_train.jsonl.gz": formats.preferences,
}
PAIRS, TRIPLES = 0.2, 0.25  # largest shares of a reply's word pairs and triples that do not occur in the data
WORD = r"[a-z0-9%'-]+"


def any_of(patterns: str) -> re.Pattern:
    """A pattern of whole words that matches any of the patterns, which are separated by a bar or a line end."""
    either = "|".join(line.strip() for line in patterns.strip().splitlines())
    return re.compile(rf"\b(?:{either})(?!\w)")


def kinds(patterns: dict[str, str]) -> dict[str, re.Pattern]:
    """Patterns of the beginning of a word, by the kind that they stand for, with the spellings in the data."""
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
RECIPES = {  # contents of the drinks according to the data
    "steamer": "milk|foam",
    "americano": "water|espresso",
    "brew": "coffee|concentrate|ice",
    "latte": "milk|espresso|foam",
    "mocha": "chocolate|espresso|milk",
    "cappuccino": "milk|espresso|foam",
    "macchiato": "milk|espresso|foam",
    "cortado": "milk|espresso",
    "espresso": "coffee|shot",
}

# ---- the customer's messages
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

# ---- the reply
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
    """1.0 or 0.0 per completion."""
    return [score(turns(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True)]


def turns(prompt: str) -> list[str]:
    """The messages so far, of which the customer's last one is the last.

    Roles are words, or those of a chat template.
    """
    parts = re.split(r"(?:^|\n\n)(?:system|user|assistant): |(?:<s>|<\|\w+\|>)+", prompt)
    return [part for part in parts if part.strip()] if len(parts) > 1 else [prompt]


def score(messages: list[str], reply: str) -> float:
    """The gold measure of one reply to the messages."""
    return float(not broken(messages, reply) and fits_situation(messages, plain(reply)))


def plain(text: str) -> str:
    """The text in lower case, with straight apostrophes and one space between words."""
    return " ".join(text.lower().replace("’", "'").split())


def found(kinds: dict[str, re.Pattern], text: str) -> set[str]:
    """The names whose pattern is in the text."""
    return {name for name, pattern in kinds.items() if pattern.search(text)}


# ---- wording


def pieces(text: str) -> list[str]:
    """The words, with a full stop at each end of a sentence. Drinks and additions are replaced by their kind."""
    parts = ["."]
    for part in re.findall(rf"{WORD}|[.!?]", plain(text)):
        if found(DRINKS, part):
            part = "<drink>"
        elif found(ADDITIONS, part):
            part = "<addition>"
        parts += ["."] if part in ".!?" and parts[-1] != "." else [] if part in ".!?" else [part]
    return [*parts, *(["."] if parts[-1] != "." else [])]


@functools.cache
def known() -> tuple[set[tuple[str, ...]], ...]:
    """The words, and the pairs and triples of consecutive words, of all messages in SPOKEN."""
    read = (read_records(DATA / name, parse, BadRows("skip")) for name, parse in SPOKEN.items())
    rows = [pieces(text) for records in read for record in records for text in record.texts()]
    return tuple({run for row in rows for run in runs_of(row, n)} for n in (1, 2, 3))


def runs_of(words: list[str], n: int) -> list[tuple[str, ...]]:
    """Every n consecutive words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def broken(messages: list[str], reply: str) -> bool:
    """Whether the wording is wrong: unknown words or pairs of words, a repetition, or no end."""
    words, pairs, triples = known()
    row, spoken = pieces(reply), re.findall(WORD, plain(reply))
    heard = set(re.findall(WORD, plain(" ".join(messages))))
    new = {word for (word,) in runs_of(row, 1) if (word,) not in words} - heard
    rare = [sum(run not in seen for run in runs_of(row, n)) for n, seen in ((2, pairs), (3, triples))]
    counts = Counter(word for word in spoken if not COMMON.fullmatch(word))
    again = max(Counter(runs_of(spoken, 3)).values(), default=0) > 1 or max(counts.values(), default=0) > 2
    again = again or any(one == two for one, two in runs_of(spoken, 2))
    unusual = rare[0] > PAIRS * len(row) or rare[1] > TRIPLES * len(row)
    return not spoken or "\ufffd" in reply or bool(new) or unusual or again or bool(DANGLING.fullmatch(spoken[-1]))


# ---- the situation


def situation(messages: list[str]) -> str:
    """The situation of the customer's last message, as listed above."""
    text, answered = plain(messages[-1]), len(messages) > 1
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


def fits_situation(messages: list[str], reply: str) -> bool:
    """Whether a reply with correct wording (in lower case) fits the situation."""
    kind, ordered = situation(messages), plain(" ".join(messages[-1::-2]))  # all messages of the customer
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
    return answers(plain(messages[-1]), reply) if kind == "question" else True


def answers(question: str, reply: str) -> bool:
    """Whether the reply answers this question about drinks, and is not a reply to an order."""
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
