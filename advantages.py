"""What lies between a rollout and its loss: score rules, KL estimators and controllers, group baselines.

Each is a named variant that `train_ppo.py` picks by a setting; the loop itself has no branches.
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
    """(B,) scores within [-limit, limit]; null leaves them alone."""
    return scores if limit is None else scores.clamp(-limit, limit)


def missing_eos(scores: Tensor, finished: Tensor, *, mode: str, value: float) -> Tensor:
    """(B,) scores with the rule for completions that never emitted a stop token.

    replace: the score becomes `value` (Ziegler et al. 2019's and Huang et al. 2024's code: -1); subtract: it loses
    abs(value) (TRL); none and mask: it stays (mask leaves such rows out of the loss, as DAPO may).

    Args:
        finished: (B,) bool, the sampler's finish reason for the completion itself; the prompt's own stop tokens do not
        count.
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
    """(B,) what a completion loses as it nears the limit: Yu et al. 2025 (arXiv:2503.14476), DAPO.

    0 up to L = max_new_tokens - overlong_tokens, then (L - length) / overlong_tokens, -1 at the limit
    """
    if overlong_tokens == 0:
        return torch.zeros(lengths.shape, device=lengths.device)
    return ((max_new_tokens - overlong_tokens - lengths) / overlong_tokens).clamp(-1.0, 0.0)


def importance_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, action_mask: Tensor, *, correction: str, max_weight: float
) -> Tensor:
    """(B, T) what a token counts that another program, or an older policy, mu sampled: pi / mu, bounded; no gradient.

        token_truncate:     min(w, max_weight),           w = pi(token) / mu(token)
        token_mask:         w, and 0 where it is above max_weight
        sequence_truncate, sequence_mask: the same with the completion's ratio, the product of w over its tokens

    Truncated importance sampling, Ionides 2008. Multiplied to the advantages, E_mu[weight * A] = E_pi[A] but for what
    is cut: exactly with the sequence's ratio, whose variance grows with the length; to first order with the token's.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"off_policy.correction={correction!r} is unknown; use {', '.join(CORRECTIONS)}")
    log_ratio = torch.where(action_mask, logprobs - sampled_logprobs, 0.0).detach()
    of, how = correction.split("_")
    log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) if of == "sequence" else log_ratio
    weights = log_ratio.clamp(max=80.0).exp()  # e^89 passes float32
    bounded = weights.clamp(max=max_weight) if how == "truncate" else weights * (weights <= max_weight)
    return torch.where(action_mask, bounded, 0.0)


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


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor, kind: str, weights: Tensor | None = None
) -> Tensor:
    """() sum over completion tokens of the KL estimate: the penalty as a loss term (kl_in=loss).

    weights: (B, 1) what a token of each row counts; None: 1.

    It charges every state its own KL, but not an early token for leading to states of more KL: see docs/ppo.md.
    """
    estimate = kl_estimate(torch.where(completion_mask, logprobs - ref_logprobs, 0.0), kind)  # (B, T), 0 at 0
    return (estimate if weights is None else estimate * weights).sum()


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


class LinearKL(FixedKL):
    """A coefficient that goes from kl_coef to kl_coef_end along a line, in num_steps rollouts, and stays there."""

    def __init__(self, kl_coef: float, *, kl_coef_end: float, num_steps: int):
        super().__init__(kl_coef)
        self.start, self.end, self.num_steps, self.taken = kl_coef, kl_coef_end, num_steps, 0

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """A rollout is over."""
        self.taken += 1
        self._set()

    def state_dict(self) -> dict[str, float]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.taken = state.get("taken", 0)
        self._set()

    def _set(self) -> None:
        share = min(1.0, self.taken / self.num_steps)
        self.kl_coef = self.start + share * (self.end - self.start)


# ---- advantages with a value model


def gae_advantages(
    rewards: Tensor, values: Tensor, value_mask: Tensor, done: Tensor | None,
    *, gamma: float, gae_lambda: float, lambda_alpha: float | None,
) -> Tensor:  # fmt: skip
    """(B, T) GAE over the states that have a value, so that advantages + values = returns there.

    lambda_alpha: each row's lambda is 1 - 1 / (alpha length), at least 0: Yue et al. 2025 (arXiv:2504.05118, VAPO),
    so that a long completion's end still reaches its beginning. None: gae_lambda for all.
    """
    if lambda_alpha is not None:
        gae_lambda = (1 - 1 / (lambda_alpha * value_mask.sum(1).clamp_min(1))).clamp_min(0.0)
    return gae(rewards, values, value_mask, gamma=gamma, gae_lambda=gae_lambda, done=done)


# ---- advantages without one: every completion is compared with the others of its prompt, or with the whole rollout


def rloo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: a sequence's return minus its siblings' mean. Ahmadian et al. 2024 (arXiv:2402.14740), Eq. 7.

    Args:
        rewards: (B, T), KL penalty included, 0 off-mask. Rows of one prompt are consecutive. A row without an action
        is nobody's sibling.
    """
    returns, count = _groups(rewards, action_mask, samples_per_prompt)  # (P, K), (P, 1)
    baseline = (returns.nansum(1, keepdim=True) - returns) / (count - 1).clamp_min(1)
    return _spread(torch.where(count > 1, returns - baseline, 0.0), action_mask)


