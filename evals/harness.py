"""task=lm_eval: run an exported model on lm-eval's tasks (ARC, HellaSwag, MMLU, ...), with results in our format.

lm-eval runs in its own process and in an empty folder. In this folder, our `evaluate.py` would hide the library
`evaluate`, which lm-eval imports.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from runtime.report import print_table


def command(task: DictConfig, model: Path, results: Path) -> list[str]:
    """The command line of lm-eval."""
    arguments = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(task.tasks)]
    arguments += ["--model_args", f"pretrained={model},dtype={task.dtype}", "--batch_size", str(task.batch_size)]
    arguments += ["--output_path", str(results), "--device", task.device, "--seed", str(task.seed)]
    if task.num_fewshot is not None:
        arguments += ["--num_fewshot", str(task.num_fewshot)]
    if task.limit is not None:
        arguments += ["--limit", str(task.limit)]
    if task.include_path is not None:
        arguments += ["--include_path", str(Path(task.include_path).absolute())]
    return arguments + (["--apply_chat_template"] if task.apply_chat_template else [])


def figures_from(results: dict) -> list[dict]:
    """A row for each task and measure: value, 95 % interval from lm-eval's standard error, n."""
    rows = []
    for name, measures in results["results"].items():
        n = results.get("n-samples", {}).get(name, {}).get("effective")
        for key, value in measures.items():
            measure, _, kind = key.partition(",")
            if not isinstance(value, int | float) or measure.endswith("_stderr") or measure in ("alias", "sample_len"):
                continue
            error = measures.get(f"{measure}_stderr,{kind}")
            row = {"benchmark": name, "measure": measure + (f" ({kind})" if kind not in ("none", "") else "")}
            row |= {"value": float(value), "n": n, "lower": None, "upper": None}
            if isinstance(error, int | float) and n and 0 <= value <= 1:  # a share is between 0 and 1
                effective = value * (1 - value) / error**2 if 0 < value < 1 and error > 0 else n
                low, high = proportion_confint(value * effective, effective, method="wilson")
                row |= {"lower": max(float(low), 0.0), "upper": min(float(high), 1.0)}
            elif isinstance(error, int | float):
                half = norm.ppf(0.975) * error
                row |= {"lower": float(value - half), "upper": float(value + half)}
            else:
                row["reason"] = "lm-eval gives no standard error"
            rows.append(row)
    return rows


def run(cfg: DictConfig, out: Path) -> dict:
    """task=lm_eval: result.json with a figure for each task and measure."""
    task = cfg.task
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("task=lm_eval needs lm-eval: pip install 'helpful[harness]'")
    model = Path(task.policy).absolute()
    if not (model / "config.json").is_file():
        raise ValueError(f"task.policy={task.policy} holds no config.json; give an exported model/ folder")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(task, model, Path(folder) / "results"), cwd=folder, text=True, capture_output=True
        )
        files = sorted(Path(folder).glob("results/**/results_*.json"))
        if done.returncode or not files:
            raise ValueError(f"lm-eval failed with exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
        results = json.loads(files[-1].read_text(encoding="utf-8"))
    figures = figures_from(results)
    rows = [
        (f"{row['benchmark']}: {row['measure']}", row["value"], row["lower"], row["upper"], row["n"]) for row in figures
    ]
    print_table("lm-eval", ("", "value", "lower", "upper", "n"), rows)
    name = model.parent.name if model.name == "model" else model.name
    return {"model": name, "figures": figures, "lm_eval": results.get("lm_eval_version")}
