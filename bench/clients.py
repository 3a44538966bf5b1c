"""Time one checkpoint behind a server beside client=local: make_data, task=answer and task=judge, as whole commands.

    vllm serve POLICY --served-model-name served --dtype bfloat16 --max-model-len 2048
    python bench/clients.py POLICY http://127.0.0.1:8000/v1 --rounds 3

Both sides answer the same prompts with the same settings. Their answers differ in length, so the figure is tokens drawn
per second of the command, its start included. The side that begins alternates by round. One row a command: medians, and
the ratio of the server to client=local.
"""

import argparse
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUESTIONS = 32


def commands(directory: Path) -> dict[str, list[str]]:
    """{row: script and overrides}."""
    texts = [f"Write three sentences about the number {number} and where one meets it." for number in range(QUESTIONS)]
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    questions = [{"question_id": str(i), "category": "writing", "turns": [text]} for i, text in enumerate(texts)]
    answers = [
        {"question_id": str(i), "model_id": model, "choices": [{"turns": [f"{model} says that {i} is a number."]}]}
        for i in range(QUESTIONS)
        for model in ("one", "two")
    ]
    for name, rows in (("prompts", prompts), ("questions", questions), ("answers", answers)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "size.py").write_text(
        "def size(prompts, completions):\n    return [len(text) for text in completions]\n"
    )
    asked = f"task.questions={directory}/questions.jsonl"
    return {
        "make_data method=best_of": [
            "make_data.py", "method=best_of", f"method.reward_fn={directory}/size.py:size", f"method.num={QUESTIONS}",
            "method.num_completions=2", f"method.prompts=[{directory}/prompts.jsonl]", "method.max_tokens=128",
        ],
        "evaluate task=answer": ["evaluate.py", "task=answer", asked, "task.model=m", "task.max_tokens=128"],
        "evaluate task=judge": [
            "evaluate.py", "task=judge", "judge=llm", "judge.max_tokens=128", asked, "task.turns=1",
            f"task.answers=[{directory}/answers.jsonl]",
        ],
    }  # fmt: skip


def drawn(cache: Path) -> int:
    """Completion tokens of all answers in a cache."""
    with sqlite3.connect(cache / "answers.sqlite") as connection:
        return sum(json.loads(text)["completion_tokens"] for (text,) in connection.execute("SELECT text FROM answers"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="the checkpoint that the server serves")
    parser.add_argument("url", help="the server's address up to /v1")
    parser.add_argument("--served-as", default="served", help="the name of its model there")
    parser.add_argument("--precision", default="bf16", help="of client=local")
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    sides = {
        "server": ["client=openai", f"client.base_url={words.url}", f"client.model={words.served_as}"],
        "local": [
            "client=local", f"client.policy={words.policy}", f"client.precision={words.precision}",
            "client.batch_size=16",  # as many as client=openai keeps in flight
        ],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for row, command in commands(Path(name)).items():
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(words.rounds):
                for side in sorted(sides, reverse=bool(number % 2)):
                    run = Path(name) / f"{row.split('=')[-1]}_{side}_{number}"
                    more = [*sides[side], f"client.cache={run}/cache", f"hydra.run.dir={run}", "log.wandb=disabled"]
                    start = time.perf_counter()
                    done = subprocess.run(
                        [sys.executable, *command, *more], cwd=ROOT, capture_output=True, text=True, check=False
                    )
                    seconds = time.perf_counter() - start
                    if done.returncode:
                        sys.exit(f"{row}, {side}: exit {done.returncode}\n{done.stderr[-2000:]}")
                    speeds[side].append(drawn(run / "cache") / seconds)
            median = {side: statistics.median(values) for side, values in speeds.items()}
            figures = "  ".join(
                f"{side} {median[side]:.1f} ({', '.join(f'{x:.1f}' for x in speeds[side])})" for side in sides
            )
            print(f"{row}: tokens/s {figures}; ratio {median['server'] / median['local']:.2f}", flush=True)


if __name__ == "__main__":
    main()
