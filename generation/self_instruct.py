"""Self-Instruct: a model writes new tasks in the style of human ones, and answers them.

Wang et al. 2023 (arXiv:2212.10560), section 2.2: (1) new instructions from a prompt of six human and two generated
ones, (2) is it a classification task, (3) instances, input first or, for classification, the label first, (4) filters.
Differences from the paper, which used a completion model: each example is a turn of a chat, each request returns one
task, and the examples of steps 2 and 3 are drawn from the seed tasks instead of a fixed list.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from data.records import read_jsonl
from generation.clients import Answer, Client, Conversation
from generation.filters import Novelty, drop_conflicting, instance_fault, instruction_fault
from generation.progress import Progress
from generation.rows import Asking, Drops, GeneratedData, ask_until, few_shot, provenance, row_id
from runtime.config import check_whole

NO_INPUT = re.compile(r"\W*(none|no input|n/?a|empty|not needed|<noinput>|\(none\))\W*", re.IGNORECASE)


@dataclass
class Task:
    """An instruction with its instances (input, output)."""

    id: str = ""
    instruction: str = ""
    is_classification: bool = False
    instances: list[tuple[str, str]] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)  # ids of the examples in the prompt that produced it
    asked: list[Conversation] = field(default_factory=list)  # all prompts that were used for it


def read_seeds(files: Sequence[str]) -> list[Task]:
    """The human tasks of files with `instruction`, `instances` ({input, output}) and `is_classification`."""
    seeds = []
    for file in files:
        for number, row in enumerate(read_jsonl(file), 1):
            missing = {"instruction", "instances", "is_classification"} - set(row)
            if missing or not row["instances"]:
                raise ValueError(f"{file}: seed task {number} lacks {', '.join(sorted(missing)) or 'an instance'}")
            instances = [(one["input"], one["output"]) for one in row["instances"]]
            seeds.append(
                Task(row.get("id", f"{file}:{number}"), row["instruction"], row["is_classification"], instances)
            )
    if len({task.is_classification for task in seeds}) < 2:
        raise ValueError(f"{list(files)}: Self-Instruct needs seed tasks of both kinds, classification and not")
    return seeds


def self_instruct(
    client: Client, seeds: list[Task], *, num: int, seed: int, max_rounds: int, tasks_per_round: int,
    num_human: int, num_generated: int, num_examples: int, threshold: float,
    min_instruction_tokens: int, max_instruction_tokens: int | None, max_output_tokens: int | None,
    count_tokens: Callable[[str], int], temperature: float | None, max_tokens: int,
    progress: Progress | None = None,
) -> GeneratedData:  # fmt: skip
    """Returns `num` rows, one or more per kept task, or fewer if `max_rounds` rounds are not enough.

    Args:
        seeds: human tasks, from which the few-shot prompts draw.
        count_tokens: number of tokens of a text. The limits on instructions and outputs use it; None = no limit.
        threshold: a new instruction is dropped if its ROUGE-L to a task that was kept before reaches this value.
    """
    check_whole(1, method__max_rounds=max_rounds, method__tasks_per_round=tasks_per_round)
    check_whole(0, method__num_human=num_human, method__num_generated=num_generated, method__num_examples=num_examples)
    random, drops = Random(seed), Drops()
    rows: list[dict] = []
    made: list[Task] = []
    novelty = Novelty(threshold, [task.instruction for task in seeds])
    rounds, progress = 0, progress or Progress()
    while len(rows) < num and rounds < max_rounds:
        progress.at(max(len(rows) / num, rounds / max_rounds), 1, kept=len(rows), drops=drops.counts)
        rounds += 1
        step = partial(_step, client, drops=drops)
        sample = partial(step, asking=Asking(temperature, max_tokens, whole=False), seed=seed + rounds)

        # ---- 1. new instructions; the examples are human and generated ones
        shown = [_draw(random, seeds, num_human) + _draw(random, made, num_generated) for _ in range(tasks_per_round)]
        tasks = [Task(parents=[task.id for task in some]) for some in shown]
        fault_of = partial(
            instruction_fault, count=count_tokens, least=min_instruction_tokens, most=max_instruction_tokens
        )
        read = partial(_read_instruction, novelty=novelty, fault_of=fault_of)
        tasks = sample(tasks, [ask_instruction(some) for some in shown], read)

        # ---- 2. classification or not
        prompts = [ask_kind(task, _both_kinds(random, seeds, num_examples)) for task in tasks]
        tasks = step(tasks, prompts, _read_kind, asking=Asking(0.0, max_tokens=8, whole=False), seed=seed)

        # ---- 3. instances: the label first for classification, else the model gives most inputs its likeliest label
        alike = {kind: [task for task in seeds if task.is_classification is kind] for kind in (True, False)}
        prompts = [ask_instance(task, _draw(random, alike[task.is_classification], num_examples)) for task in tasks]
        tasks = sample(tasks, prompts, _read_instances)

        # ---- 4. keep the tasks that have a valid instance
        for task in tasks:
            kept = _filter_instances(task, count_tokens, max_output_tokens, drops)
            made += [task] if kept else []
            rows += [_row(task, instance, client.model, seed) for instance in kept]

    facts = {"rounds": rounds, "tasks": len(made), "classification": sum(t.is_classification for t in made)}
    return GeneratedData(rows[:num], drops, facts)


def ask_instruction(examples: list[Task]) -> Conversation:
    """The prompt of step 1: each example is a turn of the chat, so a small chat model also sees the pattern."""
    ask = "Write one new task for an assistant that reads and writes text only. Vary topic, verb and form."
    return few_shot([(ask, " ".join(e.instruction.split())) for e in examples], ask)


def ask_kind(task: Task, examples: list[Task]) -> Conversation:
    """The prompt of step 2."""
    ask = "Does this task ask to choose from a small, fixed set of labels? Answer Yes or No.\n\nTask: {}"
    turns = [(ask.format(e.instruction), "Yes" if e.is_classification else "No") for e in examples]
    return few_shot(turns, ask.format(task.instruction))


def ask_instance(task: Task, examples: list[Task]) -> Conversation:
    """The prompt of step 3: `Label, Input` for classification, `Input, Output` for the rest."""
    if task.is_classification:
        ask = "Name a label that this task can give, then write an input that gets this label.\n\nTask: {}"
        form = "Label: {output}\nInput: {given}"
    else:
        ask = "Write an input for this task (None where it needs none), then the output.\n\nTask: {}"
        form = "Input: {given}\nOutput: {output}"
    turns = []
    for example in examples:
        given, output = example.instances[0]
        turns.append((ask.format(example.instruction), form.format(given=given or "None", output=output)))
    return few_shot(turns, ask.format(task.instruction))


def read_instances(text: str, *, is_classification: bool) -> list[tuple[str, str]]:
    """(input, output) of each block of an answer.

    If the answer to an open task has neither field name, the whole answer is the output and the input is empty: the
    model has done the task, so the task needed no input.
    """
    first, second = ("Label", "Input") if is_classification else ("Input", "Output")
    if not re.search(rf"^\s*({first}|{second})\s*:", text, re.IGNORECASE | re.MULTILINE):
        return [] if is_classification or not text.strip() else [("", text.strip())]
    block = rf"^\s*{first}\s*:(.*?)^\s*{second}\s*:(.*?)(?=^\s*{first}\s*:|^\s*Task\s*:|\Z)"
    pairs = re.findall(block, text, re.IGNORECASE | re.MULTILINE | re.DOTALL)
    pairs = [(b.strip(), a.strip()) if is_classification else (a.strip(), b.strip()) for a, b in pairs]
    return [("" if NO_INPUT.fullmatch(given) else given, output) for given, output in pairs]


def _step(
    client: Client, tasks: list[Task], prompts: list[Conversation], read, *, drops: Drops, seed: int, asking: Asking
) -> list[Task]:
    """Send one request per task. `read` stores the answer in the task or returns the reason to drop it.

    Returns the tasks that were kept.
    """
    for task, prompt in zip(tasks, prompts, strict=True):
        task.asked.append(prompt)
    seeds = [seed] * len(tasks)
    faults = ask_until(client, tasks, lambda t: t.asked[-1], read, asking, seeds=seeds)
    for task, fault in zip(tasks, faults, strict=True):
        if fault:
            drops.add(*fault, instruction=task.instruction)
    return [task for task, fault in zip(tasks, faults, strict=True) if not fault]


def _read_instruction(task: Task, answer: Answer, *, novelty: Novelty, fault_of: Callable) -> str | None:
    text = re.sub(r"^\W*(new )?(task|instruction)?\s*\d*\s*[:.)]\s*", "", answer.text.strip(), flags=re.IGNORECASE)
    if answer.finish_reason == "length":
        return "instruction_cut"
    fault = fault_of(text)
    if fault is None and novelty.most_similar(text) is not None:
        fault = "too_similar"
    if fault is None:
        novelty.add(text)
        task.id, task.instruction = row_id("task", text), text
    return fault


def _read_kind(task: Task, answer: Answer) -> str | None:
    word = re.search(r"\b(yes|no)\b", answer.text, re.IGNORECASE)
    if word is None:
        return "kind_not_answered"
    task.is_classification = word.group().lower() == "yes"
    return None


def _read_instances(task: Task, answer: Answer) -> str | None:
    task.instances = read_instances(answer.text, is_classification=task.is_classification)
    if answer.finish_reason == "length":
        task.instances = task.instances[:-1]  # the last instance is incomplete
    return None if task.instances else "no_whole_instance"


def _filter_instances(task: Task, count: Callable, most: int | None, drops: Drops) -> list[tuple[str, str]]:
    kept, conflicting = drop_conflicting(task.instances)
    for reason, (given, output) in conflicting:
        drops.add(reason, output, instruction=task.instruction, input=given)
    whole = []
    for given, output in kept:
        if fault := instance_fault(task.instruction, given, output, count, most=most):
            drops.add(fault, output, instruction=task.instruction, input=given)
        else:
            whole.append((given, output))
    return whole


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
    """`count` tasks of each kind in random order. With examples of one kind only, the model gives one answer only."""
    kinds = [[task for task in seeds if task.is_classification is kind] for kind in (True, False)]
    return random.sample(both := [task for kind in kinds for task in _draw(random, kind, count)], len(both))
