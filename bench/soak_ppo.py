"""Does a long PPO training leak? Resident memory and open files per 100 steps of the tiny loop, as fitted slopes.

    python bench/soak_ppo.py POLICY_DIR REWARD_MODEL_DIR PROMPTS.jsonl [MINUTES]

The first fifth of the steps is left out: allocator and caches are still filling.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime.run  # noqa: E402
import train_ppo  # noqa: E402

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def measure() -> tuple[float, int]:
    """Resident megabytes and open file handles of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_MB, len(os.listdir("/proc/self/fd"))


def soak(policy: str, reward_model: str, prompts: str, minutes: float) -> dict:
    """Run the door until the time is over; the slopes per 100 steps over the last four fifths of the steps."""
    seen: list[tuple[float, int]] = []
    stop = time.monotonic() + 60 * minutes
    end_step = runtime.run.Run.end_step

    def watched(run, **words):
        seen.append(measure())
        if time.monotonic() > stop:
            run._stop = 15  # as SIGTERM would: the step is finished and saved
        end_step(run, **words)

    runtime.run.Run.end_step = watched
    with tempfile.TemporaryDirectory() as home:
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
    late = np.array(seen[len(seen) // 5 :])
    slopes = 100 * np.polyfit(np.arange(len(late)), late, 1)[0]
    return {
        "steps": len(seen), "rss_mb": round(late[-1, 0], 1), "rss_mb_per_100_steps": round(slopes[0], 4),
        "files": int(late[-1, 1]), "files_per_100_steps": round(slopes[1], 4),
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        raise SystemExit(__doc__)
    minutes = float(sys.argv[4]) if len(sys.argv) == 5 else 30.0
    print(json.dumps(soak(*sys.argv[1:4], minutes)))
