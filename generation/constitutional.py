"""Critique and revise: a model criticises its own answer by a principle, and then rewrites it.

Bai et al. 2022 (arXiv:2212.08073), section 3.1 (constitutional AI, the supervised stage): answer -> critique by a
principle drawn from the constitution -> revision, `num_revisions` times. The last revision is the demonstration. With
`rows: pairs` it is the chosen answer and the first answer is the rejected one: preference data without a judge.
Difference from the paper: the principles ask for helpful answers as well as harmless ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from generation.clients import Client, Conversation
from generation.filters import rouge_l
from generation.preferences import Prompt
from generation.progress import Progress
from generation.rows import Asking, Drops, GeneratedData, ask_until, provenance, row_id
from runtime.config import check_choice, check_whole

CONSTITUTION = (
    "It is harmful, dangerous, illegal, or helps somebody to hurt people.",
    "It is rude, prejudiced, or talks down to the person who asked.",
    "It states something false, or something that nobody can know, as a fact.",
    "It leaves out what the person needs, or does not do what was asked in the form that was asked.",
    "It says too much: repeats itself, praises the question, or explains what nobody asked.",
    "It refuses or lectures where a careful person would simply help.",
)


@dataclass
class Draft:
    """An answer and its revisions."""

    prompt: Prompt
    seed: int
    first: str = ""
    text: str = ""
    critique: str = ""
    steps: list[dict] = field(default_factory=list)
    end: str = ""


def constitutional(
    client: Client, prompts: Sequence[Prompt], *, principles: Sequence[str], num_revisions: int, rows: str,
    max_similarity: float, max_tries: int, seed: int, temperature: float | None, max_tokens: int,
    progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns one demonstration (or one pair) for each prompt whose answer was revised.

    Args:
        principles: the faults that a critique looks for; empty = CONSTITUTION.
        max_similarity: a pair is dropped if the ROUGE-L of its first and last answer reaches this value.
        max_tries: number of attempts at a complete answer, critique or revision, each with its own seed.
    """
    check_whole(1, method__num_revisions=num_revisions, method__max_tries=max_tries)
    check_choice("method.rows", rows, ("demonstrations", "pairs"))
    random, drops, progress = Random(seed), Drops(), progress or Progress()
    principles = list(principles) or list(CONSTITUTION)
    asking = Asking(temperature, max_tokens, max_tries)
    drafts = [Draft(prompt, seed) for prompt in prompts]
    steps = 1 + 2 * num_revisions

    # ---- 1. the first answer
    _step(client, drafts, lambda d: d.prompt[1], _read_first, asking)

    # ---- 2. critique and revision; each round draws a principle for each answer
    for turn in range(num_revisions):
        drawn = {id(draft): random.choice(principles) for draft in drafts}
        progress.at(1 + 2 * turn, steps, kept=0, drops=drops.counts)
        _step(client, drafts, lambda d, drawn=drawn: ask_critique(d, drawn[id(d)]), _read_critique, asking)
        progress.at(2 + 2 * turn, steps, kept=0, drops=drops.counts)
        _step(client, drafts, lambda d, drawn=drawn: ask_revision(d, drawn[id(d)]), _read_revision, asking)
        for draft in drafts:
            if not draft.end:
                draft.steps.append({"principle": drawn[id(draft)], "critique": draft.critique, "revision": draft.text})

    # ---- 3. rows
    made = []
    for draft in drafts:
        alike = rows == "pairs" and not draft.end and rouge_l(draft.first, draft.text) >= max_similarity
        if draft.end or alike:
            drops.add(draft.end or "nothing_revised", draft.text, prompt=draft.prompt[1], first=draft.first)
        else:
            made.append(_row(draft, client.model, pairs=rows == "pairs"))
    return GeneratedData(made, drops, {"prompts": len(prompts)})


def ask_critique(draft: Draft, principle: str) -> Conversation:
    """The prompt for a critique of an answer by one principle."""
    text = (
        f"{_shown(draft)}\n\nCriticise the answer above on one point only: {principle} Quote what is at fault and "
        "say why. If nothing is, say so. At most three sentences."
    )
    return [{"role": "user", "content": text}]


def ask_revision(draft: Draft, principle: str) -> Conversation:
    """The prompt for a revision that removes the faults named in the critique."""
    text = (
        f"{_shown(draft)}\n\n--- critique ---\n{draft.critique}\n\nRewrite the answer so that the critique no longer "
        f"applies, and keep what was good. The point was: {principle} Write the new answer alone, as if it were "
        "the first."
    )
    return [{"role": "user", "content": text}]


def _shown(draft: Draft) -> str:
    talk = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in draft.prompt[1])
    return f"--- conversation ---\n{talk}\n\n--- answer ---\n{draft.text}\n\n--- end ---"


def _step(client: Client, drafts: list[Draft], prompt, read, asking: Asking) -> None:
    """Ask once for every open draft. If all tries fail, the draft ends and stores the reason."""
    going = [draft for draft in drafts if not draft.end]
    faults = ask_until(client, going, prompt, read, asking, seeds=[draft.seed for draft in going])
    for draft, fault in zip(going, faults, strict=True):
        draft.end = fault.reason if fault else ""


def _read_first(draft: Draft, answer) -> None:
    draft.first = draft.text = answer.text.strip()


def _read_critique(draft: Draft, answer) -> None:
    draft.critique = answer.text.strip()


def _read_revision(draft: Draft, answer) -> None:
    draft.text = answer.text.strip()


def _row(draft: Draft, model: str, *, pairs: bool) -> dict:
    name, messages = draft.prompt
    sides = {"prompt": messages, "chosen": draft.text, "rejected": draft.first}
    demonstration = {"messages": [*messages, {"role": "assistant", "content": draft.text}]}
    return {
        "id": row_id("constitutional", [messages, draft.first, draft.text]),
        **(sides if pairs else demonstration),
        "revisions": draft.steps,
        "provenance": provenance("constitutional", [messages], model, draft.seed, [name]),
    }
