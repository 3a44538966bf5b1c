"""An audit of a judge: its biases with intervals, its agreement with people, and what the data cannot show."""

from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from scipy.stats import norm

from evals import biases
from evals.agreement import only_judge, split_judge
from evals.answers import add_answers, load_answers
from evals.audit_page import TITLES, write_audit
from evals.families import shared_families, short
from evals.intervals import holm, unknown
from evals.questions import add_categories
from evals.readers import read_votes
from evals.verdicts import fold_orders, sort_pairs
from runtime.plots import plot_intervals
from runtime.report import print_table

# Figures that are tested together: intervals have level 1 - alpha / 7, p values are adjusted by Holm's method.
TESTED = ("position", "length", "unique_tokens", "self_preference", "agreement", "unreadable", "low_entropy")


def audit(votes: pd.DataFrame, answers: dict, task: DictConfig) -> dict:
    """Every figure of a judge: value, lower, upper, n, verdict. Unknown figures are null, with a reason.

    Args:
        votes: of people and of the judge.
        answers: from `load_answers`. Without them the lengths and hashes in the votes are used.
        task: conf/task/audit.yaml.
    """
    judge_name = only_judge(votes, task.judge)
    raw = add_answers(votes[~votes["human"] & (votes["judge"] == judge_name)], answers)
    people, judge = _sides(votes, judge_name, task)
    judge = add_answers(judge, answers)
    single = sort_pairs(raw[raw["verdict"] != "error"])  # each order is one vote, as for people
    level = 1 - task.alpha / len(TESTED)
    asked = {"level": level, "rounds": task.rounds}
    families = {
        model: bool(shared_families(judge_name, model, task.families))
        for model in sorted(set(raw["model_a"]) | set(raw["model_b"]))
    }
    figures = {"position": biases.position(raw, level=level)}
    for name, feature in (("length", "length"), ("unique_tokens", "unique")):
        gap = task.min_length_gap if name == "length" else 0
        figures[name] = biases.preference_for_more(people, single, feature, min_gap=gap, level=level)
    figures["self_preference"] = _against_people(people, biases.self_preference, people, single, families, level=level)
    figures["agreement"] = _against_people(people, biases.agreement, people, judge, **asked)
    figures["unreadable"] = biases.unreadable(raw, level=level)
    figures["low_entropy"] = _against_people(
        people, biases.low_entropy_gap, people, judge, list(task.low_entropy), level=level
    )
    holm([figures[name] for name in TESTED], alpha=task.alpha)
    figures["left_share"] = biases.left_share(people, raw, level=level)
    figures["degenerate"] = biases.degenerate(raw, level=level)
    for name, figure in figures.items():
        figure["verdict"] = VERDICTS[name](figure, task)
        figure["detectable"] = _detectable(figure, level, task.power)
    categories = biases.agreement_by_category(people, judge, **asked) if len(people) else {}
    named = [name for name, figure in figures.items() if figure["verdict"].startswith("BIAS")]
    orders = biases.position_by_category(raw, level=level)
    about = {"judge": judge_name, "level": level, "named": named}
    return {**about, **figures, "categories": categories, "position_by_category": orders}


