"""CAMEL: two agents in given roles work on an idea until the task is done. No person takes part.

Li et al. 2023 (arXiv:2303.17760), section 3 and figure 2: idea -> role pair -> task specifier -> inception prompts, in
which the user instructs and the assistant solves, never the other way round -> turns until the user says that the task
is done. A conversation is cut where the roles flip or the text loops, and such cuts are counted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from generation.clients import Answer, Client, Conversation
from generation.filters import rouge_l
from generation.progress import Progress
from generation.rows import Asking, Drops, GeneratedData, ask_until, few_shot, provenance, row_id
from runtime.config import check_whole

DONE = "TASK_DONE"
ROLE_EXAMPLES = {  # idea: (assistant, user)
    "plan the menu of a wedding": ("Chef", "Event Manager"),
    "design a water-saving garden": ("Landscape Architect", "Home Owner"),
    "write the story of a board game": ("Writer", "Game Designer"),
}
ASSISTANT_FLIP = re.compile(
    r"\W*(instruction\s*:|next instruction|i will instruct|please (provide|give) (me )?(a |the )?solution)", re.I
)
USER_FLIP = re.compile(r"\W*(solution\s*:|here is (my|the) solution|next request)", re.I)


@dataclass
class Session:
    """The conversation of two roles about a task. `messages` begins with the user's."""

    idea: str
    seed: int
    roles: tuple[str, str] = ("", "")  # assistant, user
    task: str = ""
    messages: Conversation = field(default_factory=list)
    cut: str = ""  # the text that ended it
    end: str = ""  # done | max_turns, or the fault of the last try: role_flip_user, loop, answer_cut, ...


