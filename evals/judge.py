"""A model as judge of answers: pairs in both orders, or grades from 1 to 10, in conversations of one or two turns."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from data.records import Verdict, write_jsonl
from evals.answers import load_answers
from evals.asking import Judging, ask_items, ask_judge, judge_client, plan_judge
from evals.biases import position, position_by_category
from evals.families import family_warnings
from evals.intervals import mean_estimate, percent, share_estimate
from evals.judge_items import Item, make_items, pair_verdict
from evals.judge_output import Reading
from evals.logprob_judge import LogprobJudge
from evals.paired import paired_differences, print_differences
from evals.prompts import check_identifiers, load_templates
from evals.questions import load_questions, load_references
from evals.reward_judge import RewardJudge
from evals.top_logprobs import share_verdicts
from evals.verdicts import fold_orders, points, votes_table
from evals.winrate import detectable_effect, win_rate
from generation.clients import Answer, Client
from runtime.plots import plot_intervals
from runtime.report import interval_cell, print_table


def judge_pairs(judging: Judging, items: list[Item]) -> tuple[list[Verdict], dict, Counter]:
    """(a verdict for every item, the usage, {reason: number of errors})."""
    if judging.judge.kind == "reward_model":
        judge = RewardJudge(judging.judge)
        return judge.compare(_one_order(items), pair_verdict), {}, Counter()
    if judging.judge.kind == "logprobs":
        return LogprobJudge(judging.judge).compare(items), {}, Counter()
    client = judge_client(judging.client)
    if judging.judge.kind == "top_logprobs":
        return judge_by_top_logprobs(client, items, judging)
    replies, usage = ask_judge(client, items, judging)
    readings = [read_answer(answer, parser) for answer, parser in replies]
    verdicts = [
        pair_verdict(item, client.model, answer.text or answer.error, (reading.verdict, reading.weight), item.shown)
        for item, (answer, _), reading in zip(items, replies, readings, strict=True)
    ]
    return verdicts, usage, Counter(reading.why for reading in readings if reading.verdict == "error")


def judge_by_top_logprobs(client: Client, items: list[Item], judging: Judging) -> tuple[list[Verdict], dict, Counter]:
    """`judge_pairs` with AlpacaEval 2's verdicts from the log-probabilities that an endpoint returns."""
    if judging.client.kind != "openai":
        raise ValueError(
            "judge.kind=top_logprobs needs log-probabilities from an endpoint, and "
            f"client={judging.client.kind} has none; use client=openai, or judge=logprobs for a local policy"
        )
    check_identifiers(load_templates(judging.judge.template, "pairwise"), judging.judge.template, judging.judge.kind)
    answers, usage = ask_items(client, items, judging)
    verdicts, errors = share_verdicts(items, answers, client.model)
    return verdicts, usage, errors


def _one_order(items: list[Item]) -> list[Item]:
    """Each item in one order only, because a reward model sees one answer at a time."""
    seen: dict[tuple, Item] = {}
    for item in items:
        seen.setdefault((item.question["question_id"], item.turn, item.models), item)
    return list(seen.values())


def read_answer(answer: Answer, parser: Callable) -> Reading:
    """The verdict in an answer. An answer that was cut, filtered or refused is an error, whatever its text is."""
    if answer.finish_reason != "stop":
        why = {"length": "cut by judge.max_tokens", "content_filter": "filtered"}
        return Reading("error", why=why.get(answer.finish_reason, answer.finish_reason))
    return parser(answer.text)


def grade_answers(judging: Judging, items: list[Item]) -> tuple[list[dict], dict, Counter]:
    """(a grade for every item, None where it cannot be read; the usage; {reason: number of errors})."""
    if judging.judge.kind == "reward_model":
        judge = RewardJudge(judging.judge)
        grades = [_grade(item, judge.name, score, None) for item, score in zip(items, judge.grade(items), strict=True)]
        return grades, {}, Counter()
    if judging.judge.kind in ("logprobs", "top_logprobs"):
        raise ValueError(
            f"judge.kind={judging.judge.kind} chooses between two answers; for grades use judge=llm or "
            "judge=reward_model"
        )
    client = judge_client(judging.client)
    replies, usage = ask_judge(client, items, judging)
    grades = []
    errors: Counter[str] = Counter()
    for item, (answer, parser) in zip(items, replies, strict=True):
        reading = read_answer(answer, grade_of(parser))
        errors.update([reading.why] if reading.verdict == "error" else [])
        grade = reading.weight if reading.verdict == "grade" else None
        grades.append(_grade(item, client.model, grade, answer.text or answer.error))
    return grades, usage, errors


