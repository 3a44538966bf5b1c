"""From the scores of a rollout to advantages: score rules, KL estimators, KL controllers, advantage estimators.

Each variant has a name, and a setting of `train_ppo.py` chooses it. So the training loop has no branches.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.gae import gae
from runtime.metrics import wide

MAX_LOG_RATIO = 20.0  # nats
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# ---- scores


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """(B,) scores clamped to [-limit, limit]. None changes nothing."""
    return scores if limit is None else scores.clamp(-limit, limit)


def missing_eos(scores: Tensor, finished: Tensor, *, mode: str, value: float) -> Tensor:
    """(B,) scores after the rule for completions without a stop token.

        replace     the score becomes `value` (-1 in the code of Ziegler et al. 2019 and Huang et al. 2024)
        subtract    the score loses abs(value) (TRL)
        none        the score stays
        mask        the score stays, and the row is left out of the loss (an option of DAPO)

    Args:
        finished: (B,) bool, whether the sampler ended the completion at a stop token. Stop tokens in the prompt do not
            count.
    Raises:
        ValueError: the mode is unknown.
    """
    rules = {
        "replace": lambda: torch.full_like(scores, value),
        "subtract": lambda: scores - abs(value),
        "none": lambda: scores,
        "mask": lambda: scores,
    }
    if mode not in rules:
        raise ValueError(f"missing_eos={mode!r} is unknown; use {', '.join(rules)}")
    return torch.where(finished, scores, rules[mode]())


def overlong_penalty(lengths: Tensor, *, max_new_tokens: int, overlong_tokens: int) -> Tensor:
    """(B,) penalty in [-1, 0] of long completions: DAPO, Yu et al. 2025 (arXiv:2503.14476), Eq. 13.

    0 up to L = max_new_tokens - overlong_tokens, then (L - length) / overlong_tokens, so -1 at max_new_tokens
    """
    if overlong_tokens == 0:
        return torch.zeros(lengths.shape, device=lengths.device)
    return ((max_new_tokens - overlong_tokens - lengths) / overlong_tokens).clamp(-1.0, 0.0)


def importance_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, action_mask: Tensor, *, correction: str, max_weight: float
) -> Tensor:
    """(B, T) importance weights, without gradient, of tokens that another program or an older policy sampled.

        token_truncate      min(w, max_weight),   w = pi(token) / mu(token), mu is the sampler
        token_mask          w, or 0 where w > max_weight
        sequence_truncate, sequence_mask    the same with the product of w over the completion

    This is truncated importance sampling (Ionides 2008). The weights multiply the advantages. Without a bound,
    E_mu[w A] = E_pi[A] holds exactly for the sequence's ratio, whose variance grows with the length. For the token's
    ratio it holds to first order.

    Args:
        logprobs, sampled_logprobs: (B, T) nats under pi and under mu. max_weight: > 0.
    Raises:
        ValueError: the correction is unknown.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"off_policy.correction={correction!r} is unknown; use {', '.join(CORRECTIONS)}")
    log_ratio = torch.where(action_mask, logprobs - sampled_logprobs, 0.0).detach()
    unit, bound = correction.split("_")
    log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) if unit == "sequence" else log_ratio
    weights = log_ratio.clamp(max=80.0).exp()  # e^89 overflows float32
    bounded = weights.clamp(max=max_weight) if bound == "truncate" else weights * (weights <= max_weight)
    return torch.where(action_mask, bounded, 0.0)


