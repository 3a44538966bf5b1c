"""Evaluate models and judges: one task per run, `python evaluate.py task=NAME task.input=[FILES]`."""

import signal
from importlib import import_module

import torch
from omegaconf import DictConfig

from runtime.report import plain, write_result
from runtime.run import Run, main

# each module has run(task, out) -> result; it is imported only when asked for, with the libraries it needs
TASKS = {
    "winrate": "evals.winrate",
    "lc_weights": "evals.lc_weights",
    "ratings": "evals.ratings",
    "agreement": "evals.agreement",
    "audit": "evals.audit",
    "answer": "evals.answers",
    "judge": "evals.judge",
    "rm_accuracy": "evals.benchmarks.reward_accuracy",
    "both_orders": "evals.benchmarks.both_orders",
    "arena_hard": "evals.benchmarks.arena_hard",
    "rank_correlation": "evals.rank_correlation",
    "power": "evals.power",
    "jury": "evals.jury",
    "lm_eval": "evals.harness",
    "report": "evals.pages.report",
    "perplexity": "evals.perplexity",
    "exact": "evals.exact",
    "kl_frontier": "evals.kl_frontier",
    "sweep": "evals.sweep",
    "best_of_n": "evals.best_of_n",
    "overoptimization": "evals.overoptimization",
    "plane": "evals.plane",
    "gains": "evals.gains",
}


def evaluate(cfg: DictConfig, run: Run) -> float:
    """Run the task and write result.json. Returns its first figure, for sweeps."""
    check_script(cfg, run)
    for number in (signal.SIGINT, signal.SIGTERM):  # there is no step to finish, and answers are cached as they come
        signal.signal(number, signal.SIG_DFL)
    result = plain(import_module(TASKS[cfg.task.name]).run(cfg, run.dir))
    run.begin()
    write_result(run.dir, {"task": cfg.task.name, **result})
    figures = {f"eval/{name}": value for name, value in result.items() if isinstance(value, int | float)}
    run.metrics.add({name: torch.tensor(float(value)) for name, value in figures.items()})
    run.log_metrics(0)
    run.terminal.say(f"wrote {run.dir / 'result.json'}")
    return next(iter(figures.values()), float("nan"))


def check_script(cfg: DictConfig, run: Run) -> None:
    """Raise ValueError where no task is named, or the directory holds a training."""
    if cfg.get("task") is None:
        raise ValueError(f"name a task: python evaluate.py task={' | '.join(TASKS)}")
    trained = [name for name in ("model", "checkpoints") if (run.dir / name).exists()]
    if trained:
        raise ValueError(f"{run.dir} holds a trained model; give the evaluation a hydra.run.dir of its own")


if __name__ == "__main__":
    main(evaluate, "evaluate")
