"""task=exact: grade answers by a program: numbers (GSM8K), verifiable instructions (IFEval), code with tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from data.files import read_rows
from evals.answers import load_samples
from evals.benchmarks.gsm8k import gold_number, harness_matches, last_number, majority, pass_at_k
from evals.benchmarks.ifeval import check_answer
from evals.benchmarks.sandbox import passes_tests, program_of
from evals.intervals import mean_estimate, share_estimate
from runtime.plots import plot_intervals
from runtime.report import print_table


def check_number(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """GSM8K: whether the answer's number is that of the solution, with lm-eval's two string matches beside it."""
    try:
        gold = gold_number(str(question["answer"]))
    except ValueError as error:
        raise ValueError(f"question {question['id']!r}: {error}; give the number after ####") from None
    strict, flexible = harness_matches(answer, str(question["answer"]))
    return {"exact_match": last_number(answer) == gold, "lm_eval_strict": strict, "lm_eval_flexible": flexible}


def check_instructions(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """IFEval: whether all instructions of the prompt are followed, strictly (the measure) and loosely, and each one."""
    names = question["instruction_id_list"]
    try:
        strict, loose = check_answer(names, question["kwargs"], answer)
    except ValueError as error:
        raise ValueError(f"question {question['id']!r}: {error}") from None
    hits = {"all_followed": all(strict), "all_followed_loose": all(loose)}
    hits |= {f"strict:{i}:{name}": hit for i, (name, hit) in enumerate(zip(names, strict, strict=True))}
    return hits | {f"loose:{i}:{name}": hit for i, (name, hit) in enumerate(zip(names, loose, strict=True))}


def check_code(question: dict, answer: str, task: DictConfig) -> dict[str, bool]:
    """Whether the answer's code passes the tests. As in HumanEval, the prompt precedes code that does not repeat it."""
    if not task.run_code:
        raise ValueError("this set runs code that a model wrote; set task.run_code=true on a machine that you can lose")
    program = program_of(question["prompt"], answer, question["test"], question["entry_point"])
    return {"passed": passes_tests(program, seconds=task.seconds, megabytes=task.megabytes)}


CHECKS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "gsm8k": (check_number, ("question", "answer")),
    "ifeval": (check_instructions, ("prompt", "instruction_id_list", "kwargs")),
    "code": (check_code, ("prompt", "test", "entry_point")),
}


def read_tests(file: str, fields: tuple[str, ...]) -> dict[str, dict]:
    """{question: its row}. The question is question_id, key, task_id or the text: the first of them in the row."""
    questions = {}
    for where, row in read_rows(file):
        missing = [name for name in fields if name not in row]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}; is task.format the right one?")
        names = ("question_id", "key", "task_id", fields[0])
        name = next(name for name in names if name in row)
        if str(row[name]) in questions:
            raise ValueError(f"{where}: {name} {row[name]!r} is a duplicate; keep one row per question")
        questions[str(row[name])] = row | {"id": str(row[name])}
    if not questions:
        raise ValueError(f"{file} holds no question")
    return questions


def share(hits: Sequence[bool], clusters: Sequence | None = None) -> dict:
    """Share of hits with its 95 % Wilson interval, clustered by `clusters` (prompts)."""
    estimate = share_estimate(hits, np.arange(len(hits)) if clusters is None else clusters, null=0.5, level=0.95)
    return {name: estimate.get(name) for name in ("value", "lower", "upper", "n", "reason")}