# ---- KL


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """KL(pi || ref) per sampled token from log_ratio = log pi - log ref (Schulman 2020, "Approximating KL divergence").

        k1 = log_ratio;   k2 = log_ratio^2 / 2;   k3 = exp(-log_ratio) - 1 + log_ratio

    In the reward k1 is right: its policy gradient is the gradient of the KL. In the loss k2 is right: on samples of the
    current policy it has the gradient of the KL. The gradient of k3 is biased, and that of k1 has mean 0. k3 is
    constant where ref / pi > e^20, because float32 overflows at e^88.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        log_ratio = log_ratio.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator={kind!r} is unknown; use k1, k2 or k3")


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, kind: str, weights: Tensor | None = None
) -> Tensor:
    """() sum over completion tokens of the KL estimate: the penalty as a loss term (kl_in=loss).

    Its gradient penalises the KL of each state. It does not penalise an early token for leading to states with a
    larger KL, see docs/ppo.md.

    Args:
        weights: (B, 1) weight of each row's tokens. None means 1.
    """
    estimate = kl_estimate(torch.where(completion_mask, logprobs - ref_logprobs, 0.0), kind)  # (B, T), 0 at 0
    return (estimate if weights is None else estimate * weights).sum()


class FixedKL:
    """A constant KL coefficient."""

    def __init__(self, kl_coef: float):
        self.kl_coef = kl_coef

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        return {}  # a resumed run takes the coefficient from its config

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing."""


class AdaptiveKL(FixedKL):
    """A KL coefficient that steers the KL to a target: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.

        error = clip(KL / target - 1, -0.2, 0.2);   kl_coef *= 1 + error * num_sequences / horizon

    The target is in nats per sequence, a sum over tokens: the paper's 6 means 6 nats per completion.

    Raises ValueError where the target or the horizon is not positive.
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
        self.kl_coef = state.get("kl_coef", self.kl_coef)  # absent where the run had a fixed coefficient before


class LinearKL(FixedKL):
    """A KL coefficient that changes linearly from kl_coef to kl_coef_end in num_steps rollouts, then stays constant."""

    def __init__(self, kl_coef: float, *, kl_coef_end: float, num_steps: int):
        super().__init__(kl_coef)
        self.start, self.end, self.num_steps, self.taken = kl_coef, kl_coef_end, num_steps, 0

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Take one step along the line, after a rollout."""
        self.taken += 1
        self._set()

    def state_dict(self) -> dict[str, float]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.taken = int(state.get("taken", 0))
        self._set()

    def _set(self) -> None:
        share = min(1.0, self.taken / self.num_steps)
        self.kl_coef = self.start + share * (self.end - self.start)


# ---- advantages with a value model


def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    value_mask: Tensor,
    done: Tensor | None,
    *,
    gamma: float,
    gae_lambda: float,
    lambda_alpha: float | None,
) -> Tensor:
    """(B, T) GAE over the states that have a value. There, advantages + values = returns.

    lambda_alpha: each row gets lambda = max(0, 1 - 1 / (alpha length)), so that in a long completion the reward at the
    end still reaches the first tokens: Yue et al. 2025 (arXiv:2504.05118), VAPO. None: all rows get gae_lambda.
    """
    if lambda_alpha is not None:
        gae_lambda = (1 - 1 / (lambda_alpha * value_mask.sum(1).clamp_min(1))).clamp_min(0.0)
    return gae(rewards, values, value_mask, gamma=gamma, gae_lambda=gae_lambda, done=done)


# ---- advantages without a value model: a completion is compared with others of its prompt, or with the whole rollout


