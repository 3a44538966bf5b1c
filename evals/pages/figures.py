"""The figures of each model in the results of evaluations, as rows of one table for all tasks."""

import math
from collections.abc import Iterator

from evals.audit_page import TITLES
from evals.families import short
from evals.seeds import Figure

SHARE, PERCENT = (0.0, 1.0), (0.0, 100.0)


def figures_of(result: dict, run: str) -> list[Figure]:
    """The figures of one result.json.

    Args:
            run: name of the run. It replaces the model's name if the result has none.
        Raises:
            ValueError: the task has no figure of a model.
    """
    read = READERS.get(result.get("task"))
    if read is None:
        raise ValueError(f"{run} is a result of task={result.get('task')}; task=report reads {', '.join(READERS)}")
    return [figure for figure in read(result, run) if figure.value is not None]


def _figure(
    benchmark: str, model: str, row: dict, key: str = "value", note: str = "", within: tuple = (-math.inf, math.inf)
) -> Figure:
    lower, upper = row.get("lower"), row.get("upper")
    why = row.get("reason") or ("" if lower is not None else "no interval in the result")
    note = "; ".join(filter(None, (note, why)))
    return Figure(benchmark, model, row.get(key), lower, upper, row.get("n"), note, *within)


def _exact(result: dict, run: str) -> Iterator[Figure]:
    benchmark = result["benchmark"]
    for model, row in result["models"].items():
        yield _figure(f"{benchmark}: {row['measure']}", model, row, within=SHARE)
        for name in (
            "all_followed_loose",
            "instruction_level",
            "instruction_level_loose",
            "lm_eval_flexible",
            "majority",
        ):
            if name in row:
                yield _figure(f"{benchmark}: {name}", model, row[name], within=SHARE)
        for k, figure in row.get("pass_at_k", {}).items():
            yield _figure(f"{benchmark}: pass@{k}", model, figure, within=SHARE)


def _winrate(result: dict, run: str) -> Iterator[Figure]:
    flat = [result] if "win_rate" in result else [row for own in result["models"].values() for row in own.values()]
    for row in flat:
        against = f"against {row['baseline']}"
        note = "; ".join(row.get("warnings", []))
        yield _figure(f"win rate {against}", row["model"], row | {"n": row["n_total"]}, "win_rate", note, PERCENT)
        controlled = {"lower": row.get("length_controlled_lower"), "upper": row.get("length_controlled_upper")}
        controlled |= {"value": row["length_controlled_win_rate"], "n": row["n_total"]}
        yield _figure(f"length-controlled win rate {against}", row["model"], controlled, note=note, within=PERCENT)


def _judge(result: dict, run: str) -> Iterator[Figure]:
    note = "; ".join(result.get("warnings", []))
    for model, row in result["models"].items():
        if "value" in row:
            yield _figure(f"grade by {short(result['judge'])}", model, row, note=note, within=(1.0, 10.0))
            continue
        for baseline, own in row.items():
            name = f"win rate against {baseline}, judge {short(result['judge'])}"
            yield _figure(name, model, own | {"n": own["n_total"]}, "win_rate", note, PERCENT)


def _ratings(result: dict, run: str) -> Iterator[Figure]:
    for model, row in result["ratings"].items():
        yield _figure(f"rating ({result['method']})", model, row, "rating")


def _rm_accuracy(result: dict, run: str) -> Iterator[Figure]:
    for name, row in (result.get("sections") or result["subsets"]).items():
        yield _figure(f"reward accuracy: {name}", run, row, "accuracy" if "accuracy" in row else "score", within=SHARE)


def _arena_hard(result: dict, run: str) -> Iterator[Figure]:
    for category, table in result["categories"].items():
        for model, row in table["models"].items():
            yield _figure(f"Arena-Hard {category}", model, row, within=PERCENT)
        for model, row in table.get("style_controlled", {}).get("models", {}).items():
            yield _figure(f"Arena-Hard {category}, style controlled", model, row, within=PERCENT)


def _agreement(result: dict, run: str) -> Iterator[Figure]:
    lower, upper = result["agreement_interval"]
    row = {"value": result["agreement"], "lower": lower, "upper": upper, "n": result["n"]}
    yield _figure("agreement with people", run, row, within=SHARE)
    people = result["human_human"]
    lower, upper = people["agreement_interval"]
    row = {"value": people["agreement"], "lower": lower, "upper": upper, "n": people["n"]}
    yield _figure("agreement with people", "people with each other", row)


def _audit(result: dict, run: str) -> Iterator[Figure]:
    names = ("position", "length", "unique_tokens", "self_preference", "agreement", "unreadable", "left_share")
    for name in names:
        row = result[name]
        yield _figure(f"audit: {TITLES[name].lower()}", short(result["judge"]), row, note=row["verdict"])


def _perplexity(result: dict, run: str) -> Iterator[Figure]:
    row = {"value": result["loss"], "lower": result["loss_lower"], "upper": result["loss_upper"], "n": result["tokens"]}
    yield _figure("loss, nats per token", run, row)


def _lm_eval(result: dict, run: str) -> Iterator[Figure]:
    for row in result["figures"]:
        yield _figure(f"{row['benchmark']}: {row['measure']}", result["model"], row)


def _both_orders(result: dict, run: str) -> Iterator[Figure]:
    for judge, groups in result["judges"].items():
        for name, row in groups.items():
            yield _figure(f"judge right in both orders: {name}", judge, row["acc_both"], within=SHARE)


def _lc_weights(result: dict, run: str) -> Iterator[Figure]:
    against = result["baseline"] or "the baseline of the fits"
    for model, row in result["models"].items():
        name = f"length-controlled win rate against {against}, from weights"
        yield _figure(name, model, row, "length_controlled_win_rate", within=PERCENT)


def _rank_correlation(result: dict, run: str) -> Iterator[Figure]:
    for name in ("spearman", "kendall", "pearson"):
        yield _figure(f"rank correlation: {name}", run, result[name], within=(-1.0, 1.0))


def _jury(result: dict, run: str) -> Iterator[Figure]:
    for model, row in result["majority"].items():
        yield _figure("rating by the jury's majority", model, row, "rating")


READERS = {
    "exact": _exact, "winrate": _winrate, "judge": _judge, "ratings": _ratings, "rm_accuracy": _rm_accuracy,
    "arena_hard": _arena_hard, "agreement": _agreement, "audit": _audit, "perplexity": _perplexity,
    "lm_eval": _lm_eval, "jury": _jury, "both_orders": _both_orders, "lc_weights": _lc_weights,
    "rank_correlation": _rank_correlation,
}  # fmt: skip
