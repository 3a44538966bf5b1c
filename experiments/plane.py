"""All on-policy methods in one plot: the gold reward over the exact KL, with best-of-n and the true frontier.

    python experiments/plane.py docs/plane.png        10 methods x 3 KL coefficients x 3 seeds, minutes

The task is that of the tests (1 to 3 tokens over 6 symbols, a random gold reward and reference). So the reward and the
KL of a policy are sums over all 156 completions, and the frontier, pi(y) ~ pi_ref(y) exp(r(y) / beta), is known. Every
method draws the same number of samples and is trained on the gold reward itself.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses import dpo_loss  # noqa: E402
from runtime.plots import pyplot, save_figure  # noqa: E402
from tests.enumerable_task import COMPLETIONS, TabularPolicy, make_task, optimum, reward_of  # noqa: E402
from tests.enumerable_training import BATCH, train_ppo  # noqa: E402

SEEDS, BETAS, STEPS = (0, 1, 2), (0.2, 0.5, 1.0), 150
FOUR = {"samples_per_prompt": 4}
METHODS: dict[str, dict] = {
    "PPO": {},
    "RLOO": FOUR | {"kind": "rloo"},
    "GRPO": FOUR | {"kind": "grpo", "aggregate": "sequence_mean"},
    "GRPO as published": FOUR | {"kind": "grpo", "aggregate": "sequence_mean", "kl_in": "loss", "kl_estimator": "k3"},
    "Dr. GRPO": FOUR | {"kind": "dr_grpo", "aggregate": "sequence_sum"},
    "REINFORCE++": {"kind": "reinforce_pp"},
    "online DPO": FOUR | {"kind": "online_dpo", "aggregate": "sequence_sum", "updates": 1},
    "RAFT": FOUR | {"kind": "raft"},
    "distillation": {"kind": "reinforce_pp"},
    "offline DPO": {},
}


def point(policy_logprobs: torch.Tensor, seed: int) -> tuple[float, float]:
    """(exact KL to the reference in nats, gold reward) of a distribution over the 156 completions."""
    logits, rewards = make_task(seed)
    reference = TabularPolicy(logits).logprobs(COMPLETIONS).sum(1).double().detach()
    logprobs = policy_logprobs.double().detach()
    share = logprobs.exp()
    return (share * (logprobs - reference)).sum().item(), (share * rewards).sum().item()


def table_of(target: torch.Tensor) -> TabularPolicy:
    """The table whose distribution over completions is `target`, (156,) log-probs."""
    from tests.enumerable_task import NUM_STATES, VOCABULARY, mask_of, states

    mass = torch.full((NUM_STATES, VOCABULARY), 1e-300, dtype=torch.float64)
    for t in range(COMPLETIONS.shape[1]):
        there = mask_of(COMPLETIONS)[:, t]
        mass.index_put_(
            (states(COMPLETIONS)[there, t], COMPLETIONS[there, t]), target.double().exp()[there], accumulate=True
        )
    return TabularPolicy(mass.log().float())


def train(name: str, seed: int, beta: float) -> list[tuple[float, float]]:
    """Points along the training; the last one is its end."""
    seen = []

    def on_step(step: int, policy: TabularPolicy) -> None:
        if step % 10 == 0:
            seen.append(point(policy.logprobs(COMPLETIONS).sum(1), seed))

    logits, rewards = make_task(seed)
    if name == "offline DPO":
        offline_dpo(seed, beta, on_step)
    elif name == "distillation":
        teacher = table_of(optimum(TabularPolicy(logits), rewards, beta))
        train_ppo(
            seed, kl_coef=1.0, teacher=teacher, steps=STEPS, on_step=on_step,
            score=lambda scores, completions: torch.zeros_like(scores), **METHODS[name],
        )  # fmt: skip
    else:
        kl_coef = 0.0 if name == "RAFT" else beta
        train_ppo(seed, kl_coef=kl_coef, steps=STEPS, on_step=on_step, **METHODS[name])
    return seen


def offline_dpo(seed: int, beta: float, on_step) -> None:
    """DPO on pairs that the reference drew once, as many samples as the others draw, ordered by the gold reward."""
    logits, rewards = make_task(seed)
    policy, reference = TabularPolicy(logits), TabularPolicy(logits)
    generator = torch.Generator().manual_seed(seed)
    pairs = reference.sample(STEPS * BATCH, generator).view(-1, 2, 3)
    scores = reward_of(pairs.flatten(0, 1), rewards).view(-1, 2)
    pairs, scores = pairs[scores[:, 0] != scores[:, 1]], scores[scores[:, 0] != scores[:, 1]]
    order = scores.argsort(1, descending=True)
    chosen, rejected = (pairs.gather(1, order[:, i, None, None].expand(-1, 1, 3)).squeeze(1) for i in (0, 1))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05, eps=1e-5)
    on_step(0, policy)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / STEPS)
        for rows in torch.randint(len(pairs), (4, BATCH // 2), generator=generator):
            sums = [p.logprobs(side[rows]).sum(1) for p in (policy, reference) for side in (chosen, rejected)]
            optimizer.zero_grad()
            dpo_loss(*sums[:2], *(s.detach() for s in sums[2:]), beta=beta, label_smoothing=0.0)[0].backward()
            optimizer.step()
        on_step(step + 1, policy)


def frontier(seed: int) -> np.ndarray:
    """(points, 2): the largest gold reward of any policy with each KL."""
    logits, rewards = make_task(seed)
    betas = np.geomspace(0.03, 30, 600)[::-1]
    return np.array([point(optimum(TabularPolicy(logits), rewards, beta), seed) for beta in betas])


def best_of_n(seed: int) -> np.ndarray:
    """(points, 2) of the best of n = 1, 2, 4, ..., 512 samples of the reference: exact, from the order of the rewards.

    P(best = y) = P(r <= r(y))^n - P(r < r(y))^n. Its KL is log n - (n - 1) / n if every completion is improbable.
    """
    logits, rewards = make_task(seed)
    share = TabularPolicy(logits).logprobs(COMPLETIONS).sum(1).double().exp().detach()
    order = rewards.argsort()
    upto = share[order].cumsum(0).clamp(max=1.0)
    below = upto - share[order]
    points = []
    for n in 2 ** torch.arange(10):
        best = torch.zeros_like(share)
        best[order] = upto**n - below.clamp_min(0) ** n
        points.append(point(best.clamp_min(1e-300).log(), seed))
    return np.array(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the picture, a .png; the figures go beside it as .json")
    out = parser.parse_args().out
    torch.set_num_threads(1)  # tables are small, so more threads do not help
    curves, gaps = {}, {}
    for name in METHODS:
        for beta in BETAS[:1] if name == "RAFT" else BETAS:
            for seed in SEEDS:
                curves[name, beta, seed] = np.array(train(name, seed, beta))
            gaps[f"{name}, {beta}"] = [gap(curves[name, beta, seed][-1], seed) for seed in SEEDS]
            ends = [curves[name, beta, seed][-1].round(3).tolist() for seed in SEEDS]
            print(json.dumps({"method": name, "beta": beta, "ends": ends, "gap": gaps[f"{name}, {beta}"]}), flush=True)
    for n, points in zip(2 ** np.arange(10), zip(*(best_of_n(seed) for seed in SEEDS), strict=True), strict=True):
        gaps[f"best of {n}"] = [gap(p, seed) for p, seed in zip(points, SEEDS, strict=True)]
        print(json.dumps({"best_of": int(n), "ends": np.round(points, 3).tolist(), "gap": gaps[f"best of {n}"]}))
    draw(out, curves)


def gap(end: np.ndarray, seed: int) -> float:
    """The difference of the frontier's gold reward at the same KL."""
    line = frontier(seed)
    return round(float(np.interp(end[0], line[:, 0], line[:, 1]) - end[1]), 4)


