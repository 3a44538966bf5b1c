"""Self-Instruct: a model writes new tasks after the pattern of human ones, and answers them.

Wang et al. 2023 (arXiv:2212.10560), section 2.2: (1) new instructions from a prompt of six human and two generated
ones, (2) is it a classification task, (3) instances, input first or, for classification, the label first, (4) filters.
Departs from the paper where it wrote for a completion model: the prompts here are chats, one task per request, and the
few-shot tasks of steps 2 and 3 are drawn from the seed tasks instead of being a fixed list.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from data.clients import Client, Conversation
from data.methods.filters import Novelty, drop_conflicting, instance_fault, instruction_fault
from data.methods.rows import Made, provenance, row_id

NO_INPUT = re.compile(r"\W*(none|no input|n/?a|empty|not needed|<noinput>|\(none\))\W*", re.IGNORECASE)


@dataclass
class Task:
    """An instruction with its instances (input, output)."""

    id: str
    instruction: str
    is_classification: bool
    instances: list[tuple[str, str]]
    asked: list[Conversation] = field(default_factory=list)  # every prompt on the way, for the provenance
    parents: list[str] = field(default_factory=list)


def self_instruct(
    client: Client, seeds: list[Task], *, num: int, seed: int, max_rounds: int, prompts_per_round: int,
    tasks_per_prompt: int, num_human: int, num_generated: int, num_examples: int, threshold: float,
    min_words: int, max_words: int, max_output_words: int, temperature: float, max_tokens: int,
) -> Made:  # fmt: skip
    """At least one row per task kept, `num` rows in all, fewer where `max_rounds` rounds don't give as many.

    Args:
        seeds: human tasks; the few-shot prompts draw from them.
        threshold: a new instruction's ROUGE-L against every task kept so far is below it.
    """
    random, drops, rows, made = Random(seed), Counter(), [], []
    novelty = Novelty(threshold, [task.instruction for task in seeds])
    rounds = 0
    while len(rows) < num and rounds < max_rounds:
        rounds += 1

        # ---- 1. new instructions, shown human and generated ones
        shown = [_draw(random, seeds, num_human) + _draw(random, made, num_generated) for _ in range(prompts_per_round)]
        asked = [ask_instructions(tasks, tasks_per_prompt) for tasks in shown]
        answers = client.ask(asked, temperature=temperature, max_tokens=max_tokens, seed=seed + rounds)
        new = []
        for tasks, prompt, answer in zip(shown, asked, answers, strict=True):
            cut = answer.finish_reason == "length"  # then the last task is half a task
            for instruction in read_list(answer.text, cut=cut) or _none(drops, "no_instruction_in_answer"):
                fault = instruction_fault(instruction, min_words=min_words, max_words=max_words)
                if fault is None and novelty.most_similar(instruction) is not None:
                    fault = "too_similar"
                if fault is not None:
                    drops[fault] += 1
                    continue
                novelty.add(instruction)
                parents = [task.id for task in tasks]
                new.append(Task(row_id("task", instruction), instruction, False, [], [prompt], parents))

        # ---- 2. classification or not
        _ask_each(client, new, [ask_kind(t, _both_kinds(random, seeds, num_examples)) for t in new], _read_kind,
                  drops, temperature=0.0, max_tokens=8, seed=seed)  # fmt: skip

        # ---- 3. instances: output first for classification (or all inputs get the likeliest label), else input first
        examples = [
            _draw(random, [s for s in seeds if s.is_classification == t.is_classification], num_examples) for t in new
        ]
        prompts = [ask_instance(t, shots) for t, shots in zip(new, examples, strict=True)]
        _ask_each(
            client, new, prompts, _read_instances, drops, temperature=temperature, max_tokens=max_tokens, seed=seed
        )

        # ---- 4. keep the tasks that have a sound instance
        for task in new:
            kept, faults = _filter_instances(task, max_output_words)
            drops += faults
            if kept:
                made.append(task)
            rows += [_row(task, instance, client.model, seed) for instance in kept]

    facts = {"rounds": rounds, "tasks": len(made), "classification": sum(t.is_classification for t in made)}
    return Made(rows[:num], drops, facts)


def ask_instructions(tasks: list[Task], count: int) -> Conversation:
    """The prompt of step 1."""
    shown = "\n".join(f"{n}. {' '.join(task.instruction.split())}" for n, task in enumerate(tasks, 1))
    text = (
        "Below is a list of tasks for an assistant that reads and writes text only. The tasks differ in topic, verb "
        f"and form; each stands alone.\n\n{shown}\n\nContinue the list with {count} new tasks, numbered from "
        f"{len(tasks) + 1}. Write one task per line and nothing else."
    )
    return [{"role": "user", "content": text}]


def ask_kind(task: Task, examples: list[Task]) -> Conversation:
    """The prompt of step 2."""
    shown = "\n\n".join(f"Task: {e.instruction}\nAnswer: {'Yes' if e.is_classification else 'No'}" for e in examples)
    text = (
        "Does the task ask to choose from a small, fixed set of labels? Answer Yes or No.\n\n"
        f"{shown}\n\nTask: {task.instruction}\nAnswer:"
    )
    return [{"role": "user", "content": text}]


def ask_instance(task: Task, examples: list[Task]) -> Conversation:
    """The prompt of step 3: `Label, Input` for classification, `Input, Output` for the rest."""
    first, rule = ("Input", "Write an input for the task (or None where it needs none), then the output.")
    if task.is_classification:
        first, rule = ("Label", "Name a label that the task can give, then write an input that gets this label.")
    blocks = []
    for example in examples:
        given, output = example.instances[0]
        given = given or "None"
        lines = f"Label: {output}\nInput: {given}" if first == "Label" else f"Input: {given}\nOutput: {output}"
        blocks.append(f"Task: {example.instruction}\n{lines}")
    text = f"{rule} Keep to this form.\n\n" + "\n\n".join(blocks) + f"\n\nTask: {task.instruction}\n{first}:"
    return [{"role": "user", "content": text}]


def read_list(text: str, *, cut: bool) -> list[str]:
    """The tasks of a numbered list. Of a list that was cut, the last is dropped."""
    found = re.findall(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(?:Task\s*:)?\s*(\S.*?)\s*$", text, re.MULTILINE)
    return [task.strip("*").strip() for task in (found[:-1] if cut else found) if task.strip("*").strip()]


def read_instances(text: str, *, is_classification: bool) -> list[tuple[str, str]]:
    """(input, output) of each block of an answer; its first field name may be missing, as the prompt ends with it."""
    first, second = ("Label", "Input") if is_classification else ("Input", "Output")
    if not re.match(rf"\s*{first}\s*:", text, re.IGNORECASE):
        text = f"{first}: {text}"
    block = rf"^\s*{first}\s*:(.*?)^\s*{second}\s*:(.*?)(?=^\s*{first}\s*:|^\s*Task\s*:|\Z)"
    pairs = re.findall(block, text, re.IGNORECASE | re.MULTILINE | re.DOTALL)
    pairs = [(b.strip(), a.strip()) if is_classification else (a.strip(), b.strip()) for a, b in pairs]
    return [("" if NO_INPUT.fullmatch(given) else given, output) for given, output in pairs]


def _ask_each(client: Client, tasks: list[Task], prompts: list[Conversation], read, drops: Counter, **settings) -> None:
    """One request per task; `read` puts the answer into the task, or names why the task is dropped."""
    answers = client.ask(prompts, **settings)
    faults = [read(task, answer) for task, answer in zip(tasks, answers, strict=True)]
    for task, prompt in zip(tasks, prompts, strict=True):
        task.asked.append(prompt)
    drops.update(fault for fault in faults if fault)
    tasks[:] = [task for task, fault in zip(tasks, faults, strict=True) if not fault]


def _read_kind(task: Task, answer) -> str | None:
    word = re.search(r"\b(yes|no)\b", answer.text, re.IGNORECASE)
    if word is None:
        return "kind_not_answered"
    task.is_classification = word.group().lower() == "yes"
    return None


def _read_instances(task: Task, answer) -> str | None:
    task.instances = read_instances(answer.text, is_classification=task.is_classification)
    if answer.finish_reason == "length":
        task.instances = task.instances[:-1]  # the last one is half an instance
    return None if task.instances else "no_instance_in_answer"


def _filter_instances(task: Task, max_output_words: int) -> tuple[list[tuple[str, str]], Counter]:
    kept, drops = drop_conflicting(task.instances)
    faults = [instance_fault(task.instruction, *instance, max_words=max_output_words) for instance in kept]
    drops.update(fault for fault in faults if fault)
    return [instance for instance, fault in zip(kept, faults, strict=True) if not fault], drops


def _row(task: Task, instance: tuple[str, str], model: str, seed: int) -> dict:
    given, output = instance
    user = f"{task.instruction}\n\n{given}" if given else task.instruction
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    return {
        "id": row_id("self_instruct", messages),
        "messages": messages,
        "is_classification": task.is_classification,
        "provenance": provenance("self_instruct", task.asked, model, seed, task.parents),
    }


def _draw(random: Random, tasks: list[Task], count: int) -> list[Task]:
    return random.sample(tasks, min(count, len(tasks)))


def _both_kinds(random: Random, seeds: list[Task], count: int) -> list[Task]:
    """`count` of each kind, mixed: an example list of one kind teaches one answer."""
    kinds = [[task for task in seeds if task.is_classification is kind] for kind in (True, False)]
    return random.sample(both := [task for kind in kinds for task in _draw(random, kind, count)], len(both))


def _none(drops: Counter, reason: str) -> list:
    drops[reason] += 1
    return []
