"""The meaning of names ("Assistant A") and of sentences ("B is better") in judges' texts."""

import re
from collections.abc import Callable, Iterator

Meaning = tuple[str, float] | None  # (verdict, weight) of a name; None if it names no answer

NOUN = (
    r"(?i:(?:AI\s+)?(?:assistant|response|answer|model|output|option|candidate|chatbot|system|reply|completion|choice|"
    r"text|solution|assistant's response|助手|回答|回复|模型|答案|选项))"
)
_TIES = {"c", "tie", "tied", "draw", "equal", "equally good", "same", "both", "neither", "a tie", "no winner", "none",
         "inconclusive", "both equal", "both equally good", "平局", "both_good", "both good", "both_bad", "both bad",
         "tie (bothbad)", "toss-up"}  # fmt: skip
_WILDBENCH = {"a++": "a>>b", "a+": "a>b", "b+": "b>a", "b++": "b>>a"}
_ORDER = re.compile(r"([ab])\s*(>>|>|=|==|<|<<)\s*([ab])")
_ORDINAL = {"1": "a", "2": "b", "first": "a", "second": "b", "one": "a", "two": "b"}


def letter_meaning(name: str) -> Meaning:
    """The meaning of a name if the answers are called A and B: a letter, a tie, A>>B, "Assistant A", "model_2"."""
    name = re.sub(r"[*_`~\"'#().,:;!\[\]{}$→✅✔🏆]+", " ", name.replace("model_", "model ")).strip().lower()
    name = re.sub(r"^(?:the|it is|it's|they are|is|definitely|clearly|probably)\s+", "", name)
    name = _WILDBENCH.get(name, name)
    bare = re.sub(rf"{NOUN}", "", name).strip()
    order = _ORDER.fullmatch(re.sub(r"\s+", "", bare))
    if order and order[1] != order[3]:
        if "=" in order[2]:
            return "tie", 1.0
        winner = order[1] if ">" in order[2] else order[3]
        return winner, 3.0 if len(order[2]) == 2 else 1.0
    if name in _TIES or bare in _TIES or re.match(r"(?:a )?(?:tie|draw)\b", name):
        return "tie", 1.0
    if bare in ("a", "b"):
        return bare, 1.0
    return (_ORDINAL[bare], 1.0) if bare in _ORDINAL and bare != name else None


def identifier_meaning(name: str) -> Meaning:
    """The same if the answers are called m and M (AlpacaEval). The case of the letter matters."""
    name = re.sub(r"[*_`~\"'#().,:;!\[\]{}]+", " ", name).strip()
    bare = re.sub(rf"^(?:the\s+)?{NOUN}\s*", "", name, flags=re.IGNORECASE)
    return {"m": ("a", 1.0), "M": ("b", 1.0)}.get(bare)


# ---- sentences