def _sides(votes: pd.DataFrame, judge_name: str, task: DictConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    readable = votes[votes["verdict"] != "error"]
    judge = readable[~readable["human"] & (readable["judge"] == judge_name)]
    if readable["human"].any() and len(judge):
        humans = task.humans or ("expert_*" if task.format == "mtbench" else "*")
        return split_judge(votes, judge=judge_name, humans=humans)
    return votes[:0], fold_orders(judge)


def _against_people(people: pd.DataFrame, figure, *args, **settings) -> dict:
    return figure(*args, **settings) if len(people) else unknown("no human votes (or no readable verdict) to compare")


def _detectable(figure: dict, level: float, power: float) -> float | None:
    """The smallest bias that data of this size detects with the given power, from the width of the interval."""
    if figure["value"] is None:
        return None
    z = norm.ppf((1 + level) / 2)
    return (z + norm.ppf(power)) * (figure["upper"] - figure["lower"]) / 2 / z


def _test(figure: dict, above: str, below: str, neither: str) -> str:
    if figure["value"] is None:
        return f"not known: {figure['reason']}"
    if not figure.get("significant"):
        return f"none seen: {neither}"
    return f"BIAS: {above if figure['value'] > figure['null'] else below}"


def _position_verdict(figure: dict, task: DictConfig) -> str:
    share = 100 * (figure["value"] or 0)
    return _test(
        figure | {"null": 0.5},
        f"favours the answer shown first ({share:.0f} % of its decisive votes)",
        f"favours the answer shown second ({100 - share:.0f} % of its decisive votes)",
        "the order shown does not change the outcome measurably",
    )


def _more_verdict(what: str):
    def verdict(figure: dict, task: DictConfig) -> str:
        if figure["value"] is None:
            return f"not known: {figure['reason']}"
        share, points = 100 * (figure["judge"] or 0), 100 * abs(figure["value"])
        expected = figure.get("people_at_its_sharpness")
        if expected is None:
            return _test(
                figure | {"null": 0.0},
                f"names the {what} answer in {share:.0f} % (compared with a coin, as there are no human votes on "
                "these pairs)",
                f"names the {what} answer in {share:.0f} % (compared with a coin, as there are no human votes on "
                "these pairs)",
                f"names the {what} answer as often as a coin",
            )
        shares = f"names the {what} answer in {share:.0f} %, people as sharp as the judge would on the same pairs in"
        return _test(
            figure | {"null": 0.0},
            f"{shares} {100 * expected:.0f} %: it leans {points:.0f} points more to {what} answers than they do",
            f"{shares} {100 * expected:.0f} %: it leans {points:.0f} points less to {what} answers than they do",
            f"{shares} {100 * expected:.0f} %",
        )

    return verdict


def _self_verdict(figure: dict, task: DictConfig) -> str:
    own, gain = ", ".join(figure.get("family", [])), abs(figure["value"] or 0)
    return _test(
        figure | {"null": 0.0},
        f"lifts its own family ({own}) by {gain:.0f} rating points beyond people and its sharpness",
        f"marks its own family ({own}) down by {gain:.0f} rating points",
        f"its own family ({own}) gets the ratings that people give it, at the judge's sharpness",
    )


def _agreement_verdict(figure: dict, task: DictConfig) -> str:
    if figure["value"] is None:
        return f"not known: {figure['reason']}"
    lower = figure["kappa_interval"][0]
    if lower is None:
        share = f"agrees with {100 * figure['value']:.0f} % of human votes"
        return f"{share}, which vary too little to exclude chance agreement"
    if lower <= 0:
        return "BIAS: agrees with people no more than chance does"
    share, people = 100 * figure["value"], figure.get("people")
    if people is None:
        return f"agrees with {share:.0f} % of human votes (no two people voted on one item, so there is no ceiling)"
    ceiling = 100 * people["agreement"]
    side = "below" if figure["upper"] < people["agreement"] else "not below"
    return f"agrees with {share:.0f} % of human votes, {side} people's agreement with each other ({ceiling:.0f} %)"


def _unreadable_verdict(figure: dict, task: DictConfig) -> str:
    if figure["value"] is None:
        return f"not known: {figure['reason']}"
    share = f"{100 * figure['value']:.1f} % of its verdicts cannot be read"
    return f"BIAS: {share}" if figure["value"] > task.max_unreadable else f"{share}, and count neither as tie nor loss"


def _low_entropy_verdict(figure: dict, task: DictConfig) -> str:
    points, kinds = 100 * abs(figure["value"] or 0), ", ".join(task.low_entropy)
    return _test(
        figure | {"null": 0.0},
        f"agrees with people {points:.0f} points more on {kinds}",
        f"agrees with people {points:.0f} points less on {kinds}",
        f"agrees with people equally on {kinds} and on the rest, within the error of these votes",
    ).replace("BIAS: ", "measured: ")


def _left_verdict(figure: dict, task: DictConfig) -> str:
    if figure["value"] is None:
        return f"not known: {figure['reason']}"
    people = "" if "people" not in figure else f", people name the same answers in {100 * figure['people']:.0f} %"
    share = (
        f"names the answer shown first in {100 * figure['judge']:.0f} % of the items that it saw in one order{people}"
    )
    apart = figure["lower"] > 0 or figure["upper"] < 0
    return f"measured: {share}" if apart else f"none seen: {share}"


def _degenerate_verdict(figure: dict, task: DictConfig) -> str:
    if figure["value"] is None:
        return f"not known: {figure['reason']}"
    same, model = figure["same_answers"], figure["model"]
    answers = figure["models"][model]["answers"]
    if same < 3 or figure["value"] < task.max_same_answer:
        return f"none seen: no model repeats one answer over more than {max(same, 1)} of its {answers} prompts"
    return f"BIAS: {model} gives one and the same answer to {same} of {answers} prompts"


VERDICTS = {
    "position": _position_verdict,
    "length": _more_verdict("longer"),
    "unique_tokens": _more_verdict("richer"),
    "self_preference": _self_verdict,
    "agreement": _agreement_verdict,
    "unreadable": _unreadable_verdict,
    "low_entropy": _low_entropy_verdict,
    "left_share": _left_verdict,
    "degenerate": _degenerate_verdict,
}


def run(cfg: DictConfig, out: Path) -> dict:
    """task=audit: result.json, audit.html, audit.png, agreement.png."""
    task = cfg.task
    votes = add_categories(read_votes(task.input, task.format), task.questions)
    result = audit(votes, load_answers(task.answers or []), task)
    figures = {name: result[name] for name in VERDICTS}
    print_table(
        f"audit of {result['judge']}",
        ("figure", "value", "lower", "upper", "n"),
        [(name, *(figure[key] for key in ("value", "lower", "upper", "n"))) for name, figure in figures.items()],
    )
    print("\n".join(f"{name}: {figure['verdict']}" for name, figure in figures.items()))
    plot_shares(out / "audit.png", result)
    rows = [(name, row["agreement"], *row["agreement_interval"]) for name, row in result["categories"].items()]
    if rows:
        plot_intervals(out / "agreement.png", "agreement with people, by category", rows, null=None)
    write_audit(out / "audit.html", result, list(VERDICTS))
    return result


def plot_shares(path: Path, result: dict) -> None:
    """Plot the biases that are differences or shares on one axis, each relative to its value without bias."""
    rows = []
    for name, null in (("position", 0.5), ("length", 0.0), ("unique_tokens", 0.0), ("low_entropy", 0.0)):
        figure = result[name]
        if figure["value"] is not None:
            rows.append((TITLES[name].lower(), *(figure[k] - null for k in ("value", "lower", "upper"))))
    plot_intervals(path, f"{short(result['judge'])}: difference from no bias", rows, null=0.0)
