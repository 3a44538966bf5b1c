"""UltraChat: two models, in the roles of user and assistant, talk about topics from a tree of topics.

Ding et al. 2023 (arXiv:2305.14233), section 3: a person chooses meta-topics; a model names sub-topics, then opening
questions, or a piece of material (a text to rewrite, continue, summarise, ...) and a request about it; then user and
assistant alternate for three to seven rounds. The user's prompt forbids thanks and answers.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from random import Random

from generation.clients import Answer, Client, Conversation
from generation.filters import is_refusal, rouge_l
from generation.progress import Progress
from generation.rows import Asking, Drops, GeneratedData, answer_fault, ask_until, provenance, row_id
from runtime.config import check_whole

NO_USER = re.compile(
    r"(thanks?\b|thank you|you('?re| are) (very |most |always )?welcome|great (answer|question)"
    r"|of course|certainly|sure[,!.]|as an ai\b"
    r"|i am an ai\b|i'?m (glad|happy) (you|to help)|here (is|are)\b|how (can|may) i (help|assist)|assistant\s*:)",
    re.IGNORECASE,
)
USER_ROLE = (
    "You play a person who talks with an AI assistant. The messages that you receive are the assistant's. Write only "
    "the person's next message: a question or a request that follows from what was said, digs deeper or turns to "
    "something near it. Do not thank, praise or greet. Do not answer. At most 60 words."
)
REQUESTS = (
    "summarise",
    "rewrite in a simpler style",
    "continue",
    "turn into a list of key points",
    "find the flaws of",
)


@dataclass
class Talk:
    """A conversation that grows."""

    rounds: int  # the number to reach
    topic: str
    parents: list[str]
    messages: Conversation = field(default_factory=list)
    end: str = ""  # the reason if it ended early
    cut: str = ""  # the text that was rejected then


def ultrachat(
    client: Client, user_client: Client, *, topics: Sequence[str], num: int, seed: int, num_subtopics: int,
    num_questions: int, material_share: float, min_rounds: int, max_rounds: int, max_similarity: float, max_tries: int,
    temperature: float | None, max_tokens: int, progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns at most `num` conversations of `min_rounds` to `max_rounds` rounds.

    There are fewer if messages of the user or of the assistant break the rules.

    Args:
        client: the assistant; it also writes topics and material. user_client: the user.
        material_share: share of the opening messages that contain a text, in [0, 1].
        max_similarity: a user message is a repeat if its ROUGE-L to an earlier one reaches this value.
        max_tries: number of attempts at a message, each with its own seed. A message must be complete, and the user's
            must keep the rules.
    """
    check_whole(
        1, method__num_subtopics=num_subtopics, method__num_questions=num_questions, method__max_tries=max_tries
    )
    if not topics or not 0 <= material_share <= 1:
        raise ValueError(f"need method.topics and a method.material_share in [0, 1], got {topics=} {material_share=}")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"need 1 <= min_rounds <= max_rounds, got {min_rounds=} {max_rounds=}; UltraChat has 3 to 7")
    random, drops, progress = Random(seed), Drops(), progress or Progress()
    asking = Asking(temperature, max_tokens, max_tries)

    # ---- 1. meta-topics -> sub-topics -> questions and material
    openings = _openings(client, topics, random, drops, asking, num=num, seed=seed, num_subtopics=num_subtopics,
                         num_questions=num_questions, material_share=material_share)  # fmt: skip
    talks = [
        Talk(random.randint(min_rounds, max_rounds), topic, [row_id("subtopic", topic)], [_message("user", text)])
        for topic, text in openings[:num]
    ]

    # ---- 2. the assistant answers and the user continues, in all conversations at the same time
    for turn in range(max_rounds):
        progress.at(turn, max_rounds, kept=sum(len(t.messages) >= 2 * min_rounds for t in talks), drops=drops.counts)
        going = [talk for talk in talks if not talk.end and turn < talk.rounds]
        _step(client, going, lambda talk: talk.messages, partial(_hear, role="assistant"), seed + turn, asking)
        going = [talk for talk in going if not talk.end and turn + 1 < talk.rounds]
        hear = partial(_hear, role="user", max_similarity=max_similarity)
        _step(user_client, going, lambda talk: as_user(talk.messages), hear, seed + turn, asking)

    # ---- 3. keep the conversations with enough rounds
    rows = []
    for talk in talks:
        if len(talk.messages) // 2 < min_rounds:
            drops.add(talk.end, talk.cut, messages=talk.messages)
        else:
            rows.append(_row(talk, [client.model, user_client.model], seed))
    rounds = Counter(len(row["messages"]) // 2 for row in rows)
    cut = Counter(talk.end for talk in talks if talk.end)
    return GeneratedData(
        rows, drops, {"rounds": dict(sorted(rounds.items())), "ended_early": dict(sorted(cut.items()))}
    )


def ask_subtopics(topic: str, count: int) -> Conversation:
    """Meta-topic -> sub-topics."""
    return [
        _message(
            "user", f"List {count} different concrete sub-topics of: {topic}. One per line, numbered, no comments."
        )
    ]


def ask_questions(topic: str, count: int) -> Conversation:
    """Sub-topic -> opening questions."""
    text = f"List {count} different questions that a curious person could ask about: {topic}. One per line, numbered."
    return [_message("user", text)]


def ask_material(topic: str) -> Conversation:
    """Sub-topic -> a text for the user's first message."""
    return [_message("user", f"Write a short passage (80 to 150 words) of an article, story or letter about: {topic}.")]


def as_user(messages: Conversation) -> Conversation:
    """The prompt of the user's model. The roles are exchanged, so its answer is the next user message."""
    flipped = {"user": "assistant", "assistant": "user"}
    turned = [_message(flipped[m["role"]], m["content"]) for m in messages]
    turned[-1]["content"] += "\n\nWhat is your next question or request?"
    return [_message("system", USER_ROLE), _message("user", "Begin."), *turned]


def user_fault(text: str, messages: Conversation, *, max_similarity: float) -> str | None:
    """The reason to reject a user message: it is empty, thanks, answers, refuses or repeats. None if it is good."""
    if not text.strip():
        return "user_empty"
    if NO_USER.match(text.strip().lstrip("\"'*- ")):
        return "user_thanks_or_answers"
    if is_refusal(text):
        return "user_refuses"
    if any(rouge_l(text, m["content"]) >= max_similarity for m in messages):
        return "user_repeats"
    return None


def read_list(text: str) -> list[str]:
    """The entries of a numbered or dashed list."""
    found = re.findall(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(\S.*?)\s*$", text, re.MULTILINE)
    return [entry.strip('*" ').rstrip(":") for entry in found if entry.strip('*" :')]


def _openings(
    client: Client, topics: Sequence[str], random: Random, drops: Drops, asking: Asking,
    *, num: int, seed: int, num_subtopics: int, num_questions: int, material_share: float,
) -> list[tuple[str, str]]:  # fmt: skip
    """(sub-topic, first user message) of each conversation. It sends only as many requests as `num` needs."""
    chosen = random.sample(list(topics), min(num, len(topics)))
    lists = _ask_lists(client, [ask_subtopics(topic, num_subtopics) for topic in chosen], seed, asking)
    subtopics = list(dict.fromkeys(entry for row in zip_longest(*lists) for entry in row if entry))  # topics in turn
    openings = _with_text(client, subtopics[: round(num * material_share)], random, seed, asking, drops)
    at = round(num * material_share) % max(1, len(subtopics))
    subtopics = subtopics[at:] + subtopics[:at]
    while len(openings) < num and subtopics:
        some = math.ceil((num - len(openings)) / num_questions)
        asked, subtopics = subtopics[:some], subtopics[some:]
        lists = _ask_lists(client, [ask_questions(topic, num_questions) for topic in asked], seed, asking)
        openings += [(topic, text) for topic, texts in zip(asked, lists, strict=True) for text in texts[:num_questions]]
    if not openings:
        raise ValueError(f"{client.model} gave no list of sub-topics or questions; use a stronger model")
    return openings


def _with_text(
    client: Client, subtopics, random: Random, seed: int, asking: Asking, drops: Drops
) -> list[tuple[str, str]]:
    """(sub-topic, first user message) with messages that contain a text and a request about it."""
    openings = []
    prompts = [ask_material(topic) for topic in subtopics]
    answers = client.ask(prompts, seed=seed, temperature=asking.temperature, max_tokens=asking.max_tokens)
    for topic, answer in zip(subtopics, answers, strict=True):
        request = random.choice(REQUESTS)
        if fault := answer_fault(answer, whole=True):
            drops.add(f"material_{fault}", answer.text or answer.error, topic=topic)
        else:
            openings.append((topic, f"Please {request} this text:\n\n{answer.text.strip()}"))
    return openings


def _ask_lists(client: Client, prompts: list[Conversation], seed: int, asking: Asking) -> list[list[str]]:
    """The entries of each answer. The last entry of a cut list is dropped, as it is incomplete."""
    answers = client.ask(prompts, seed=seed, temperature=asking.temperature, max_tokens=asking.max_tokens)
    lists = [read_list(answer.text) for answer in answers]
    cut = [answer.finish_reason == "length" for answer in answers]
    return [list(dict.fromkeys(found[:-1] if was_cut else found)) for found, was_cut in zip(lists, cut, strict=True)]


def _step(client: Client, talks: list[Talk], prompt, read, seed: int, asking: Asking) -> None:
    """Add one message to every conversation. If all tries fail, the conversation ends and stores the reason."""
    faults = ask_until(client, talks, prompt, read, asking, seeds=[seed] * len(talks))
    for talk, fault in zip(talks, faults, strict=True):
        talk.end, talk.cut = fault or ("", "")


def _hear(talk: Talk, answer: Answer, role: str, max_similarity: float = 1.0) -> str | None:
    text = answer.text.strip()
    fault = "refusal" if is_refusal(text) else None
    if role == "user":
        fault = user_fault(text, talk.messages, max_similarity=max_similarity)
    if fault is None:
        talk.messages.append(_message(role, text))
    return fault


def _row(talk: Talk, models: list[str], seed: int) -> dict:
    whole = talk.messages[: len(talk.messages) // 2 * 2]  # ends with an answer
    return {
        "id": row_id("ultrachat", whole),
        "messages": whole,
        "topic": talk.topic,
        "provenance": provenance("ultrachat", talk.messages, models, seed, talk.parents),
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