def rloo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: a row's return minus the mean return of the prompt's other rows.

    Ahmadian et al. 2024 (arXiv:2402.14740), Eq. 7.

    Args:
        rewards: (B, T), KL penalty included, 0 off-mask. Rows of one prompt are consecutive. Rows without an action
            are left out of all means.
    """
    returns, count = _groups(rewards, action_mask, samples_per_prompt)  # (P, K), (P, 1)
    baseline = (returns.nansum(1, keepdim=True) - returns) / (count - 1).clamp_min(1)
    return _per_token(torch.where(count > 1, returns - baseline, 0.0), action_mask)


def grpo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: returns standardised within each prompt. Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.

    In the paper the KL penalty is in the loss: set kl_in=loss and kl_estimator=k3. Where all returns of a group are
    equal, its advantages are 0.
    """
    returns, count = _groups(rewards, action_mask, samples_per_prompt)  # (P, K), (P, 1)
    centered = returns - returns.nanmean(1, keepdim=True)
    std = (centered.square().nansum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return _per_token(centered / (std + 1e-6), action_mask)


def dr_grpo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: returns minus their group's mean. Liu et al. 2025 (arXiv:2503.20783), Dr. GRPO.

    GRPO divides by the standard deviation, so the weight of a prompt depends on its difficulty. It also divides by the
    length, which favours short right answers and long wrong ones. Dr. GRPO does neither (aggregation=sequence_sum).
    The advantages are (K - 1) / K of RLOO's.
    """
    returns, _ = _groups(rewards, action_mask, samples_per_prompt)  # (P, K)
    return _per_token(returns - returns.nanmean(1, keepdim=True), action_mask)


def reinforce_pp(rewards: Tensor, action_mask: Tensor, *, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, T) advantages: returns to go, whitened over the rollout of all ranks. Hu 2025 (arXiv:2501.03262).

    REINFORCE++ needs only one sample per prompt. In the paper the KL penalty is in the reward.
    """
    to_go = torch.where(action_mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    return whiten(to_go, action_mask, mean, shift_mean=True)


def raft(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: 1 for the best of each prompt's samples, 0 for the others: Dong et al. 2023 (2304.06767).

    On samples of the current policy the gradient is that of SFT on the best sample (best-of-n SFT). Where all returns
    of a group are equal, its advantages are 0.
    """
    returns, _ = _groups(rewards, action_mask, samples_per_prompt)  # (P, K)
    returns = returns.nan_to_num(nan=-torch.inf)
    best = torch.zeros_like(returns).scatter(1, returns.argmax(1, keepdim=True), 1.0)
    return _per_token(torch.where(_differ(returns), best, 0.0), action_mask)


def online_dpo(rewards: Tensor, action_mask: Tensor, penalty: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages of DPO on the best and the worst of each prompt's samples: Guo et al. 2024 (arXiv:2402.04792).

        A = sigmoid(-m) for the best, -sigmoid(-m) for the worst, 0 for the others;   m = penalty(best) - penalty(worst)

    with penalty = beta (log pi - log ref) of a completion. The gradient of -log sigmoid(m) is -beta sigmoid(-m) (grad
    log pi(best) - grad log pi(worst)). So at the policy that sampled, the policy gradient is DPO's divided by beta.

    Args:
        penalty: (B, T) kl_coef * (log pi - log ref). `rewards` already contain -penalty. It is added back, so that the
            score alone decides which sample is best and which is worst.
    """
    scores, _ = _groups(rewards + penalty, action_mask, samples_per_prompt)  # (P, K)
    penalties, _ = _groups(penalty, action_mask, samples_per_prompt)  # (P, K)
    best = scores.nan_to_num(nan=-torch.inf).argmax(1, keepdim=True)
    worst = scores.nan_to_num(nan=torch.inf).argmin(1, keepdim=True)
    weight = torch.sigmoid(penalties.gather(1, worst) - penalties.gather(1, best))  # (P, 1)
    signs = torch.zeros_like(scores).scatter(1, best, 1.0).scatter(1, worst, -1.0)
    return _per_token(torch.where(_differ(scores), weight * signs, 0.0), action_mask)


def _differ(returns: Tensor) -> Tensor:
    """(P, 1) whether two rows of a group have different returns. nan marks rows that are left out."""
    known = returns.isfinite()
    most, least = (returns.masked_fill(~known, fill) for fill in (-torch.inf, torch.inf))
    return most.amax(1, keepdim=True) > least.amin(1, keepdim=True)


def _groups(rewards: Tensor, action_mask: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """(P, K) returns minus the group's best, nan where a row has no action, and (P, 1) the number of the other rows.

    Advantages depend on differences only. The rounded mean of equal returns can differ from them; that of zeros is 0.
    """
    if samples_per_prompt < 2 or len(rewards) % samples_per_prompt:
        raise ValueError(
            f"advantages of a group compare the samples of a prompt: {len(rewards)} rows with samples_per_prompt="
            f"{samples_per_prompt}; use samples_per_prompt >= 2, or advantage=gae"
        )
    kept = action_mask.any(1)
    returns = torch.where(kept, rewards.sum(1), torch.nan).view(-1, samples_per_prompt)
    returns = returns - returns.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)
    return returns, kept.view(-1, samples_per_prompt).sum(1, keepdim=True)


def _per_token(advantages: Tensor, action_mask: Tensor) -> Tensor:
    """(B, T) each row's advantage at all of its actions, 0 elsewhere. advantages: (P, K)."""
    return torch.where(action_mask, advantages.reshape(-1, 1), 0.0)


# ---- whitening, and the choice of an estimator


def whiten(x: Tensor, mask: Tensor, mean: Callable[[Tensor], Tensor], *, shift_mean: bool) -> Tensor:
    """(B, T): x with variance 1 over the masked entries of all ranks, 0 off-mask.

        (x - mean) * rsqrt(var + 1e-8) [+ mean],   as in the code of Ziegler et al. 2019; var divides by n

    Args:
        shift_mean: True moves the mean to 0 (for advantages). False keeps the mean (for rewards).
        mean: averages a scalar tensor over ranks (`run.mean`).
    """
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise ValueError(f"whiten wants a bool mask like x {tuple(x.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    kept = wide(torch.where(mask, x, 0.0))  # in float32 the rounded mean of equal entries differs from them
    count = mean(mask.sum().to(kept.dtype))
    center = mean(kept.sum()) / count
    centered = kept - center
    variance = mean(torch.where(mask, centered, 0.0).square().sum()) / count
    whitened = centered * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, (whitened if shift_mean else whitened + center).to(x.dtype), 0.0)


WITH_VALUES = {"gae": gae_advantages}  # these train a value model
OF_GROUPS = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "raft": raft}
OF_PAIRS = {"online_dpo": online_dpo}
OF_ROLLOUTS = {"reinforce_pp": reinforce_pp}
ADVANTAGES = (*WITH_VALUES, *OF_GROUPS, *OF_PAIRS, *OF_ROLLOUTS)


def estimate_advantages(
    rewards: Tensor, values: Tensor, action_mask: Tensor, value_mask: Tensor, done: Tensor | None = None,
    *, kind: str, gamma: float, gae_lambda: float, samples_per_prompt: int, lambda_alpha: float | None = None,
    mean: Callable[[Tensor], Tensor] = lambda x: x, penalty: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) advantages by the estimator named `kind`.

    Args:
        penalty: (B, T) kl_coef * KL, already subtracted from the rewards. None means 0.
        done: (B, T) bool, the last state of each episode. None: a row is one episode.
        mean: averages a scalar tensor over ranks (`run.mean`).
    Raises:
        ValueError: the kind is unknown, or samples_per_prompt does not fit it.
    """
    if kind in WITH_VALUES:
        discounts = {"gamma": gamma, "gae_lambda": gae_lambda, "lambda_alpha": lambda_alpha}
        return WITH_VALUES[kind](rewards, values, value_mask, done, **discounts)
    if kind in OF_GROUPS:
        return OF_GROUPS[kind](rewards, action_mask, samples_per_prompt=samples_per_prompt)
    if kind in OF_PAIRS:
        penalty = torch.zeros_like(rewards) if penalty is None else penalty
        return OF_PAIRS[kind](rewards, action_mask, penalty, samples_per_prompt=samples_per_prompt)
    if kind in OF_ROLLOUTS:
        return OF_ROLLOUTS[kind](rewards, action_mask, mean=mean)
    raise ValueError(f"advantage={kind!r} is unknown; use {', '.join(ADVANTAGES)}")


def explained_variance(returns: Tensor, values: Tensor, value_mask: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """() 1 - var(returns - values) / var(returns) over the states of all ranks.

    1 is a perfect value model. A constant prediction gets 0.

    Args:
        mean: averages a scalar tensor over ranks (`run.mean`).
    """
    errors, returns = (wide(torch.where(value_mask, x, 0.0)) for x in (returns - values, returns))  # (B, T)
    count = mean(wide(value_mask.sum()))
    variances = [mean(x.square().sum()) / count - (mean(x.sum()) / count).square() for x in (errors, returns)]
    return 1 - variances[0] / variances[1].clamp_min(1e-12)