def grade(questions: dict[str, dict], answers: dict[str, list[str]], check: Callable, task: DictConfig) -> dict:
    """The shares of one model. A question without an answer is wrong, and `unanswered` counts it.

    Args:
        answers: {question: its samples}. With several samples the measure is their mean, with pass@k and majority vote.
    Raises:
        ValueError: no question has an answer.
    """
    samples = {
        key: answers.get(key) or answers.get(str(row.get("prompt", row.get("question")))) or []
        for key, row in questions.items()
    }
    if not any(samples.values()):
        raise ValueError(
            f"none of the {len(questions)} questions has an answer: task.questions has {next(iter(questions))[:60]!r}, "
            f"task.input {next(iter(answers))[:60]!r}; give both the same question_id"
        )
    found = {key: [check(row, text, task) for text in samples[key] or [""]] for key, row in questions.items()}
    first = next(iter(next(iter(found.values()))[0]))
    right = {key: [hits[first] for hits in rows] for key, rows in found.items()}
    result = _over_samples(questions, samples, right) | {"unanswered": sum(not texts for texts in samples.values())}
    parts: dict[str, tuple[list, list]] = {}
    for key, rows in found.items():
        for name, hit in (pair for hits in rows for pair in hits.items() if pair[0] != first):
            kind, _, instruction = name.partition(":")
            instruction = instruction.partition(":")[2]
            for group in (kind, *([f"{kind}:{instruction}"] if instruction else [])):
                hits, clusters = parts.setdefault(group, ([], []))
                hits.append(hit)
                clusters.append(key)
    measured = {name: share(*pair) for name, pair in parts.items()}
    if "strict" in measured:
        result |= {"instruction_level": measured.pop("strict"), "instruction_level_loose": measured.pop("loose")}
        for kind, name in (("strict", "instructions"), ("loose", "instructions_loose")):
            result[name] = {k.partition(":")[2]: v for k, v in sorted(measured.items()) if k.startswith(f"{kind}:")}
        measured = {name: figure for name, figure in measured.items() if ":" not in name}
    return {"measure": first} | result | measured


def _over_samples(questions: dict[str, dict], samples: dict[str, list[str]], right: dict[str, list[bool]]) -> dict:
    counts = {len(texts) for texts in samples.values() if texts}
    if counts <= {1}:
        return share([hits[0] for hits in right.values()])
    k, names = min(counts), list(questions)
    means = [np.mean(right[key]) for key in names]
    mean = mean_estimate(means, names, null=0.5, level=0.95, max_deviation=1.0)
    result = {name: mean.get(name) for name in ("value", "lower", "upper", "n")} | {"samples": sorted(counts)}
    result["lower"], result["upper"] = max(result["lower"], 0.0), min(result["upper"], 1.0)
    result["pass_at_k"] = {}
    for size in sorted({1, k, *(2**i for i in range(1, k.bit_length()))}):
        values = [pass_at_k(len(right[key]), sum(right[key]), size) if samples[key] else 0.0 for key in names]
        result["pass_at_k"][str(size)] = share_of(values, names)
    if "answer" in questions[names[0]]:
        voted = {key: majority([last_number(text) for text in samples[key]]) for key in names}
        hits = [voted[key] is not None and voted[key] == gold_number(str(questions[key]["answer"])) for key in names]
        result["majority"] = share(hits)
    return result


def share_of(values: Sequence[float], names: Sequence[str]) -> dict:
    """The mean of values in [0, 1], one per question, with its interval."""
    estimate = share_estimate(values, names, null=0.5, level=0.95)
    return {name: estimate.get(name) for name in ("value", "lower", "upper", "n", "reason")}


def run(cfg: DictConfig, out: Path) -> dict:
    """task=exact: result.json with one entry per model, exact.png."""
    task = cfg.task
    if task.format not in CHECKS:
        raise ValueError(f"task.format={task.format!r} is unknown; known: {', '.join(CHECKS)}")
    check, fields = CHECKS[task.format]
    questions, answers = read_tests(task.questions, fields), load_samples(task.input)
    results = {model: grade(questions, texts, check, task) for model, texts in answers.items()}
    rows = [(model, r["value"], r["lower"], r["upper"], r["n"], r["unanswered"]) for model, r in results.items()]
    print_table(task.format, ("model", "share", "lower", "upper", "n", "unanswered"), rows)
    extra = ("all_followed_loose", "instruction_level", "instruction_level_loose", "lm_eval_strict", "lm_eval_flexible")
    further = [
        (f"{model}: {name}", *(r[name][key] for key in ("value", "lower", "upper", "n")))
        for model, r in results.items()
        for name in (*extra, "majority")
        if name in r
    ]
    further += [
        (f"{model}: pass@{k}", *(figure[key] for key in ("value", "lower", "upper", "n")))
        for model, r in results.items()
        for k, figure in r.get("pass_at_k", {}).items()
    ]
    if further:
        print_table("beside it", ("", "share", "lower", "upper", "n"), further)
    plot_intervals(out / "exact.png", f"{task.format}: share right", [row[:4] for row in rows], null=None)
    return {"benchmark": task.format, "models": results}
