"""Let a model judge answers: pairs in both orders, or grades from 1 to 10, over one or two turns of a conversation."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from data.clients import Answer, Client, build_client
from data.records import Verdict, write_jsonl
from evals.answers import load_answers
from evals.families import family_warnings
from evals.intervals import mean_estimate
from evals.judge_items import Item, choose_template, item_messages, make_items, pair_verdict
from evals.logprob_judge import LogprobJudge
from evals.prompts import PARSERS, Template, load_templates, read_rating
from evals.questions import load_questions, load_references
from evals.reward_judge import RewardJudge
from evals.verdicts import fold_orders, points, votes_table
from evals.winrate import detectable_effect, win_rate
from runtime.plots import plot_intervals
from runtime.report import print_table


def ask_judge(client: Client, items: Sequence[Item], cfg: DictConfig) -> tuple[list[tuple[Answer, Template]], dict]:
    """What the client said to every item, and what that cost; the bound is shown before the first request."""
    task, judge = cfg.task, cfg.judge
    templates = load_templates(judge.template, task.mode)
    chosen = [choose_template(item, templates) for item in items]
    conversations = [item_messages(item, template) for item, template in zip(items, chosen, strict=True)]
    bound = client.cost_bound(conversations, max_tokens=judge.max_tokens)
    print(
        f"{len(items)} questions to {client.model}, at most {bound:.4f} in currency units (client.*_price)", flush=True
    )
    settings = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, "seed": task.seed}
    answers = client.ask(conversations, **settings)
    return list(zip(answers, chosen, strict=True)), asdict(client.usage) | {"cost_bound": bound}


def judge_pairs(cfg: DictConfig, items: list[Item]) -> tuple[list[Verdict], dict]:
    """A verdict for every item, and the usage."""
    if cfg.judge.kind == "reward_model":
        judge = RewardJudge(cfg.judge)
        return judge.compare([item for item in items if item.shown == "a"], pair_verdict), {}
    if cfg.judge.kind == "logprobs":
        return LogprobJudge(cfg.judge).compare(items), {}
    client = _client(cfg)
    said, usage = ask_judge(client, items, cfg)
    verdicts = [
        pair_verdict(item, client.model, answer.text or answer.error, _read(answer, template), item.shown)
        for item, (answer, template) in zip(items, said, strict=True)
    ]
    return verdicts, usage


def _client(cfg: DictConfig) -> Client:
    if cfg.get("client") is None:
        raise ValueError(
            "task=judge asks a model: give client=openai | local | scripted, or judge=reward_model | logprobs"
        )
    return build_client(cfg.client)


def _read(answer: Answer, template: Template) -> tuple[str, float]:
    if answer.missing:
        return "error", 1.0
    return PARSERS[template.output_format](answer.text)


def grade_answers(cfg: DictConfig, items: list[Item]) -> tuple[list[dict], dict]:
    """A grade for every item (None where it cannot be read), and the usage."""
    if cfg.judge.kind == "reward_model":
        judge = RewardJudge(cfg.judge)
        return [
            _grade(item, judge.name, score, None) for item, score in zip(items, judge.grade(items), strict=True)
        ], {}
    if cfg.judge.kind == "logprobs":
        raise ValueError("judge=logprobs chooses between two answers; for grades use judge=llm or judge=reward_model")
    client = _client(cfg)
    said, usage = ask_judge(client, items, cfg)
    grades = [
        _grade(
            item,
            client.model,
            None if answer.missing else read_rating(answer.text),
            answer.text or answer.error,
        )
        for item, (answer, _) in zip(items, said, strict=True)
    ]
    return grades, usage


def _grade(item: Item, judge: str, grade: float | None, text: str | None) -> dict:
    about = {"question": item.question["question_id"], "category": item.question["category"], "turn": item.turn}
    return {**about, "model": item.models[0], "judge": judge, "grade": grade, "text": text}


def summarise_pairs(votes: pd.DataFrame, task: DictConfig) -> dict:
    """{model b: {model a: figures}}: a win counts where both orders agree, a tie is half, errors are left out."""
    folded = fold_orders(votes)
    results: dict[str, dict] = {}
    for baseline, model in dict.fromkeys(zip(votes["model_a"], votes["model_b"], strict=True)):
        rows = folded[folded[["model_a", "model_b"]].isin([baseline, model]).all(axis=1)]
        share = points(rows["verdict"]).where(rows["model_a"] == model, 1 - points(rows["verdict"])).to_numpy(float)
        known = ~np.isnan(share)
        figures = {"win_rate": None, "n_total": 0, "n_errors": len(rows)}
        if known.any():
            estimate = mean_estimate(100 * share[known], rows["question"][known], null=50, level=0.95)
            effect = detectable_effect(int(known.sum()), alpha=task.alpha, power=task.power)
            figures = win_rate(share) | {"minimum_detectable_effect": 100 * effect}
            figures |= {"lower": estimate["lower"], "upper": estimate["upper"]}
        results.setdefault(model, {})[baseline] = figures
    return results


def summarise_grades(grades: pd.DataFrame) -> dict:
    """{model: mean grade with its interval over questions, by turn and by category}; unreadable grades are left out."""
    results = {}
    for model, rows in grades.groupby("model", sort=False):
        known = rows[rows["grade"].notna()]
        result = mean_estimate(known["grade"].to_numpy(float), known["question"], null=5.5, level=0.95)
        result.pop("p_value", None)
        result["n_errors"] = len(rows) - len(known)
        for name, column in (("turns", "turn"), ("categories", "category")):
            result[name] = {str(key): float(part["grade"].mean()) for key, part in known.groupby(column)}
        results[model] = result
    return results


def judge_warnings(judge: str, errors: float, answers: dict, files: dict[str, str], task: DictConfig) -> list[str]:
    """What a reader must know before believing the figures."""
    warnings = family_warnings(judge, files, task.families)
    if errors > task.max_unreadable:
        warnings.append(f"{100 * errors:.1f} % of the verdicts cannot be read; they count neither as tie nor as loss")
    for model, questions in answers.items():
        texts = pd.Series([json.dumps(turns) for turns in questions.values()]).value_counts()
        if texts.iloc[0] >= 3 and texts.iloc[0] / texts.sum() > task.max_same_answer:
            warnings.append(f"{model} gives one and the same answer to {texts.iloc[0]} of {texts.sum()} prompts")
    return warnings


def run(cfg: DictConfig, out: Path) -> dict:
    """task=judge: verdicts.jsonl (or grades.jsonl), the win rates (or grades) and what to be warned of."""
    task = cfg.task
    if task.mode not in ("pairwise", "single"):
        raise ValueError(f"task.mode={task.mode!r} must be pairwise or single")
    answers = load_answers(task.answers)
    files = {model: file for file in task.answers for model in load_answers([file])}
    questions, references = load_questions(task.questions), load_references(task.questions, task.references)
    items = make_items(questions, answers, references, task)
    ask, name = (judge_pairs, "verdicts.jsonl") if task.mode == "pairwise" else (grade_answers, "grades.jsonl")
    rows, usage = ask(cfg, items)
    rows = [row if isinstance(row, dict) else asdict(row) for row in rows]
    write_jsonl(out / name, rows)
    judge = rows[0]["judge"]
    errors = np.mean([row["grade"] is None if task.mode == "single" else row["verdict"] == "error" for row in rows])
    warnings = judge_warnings(judge, float(errors), answers, files, task)
    report = report_pairs(rows, task, out) if task.mode == "pairwise" else report_grades(rows, out)
    for warning in warnings:
        print(f"warning: {warning}")
    return {"judge": judge, "unreadable": float(errors), "warnings": warnings, "usage": usage, **report}


def report_pairs(rows: list[dict], task: DictConfig, out: Path) -> dict:
    """The win rates, on the screen and as a picture; `models` nests model b, then model a."""
    results = summarise_pairs(votes_table(rows), task)
    flat = [(f"{b} against {a}", r) for b, others in results.items() for a, r in others.items()]
    columns = ("win_rate", "lower", "upper", "n_wins", "n_draws", "n_wins_base", "n_errors")
    head = ("", "win rate", "lower", "upper", "wins", "ties", "losses", "unreadable")
    print_table("win rate in percent", head, [(name, *(r.get(c) for c in columns)) for name, r in flat])
    shown = [(name, r["win_rate"], r["lower"], r["upper"]) for name, r in flat if r["win_rate"] is not None]
    plot_intervals(out / "judge.png", "win rate, percent (both orders)", shown[:60], null=50)
    return {"models": results}


def report_grades(rows: list[dict], out: Path) -> dict:
    """The grades, on the screen and as a picture."""
    results = summarise_grades(pd.DataFrame(rows))
    table = [(model, r["value"], r["lower"], r["upper"]) for model, r in results.items()]
    print_table("mean grade", ("model", "grade", "lower", "upper"), table)
    plot_intervals(out / "judge.png", "mean grade", table[:60], null=None)
    return {"models": results}
