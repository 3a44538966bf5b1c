"""Simulated people with known preferences vote in the arena. Ratings should find the order, a reward model the taste.

    python experiments/arena_people.py POLICY DIR      some minutes; POLICY: a coffee policy, runs/coffee/sft/model

Four "models" answer with the best of 1, 2, 4 and 8 replies of the policy by evals/barista.py's gold reward, so their
order is known. Fifty people prefer by the same reward, with Bradley-Terry's noise. The arena's export then goes through
the scripts: evaluate.py task=ratings, and train_rm.py on nine tenths of the comparisons.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from math import exp
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from arena.battle import Arena  # noqa: E402
from arena.limits import Limits  # noqa: E402
from arena.store import Store  # noqa: E402
from data.records import write_jsonl  # noqa: E402
from evals.barista import score  # noqa: E402
from runtime.metrics import read_log  # noqa: E402

PEOPLE, VOTES, PROMPTS, REPLIES = 50, 2000, 400, 8
MODELS = {"best_of_1": 1, "best_of_2": 2, "best_of_4": 4, "best_of_8": 8}


class BestOf:
    """Answers with the best of k replies that were sampled before."""

    def __init__(self, replies: dict[str, list[str]], k: int):
        self.replies, self.k = replies, k

    def stream(self, messages: list[dict], seed: int) -> Iterator[str]:
        picked = random.Random(seed).sample(self.replies[messages[-1]["content"]], self.k)
        yield max(picked, key=score)


def script(*overrides: str) -> None:
    """Run a script to its end."""
    subprocess.run([sys.executable, *overrides, "overwrite=true", "log.wandb=disabled"], cwd=ROOT, check=True)


def sample_replies(policy: str, home: Path) -> dict[str, list[str]]:
    """{the customer's first message: REPLIES replies}."""
    files = "data/embedded/sft_coffee_train.jsonl.gz"
    rows = [row["messages"][0]["content"] for row in read_zipped(ROOT / files) if row["messages"][0]["role"] == "user"]
    home.mkdir(parents=True, exist_ok=True)
    write_jsonl(home / "prompts.jsonl", [{"prompt": text} for text in list(dict.fromkeys(rows))[:PROMPTS]])
    overrides = [f"data.prompts=[{home}/prompts.jsonl]", f"samples_per_prompt={REPLIES}", "sampling.max_new_tokens=48"]
    script("generate.py", f"policy={policy}", *overrides, f"hydra.run.dir={home}/replies")
    replies: dict[str, list[str]] = {}
    for row in read_log(home / "replies" / "completions.jsonl"):
        replies.setdefault(row["prompt"][0]["content"], []).append(row["completion"] or ".")
    return replies


def read_zipped(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def vote(replies: dict[str, list[str]], home: Path) -> None:
    """Store VOTES battles, each with the vote of a person who prefers by the gold reward."""
    home.mkdir(exist_ok=True)
    (home / "arena.sqlite").unlink(missing_ok=True)
    store, rng, prompts = Store(home / "arena.sqlite"), random.Random(0), list(replies)
    limits = Limits(messages_per_minute=10**6, max_characters=10**4)
    speakers = {name: BestOf(replies, k) for name, k in MODELS.items()}
    arena = Arena(store, speakers, limits, seed=0, max_turns=1)
    for n in range(VOTES):
        person = f"person_{n % PEOPLE}"
        battle = list(arena.say(rng.choice(prompts), None, person))[-1]
        a, b = (score(talk[-1]["content"]) for talk in battle.talks)
        arena.vote(battle, person, "tie" if a == b else "a" if rng.random() < 1 / (1 + exp(b - a)) else "b")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", help="a checkpoint")
    parser.add_argument("home", type=Path, help="directory of all that is written")
    args = parser.parse_args()
    policy, home = args.policy, args.home.absolute()
    vote(sample_replies(policy, home), home / "arena")
    subprocess.run(
        [sys.executable, "arena.py", "export=true", "resume=true", f"hydra.run.dir={home}/arena"], cwd=ROOT, check=True
    )
    votes, comparisons = home / "arena" / "verdicts.jsonl", home / "arena" / "comparisons.jsonl"
    overrides = [f"task.input=[{votes}]", "task.format=verdicts", "task.interval=sandwich"]
    script("evaluate.py", "task=ratings", *overrides, f"hydra.run.dir={home}/ratings")
    overrides = [
        f"policy={policy}",
        f"data.train=[{comparisons}@train]",
        f"data.eval=[{comparisons}@eval]",
        "num_steps=60",
    ]
    overrides += ["batch_size=32", "micro_batch_size=32", "optim.lr=3e-4", "optim.warmup_steps=5", "eval_every=60"]
    script("train_rm.py", *overrides, "save_every=0", f"hydra.run.dir={home}/rm")
    last = [row for row in read_log(home / "rm" / "metrics.jsonl") if "eval/accuracy" in row][-1]
    figures = {key: round(last[f"eval/{key}"], 4) for key in ("accuracy", "accuracy_lower", "accuracy_upper")}
    print(f"reward model on held-out votes: {figures}")


if __name__ == "__main__":
    main()
