"""Magpie: an aligned model, shown its own template up to where the user speaks, writes what a user would ask.

Xu et al. 2024 (arXiv:2406.08464), section 2.1: (1) the pre-query template alone is the prompt, and the model goes on as
the user; (2) the instruction that it wrote is asked in the usual way. No seed tasks, no few-shot examples. What
stays: instructions unlike all others, whole, and not refused.
A checkpoint of ours needs nothing further; an endpoint must serve `/completions`, and `client.pre_query` is the text of
its template before the user's message.
"""

from collections.abc import Callable

from generation.clients import Client, Conversation
from generation.filters import Novelty, instance_fault, instruction_fault
from generation.progress import Progress
from generation.rows import Drops, GeneratedData, answer_fault, provenance, row_id
from runtime.config import check_whole


def magpie(
    client: Client, *, num: int, system: str | None, batch_size: int, max_rounds: int, threshold: float,
    min_instruction_tokens: int, max_instruction_tokens: int, count_tokens: Callable[[str], int], seed: int,
    temperature: float | None, answer_temperature: float | None, max_tokens: int, progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """At most `num` demonstrations of one turn.

    Args:
        system: a system message before the user's turn, which steers what is asked (the paper's section 2.2).
        batch_size: instructions drawn in a round; all are filtered against each other.
        threshold: an instruction's ROUGE-L against every one kept before is below it.
        max_instruction_tokens: a longer one is cut by the request, and dropped.
        temperature: of the instructions (high: diverse). answer_temperature: of the answers.
    """
    check_whole(1, method__batch_size=batch_size, method__max_rounds=max_rounds)
    novelty, drops, rows, progress = Novelty(threshold), Drops(), [], progress or Progress()
    before: Conversation = [{"role": "system", "content": system}] if system else []
    rounds = 0
    while len(rows) < num and rounds < max_rounds:
        progress.at(max(len(rows) / num, rounds / max_rounds), 1, kept=len(rows), drops=drops.counts)

        # ---- 1. the user's turn to come
        seeds = [seed + rounds * batch_size + i for i in range(batch_size)]
        asked = [[*before, {"role": "user", "content": None}]] * batch_size
        drawn = client.ask(asked, temperature=temperature, max_tokens=max_instruction_tokens, seed=seeds)
        instructions = []
        for own, answer in zip(seeds, drawn, strict=True):
            text = answer.text.strip()
            fault = answer_fault(answer, whole=True)
            fault = fault or instruction_fault(text, count_tokens, least=min_instruction_tokens, most=None)
            if fault is None and novelty.most_similar(text) is not None:
                fault = "too_similar"
            if fault:
                drops.add(fault, text or answer.error)
            else:
                novelty.add(text)
                instructions.append((own, text))

        # ---- 2. its answer
        asked = [[*before, {"role": "user", "content": text}] for _, text in instructions]
        answers = client.ask(asked, temperature=answer_temperature, max_tokens=max_tokens, seed=seed)
        for (own, text), messages, answer in zip(instructions, asked, answers, strict=True):
            output = answer.text.strip()
            fault = answer_fault(answer, whole=True) or instance_fault(text, "", output, count_tokens, most=None)
            if fault:
                drops.add(fault, output or answer.error, instruction=text)
            else:
                rows.append(_row([*messages, {"role": "assistant", "content": output}], answer, client.model, own))
        rounds += 1
    return GeneratedData(rows[:num], drops, {"rounds": rounds})


def _row(messages: Conversation, answer, model: str, seed: int) -> dict:
    return {
        "id": row_id("magpie", messages),
        "messages": messages,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        "provenance": provenance("magpie", messages[:-1], model, seed, [row_id("pre_query", messages[:-2])]),
    }
