"""Export of the arena's store to the files that other scripts read: verdicts, comparisons, rankings, labels."""

from itertools import combinations
from pathlib import Path

from arena.store import Store
from data.records import write_jsonl
from evals.verdicts import text_hash
from runtime.files import write_sums


def export(store: Store, directory: Path) -> dict[str, int]:
    """Write the files below. Returns the number of rows of each.

    verdicts.jsonl     one vote a row           evaluate.py task=ratings | audit, task.format=verdicts
    comparisons.jsonl  prompt, chosen, rejected train_rm.py, train_dpo.py (no ties, "both bad", equal answers)
    rankings.jsonl     prompt, completions, ranks   the same scripts, K-wise
    labels.jsonl       item, annotator, label   check_data.py check=agreement
    """
    battles, annotations = store.battles(), store.annotations()
    files = {
        "verdicts.jsonl": [verdict(battle) for battle in battles],
        "comparisons.jsonl": [
            comparison(battle) for battle in battles if battle["verdict"] in "ab" and differs(battle)
        ],
        "rankings.jsonl": [ranking(row) for row in annotations if row["acceptable"]],
        "labels.jsonl": [label for row in annotations for label in labels(row)],
    }
    for name, rows in files.items():
        write_jsonl(directory / name, rows)
    write_sums(directory, files)
    return {name: len(rows) for name, rows in files.items()}


def verdict(battle: dict) -> dict:
    """A vote as `evals.verdicts.Verdict`. Side a was on the left, so it was read first. "Both bad" is a tie."""
    bad = battle["verdict"] == "both_bad"
    answers = {side: "\n\n".join(turn[f"answer_{side}"] for turn in battle["turns"]) for side in "ab"}
    return {
        "question": text_hash("\n\n".join(turn["prompt"] for turn in battle["turns"])),
        "model_a": battle["model_a"],
        "model_b": battle["model_b"],
        "verdict": "tie" if bad else battle["verdict"],
        "both_bad": bad,
        "judge": battle["visitor"],
        "human": True,
        "turn": len(battle["turns"]),
        "shown": "a",
        **{f"length_{side}": len(answers[side]) for side in "ab"},
        **{f"hash_{side}": text_hash(answers[side]) for side in "ab"},
    }


def comparison(battle: dict) -> dict:
    """The last turn as a preference. The prompt holds the earlier turns with the winner's answers."""
    winner, loser = ("a", "b") if battle["verdict"] == "a" else ("b", "a")
    *before, last = battle["turns"]
    prompt = [
        message
        for turn in before
        for message in (
            {"role": "user", "content": turn["prompt"]},
            {"role": "assistant", "content": turn[f"answer_{winner}"]},
        )
    ]
    prompt.append({"role": "user", "content": last["prompt"]})
    models = {"chosen_model": battle[f"model_{winner}"], "rejected_model": battle[f"model_{loser}"]}
    return {
        "id": battle["id"],
        "prompt": prompt,
        "chosen": last[f"answer_{winner}"],
        "rejected": last[f"answer_{loser}"],
    } | models


def differs(battle: dict) -> bool:
    """Whether the last two answers of a battle differ."""
    last = battle["turns"][-1]
    return last["answer_a"].strip() != last["answer_b"].strip()


def ranking(row: dict) -> dict:
    """An annotation as prompt, completions, ranks."""
    origin = {"id": f"{row['item']}/{row['annotator']}", "annotator": row["annotator"], "reason": row["reason"]}
    return {"prompt": row["prompt"], "completions": row["answers"], "ranks": row["ranks"]} | origin


def labels(row: dict) -> list[dict]:
    """For every pair of answers, which one this annotator ranked higher. Agreement is measured on these labels."""
    found = []
    for i, j in combinations(range(len(row["ranks"])), 2):
        order = row["ranks"][i] - row["ranks"][j]
        label = "first" if order < 0 else "second" if order > 0 else "tie"
        found.append({"item": f"{row['item']}:{i}-{j}", "annotator": row["annotator"], "label": label})
    return found
