"""task=exact: answers that need no judge: numbers (GSM8K), instructions that can be verified (IFEval), tested code."""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from omegaconf import DictConfig
from statsmodels.stats.proportion import proportion_confint

from evals.answers import load_answers
from evals.instructions import follows
from evals.readers import read_rows
from evals.sandbox import passes_tests
from runtime.plots import plot_intervals
from runtime.report import print_table

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The number after ####, else the last one in the text; commas, currency signs and trailing zeros do not matter."""
    marked = text.rsplit("####", 1)
    found = NUMBER.findall(marked[-1]) if len(marked) == 2 else []
    number = found[0] if found else (NUMBER.findall(text) or [None])[-1]
    if number is None:
        return None
    try:
        return Decimal(number.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def check_number(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """GSM8K: is the last number of the answer the one after #### in the solution?"""
    gold = last_number(str(question["answer"]))
    if gold is None:
        raise ValueError(f"question {question['id']!r} has no number in its answer: {question['answer']!r}")
    return {"exact_match": last_number(answer) == gold}


def check_instructions(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """IFEval (Zhou et al. 2023, arXiv:2311.07911), strict: every verifiable instruction of the prompt is followed."""
    ids, settings = question["instruction_id_list"], question["kwargs"]
    hits = {
        f"{i}:{name}": follows(name, answer, given or {})
        for i, (name, given) in enumerate(zip(ids, settings, strict=True))
    }
    return {"all_followed": all(hits.values())} | hits


def check_code(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """HumanEval's shape: the answer's code (after the prompt, where it does not repeat it) passes the tests."""
    if not task.run_code:
        raise ValueError("this set runs code that a model wrote; say task.run_code=true, in a machine you can lose")
    blocks = re.findall(r"```(?:python)?\n(.*?)```", answer, flags=re.DOTALL)
    code = "\n".join(blocks) if blocks else answer
    if f"def {question['entry_point']}" not in code:
        code = question["prompt"] + code
    program = f"{code}\n{question['test']}\ncheck({question['entry_point']})\n"
    return {"passed": passes_tests(program, seconds=task.seconds, megabytes=task.megabytes)}


CHECKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "gsm8k": (check_number, ("question", "answer")),
    "ifeval": (check_instructions, ("prompt", "instruction_id_list", "kwargs")),
    "code": (check_code, ("prompt", "test", "entry_point")),
}


def read_tests(file: str, fields: tuple[str, ...]) -> dict[str, dict]:
    """{id or text of the question: its row}, under question_id, key, task_id or the question itself."""
    questions = {}
    for where, row in read_rows(file):
        missing = [name for name in fields if name not in row]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}; is task.format the right one?")
        names = ("question_id", "key", "task_id", fields[0])
        name = next(name for name in names if name in row)
        questions[str(row[name])] = row | {"id": str(row[name])}
    return questions


def share(hits: list[bool]) -> dict:
    """Share of hits with its Wilson interval."""
    lower, upper = proportion_confint(sum(hits), len(hits), method="wilson")
    return {"value": sum(hits) / len(hits), "lower": float(lower), "upper": float(upper), "n": len(hits)}


def grade(questions: dict[str, dict], answers: dict[str, list[str]], check: Callable, task: DictConfig) -> dict:
    """The shares of one model; a question without an answer is wrong, and counted in `unanswered`."""
    texts = {key: (answers.get(key) or answers.get(str(row.get("prompt", row.get("question")))) or [None])[0]
             for key, row in questions.items()}  # fmt: skip
    found = [check(row, texts[key] or "", task) for key, row in questions.items()]
    first = next(iter(found[0]))
    result = share([hits[first] for hits in found]) | {"unanswered": sum(text is None for text in texts.values())}
    parts = [(name.split(":", 1)[1], hit) for hits in found for name, hit in hits.items() if name != first]
    if parts:
        result["instruction_level"] = share([hit for _, hit in parts])
        names = sorted({name for name, _ in parts})
        result["instructions"] = {name: share([hit for other, hit in parts if other == name]) for name in names}
    return {"measure": first} | result


def run(cfg: DictConfig, out: Path) -> dict:
    """task=exact: result.json with one entry a model, exact.png."""
    task = cfg.task
    if task.format not in CHECKS:
        raise ValueError(f"task.format={task.format!r} is unknown; known: {', '.join(CHECKS)}")
    check, fields = CHECKS[task.format]
    questions, answers = read_tests(task.questions, fields), load_answers(task.input)
    results = {model: grade(questions, said, check, task) for model, said in answers.items()}
    rows = [(model, r["value"], r["lower"], r["upper"], r["n"], r["unanswered"]) for model, r in results.items()]
    print_table(task.format, ("model", "share", "lower", "upper", "n", "unanswered"), rows)
    plot_intervals(out / "exact.png", f"{task.format}: share right", [row[:4] for row in rows], null=None)
    return {"models": results}
