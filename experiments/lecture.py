"""Check the lecture's statements about judges on public votes, with our own audit: figures of docs/lecture.md.

    python experiments/lecture.py FOLDER docs/lecture.png      a minute

FOLDER must contain mtbench/, llmbar/, llmfao/ and alpaca_eval/ as listed in docs/lecture.md.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1]))

from evals.audit import audit  # noqa: E402
from evals.questions import add_categories  # noqa: E402
from evals.readers import read_votes  # noqa: E402
from evals.winrate import length_controlled, win_rate  # noqa: E402
from runtime.plots import plot_intervals  # noqa: E402

CONF = Path(__file__).parents[1] / "conf"
AUDITS = {  # name: (format, files, judge)
    "GPT-4 on MT-Bench": ("mtbench", ["mtbench/human.jsonl", "mtbench/gpt4_pair.jsonl"], None),
    "GPT-4 on phi-3": ("mtbench", ["mtbench/phi3_dpo_gpt4_pair.jsonl"], None),
    **{
        f"{judge} on LLMBar": ("llmbar", ["llmbar/vanilla_both_orders.csv.gz"], judge)
        for judge in ("GPT-4", "ChatGPT", "PaLM2", "LLaMA2", "Falcon")
    },
    **{
        f"{name} on llmfao": (
            "llmfao",
            [f"llmfao/{file}.csv" for file in ("crowd-comparisons", f"{judge}-crowd-comparisons")]
            + ["llmfao/pairs_crowd_lengths.csv.gz"],
            judge,
        )
        for name, judge in (("GPT-4", "gpt4"), ("GPT-3.5", "gpt3"))
    },
}
LOW_ENTROPY = {"mtbench": ["math", "coding", "reasoning"], "llmbar": [], "llmfao": ["code", "knowledge"]}
FIGURES = ("position", "length", "self_preference", "low_entropy", "agreement")


def audits(folder: Path) -> dict[str, dict]:
    """The audit of every judge, with default settings."""
    found = {}
    for name, (form, files, judge) in AUDITS.items():
        task = OmegaConf.load(CONF / "task" / "audit.yaml")
        task.families = OmegaConf.load(CONF / "evaluate.yaml").families
        task.judge, task.low_entropy, task.format = judge, LOW_ENTROPY[form], form
        votes = read_votes([str(folder / file) for file in files], form)
        found[name] = audit(add_categories(votes, "mt_bench" if form == "mtbench" else None), {}, task)
    return found


def length_control(folder: Path) -> list[tuple]:
    """AlpacaEval 2: the raw and the length-controlled win rate of models that were instructed to be brief or long."""
    rows = pd.read_csv(folder / "alpaca_eval" / "ae2_weighted_annotations.csv.gz")
    table = []
    for model, part in rows.groupby("model"):
        preference = (part["preference"].where(part["preference"] != 0, 1.5) - 1).to_numpy()
        lengths = part["len_1"].to_numpy(), part["len_2"].to_numpy()
        controlled = length_controlled(preference, *lengths, None)
        # weight of tanh(baseline longer); a negative weight favours length
        weight = controlled["length_control"]["weights"]["length"]
        rate, without = win_rate(preference)["win_rate"], controlled["length_controlled_win_rate"]
        table.append((model, part["len_2"].mean(), rate, without, weight))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="mtbench/, llmbar/, llmfao/ and alpaca_eval/ in it")
    parser.add_argument("out", type=Path, help="the picture, a .png")
    args = parser.parse_args()
    found, points = audits(args.folder), []
    for figure in FIGURES:
        print(f"\n{figure}")
        for name, result in found.items():
            one = result[figure]
            if one["value"] is not None:
                shown = {key: one[key] for key in ("n", "flips", "people") if key in one}
                if isinstance(shown.get("people"), dict):
                    shown["people"] = round(shown["people"]["agreement"], 3)
                print(f"  {name:20} {one['value']:.3f} ({one['lower']:.3f} to {one['upper']:.3f}) {shown}")
                if figure in ("position", "length", "low_entropy"):
                    centre = 0.5 if figure == "position" else 0.0
                    points.append((f"{figure}: {name}", *(one[key] - centre for key in ("value", "lower", "upper"))))
    print("\nAlpacaEval 2: model, characters, win rate, length-controlled win rate, weight of length")
    table = length_control(args.folder)
    for row in table:
        print("  {:32} {:6.0f} {:6.2f} {:6.2f} {:6.2f}".format(*row))
    print(f"  length helps in {sum(row[4] < 0 for row in table)} of {len(table)} models")
    plot_intervals(args.out, "difference from no bias, with simultaneous intervals", points, null=0)


if __name__ == "__main__":
    main()
