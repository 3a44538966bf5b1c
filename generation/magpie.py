"""Magpie: an aligned model writes user messages if its prompt ends where the template expects one.

Xu et al. 2024 (arXiv:2406.08464), section 2.1: (1) the prompt is the template before the user's message, so the model
writes that message; (2) the model then answers it in the usual way. There are no seed tasks and no few-shot examples.
An instruction is kept if it is unlike all earlier ones, complete, and not refused.
A local checkpoint needs no further settings. An endpoint must serve `/completions`, and `client.pre_query` is the text
of its template before the user's message.
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
        system: a system message before the user's turn; it steers the subject (the paper's section 2.2).
        batch_size: number of instructions sampled in a round.
        threshold: an instruction is dropped if its ROUGE-L to one that was kept before reaches this value.
        max_instruction_tokens: a longer instruction is cut by the request, and dropped.
        temperature: that of the instructions; a high one makes them diverse. answer_temperature: that of the answers.
    """
    check_whole(1, method__batch_size=batch_size, method__max_rounds=max_rounds)
    novelty, drops, progress = Novelty(threshold), Drops(), progress or Progress()
    rows: list[dict] = []
    before: Conversation = [{"role": "system", "content": system}] if system else []
    rounds = 0
    while len(rows) < num and rounds < max_rounds:
        progress.at(max(len(rows) / num, rounds / max_rounds), 1, kept=len(rows), drops=drops.counts)

        # ---- 1. the model writes user messages
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

        # ---- 2. the model answers them
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
