"""Effect of the rules for completions that never stop, on the enumerable task with scores of any mean.

    python experiments/missing_eos.py        3 rules x 3 offsets x 3 seeds, 2 minutes

The zero of a reward model is arbitrary, so a constant added to every score must not change the result. The task is that
of the tests: completions of 1 to 3 tokens, of which those without a stop symbol are cut. kl_coef is 0.5.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from advantages import missing_eos  # noqa: E402
from tests.enumerable_task import COMPLETIONS, STOP, TabularPolicy, make_task  # noqa: E402
from tests.enumerable_training import train_ppo  # noqa: E402

RULES, OFFSETS, SEEDS, VALUE = ("replace", "subtract", "none"), (-5.0, 0.0, 5.0), (0, 1, 2), -1.0


def measure(policy: TabularPolicy, rewards: torch.Tensor) -> tuple[float, float]:
    """Share of completions that are cut, and the mean score of the others without the offset."""
    finished = (COMPLETIONS == STOP).any(1)
    with torch.no_grad():
        p = policy.logprobs(COMPLETIONS).sum(1).exp()
    return p[~finished].sum().item(), ((p * rewards)[finished].sum() / p[finished].sum()).item()


def main() -> None:
    torch.set_num_threads(1)
    tasks = {seed: make_task(seed) for seed in SEEDS}
    start = [measure(TabularPolicy(logits), rewards) for logits, rewards in tasks.values()]
    print("before   ", "  ".join(f"cut {cut:.2f} score {score:5.2f}" for cut, score in start))
    for rule in RULES:
        for offset in OFFSETS:

            def final(scores, completions, rule=rule, offset=offset):
                return missing_eos(scores + offset, (completions == STOP).any(1), mode=rule, value=VALUE)

            found = [measure(train_ppo(seed, kl_coef=0.5, score=final), tasks[seed][1]) for seed in SEEDS]
            print(f"{rule:8} {offset:+.0f}", "  ".join(f"cut {cut:.2f} score {score:5.2f}" for cut, score in found))


if __name__ == "__main__":
    main()
