"""What lies between a rollout and its loss: score rules, KL estimators and controllers, group baselines.

Each is a named variant that `train_ppo.py` picks by a setting; the loop itself has no branches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.gae import gae

MAX_LOG_RATIO = 20.0  # nats

# ---- scores


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """(B,) scores within [-limit, limit]; null leaves them alone."""
    return scores if limit is None else scores.clamp(-limit, limit)


def missing_eos(scores: Tensor, finished: Tensor, *, mode: str, value: float) -> Tensor:
    """(B,) scores with the rule for completions that never emitted a stop token.

    replace: the score becomes `value` (Ziegler et al. 2019's and Huang et al. 2024's code: -1); subtract: it loses
    abs(value) (TRL); none: it stays.

    Args:
        finished: (B,) bool, the sampler's finish reason for the completion itself; the prompt's own stop tokens do not
        count.
    """
    rules = {
        "replace": lambda: torch.full_like(scores, value),
        "subtract": lambda: scores - abs(value),
        "none": lambda: scores,
    }
    if mode not in rules:
        raise ValueError(f"missing_eos={mode!r} is unknown; use {', '.join(rules)}")
    return torch.where(finished, scores, rules[mode]())


def importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, *, max_weight: float) -> Tensor:
    """min(pi(token) / mu(token), max_weight) of tokens that another program, mu, sampled; no gradient.

    Truncated importance sampling, Ionides 2008; for rollouts of an engine whose log-probs are not quite the trainer's.
    Multiplied to the advantages, E_mu[weight * A] = E_pi[A] but for what is cut.
    """
    return (logprobs - sampled_logprobs).exp().clamp(max=max_weight).detach()


# ---- KL


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """KL(pi || ref) per sampled token from log_ratio = log pi - log ref (Schulman 2020, "Approximating KL divergence").

        k1 = log_ratio;   k2 = log_ratio^2 / 2;   k3 = exp(-log_ratio) - 1 + log_ratio

    As a reward k1 is the right one: its policy gradient is that of the KL. As a loss term k2 has the KL's gradient on
    samples of the current policy; k3's is biased; k1's has mean zero, so it is no loss. k3 grows no further where the
    reference gives a token e^20 times the policy's probability: float32 overflows at e^88.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        log_ratio = log_ratio.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator={kind!r} is unknown; use k1, k2 or k3")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, kind: str) -> Tensor:
    """() sum over completion tokens of the KL estimate: the penalty as a loss term (kl_in=loss).

    It charges every state its own KL, but not an early token for leading to states of more KL: see docs/ppo.md.
    """
    return kl_estimate((logprobs - ref_logprobs)[completion_mask], kind).sum()


class FixedKL:
    """A KL coefficient that stays."""

    def __init__(self, kl_coef: float):
        self.kl_coef = kl_coef

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        return {}  # the setting rules

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to go on with."""


class AdaptiveKL(FixedKL):
    """A coefficient that steers the KL to a target: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.

        error = clip(KL / target - 1, -0.2, 0.2);   kl_coef *= 1 + error * num_sequences / horizon

    The unit is nats per sequence (a sum over tokens), not per token: the paper's target of 6 means 6 nats a completion.
    """

    def __init__(self, kl_coef: float, *, target_nats_per_sequence: float, horizon: int):
        super().__init__(kl_coef)
        if target_nats_per_sequence <= 0 or horizon <= 0:
            raise ValueError(
                f"need kl_target_nats_per_sequence > 0, kl_horizon > 0: {target_nats_per_sequence}, {horizon}"
            )
        self.target, self.horizon = target_nats_per_sequence, horizon

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        error = min(max(kl_per_sequence / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state.get("kl_coef", self.kl_coef)  # none where the coefficient was fixed so far


# ---- baselines without a value model: every completion is compared with the others of its prompt


def rloo(rewards: Tensor, completion_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: a sequence's return minus its siblings' mean. Ahmadian et al. 2024 (arXiv:2402.14740), Eq. 7.

    Args:
        rewards: (B, T), KL penalty included, 0 off-mask. Rows of one prompt are consecutive.
    """
    returns = _groups(rewards, samples_per_prompt)  # (P, K)
    K = samples_per_prompt
    baseline = (returns.sum(1, keepdim=True) - returns) / (K - 1)
    return _spread(returns - baseline, completion_mask)


def grpo(rewards: Tensor, completion_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: returns standardised within each prompt. Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.

    The paper scores without the KL and adds the KL to the loss: kl_in=loss with kl_estimator=k3. A group whose returns
    are all equal teaches nothing: its advantages are 0.
    """
    returns = _groups(rewards, samples_per_prompt)  # (P, K)
    centered = returns - returns.mean(1, keepdim=True)
    return _spread(centered / (returns.std(1, keepdim=True) + 1e-6), completion_mask)


def _groups(rewards: Tensor, samples_per_prompt: int) -> Tensor:
    if samples_per_prompt < 2 or len(rewards) % samples_per_prompt:
        raise ValueError(
            f"rloo and grpo compare the samples of a prompt: {len(rewards)} rows with samples_per_prompt="
            f"{samples_per_prompt}; use samples_per_prompt >= 2, or advantage=gae"
        )
    return rewards.sum(1).view(-1, samples_per_prompt)


def _spread(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    return torch.where(completion_mask, advantages.reshape(-1, 1), 0.0)


# ---- the choice, and its scale


def whiten(x: Tensor, mask: Tensor, mean: Callable[[Tensor], Tensor], *, shift_mean: bool) -> Tensor:
    """(B, T): x with variance 1 over the masked entries of all ranks, 0 off-mask.

    shift_mean=True also moves the mean to 0 (advantages); False keeps it (rewards), as in Ziegler et al. 2019's code:
    (x - mean) * rsqrt(var + 1e-8) [+ mean]. The variance is the biased one.

    Args:
        mean: averages a scalar tensor over ranks (`run.mean`).
    """
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(f"whiten wants a bool mask like x {tuple(x.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    kept = torch.where(mask, x, 0.0)
    count = mean(mask.sum().to(x.dtype))
    center = mean(kept.sum()) / count
    variance = mean(torch.where(mask, x - center, 0.0).square().sum()) / count
    whitened = (x - center) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + center, 0.0)


def estimate_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, value_mask: Tensor,
    *, kind: str, gamma: float, gae_lambda: float, samples_per_prompt: int,
) -> Tensor:  # fmt: skip
    """(B, T) advantages of the named kind; gae covers value_mask, so that advantages + values = returns there."""
    if kind == "gae":
        return gae(rewards, values, value_mask, gamma=gamma, gae_lambda=gae_lambda)
    groups = {"rloo": rloo, "grpo": grpo}
    if kind not in groups:
        raise ValueError(f"advantage={kind!r} is unknown; use gae, rloo or grpo")
    return groups[kind](rewards, completion_mask, samples_per_prompt=samples_per_prompt)


def explained_variance(returns: Tensor, values: Tensor, value_mask: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """() 1 - var(returns - values) / var(returns) over the states of all ranks: 1 = a perfect value model, <= 0 = none.

    Args:
        mean: averages a scalar tensor over ranks (`run.mean`).
    """
    returns, errors = returns[value_mask].double(), (returns - values)[value_mask].double()
    count = mean(torch.tensor(float(len(returns)), device=returns.device))
    variances = [mean(x.square().sum()) / count - (mean(x.sum()) / count).square() for x in (errors, returns)]
    return 1 - variances[0] / variances[1].clamp_min(1e-12)
