"""Time and memory of the checks and the ratings on large files.

    python bench/large_files.py --out runs/large

It writes 100,000 conversations, 100,000 votes, 1,000,000 battles and 805 AlpacaEval annotations, and then runs each
command in its own process. Conversations are composed of sentences of the embedded sets, 117 words each.
"""

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from data.records import read_jsonl, write_jsonl  # noqa: E402
from runtime.report import print_table  # noqa: E402

SETS = [f"data/embedded/sft_{name}_train.jsonl.gz" for name in ("oasst", "rasbt", "seed")]
ROWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/large")
    parser.add_argument("--only", nargs="+", help="names of the commands to run; default all")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    if not (out / "annotations.json").exists():
        write_files(out, random.Random(0))
    commands = {
        "pilot": f"check_data.py check=pilot check.input=[{out}/train.jsonl]",
        "task_mix": f"check_data.py check=task_mix check.input=[{out}/train.jsonl]",
        "agreement": f"check_data.py check=agreement check.input=[{out}/votes.jsonl]",
        "contamination": f"check_data.py check=contamination check.input=[{out}/train.jsonl] "
        f"check.against=[{out}/eval.jsonl]",
        "quality": f"check_data.py check=quality check.input=[{out}/train.jsonl]",
        "ratings": f"evaluate.py task=ratings task.input=[{out}/battles.jsonl]",
        "winrate": f"evaluate.py task=winrate task.format=alpaca_eval task.input=[{out}/annotations.json] "
        f"task.difficulty={out}/difficulty.json",
    }
    chosen = args.only or list(commands)
    rows = [(name, *measure(commands[name], out / name)) for name in chosen]
    print_table("large files", ("command", "seconds", "peak MiB"), rows)


def measure(command: str, home: Path) -> tuple[float, float]:
    """(seconds of wall time, peak memory in MiB) of a command in its own process."""
    start = time.monotonic()
    arguments = [sys.executable, *command.split(), "overwrite=true", f"hydra.run.dir={home}"]
    pid = os.posix_spawn(
        sys.executable, arguments, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)]
    )
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.monotonic() - start, used.ru_maxrss / 1024


def talks(draw: random.Random, count: int) -> Iterator[dict]:
    """Conversations composed of sentences of the embedded sets."""
    asked: list[str] = []
    answered: list[str] = []
    for row in (row for file in SETS for row in read_jsonl(ROOT / file)):
        for message in row["messages"]:
            parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", message["content"]) if part.strip()]
            (asked if message["role"] == "user" else answered).extend(parts)
    for i in range(count):
        messages = []
        for _ in range(1 if draw.random() < 0.8 else draw.randint(2, 3)):
            messages.append({"role": "user", "content": " ".join(draw.choices(asked, k=draw.randint(1, 6)))})
            messages.append({"role": "assistant", "content": " ".join(draw.choices(answered, k=draw.randint(1, 8)))})
        yield {"id": i, "messages": messages}


def write_files(out: Path, draw: random.Random) -> None:
    """Write all inputs; `difficulty.json` and `annotations.json` are last."""
    write_jsonl(out / "train.jsonl", talks(draw, ROWS))
    write_jsonl(out / "eval.jsonl", talks(draw, ROWS // 20))
    write_jsonl(out / "votes.jsonl", votes(draw))
    skills = [draw.gauss(0, 1) for _ in range(60)]
    write_jsonl(out / "battles.jsonl", (battle(draw, skills) for _ in range(10 * ROWS)))
    texts = [f"instruction {i}" for i in range(805)]
    (out / "difficulty.json").write_text(json.dumps({text: draw.gauss(0, 1) for text in texts}))
    (out / "annotations.json").write_text(json.dumps([annotation(draw, text) for text in texts]))


def votes(draw: random.Random):
    """Votes of three of twenty annotators on each item: 15 % ties, three quarters of the others are right."""
    for item in range(ROWS // 3):
        truth = draw.choice("ab")
        for person in draw.sample(range(20), 3):
            label = "tie" if draw.random() < 0.15 else truth if draw.random() < 0.75 else draw.choice("ab")
            yield {"item": str(item), "annotator": f"person {person}", "label": label, "category": str(item % 8)}


def battle(draw: random.Random, skills: list[float]) -> dict:
    a, b = draw.sample(range(len(skills)), 2)
    better, worse = ("model_a", "model_b") if draw.gauss(skills[a] - skills[b], 1.7) > 0 else ("model_b", "model_a")
    winner = draw.choices([better, worse, "tie", "tie (bothbad)"], [8, 0, 1, 1])[0]
    return {"model_a": f"model {a}", "model_b": f"model {b}", "winner": winner}


def annotation(draw: random.Random, instruction: str) -> dict:
    long, short = draw.randint(200, 3000), draw.randint(200, 3000)
    outputs = {"output_1": "x" * long, "output_2": "y" * short}
    return {"instruction": instruction, "generator_1": "base", "generator_2": "mine", **outputs} | {
        "preference": 1 + min(max(0.5 + (short - long) / 6000 + draw.gauss(0, 0.3), 0.0), 1.0)
    }


if __name__ == "__main__":
    main()
