"""task=lc_weights: length-controlled win rates of any two models, from the weights of existing fits.

alpaca_eval publishes the weights of every model on its leaderboard, all fitted against one baseline. The rate of one
model against another follows from the weights of both (Dubois et al. 2024, arXiv:2404.04475, section 4):

    rate = 100 * mean over the instructions of sigmoid((w_d - v_d) * difficulty + w_model - v_model)
"""

import json
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from scipy.special import expit

from data.files import read_rows
from evals.length_control import read_difficulty, spread_of
from runtime.report import print_table

PUBLISHED = {"difficulty": "instruction_difficulty", "model": "not_gamed_baseline.astype(float)"}
NO_INTERVAL = "weights alone have no sampling error; task=winrate gives one from the annotations"


def read_weights(file: str) -> dict[str, dict[str, float]]:
    """{model: {"difficulty": weight, "model": weight}} of alpaca_eval's CSV, or of result.json of task=winrate.

    Raises:
        ValueError: the layout is unknown, or the fit has no difficulty and so is only valid for its own instructions.
    """
    if file.endswith(".json"):
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        own = (
            [result]
            if "model" in result
            else [row for rows in result.get("models", {}).values() for row in rows.values()]
        )
        weights = {row["model"]: (row.get("length_control") or {}).get("weights") for row in own}
    else:
        rows = [row for _, row in read_rows(file)]
        columns = list(rows[0]) if rows else []
        if not set(PUBLISHED.values()) <= set(columns):
            raise ValueError(f"{file} needs columns {', '.join(PUBLISHED.values())}, it has {', '.join(columns)}")
        weights = {row[columns[0]]: {name: row[column] for name, column in PUBLISHED.items()} for row in rows}
    lacking = [model for model, own in weights.items() if not own or set(PUBLISHED) - set(own)]
    if lacking or not weights:
        raise ValueError(f"{file} has no weights of difficulty and model for {', '.join(lacking) or 'any model'}")
    return {model: {name: float(own[name]) for name in PUBLISHED} for model, own in weights.items()}


def predicted_rates(weights: dict[str, float], baseline: dict[str, float], difficulty: np.ndarray) -> np.ndarray:
    """(n,) probability that the model's answer is preferred to the baseline's, if both are equally long."""
    slope = weights["difficulty"] - baseline["difficulty"]
    return expit(slope * difficulty + weights["model"] - baseline["model"])


def run(cfg: DictConfig, out: Path) -> dict:
    """task=lc_weights: the rate of every model against the benchmark's baseline, or against `task.baseline`."""
    task = cfg.task
    weights = read_weights(task.weights)
    if task.baseline is not None and task.baseline not in weights:
        raise ValueError(f"task.baseline={task.baseline} is not in {task.weights}: {', '.join(sorted(weights))}")
    against = weights[task.baseline] if task.baseline is not None else dict.fromkeys(PUBLISHED, 0.0)
    difficulty = np.array(list(read_difficulty(task.difficulty)[0].values()))
    models: dict[str, dict] = {}
    for model, own in weights.items():
        rates = predicted_rates(own, against, difficulty)
        models[model] = {
            "length_controlled_win_rate": 100 * float(rates.mean()),
            "alpaca_eval_standard_error": spread_of(rates),
            "n": len(rates),
            "reason": NO_INTERVAL,
        }
    order = sorted(models, key=lambda model: -models[model]["length_controlled_win_rate"])
    rows = [
        (model, *(models[model][k] for k in ("length_controlled_win_rate", "alpaca_eval_standard_error", "n")))
        for model in order
    ]
    title = f"length-controlled win rate against {task.baseline or 'the baseline of the fits'} ({NO_INTERVAL})"
    print_table(title, ("model", "rate", "alpaca_eval's s.e.", "instructions"), rows)
    return {"baseline": task.baseline, "models": {model: models[model] for model in order}}