def grpo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: returns standardised within each prompt. Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.

    The paper scores without the KL and adds the KL to the loss: kl_in=loss with kl_estimator=k3. A group whose returns
    are all equal teaches nothing: its advantages are 0.
    """
    returns, count = _groups(rewards, action_mask, samples_per_prompt)  # (P, K), (P, 1)
    centered = returns - returns.nanmean(1, keepdim=True)
    std = (centered.square().nansum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return _spread(centered / (std + 1e-6), action_mask)


def dr_grpo(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: returns minus their group's mean. Liu et al. 2025 (arXiv:2503.20783), Dr. GRPO.

    Dividing by the deviation, as GRPO does, weighs questions by how hard they are; dividing by the length prefers short
    right answers and long wrong ones. The paper does neither (aggregation=sequence_sum). It is (K - 1) / K of RLOO.
    """
    returns, _ = _groups(rewards, action_mask, samples_per_prompt)  # (P, K)
    return _spread(returns - returns.nanmean(1, keepdim=True), action_mask)


def reinforce_pp(rewards: Tensor, action_mask: Tensor, *, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, T) advantages: returns to go, whitened over the rollout of all ranks. Hu 2025 (arXiv:2501.03262).

    REINFORCE++ compares with the whole rollout, so one sample of a prompt is enough, and its KL is in the reward.
    """
    to_go = torch.where(action_mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    return whiten(to_go, action_mask, mean, shift_mean=True)


def raft(rewards: Tensor, action_mask: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages: 1 for the best of each prompt's samples, 0 for the others: Dong et al. 2023 (2304.06767).

    On samples of the policy itself the gradient is that of SFT on the best: best-of-n SFT, a rollout at a time.
    A group whose returns are all equal teaches nothing.
    """
    returns, _ = _groups(rewards, action_mask, samples_per_prompt)  # (P, K)
    returns = returns.nan_to_num(nan=-torch.inf)
    best = torch.zeros_like(returns).scatter(1, returns.argmax(1, keepdim=True), 1.0)
    return _spread(torch.where(_differ(returns), best, 0.0), action_mask)


