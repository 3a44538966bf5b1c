"""The tab with the ratings of the models."""

from typing import Any

import gradio as gr
import matplotlib
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from arena.export import labels, verdict
from arena.pairs import tally
from arena.store import Store
from evals.ratings import rate
from evals.verdicts import votes_table

matplotlib.use("Agg")
SETTINGS: dict[str, Any] = dict(
    method="bradley_terry", interval="sandwich", level=0.95, rounds=0, k=4.0, anchor=None
)  # fmt: skip


def standing(store: Store, models: list[str]) -> tuple[pd.DataFrame, str]:
    """(table of rank, rating, interval and battles of each model, a sentence about it or about why it is empty)."""
    battles = store.battles()
    columns = ["rank", "model", "rating", "lower", "upper", "battles"]
    if not battles:
        return pd.DataFrame(columns=columns), "No votes yet."
    try:
        rated = rate(votes_table(verdict(battle) for battle in battles), **SETTINGS)["ratings"]
    except ValueError as error:  # for example, a model that never won has no finite rating
        return pd.DataFrame(columns=columns), str(error)
    rows = [(row["rank"], name, row["rating"], row["lower"], row["upper"], row["n"]) for name, row in rated.items()]
    return pd.DataFrame(rows, columns=columns).round(0), f"{len(battles)} votes; Bradley-Terry, 95 % intervals."


def pair_table(store: Store, models: list[str]) -> pd.DataFrame:
    """For every pair: n votes, how often the first won, and the share of battles in which it stood on the left."""
    rows = []
    for (first, second), row in tally(store, models).items():
        left = row["left"] / row["votes"] if row["votes"] else float("nan")
        rows.append((f"{first} against {second}", row["votes"], share(row["wins"], row["votes"]), round(left, 3)))
    return pd.DataFrame(rows, columns=["pair", "n", "first wins", "on left"])


def share(hits: float, n: float) -> str:
    """A share with its Wilson interval, in percent."""
    if not n:
        return "-"
    low, high = proportion_confint(hits, n, method="wilson")
    return f"{hits / n:.0%} ({low:.0%} to {high:.0%})"


def narrow(ratings: pd.DataFrame) -> pd.DataFrame:
    """The table of `standing` with each rating and its interval in one cell, so that a telephone shows them."""
    cells = [f"{row.rating:.0f} ({row.lower:.0f} to {row.upper:.0f})" for row in ratings.itertuples()]
    columns = {"#": ratings["rank"], "model": ratings["model"], "rating (95 %)": cells, "n": ratings["battles"]}
    return pd.DataFrame(columns)


def position_balance(store: Store) -> str:
    """How often the left answer wins a decided vote. Sides are random, so a share other than 1/2 is position bias."""
    verdicts = [battle["verdict"] for battle in store.battles()]
    left, decided = verdicts.count("a"), verdicts.count("a") + verdicts.count("b")
    if not decided:
        return "Position: no decided votes yet."
    return f"Position: the left answer won {left} of {decided} decided votes: {share(left, decided)}."


def agreement(store: Store) -> str:
    """How often two annotators gave the same verdict on a pair of answers."""
    votes_of: dict[str, list[str]] = {}
    for row in store.annotations():
        for label in labels(row):
            votes_of.setdefault(label["item"], []).append(label["label"])
    both = [votes for votes in votes_of.values() if len(votes) == 2]
    if not both:
        return "Agreement: no pair of answers has two verdicts yet."
    same = sum(first == second for first, second in both)
    return (
        f"Agreement: two annotators gave the same verdict on {same} of {len(both)} pairs of answers: "
        f"{share(same, len(both))}."
    )


def plot(ratings: pd.DataFrame):
    """Ratings with their intervals, best on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 0.4 * max(len(ratings), 1)), layout="tight")
    axes = figure.subplots()
    table = ratings.iloc[::-1]
    errors = [table["rating"] - table["lower"], table["upper"] - table["rating"]]
    axes.errorbar(table["rating"], table["model"], xerr=errors, fmt="o", capsize=3)
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set_xlabel("Bradley-Terry rating")
    return figure


def board_tab(store: Store, models: list[str], blocks: gr.Blocks, *, refresh_seconds: float) -> None:
    """Build the tab inside an open `gr.Blocks`."""
    summary = gr.Markdown()
    settings = {"interactive": False, "wrap": True}
    widths = ["10%", "40%", "34%", "16%"]
    table = gr.Dataframe(label="Ratings", elem_id="ratings", column_widths=widths, **settings)
    picture = gr.Plot(label="Intervals", show_label=False)
    widths = ["44%", "14%", "24%", "18%"]
    pairs = gr.Dataframe(label="Pairs", elem_id="pairs", column_widths=widths, **settings)

    def show():
        ratings, why = standing(store, models)
        text = "\n\n".join((why, position_balance(store), agreement(store)))
        return text, narrow(ratings), plot(ratings) if len(ratings) else None, pair_table(store, models)

    shown = [summary, table, picture, pairs]
    blocks.load(show, None, shown, show_progress="hidden", api_name="board")
    gr.Timer(refresh_seconds).tick(show, None, shown, show_progress="hidden", api_visibility="private")