def grade_of(parser: Callable) -> Callable[[str], Reading]:
    """A parser that returns a `Reading`, from one that returns a grade or None."""

    def read(text: str) -> Reading:
        grade = parser(text)
        return Reading("error", why="no grade from 1 to 10") if grade is None else Reading("grade", grade)

    return read


def _grade(item: Item, judge: str, grade: float | None, text: str | None) -> dict:
    about = {"question": item.question["question_id"], "category": item.question["category"], "turn": item.turn}
    return {**about, "model": item.models[0], "judge": judge, "grade": grade, "text": text}


def summarise_pairs(votes: pd.DataFrame, task: DictConfig) -> dict:
    """{model b: {model a: figures}}. A win counts where both orders agree, a tie is half, errors are left out."""
    folded = fold_orders(votes)
    results: dict[str, dict] = {}
    for baseline, model in dict.fromkeys(zip(votes["model_a"], votes["model_b"], strict=True)):
        rows = folded[folded[["model_a", "model_b"]].isin([baseline, model]).all(axis=1)]
        share = points(rows["verdict"]).where(rows["model_a"] == model, 1 - points(rows["verdict"])).to_numpy(float)
        known = ~np.isnan(share)
        figures: dict = {"win_rate": None, "n_total": 0, "n_errors": len(rows)}
        if known.any():
            estimate = percent(share_estimate(share[known], rows["question"][known], null=0.5, level=0.95))
            effect = detectable_effect(int(known.sum()), alpha=task.alpha, power=task.power)
            figures = win_rate(share) | {"minimum_detectable_effect": 100 * effect}
            figures |= {"lower": estimate["lower"], "upper": estimate["upper"]}
        order = position(votes[votes[["model_a", "model_b"]].isin([baseline, model]).all(axis=1)], level=0.95)
        figures["order"] = {name: order.get(name) for name in ("value", "lower", "upper", "n", "flips", "reason")}
        results.setdefault(model, {})[baseline] = figures
    return results


def paired_pairs(votes: pd.DataFrame, models: list[str]) -> dict[str, list[dict]]:
    """{baseline: paired differences, in points, of every two models that were compared with it}."""
    folded = fold_orders(votes)
    found = {}
    for baseline in dict.fromkeys([*votes["model_a"], *votes["model_b"]]):
        met = {}
        for model in models:
            rows = folded[folded[["model_a", "model_b"]].isin([baseline, model]).all(axis=1)]
            if model != baseline and len(rows):
                share = points(rows["verdict"]).where(rows["model_a"] == model, 1 - points(rows["verdict"]))
                met[model] = rows.assign(value=100 * share)
        if len(met) > 1:
            found[baseline] = paired_differences(met, max_difference=100.0)
    return found


def summarise_grades(grades: pd.DataFrame) -> dict:
    """{model: mean grade with interval over questions, by turn and category}. Unreadable grades are left out."""
    results = {}
    for model, rows in grades.groupby("model", sort=False):
        known = rows[rows["grade"].notna()]
        result = _mean_grade(known)
        result["n_errors"] = len(rows) - len(known)
        for name, column in (("turns", "turn"), ("categories", "category")):
            result[name] = {str(key): _mean_grade(part) for key, part in known.groupby(column)}
        results[model] = result
    return results


def _mean_grade(known: pd.DataFrame) -> dict:
    """The mean of grades from 1 to 10 with its interval over questions."""
    result = mean_estimate(known["grade"].to_numpy(float), known["question"], null=5.5, level=0.95, max_deviation=4.5)
    result.pop("p_value", None)
    if result["lower"] is not None:
        result |= {"lower": max(result["lower"], 1.0), "upper": min(result["upper"], 10.0)}
    elif len(known):
        result["value"] = float(known["grade"].mean())
    return result


def judge_warnings(
    judge: str, errors: Counter, num_asked: int, answers: dict, files: dict[str, str], task: DictConfig
) -> list[str]:
    """Warnings about the figures: shared families, unreadable verdicts, constant answers."""
    warnings = family_warnings(judge, files, task.families)
    if errors.total() > task.max_unreadable * num_asked:
        reasons = ", ".join(f"{count} {why}" for why, count in errors.most_common())
        share = 100 * errors.total() / num_asked
        warnings.append(
            f"{share:.1f} % of the verdicts cannot be read ({reasons}); they count neither as ties nor as losses"
        )
    for model, questions in answers.items():
        texts = pd.Series([json.dumps(turns) for turns in questions.values()]).value_counts()
        if texts.iloc[0] >= 3 and texts.iloc[0] / texts.sum() > task.max_same_answer:
            warnings.append(f"{model} gives the same answer to {texts.iloc[0]} of {texts.sum()} prompts")
    return warnings