def camel(
    client: Client, user_client: Client, *, ideas: Sequence[str], num: int, seed: int, max_turns: int, min_turns: int,
    max_similarity: float, max_tries: int, temperature: float | None, max_tokens: int,
    progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns at most `num` conversations. The ideas are used in turn; each conversation has its own roles and task.

    Args:
        max_turns: the largest number of user instructions. Conversations with fewer than `min_turns` answers are
            dropped.
        max_similarity: a message is a loop if its ROUGE-L to one of the speaker's last two reaches this value.
        max_tries: number of attempts at a message, each with its own seed. A message must be complete, keep its role
            and not repeat.
    """
    check_whole(1, method__max_tries=max_tries)
    if not ideas or not 1 <= min_turns <= max_turns:
        raise ValueError(f"need an idea and 1 <= min_turns <= max_turns, got {list(ideas)} {min_turns=} {max_turns=}")
    asking = Asking(temperature, max_tokens, max_tries)
    sessions = [Session(ideas[n % len(ideas)], seed + n // len(ideas)) for n in range(num)]

    progress = progress or Progress()

    # ---- 1. the roles and the task
    _step(client, sessions, lambda s: ask_roles(s.idea), _read_roles, asking)
    _step(client, sessions, lambda s: ask_task(s.idea, *s.roles), _read_task, asking)

    # ---- 2. the user instructs and the assistant solves, in all sessions at the same time
    for turn in range(max_turns):
        kept = sum(len(s.messages) >= 2 * min_turns for s in sessions)
        progress.at(turn, max_turns, kept=kept, drops=Counter(s.end for s in sessions if s.end and s.end != "done"))
        _step(user_client, sessions, as_user, lambda s, a: _hear(s, a, "user", max_similarity), asking)
        _step(client, sessions, as_assistant, lambda s, a: _hear(s, a, "assistant", max_similarity), asking)

    # ---- 3. keep the sessions with enough turns
    rows, drops = [], Drops()
    for session in sessions:
        session.end = session.end or "max_turns"
        turns = len(session.messages) // 2
        if turns < min_turns:
            drops.add(session.end, session.cut, idea=session.idea, messages=session.messages)
        else:
            rows.append(_row(session, turns, [client.model, user_client.model]))
    ends = Counter(session.end for session in sessions)
    return GeneratedData(rows, drops, {"ends": dict(sorted(ends.items()))})


def ask_roles(idea: str) -> Conversation:
    """Idea -> two roles."""
    ask = (
        "Two people work on this idea together: one instructs (the user), the other carries it out (the assistant). "
        "Name a fitting profession for each.\n\nIdea: {}"
    )
    examples = [(ask.format(old), f"Assistant: {roles[0]}\nUser: {roles[1]}") for old, roles in ROLE_EXAMPLES.items()]
    return few_shot(examples, ask.format(idea))


def ask_task(idea: str, assistant_role: str, user_role: str) -> Conversation:
    """Idea and roles -> a specific task."""
    text = (
        f"{_a(assistant_role).capitalize()} helps {_a(user_role)} with this idea: {idea}\n\nMake it one specific task. "
        "Be concrete and inventive, and use at most 50 words. Answer with the task alone."
    )
    return [{"role": "user", "content": text}]


def as_assistant(session: Session) -> Conversation:
    """The prompt of the assistant's model: its inception prompt and the conversation."""
    assistant_role, user_role = session.roles
    text = (
        f"You are {_a(assistant_role)}; the person you talk with is {_a(user_role)}. Never flip roles: they "
        f"instruct, you solve. You work on this task together: {session.task}\n"
        "Each message of theirs is one instruction. Answer it with a complete, specific solution, and say honestly "
        "what you cannot do and why. Ask nothing and give no instructions. Begin with `Solution:`."
    )
    return [{"role": "system", "content": text}, *session.messages]


def as_user(session: Session) -> Conversation:
    """The prompt of the user's model: its inception prompt and the conversation with exchanged roles."""
    assistant_role, user_role = session.roles
    text = (
        f"You are {_a(user_role)}; the assistant you talk with is {_a(assistant_role)}. Never flip roles: you "
        f"instruct, they solve. You work on this task together: {session.task}\n"
        "Give one instruction at a time, the next that the task needs, with what they must know for it. Do not solve "
        "it and do not thank. Begin with `Instruction:`. When the task is completely solved, answer with the single "
        f"word {DONE}."
    )
    flipped = {"user": "assistant", "assistant": "user"}
    turned = [{"role": flipped[m["role"]], "content": m["content"]} for m in session.messages]
    return [{"role": "system", "content": text}, {"role": "user", "content": "Give your first instruction."}, *turned]


def flip_fault(text: str, role: str) -> str | None:
    """The fault of a message whose speaker took the other role: an assistant that instructs, or a user that solves."""
    flipped = ASSISTANT_FLIP.match(text) if role == "assistant" else USER_FLIP.match(text)
    return f"role_flip_{role}" if flipped else None


def _step(client: Client, sessions: list[Session], prompt, read, asking: Asking) -> None:
    """Ask once in every open session. If all tries fail, the session ends and stores the reason."""
    going = [session for session in sessions if not session.end]
    faults = ask_until(client, going, prompt, read, asking, seeds=[session.seed for session in going])
    for session, fault in zip(going, faults, strict=True):
        if fault is not None:
            session.end, session.cut = session.end or fault.reason, fault.text


def _read_roles(session: Session, answer: Answer) -> str | None:
    session.roles = (_first_line(answer.text, "Assistant"), _first_line(answer.text, "User"))
    return None if all(session.roles) else "no_roles"


def _first_line(text: str, name: str) -> str:
    found = re.search(rf"^\W*{name}\W*:\W*(\w[^\n]*)", text, re.IGNORECASE | re.MULTILINE)
    return found.group(1).strip(" *.")[:80] if found else ""


def _read_task(session: Session, answer: Answer) -> None:
    session.task = " ".join(answer.text.split())


def _hear(session: Session, answer: Answer, role: str, max_similarity: float) -> str | None:
    """Add a message to the session, or end it if the user says so. Flipped roles and loops are faults."""
    text = answer.text.strip()
    before = [m["content"] for m in session.messages if m["role"] == role]
    if role == "user" and DONE in text:
        session.end = "done"
        return None
    if any(rouge_l(text, old) >= max_similarity for old in before[-2:]):
        return "loop"
    if flip := flip_fault(text, role):
        return flip
    session.messages.append({"role": role, "content": text})
    return None


def _row(session: Session, turns: int, models: list[str]) -> dict:
    assistant_role, user_role = session.roles
    system = f"You are {_a(assistant_role)}. You help {_a(user_role)} with this task: {session.task}"
    messages = [{"role": "system", "content": system}, *session.messages[: 2 * turns]]
    return {
        "id": row_id("camel", messages),
        "messages": messages,
        "idea": session.idea,
        "roles": {"assistant": assistant_role, "user": user_role},
        "end": session.end,
        "provenance": provenance(
            "camel", [ask_roles(session.idea), as_user(session)], models, session.seed, [row_id("idea", session.idea)]
        ),
    }


def _a(role: str) -> str:
    return f"{'an' if role[:1].lower() in 'aeiou' else 'a'} {role}"