_WHO = (
    rf"(?:(?:the )?(?P<nth>first|second) {NOUN}|(?:{NOUN}\s*[_ ]?(?P<noun>[AB12abMm])|"
    rf"(?<![A-Za-z0-9_'’])(?P<bare>[ABM]))"
    r"(?![A-Za-z0-9_>=<]))"
)
_OWN = rf"(?:['’]s? (?:{NOUN}|work|essay|story|code|explanation|reply)|['’]s|的{NOUN})?"
_VERBS = r"is|was|are|were|seems?|appears?|would be|does|did|do|provides?|provided|gives?|gave|offers?|offered|has|had"
_GAP = (
    rf"(?:,?\s+(?:\w+ly\s+)?(?:{_VERBS})\b(?:\s+(?!(?:not|no|never|less|than|why|how|that)\b|"
    rf"(?-i:[AB])\b|{NOUN}\s+[AB12]\b)[\w'’,-]+){{0,5}}?|\s+\w+ly)?"
)
_BETTER = (
    r"(?:better|best|superior|stronger|strongest|preferred|preferable|winner|winning|"
    r"more (?:\w+,? and )?(?:helpful|useful)|更好|更优|胜出|获胜|更佳)"
)
_BEATS = (
    r"(?:wins|won|win|deserves (?:to win|the win)|prevails|takes it|takes the win|comes out (?:ahead|"
    r"on top)|outperforms|outperformed(?! by)|beats|edges out|surpasses|outshines|has the (?:slight |clear )?edge)"
)
_WORSE = (
    r"(?:worse|inferior|weaker|worst|less (?:\w+,? and )?(?:helpful|useful)|loses to|lost to|"
    r"(?:outperformed|beaten|surpassed|outshone|edged out|outclassed|bested) by)"
)
_LIKES = (
    r"(?:prefer|choose|chose|pick|picked|select|selected|favou?r|go with|going with|vote for|side with|"
    r"in favou?r of|lean towards?|opt for|award(?: the win)? to|goes to|preference for|edge to|"
    r"give (?:it|the edge|the win) to)(?: the)?"
)
_NOT = r"\b(?:not|n't|never|no|hardly|neither|nor|cannot)\b|n['’]t\b"
_UNSURE = (  # words before a name that make it uncertain
    rf"(?:(?:{_NOT})\s*\w*|\b(?:if|when|whether|unless|why))\s*(?:the\s+)?$|\bwhether\b[^,;:]*$|"
    rf"(?:{_NOT}|\b(?:hard|difficult|impossible|unable|could|might|may|some)\b)[^,;:]{{0,20}}?"
    r"\b(?:say|tell|claim|think|believe|determine|decide|judge|conclude|argue|sure|clear)"
    r"(?:\s+(?:that|if|for sure|with certainty))?\s+(?:the\s+)?$"
)
_EVEN = (
    rf"\b(?:it['’]?s|it is|this is|call (?:it|this)(?: one)?|declare|results? in|ends? in|as|is)\s+(?:\w+ly )?(?:a|"
    rf"an)\s+(?:\w+ )?"
    rf"(?:tie|draw|toss-up)\b|\bof (?:\w+ )?(?:equal|the same) quality\b|"
    rf"\b(?:are|is|were) (?!not\b)(?:\w+ )?(?:tied|on (?:a )?par)\b|"
    rf"\bboth {NOUN}?s?\s*(?:are|were|perform(?:ed)?|do|did)\s+(?:about |roughly )?"
    rf"(?:equally|the same|equal|on par|just as)|\bequally (?:good|bad|helpful|well|strong|correct|valid)|"
    rf"\bneither\b[^.\n]*\b(?:better|superior|stands out)|\bno (?:clear )?(?:winner|difference|preference)|"
    rf"\b(?:tie|draw) between\b|平局|不分上下|\bit['’]?s even\b|\bcall it even\b"
)
_CONCLUDES = re.compile(
    r"\b(?:overall|therefore|thus|hence|conclu\w*|final(?:ly)?|ultimately|on balance|all in all|in sum(?:mary)?|"
    r"to sum up|consequently|so|verdict|in the end|taken together|综上|总之|因此)\b|综上|总之|因此",
    re.IGNORECASE,
)
_STRONG = re.compile(r"\b(?:significantly|much|far|vastly|considerably|substantially|overwhelmingly)\b", re.IGNORECASE)


def read_words(blanked: str, meaning: Callable[[str], Meaning]) -> tuple[Meaning, bool]:
    """(the verdict of sentences such as "B is better", whether sentences contradict each other)."""
    found: list[tuple[Meaning, bool]] = []
    for sentence in re.split(r"(?<=[.!?。！？;])\s+|\n+", re.sub(r"[*_#]+", "", blanked)):
        if sentence.rstrip().endswith(("?", "？")):
            continue
        stated = [*_sentence_words(sentence, meaning)]
        turns = re.search(r"\b(?:but|however|yet|although|though|while)\b", sentence, re.IGNORECASE)
        concludes = bool(_CONCLUDES.search(sentence))
        found += [(meant, concludes) for meant in (stated[-1:] if turns or concludes else stated)]
    if not found:
        return None, False
    if len({verdict for (verdict, _), _ in found}) == 1:
        return found[-1][0], False
    concluding = [meant for meant, concludes in found if concludes]
    return (concluding[-1], False) if concluding else (None, True)


def _sentence_words(sentence: str, meaning: Callable[[str], Meaning]) -> Iterator[Meaning]:
    found: list[tuple[int, Meaning]] = []
    wins = rf"{_WHO}{_OWN}{_GAP}\s*(?P<what>{_BETTER}|{_BEATS}|{_WORSE})"
    likes = rf"\b{_LIKES}\s+{_WHO}"
    strong = 3.0 if _STRONG.search(sentence) else 1.0
    for pattern in (wins, likes):
        for match in re.finditer(pattern, sentence, re.IGNORECASE):
            who = match["nth"] or match["noun"] or match["bare"]
            if match["bare"] and match["bare"] not in "ABM":
                continue  # the article
            meant = meaning(f"answer {who}") if meaning is letter_meaning else meaning(who)
            before, after = sentence[max(0, match.start() - 50) : match.start()], sentence[match.end() :]
            if meant is None or re.search(_NOT, match[0], re.IGNORECASE) or re.search(_UNSURE, before, re.IGNORECASE):
                continue
            if re.match(r"\s+if\b", after, re.IGNORECASE):
                continue
            verdict = meant[0]
            if pattern is wins and re.fullmatch(_WORSE, match["what"], re.IGNORECASE):
                verdict = {"a": "b", "b": "a"}[verdict]
            found.append((match.start(), (verdict, strong)))
    found += [(match.start(), ("tie", 1.0)) for match in re.finditer(_EVEN, sentence, re.IGNORECASE)]
    yield from (meant for _, meant in sorted(found, key=lambda pair: pair[0]))
