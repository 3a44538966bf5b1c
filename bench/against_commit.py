"""Compare the speed of another commit with this code on the same rows, interleaved: ratios of medians, theirs over
ours.

    python bench/against_commit.py 40e4cb1 --rounds 3                 all rows
    python bench/against_commit.py 40e4cb1 --only judge winrate       a part of them, on 805 pairs
    python bench/against_commit.py 40e4cb1 --only judge --pairs 100   on fewer

The training steps and the sampler are the rows of bench/vs_peers.py, both sides in bf16. The other rows are whole
commands on pairs of answers of Anthropic HH, each side with its own defaults. The side that begins alternates by
round.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.vs_peers import PREFERENCES, Bench, works  # noqa: E402


def write_answers(directory: Path, count: int) -> list[str]:
    """Write questions with two models' answers, short enough for every judge.

    Returns the overrides that name the files.
    """
    answers = []
    questions: list[dict] = []
    with gzip.open(PREFERENCES, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            text = row["prompt"][0]["content"]
            if (
                len(questions) < count
                and len(row["prompt"]) == 1
                and len(text + row["chosen"] + row["rejected"]) < 3000
            ):
                name = str(len(questions))
                questions.append({"question_id": name, "category": "hh", "turns": [text]})
                answers += [
                    {"question_id": name, "model_id": side, "choices": [{"turns": [row[side]]}]}
                    for side in ("rejected", "chosen")
                ]
    for name, rows in (("questions", questions), ("answers", answers)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"task.questions={directory}/questions.jsonl", f"task.answers=[{directory}/answers.jsonl]"]
    return [*files, "task.turns=1", "task.baseline=rejected"]


def evaluations(bench: Bench, count: int) -> dict[str, list[str]]:
    """{row: overrides of evaluate.py}. The win rate uses verdicts of the reward model, which are computed once here."""
    directory = bench.directory
    asked = ["task=judge", *write_answers(directory, count)]
    scored = [*asked, "judge=reward_model", f"judge.path={bench.scorer}"]
    bench.run([sys.executable, "evaluate.py", *scored, f"hydra.run.dir={directory}/verdicts"])
    return {
        "judge, reward model": scored,
        "judge, log-probs": [*asked, "judge=logprobs", f"judge.path={bench.model}"],
        "winrate, length-controlled": [
            "task=winrate",
            "task.format=verdicts",
            f"task.input=[{directory}/verdicts/verdicts.jsonl]",
        ],
    }


def whole(bench: Bench, overrides: list[str], root: Path) -> float:
    """Seconds of a whole evaluation, including its start."""
    began = time.perf_counter()
    out = bench.directory / f"evaluation{bench.count}"
    bench.run([sys.executable, "evaluate.py", *overrides, f"hydra.run.dir={out}"], root)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of the names of rows")
    parser.add_argument("--pairs", type=int, default=805, help="pairs of answers of the rows that evaluate")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp())
    other = directory / "other"
    subprocess.run(
        ["git", "worktree", "add", "--detach", other, args.commit], check=True, cwd=ROOT, capture_output=True
    )
    try:
        bench = Bench(directory)
        chosen = {work.name: work.ours for work in works() if work.name.startswith(tuple(args.only))}
        timed = {
            name: lambda root, overrides=overrides: bench.ours(overrides, root)[0] for name, overrides in chosen.items()
        }
        if any(name.startswith(tuple(args.only)) for name in ("judge", "winrate")):
            rows = evaluations(bench, args.pairs).items()
            timed |= {
                name: lambda root, overrides=overrides: whole(bench, overrides, root)
                for name, overrides in rows
                if name.startswith(tuple(args.only))
            }
        print(f"| work | {args.commit}, s | this code, s | times as fast |\n| --- | --- | --- | --- |", flush=True)
        for name, run in timed.items():
            seconds: dict[Path, list[float]] = {other: [], ROOT: []}
            for number in range(args.rounds):
                for root in (other, ROOT) if number % 2 == 0 else (ROOT, other):
                    seconds[root].append(run(root))
            seconds_of = (", ".join(f"{value:.2f}" for value in seconds[root]) for root in (other, ROOT))
            ratio = statistics.median(seconds[other]) / statistics.median(seconds[ROOT])
            print(f"| {name} | {' | '.join(seconds_of)} | **{ratio:.2f}** |", flush=True)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", other], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