def online_dpo(rewards: Tensor, action_mask: Tensor, penalty: Tensor, *, samples_per_prompt: int) -> Tensor:
    """(B, T) advantages of DPO on the best and the worst of each prompt's samples: Guo et al. 2024 (arXiv:2402.04792).

        A = sigmoid(-m) for the best, -sigmoid(-m) for the worst, 0 for the others;   m = penalty(best) - penalty(worst)

    with penalty = beta (log pi - log ref) of a completion. The gradient of -log sigmoid(m) is -beta sigmoid(-m) (grad
    log pi(best) - grad log pi(worst)), so on the policy that sampled this is DPO's gradient over beta.

    Args:
        penalty: (B, T) kl_coef * (log pi - log ref), which `rewards` have lost; the best is chosen by the score alone.
    """
    scores, _ = _groups(rewards + penalty, action_mask, samples_per_prompt)  # (P, K)
    paid, _ = _groups(penalty, action_mask, samples_per_prompt)
    best = scores.nan_to_num(nan=-torch.inf).argmax(1, keepdim=True)
    worst = scores.nan_to_num(nan=torch.inf).argmin(1, keepdim=True)
    weight = torch.sigmoid(paid.gather(1, worst) - paid.gather(1, best))  # (P, 1)
    signs = torch.zeros_like(scores).scatter(1, best, 1.0).scatter(1, worst, -1.0)
    return _spread(torch.where(_differ(scores), weight * signs, 0.0), action_mask)


def _differ(returns: Tensor) -> Tensor:
    """(P, 1) whether two rows of a group, those left out aside, have different returns."""
    known = returns.isfinite()
    most, least = (returns.masked_fill(~known, fill) for fill in (-torch.inf, torch.inf))
    return most.amax(1, keepdim=True) > least.amin(1, keepdim=True)


def _groups(rewards: Tensor, action_mask: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """(P, K) returns, nan where a row is left out, and (P, 1) how many are not."""
    if samples_per_prompt < 2 or len(rewards) % samples_per_prompt:
        raise ValueError(
            f"advantages of a group compare the samples of a prompt: {len(rewards)} rows with samples_per_prompt="
            f"{samples_per_prompt}; use samples_per_prompt >= 2, or advantage=gae"
        )
    kept = action_mask.any(1)
    returns = torch.where(kept, rewards.sum(1), torch.nan).view(-1, samples_per_prompt)
    return returns, kept.view(-1, samples_per_prompt).sum(1, keepdim=True)


def _spread(advantages: Tensor, action_mask: Tensor) -> Tensor:
    return torch.where(action_mask, advantages.reshape(-1, 1), 0.0)


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


WITH_VALUES = {"gae": gae_advantages}  # a value model is trained for these
OF_GROUPS = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo, "raft": raft}
OF_PAIRS = {"online_dpo": online_dpo}
OF_ROLLOUTS = {"reinforce_pp": reinforce_pp}
ADVANTAGES = (*WITH_VALUES, *OF_GROUPS, *OF_PAIRS, *OF_ROLLOUTS)


def estimate_advantages(
    rewards: Tensor, values: Tensor, action_mask: Tensor, value_mask: Tensor, done: Tensor | None = None,
    *, kind: str, gamma: float, gae_lambda: float, samples_per_prompt: int, lambda_alpha: float | None = None,
    mean: Callable[[Tensor], Tensor] = lambda x: x, penalty: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(B, T) advantages of the named kind.

    Args:
        penalty: (B, T) kl_coef * KL, which the rewards have lost; None: nothing.
        done: (B, T) bool, the last state of each episode; None: a row is one episode.
        mean: averages a scalar tensor over ranks (`run.mean`).
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
    """() 1 - var(returns - values) / var(returns) over the states of all ranks: 1 = a perfect value model, <= 0 = none.

    Args:
        mean: averages a scalar tensor over ranks (`run.mean`).
    """
    errors, returns = (wide(torch.where(value_mask, x, 0.0)) for x in (returns - values, returns))  # (B, T)
    count = mean(wide(value_mask.sum()))
    variances = [mean(x.square().sum()) / count - (mean(x.sum()) / count).square() for x in (errors, returns)]
    return 1 - variances[0] / variances[1].clamp_min(1e-12)
