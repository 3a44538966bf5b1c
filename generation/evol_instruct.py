"""Evol-Instruct: a model makes instructions harder (in depth) or turns them into new ones (in breadth), round by round.

Xu et al. 2023 (arXiv:2304.12244, WizardLM), section 3: in-depth evolving adds a constraint, deepens, concretises, asks
for more steps of reasoning, or complicates the input; in-breadth evolving writes a rarer instruction of the same
domain. An evolved instruction is eliminated if the model says that it asks the same as before, if its answer is a short
refusal or empty, or if it copies words of the prompt. Then the previous instruction takes part in the next round again.
The data are the instructions and answers of all rounds, including the seeds.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from generation.clients import Answer, Client, Conversation
from generation.filters import is_refusal, words
from generation.preferences import Prompt
from generation.progress import Progress
from generation.rows import Drops, GeneratedData, answer_fault, provenance, row_id
from runtime.config import check_whole

DEPTH = {
    "constraint": "Add one more constraint or requirement to it.",
    "deepen": "Where it asks about something, make it ask about it more deeply and more broadly.",
    "concretise": "Replace its general notions by more specific ones.",
    "reasoning": "Where it can be answered in one simple step, make it need several steps of reasoning.",
    "complicate_input": "Add data that it works on: a table, code, a formula, a short text.",
}
BREADTH = "breadth"
COPIED = re.compile(r"(given|rewritten|created|new)[ _]+(prompt|instruction)|the prompt above", re.IGNORECASE)
SHORT_REFUSAL = 80  # an answer with "sorry" and fewer words is a refusal (the paper's number)


@dataclass
class Instruction:
    """An instruction with its origin."""

    text: str
    parents: list[str]
    how: str = "seed"
    answer: Answer | None = None


def evol_instruct(
    client: Client,
    prompts: Sequence[Prompt],
    *,
    num_rounds: int,
    breadth_share: float,
    max_growth: int,
    count_tokens: Callable[[str], int],
    seed: int,
    temperature: float | None,
    max_tokens: int,
    progress: Progress | None = None,
) -> GeneratedData:
    """Returns demonstrations: the seeds and every evolved instruction that was not eliminated, with their answers.

    Args:
        prompts: the seeds; each is one user message.
        breadth_share: share of in-breadth evolutions. The others are in depth; each draws its kind.
        max_growth: an in-depth evolution is dropped if it has more additional tokens than this.
    """
    check_whole(0, method__num_rounds=num_rounds)
    if not 0 <= breadth_share <= 1:
        raise ValueError(f"method.breadth_share={breadth_share} must lie in [0, 1]")
    random, drops, progress = Random(seed), Drops(), progress or Progress()
    steps = 3 * num_rounds + 1
    rows: list[dict] = []
    ask = partial(client.ask, temperature=temperature, max_tokens=max_tokens)
    pool = _seeds(prompts, drops)

    for turn in range(num_rounds + 1):
        # ---- 1. evolve (round 0 uses the seeds unchanged)
        step = 3 * turn - 2
        evolved = pool if turn == 0 else _evolve(ask, pool, random, seed + turn, breadth_share)
        if turn:
            progress.at(step, steps, kept=len(rows), drops=drops.counts)
            kinds = [ask_same(old.text, new.text) for old, new in zip(pool, evolved, strict=True)]
            same = client.ask(kinds, temperature=0.0, max_tokens=8, seed=seed)
        progress.at(max(step + 1, 0), steps, kept=len(rows), drops=drops.counts)

        # ---- 2. answer
        asked = [[{"role": "user", "content": new.text or "-"}] for new in evolved]
        answers = ask(asked, seed=seed)

        # ---- 3. eliminate
        following = []
        for i, (old, new, answer) in enumerate(zip(pool, evolved, answers, strict=True)):
            fault = answer_fault(answer, whole=True) or says_nothing(answer.text)
            if turn:
                longer = count_tokens(new.text) - count_tokens(old.text)
                grown = longer > max_growth and new.how != BREADTH
                fault = ("grew_too_much" if grown else None) or fault
                fault = evolution_fault(new.text, same[i].text) or answer_fault(same[i], whole=False) or fault
            if fault:
                drops.add(fault, new.text, before=old.text, how=new.how, answer=answer.text or answer.error)
                following.append(old)
            else:
                rows.append(_row(new, answer, client.model, seed))
                following.append(new)
        pool = following
    return GeneratedData(rows, drops, {"seeds": len(pool), "rounds": num_rounds})


def ask_evolution(text: str, how: str) -> Conversation:
    """Instruction -> a harder one, or a new one of its domain."""
    if how == BREADTH:
        task = (
            "Write a new instruction in the domain of the one below, of like length and difficulty, but rarer: "
            "something that few would think of."
        )
    else:
        task = (
            "Rewrite the instruction below so that it is a little harder to answer, also for a strong model. "
            f"{DEPTH[how]} It must stay reasonable, understood and answerable by people, keep any code or table in it, "
            "and grow by at most 20 words."
        )
    text = f"{task} Answer with the instruction alone.\n\n--- instruction ---\n{text}\n--- end ---"
    return [{"role": "user", "content": text}]


def ask_same(before: str, after: str) -> Conversation:
    """The prompt that asks whether two instructions are the same."""
    text = (
        "Do these two instructions ask for the same thing, with the same constraints, at the same depth? Answer Yes or "
        f"No.\n\n--- first ---\n{before}\n\n--- second ---\n{after}\n--- end ---"
    )
    return [{"role": "user", "content": text}]


def evolution_fault(text: str, same: str) -> str | None:
    """The reason to eliminate an evolved instruction: its text, or the model's answer `same` to `ask_same`. Or None."""
    if not words(text):
        return "evolution_empty"
    if COPIED.search(text):
        return "copies_the_prompt"
    if is_refusal(text):
        return "refusal"
    return "nothing_new" if re.match(r"\W*yes\b", same, re.IGNORECASE) else None


def says_nothing(text: str) -> str | None:
    """The fault of an answer that is a short refusal or has no words, else None."""
    found = words(text)
    if is_refusal(text) or "sorry" in found and len(found) < SHORT_REFUSAL:
        return "refusal"
    return None if found else "answer_empty"


def _seeds(prompts: Sequence[Prompt], drops: Drops) -> list[Instruction]:
    for name, messages in prompts:
        if len(messages) != 1:
            drops.add("seed_has_several_turns", messages[-1]["content"], id=name)
    return [Instruction(messages[-1]["content"], [name]) for name, messages in prompts if len(messages) == 1]


def _evolve(ask: Callable, pool, random: Random, seed: int, breadth_share: float) -> list[Instruction]:
    hows = [BREADTH if random.random() < breadth_share else random.choice(list(DEPTH)) for _ in pool]
    asked = [ask_evolution(old.text, how) for old, how in zip(pool, hows, strict=True)]
    evolved = []
    for old, how, answer in zip(pool, hows, ask(asked, seed=seed), strict=True):
        text = "" if answer_fault(answer, whole=True) else answer.text.strip()
        evolved.append(Instruction(text, [*old.parents, row_id("instruction", old.text)], how))
    return evolved


def _row(instruction: Instruction, answer: Answer, model: str, seed: int) -> dict:
    messages = [{"role": "user", "content": instruction.text}, {"role": "assistant", "content": answer.text.strip()}]
    return {
        "id": row_id("evol_instruct", messages),
        "messages": messages,
        "evolution": instruction.how,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        "provenance": provenance("evol_instruct", [instruction.text], model, seed, instruction.parents),
    }