def run(cfg: DictConfig, out: Path) -> dict:
    """task=judge: verdicts.jsonl (or grades.jsonl), the win rates (or grades), and warnings."""
    task = cfg.task
    if task.mode not in ("pairwise", "single"):
        raise ValueError(f"task.mode={task.mode!r} must be pairwise or single")
    answers = load_answers(task.answers)
    files = {model: file for file in task.answers for model in load_answers([file])}
    questions, references = load_questions(task.questions), load_references(task.questions, task.references)
    items = make_items(questions, answers, references, task)
    judging = Judging(cfg.judge, cfg.get("client"), task.mode, task.seed)
    if task.plan:
        return plan_judge(judging, items)
    ask, name = (judge_pairs, "verdicts.jsonl") if task.mode == "pairwise" else (grade_answers, "grades.jsonl")
    rows, usage, errors = ask(judging, items)
    rows = [row if isinstance(row, dict) else asdict(row) for row in rows]
    write_jsonl(out / name, rows)
    judge = rows[0]["judge"]
    warnings = judge_warnings(judge, errors, len(rows), answers, files, task)
    report = report_pairs(rows, task, out) if task.mode == "pairwise" else report_grades(rows, out)
    if task.mode == "pairwise":
        warnings += order_warnings(votes_table(rows))
    for warning in warnings:
        print(f"warning: {warning}")
    unreadable = errors.total() / len(rows)
    about = {"judge": judge, "unreadable": unreadable, "errors": dict(errors.most_common()), "warnings": warnings}
    return {**about, "usage": usage, **report}


def order_warnings(votes: pd.DataFrame) -> list[str]:
    """A warning if the order decides many verdicts: they count as ties, which moves win rates towards 50."""
    order = position(votes, level=0.95)
    if order["value"] is None or order["lower"] <= 0.5 <= order["upper"]:
        return []
    first = order["value"] > 0.5
    share = 100 * (order["value"] if first else 1 - order["value"])
    flips = order["flips"]["to_first"] + order["flips"]["to_second"]
    return [
        f"the judge names the answer shown {'first' if first else 'second'} in {share:.0f} % of its decisive verdicts, "
        f"and {flips} of {order['flips']['items']} verdicts change with the order: these count as ties"
    ]


def report_pairs(rows: list[dict], task: DictConfig, out: Path) -> dict:
    """Print and plot the win rates. In the result, `models` is {model b: {model a: figures}}."""
    results = summarise_pairs(votes_table(rows), task)
    flat = [(f"{b} against {a}", r) for b, others in results.items() for a, r in others.items()]
    columns = ("win_rate", "lower", "upper", "n_wins", "n_draws", "n_wins_base", "n_errors")
    head = ("", "win rate", "lower", "upper", "wins", "ties", "losses", "no verdict", "first share")
    table = [(name, *(r.get(c) for c in columns), interval_cell(r["order"])) for name, r in flat]
    print_table("win rate in percent", head, table)
    shown = [(name, r["win_rate"], r["lower"], r["upper"]) for name, r in flat if r["win_rate"] is not None]
    plot_intervals(out / "judge.png", "win rate, percent (both orders)", shown[:60], null=50)
    votes = votes_table(rows)
    order = position(votes, level=0.95)
    orders = {"all": order, **position_by_category(votes, level=0.95)}
    known = [(name, row["flips"]["changed"], row) for name, row in orders.items() if row["value"] is not None]
    if known:
        names = ("", "verdict changes", "lower", "upper", "items", "names the first", "lower", "upper")
        keys = ("value", "lower", "upper")
        table = [(name, *(c[k] for k in keys), c["n"], *(row[k] for k in keys)) for name, c, row in known]
        print_table("effect of the order shown", names, table)
    paired = paired_pairs(votes, list(dict.fromkeys([*votes["model_a"], *votes["model_b"]])))
    for differences in paired.values():
        print_differences(differences, list(dict.fromkeys(name for row in differences for name in row["models"])))
    return {"models": results, "orders": orders, "paired": paired}


def report_grades(rows: list[dict], out: Path) -> dict:
    """Print and plot the grades."""
    results = summarise_grades(pd.DataFrame(rows))
    table = [(model, r["value"], r["lower"], r["upper"], r["n"]) for model, r in results.items()]
    print_table("mean grade", ("model", "grade", "lower", "upper", "n"), table)
    plot_intervals(out / "judge.png", "mean grade", [row[:4] for row in table[:60]], null=None)
    grades = {model: own.assign(value=own["grade"]) for model, own in pd.DataFrame(rows).groupby("model", sort=False)}
    paired = paired_differences(grades, max_difference=9.0)
    if paired:
        print_differences(paired, sorted(results, key=lambda model: -(results[model]["value"] or 0)))
    return {"models": results, "paired": paired}