def draw(out: Path, curves: dict) -> None:
    """One panel per seed, as each seed is another task. A thin line is a training, a mark its end."""
    figure, axes = pyplot().subplots(1, len(SEEDS), figsize=(16, 5.2))
    marks = dict(zip(METHODS, "os^v<>DPX*", strict=True))
    for axis, seed in zip(axes, SEEDS, strict=True):
        line, best = frontier(seed), best_of_n(seed)
        axis.plot(*line.T, color="black", linewidth=1.5, label="frontier")
        axis.plot(*best.T, color="gray", linestyle="--", marker=".", label="best of n")
        for number, name in enumerate(METHODS):
            for beta in BETAS:
                if (name, beta, seed) in curves:
                    points, color = curves[name, beta, seed], f"C{number}"
                    axis.plot(*points.T, color=color, linewidth=0.5, alpha=0.5)
                    label = name if beta == BETAS[0] else None
                    axis.plot(*points[-1], marks[name], color=color, markersize=6, label=label)
        axis.set_xlabel("exact KL to the reference, nats")
        axis.set_title(f"task {seed}", fontsize=10)
        axis.set_xlim(0, 5)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("gold reward, exact")
    axes[-1].legend(fontsize=8, loc="lower right")
    save_figure(figure, out)


if __name__ == "__main__":
    main()
