"""Find memory leaks of a long PPO training: slopes of resident memory and open files per 100 steps of the tiny loop.

    python bench/soak_ppo.py POLICY_DIR REWARD_MODEL_DIR PROMPTS.jsonl --minutes 30 --figure runs/soak.png

The first fifth of the steps is left out, because allocator and caches are still filling.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime.run  # noqa: E402
import train_ppo  # noqa: E402
from runtime.plots import pyplot, save_figure  # noqa: E402

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def measure() -> tuple[float, int]:
    """Resident megabytes and open file handles of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MB, len(os.listdir("/proc/self/fd"))


def soak(policy: str, reward_model: str, prompts: str, minutes: float) -> np.ndarray:
    """Run the script until the time is over. Returns the (steps, 2) results of `measure` at each step."""
    seen: list[tuple[float, int]] = []
    stop = time.monotonic() + 60 * minutes
    end_step = runtime.run.Run.end_step

    def watched(run, **kwargs):
        seen.append(measure())
        if time.monotonic() > stop:
            run._signals.asked = True  # as after SIGTERM: the step is completed and saved
        end_step(run, **kwargs)

    with tempfile.TemporaryDirectory() as home, patch.object(runtime.run.Run, "end_step", watched):
        sys.argv = [
            "train_ppo.py", f"policy={policy}", f"reward_model={reward_model}", f"data.prompts=[{prompts}]",
            "num_steps=1000000", "batch_size=4", "minibatch_size=4", "micro_batch_size=4", "ppo_epochs=1",
            "sampling.max_new_tokens=8", "sample_every=50", "save_every=50", "log.wandb=disabled",
            "optim.schedule=constant", f"hydra.run.dir={home}/run",
        ]  # fmt: skip
        try:
            runtime.run.main(train_ppo.train, "train_ppo")
        except SystemExit as exit:
            assert exit.code == 75, f"the run ended with {exit.code}"
    return np.array(seen)


def slopes(seen: np.ndarray) -> dict:
    """Growth per 100 steps over the last four fifths of the steps."""
    late = seen[len(seen) // 5 :]
    megabytes, files = 100 * np.polyfit(np.arange(len(late)), late, 1)[0]
    return {
        "steps": len(seen),
        "rss_mb": round(late[-1, 0], 1),
        "rss_mb_per_100_steps": round(megabytes, 4),
        "files": int(late[-1, 1]),
        "files_per_100_steps": round(files, 4),
    }


def draw(seen: np.ndarray, path: Path) -> None:
    """Plot memory and open files over the step."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 2.8))
    for axis, column, name in zip(axes, seen.T, ("resident memory, MB", "open files"), strict=True):
        axis.plot(column, linewidth=1)
        axis.set(xlabel="step", title=name, ylim=(0, 1.15 * column.max()))
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("policy", help="a directory, as for train_ppo.py")
    parser.add_argument("reward_model", help="a directory of train_rm.py")
    parser.add_argument("prompts", help="a file of prompts")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--figure", type=Path, help="memory and open files against the step, a .png")
    given = parser.parse_args()
    measured = soak(given.policy, given.reward_model, given.prompts, given.minutes)
    print(json.dumps(slopes(measured)))
    if given.figure is not None:
        draw(measured, given.figure)


if __name__ == "__main__":
    main()
