"""Every training objective, written in torch, with its equation. Each function returns the loss and unreduced metrics.

Conventions:
    Column t of a (B, T) tensor is about token t.
    Masks are bool. True means that the token counts.
    A loss is a sum divided by the number of tokens, groups or pairs of the whole optimizer step (`num_*`). Where ranks
    average their gradients, `num_*` is the mean over ranks. So the micro-batch size and the padding change nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import check_agreement, use_triton
from kernels.clips import Clips
from runtime.devices import any_on_host
from runtime.metrics import Mean, masked, wide

# ---- supervised fine-tuning


def sft_loss(
    logprobs: Tensor, completion_mask: Tensor, *, num_tokens: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood per target token: -sum_t log pi(y_t | before) / num_tokens.

    Args:
        logprobs: (B, T) nats. completion_mask: (B, T) bool, the targets.
        num_tokens: targets of the whole optimizer step.
    Returns:
        loss: (); metrics: the mean loss per target.
    Raises:
        ValueError: a row has no target.
    """
    _check_mask(completion_mask, logprobs=logprobs)
    if any_on_host(~completion_mask.any(1)):
        rows = (~completion_mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} have no target token; drop them, or raise data.max_length")
    nll = torch.where(completion_mask, -logprobs, 0.0)  # (B, T)
    return nll.sum() / num_tokens, {"objective/loss": masked(nll, completion_mask)}


# ---- reward model


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    weights: Tensor,
    margins: Tensor,
    ties: Tensor,
    *,
    center_coef: float,
    num_groups: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry loss over all pairs of each group: Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1.

        loss = sum_p w_p [-log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2] / num_groups,   w_p = 1 / C(K, 2)

    A group is one prompt with K ranked completions. A plain comparison has K = 2 and w = 1. The margin m is Llama 2's
    (arXiv:2307.09288, Eq. 2). c pulls the mean score to 0 (Eisenstein et al. 2023, arXiv:2312.09244). The loss of a tie
    is the mean of both directions, without a margin, so it is smallest at equal scores.

    Args:
        chosen_scores, rejected_scores: (P,). weights: (P,), which sum to 1 within a group.
        margins: (P,) in score units. ties: (P,) bool.
        num_groups: prompts of the whole optimizer step.
    Returns:
        loss: (); metrics: score differences (P,), and the mean accuracy over the pairs that are not ties.
    Raises:
        ValueError: shapes differ or center_coef < 0.
    """
    shapes = [tuple(x.shape) for x in (chosen_scores, rejected_scores, weights, margins, ties)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"reward_loss wants five (P,) tensors, got {shapes}")
    if center_coef < 0:
        raise ValueError(f"center_coef={center_coef} must be >= 0; it weighs (r_w + r_l)^2")
    difference = chosen_scores - rejected_scores  # (P,)
    decided = -F.logsigmoid(difference - margins)
    tied = -0.5 * (F.logsigmoid(difference) + F.logsigmoid(-difference))
    nll = torch.where(ties, tied, decided)
    loss = (weights * (nll + center_coef * (chosen_scores + rejected_scores).square())).sum() / num_groups
    return loss, {"rewards/margin": difference.detach(), "rewards/accuracy": masked((difference > 0).float(), ~ties)}


def pointwise_reward_loss(
    scores: Tensor, labels: Tensor, *, center_coef: float, num_groups: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logistic loss on human rewards: sum [-y log sigmoid(r) - (1 - y) log sigmoid(-r) + c r^2] / num_groups.

    Args:
        scores: (B,) logits of "this completion is good". labels: (B,) in [0, 1].
        num_groups: rows of the whole optimizer step.
    Returns:
        loss: (); metrics: the mean accuracy over the rows whose label is not 0.5.
    Raises:
        ValueError: shapes differ, or a label lies outside [0, 1].
    """
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"pointwise_reward_loss wants two (B,) tensors, got {scores.shape}, {labels.shape}")
    if any_on_host((labels < 0) | (labels > 1)):
        raise ValueError(f"labels must lie in [0, 1], got {labels.min():.3g} to {labels.max():.3g}")
    nll = F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    loss = (nll + center_coef * scores.square()).sum() / num_groups
    decided = labels != 0.5  # a label of 1/2 means neither good nor bad
    return loss, {"rewards/accuracy": masked(((scores > 0) == (labels > 0.5)).float(), decided)}


# ---- preferences: from log-probs of whole completions, stop token included, to a mean over pairs or rows


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float | Tensor,
    label_smoothing: float,
    target_margin: float | Tensor = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO: Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; smoothing is cDPO, Mitchell 2023, Eq. 3.

        margin = beta [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))]
        loss   = -(1 - eps) log sigmoid(margin - m) - eps log sigmoid(m - margin)

    m > 0 is the offset of ODPO (Amini et al. 2024, arXiv:2402.10571). With log-probs averaged over tokens this is
    length-normalised DPO. With reference log-probs of 0 it is CPO (Xu et al. 2024, arXiv:2401.08417), and with averaged
    ones it is SimPO.

    Args:
        *_logprobs: (B,) nats, summed over the tokens of a completion, or averaged in the variants above.
        beta: > 0, a number or (B,) per pair. A large beta keeps the policy near the reference.
        label_smoothing: eps in [0, 0.5), the share of pairs that are assumed to be mislabelled.
        target_margin: m, a number or (B,), in the unit of the margin.
    Returns:
        loss: (); metrics: (B,) tensors, detached and unreduced. All pair losses return the same metrics.
    Raises:
        ValueError: shapes differ, or beta or label_smoothing is out of range.
    """
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    margin, metrics = _margin(*pair, beta=beta, label_smoothing=label_smoothing)
    kept, flipped = F.logsigmoid(margin - target_margin), F.logsigmoid(target_margin - margin)
    return -((1 - label_smoothing) * kept + label_smoothing * flipped).mean(), metrics


def robust_dpo_loss(*pair: Tensor, beta: float | Tensor, label_smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's loss, unbiased where a share eps of the labels is flipped: Chowdhury et al. 2024 (arXiv:2403.00409).

        loss = [-(1 - eps) log sigmoid(margin) + eps log sigmoid(-margin)] / (1 - 2 eps)

    pair: the four tensors of `dpo_loss`.
    """
    margin, metrics = _margin(*pair, beta=beta, label_smoothing=label_smoothing)
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    return -((1 - label_smoothing) * kept - label_smoothing * flipped).mean() / (1 - 2 * label_smoothing), metrics


def ipo_loss(*pair: Tensor, beta: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """IPO: Azar et al. 2023 (arXiv:2310.12036), Eq. 17: (margin / beta - 1 / (2 beta))^2; beta is the paper's tau.

    pair: the four tensors of `dpo_loss`. Log-probs averaged over tokens make the loss independent of the length.
    """
    margin, metrics = _margin(*pair, beta=beta)
    return ((margin - 0.5) / beta).square().mean(), metrics


def hinge_loss(*pair: Tensor, beta: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """max(0, 1 - margin) with DPO's margin: Liu et al. 2023 (arXiv:2309.06657). pair: as in `dpo_loss`."""
    margin, metrics = _margin(*pair, beta=beta)
    return F.relu(1 - margin).mean(), metrics


def simpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, *, beta: float, target_margin: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """SimPO: Meng et al. 2024 (arXiv:2405.14734), Eq. 6: -log sigmoid(beta (mean_w - mean_l) - gamma).

    It needs no reference policy.

    Args:
        *_means: (B,) nats per token. target_margin: the paper's gamma.
    """
    none = torch.zeros_like(chosen_means)
    pair = (chosen_means, rejected_means, none, none)
    return dpo_loss(*pair, beta=beta, label_smoothing=0.0, target_margin=target_margin)


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The odds-ratio term of ORPO: Hong et al. 2024 (arXiv:2403.07691), Eq. 7. The other term is `sft_loss` on y_w.

        loss = -beta log sigmoid(log odds(y_w) - log odds(y_l)),   log odds = mean - log(1 - exp(mean))

    Args:
        *_means: (B,) nats per token, at most 0. A probability of 1 would have infinite odds, so probabilities are
            clamped to 1 - eps, where eps is the machine epsilon of the dtype.
        beta: the paper's lambda.
    """
    none = torch.zeros_like(chosen_means)
    _, metrics = _margin(chosen_means, rejected_means, none, none, beta=beta)
    most = -torch.finfo(chosen_means.dtype).eps
    chosen_odds, rejected_odds = (
        means - torch.log(-torch.expm1(means.clamp(max=most))) for means in (chosen_means, rejected_means)
    )
    return -beta * F.logsigmoid(chosen_odds - rejected_odds).mean(), metrics


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """KTO: Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 7, on single completions marked good or bad.

        loss = mean of w [1 - sigmoid(s beta (log pi - log ref - KL))],   s = 1 where desirable, else -1

    Args:
        logprobs, ref_logprobs: (B,) nats. desirable: (B,) bool.
        kl: () nats, max(0, mean of log pi - log ref over the step's mismatched rows). It gets no gradient.
    Returns:
        loss: (); metrics: the mean implicit reward of desirable and of undesirable rows.
    Raises:
        ValueError: shapes differ, or `desirable` is not bool.
    """
    shapes = [tuple(x.shape) for x in (logprobs, ref_logprobs, desirable)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or desirable.dtype != torch.bool:
        raise ValueError(f"kto_loss wants two (B,) tensors and a (B,) bool mask, got {shapes}, {desirable.dtype}")
    rewards = beta * (logprobs - ref_logprobs)
    gain = (rewards - beta * kl.detach()) * torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    metrics = {"rewards/chosen": masked(rewards, desirable), "rewards/rejected": masked(rewards, ~desirable)}
    return (weights * torch.sigmoid(-gain)).mean(), metrics


def plackett_luce_loss(
    logprobs: Tensor, ref_logprobs: Tensor, group_ids: Tensor, ranks: Tensor, *, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """K-wise DPO under Plackett-Luce: Rafailov et al. 2023, Eq. 20. With K = 2 it equals `dpo_loss`.

        loss = mean over groups of sum_k [log sum_{j not above k} exp(r_j) - r_k],   r = beta (log pi - log ref)

    Args:
        logprobs, ref_logprobs: (B,) nats, the K completions of every prompt. group_ids: (B,).
        ranks: (B,), 0 is best. Each of several tied completions is in the others' sums (Breslow's rule).
    Returns:
        loss: (); metrics: means over all ordered pairs of a group.
    """
    rewards = beta * (logprobs - ref_logprobs)  # (B,)
    same = group_ids[:, None] == group_ids
    above = ranks[:, None] < ranks  # (B, B): row k is ranked above column j
    rivals = torch.where(same & ~above.T, rewards, float("-inf")).logsumexp(1)
    num_groups = 1 + (group_ids.sort().values.diff() != 0).sum()
    pairs = _reward_metrics(rewards[:, None].expand_as(same), rewards[None, :].expand_as(same))
    return (rivals - rewards).sum() / num_groups, {name: masked(x, same & above) for name, x in pairs.items()}


# ---- PPO


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, score_mask: Tensor, *, kl_coef: float) -> Tensor:
    """(B, T) rewards: the score at the end of each row, minus the KL penalty on every token.

    Ziegler et al. 2019 (arXiv:1909.08593), Eq. 2: R = r(x, y) - beta log(pi(y|x) / rho(y|x)), spread over tokens.

    Args:
        scores: (B,). kl: (B, T) nats per token, log pi_old - log pi_ref.
        score_mask: (B, T) bool. The score goes to its last True column: the end of the completion (score_position=eos),
            or one state later (after_eos).
        kl_coef: score units per nat. 0 where the KL penalty is a loss term.
    Raises:
        ValueError: a completion is empty.
    """
    _check_mask(completion_mask, kl=kl)
    _check_mask(score_mask, kl=kl)
    B, T = kl.shape
    columns = torch.arange(T, device=kl.device).expand(B, T)
    last = columns.masked_fill(~score_mask, -1).amax(1, keepdim=True)  # (B, 1)
    if any_on_host(last < 0):
        raise ValueError(f"rows {(last < 0).flatten().nonzero().flatten().tolist()} have an empty completion")
    rewards = torch.where(completion_mask, -kl_coef * kl, 0.0)
    return rewards + torch.where(columns == last, scores.to(rewards.dtype)[:, None], 0.0)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    dual_clip: float | None,
    num_tokens: Tensor | float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate: Schulman et al. 2017 (arXiv:1707.06347), Eq. 7, with the sign of a loss.

        ratio = exp(log pi - log pi_old);   loss = sum_t max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)) / num_tokens

    Args:
        logprobs, old_logprobs: (B, T) nats. advantages: (B, T). completion_mask: (B, T) bool.
        clip_range: eps. clip_range_high: another eps for the upper bound, so that unlikely tokens can grow (Yu et al.
            2025, arXiv:2503.14476, Eq. 10, DAPO's clip-higher: 0.28 with 0.2). None means the same eps.
        dual_clip: c > 1 bounds the loss of a token with A < 0 by -A c (Ye et al. 2020, arXiv:1912.09729, Eq. 5).
        num_tokens: completion tokens of the whole optimizer step, or the count that `aggregation` returns.
    Returns:
        loss: (); metrics: means over the masked tokens. approx_kl is (log ratio)^2 / 2.
    Raises:
        ValueError: shapes or dtypes differ, or a clip is out of range.
    """
    _check_mask(completion_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _clips(clip_range, clip_range_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be null or > 1")
    log_ratio = torch.where(completion_mask, logprobs - old_logprobs, 0.0)  # (B, T)
    advantages = torch.where(completion_mask, advantages, 0.0)
    bounded = log_ratio.clamp(max=80.0)  # exp would overflow to inf, and its gradient is nan even where it is clipped
    ratio = (torch.where(advantages < 0, log_ratio, bounded) if dual_clip is None else bounded).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss.sum() / num_tokens, _policy_metrics(loss, log_ratio, clipped > unclipped, ratio, completion_mask)


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    num_tokens: Tensor | float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: Zheng et al. 2025 (arXiv:2507.18071), Eqs. 5 and 7. A completion has one ratio, clipped like PPO's.

        s = exp(mean over t of log pi - log pi_old),   loss = sum_t max(-A s, -A clip(s, 1 - eps, 1 + eps)) / num_tokens

    The paper uses aggregation=sequence_mean, clip_range 3e-4 and clip_range_high 4e-4.
    """
    _check_mask(completion_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _clips(clip_range, clip_range_high)
    log_ratio = torch.where(completion_mask, logprobs - old_logprobs, 0.0)  # (B, T)
    mean = log_ratio.sum(1, keepdim=True) / completion_mask.sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(completion_mask, mean.expand_as(log_ratio), 0.0)  # (B, T)
    advantages = torch.where(completion_mask, advantages, 0.0)
    ratio = torch.where(advantages < 0, mean, mean.clamp(max=80.0)).exp()  # see ppo_policy_loss
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    loss = torch.maximum(unclipped, clipped)
    return loss.sum() / num_tokens, _policy_metrics(loss, log_ratio, clipped > unclipped, ratio, completion_mask)


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_range: float,
    num_tokens: Tensor | float,
    clip_range_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: MiniMax 2025 (arXiv:2506.13585). REINFORCE with clipped importance weights: no token loses its gradient.

        loss = -sum_t stop_gradient(clip(ratio, 1 - eps, 1 + eps)) A log pi / num_tokens

    The paper bounds the weight only from above: set clip_range=1 and clip_range_high.
    """
    _check_mask(completion_mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _clips(clip_range, clip_range_high)
    logprobs, advantages = (torch.where(completion_mask, x, 0.0) for x in (logprobs, advantages))  # (B, T)
    log_ratio = torch.where(completion_mask, logprobs.detach() - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    loss = -ratio.clamp(low, high) * advantages * logprobs
    clipped = (ratio < low) | (ratio > high)
    return loss.sum() / num_tokens, _policy_metrics(loss, log_ratio, clipped, ratio, completion_mask)


def aggregation(completion_mask: Tensor, kind: str, *, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """(B, 1) weight of each row's tokens, and (B,) what each row adds to the divisor of the loss.

        kind            weight              added to the divisor
        token           1                   tokens of the row (DAPO, Eq. 12)
        sequence_mean   1 / tokens of row   1 (GRPO, Eq. 3, and GSPO, Eq. 5)
        sequence_sum    1                   max_new_tokens (Dr. GRPO's constant length)

    The weights multiply the advantages, since the policy losses are proportional to them.
    """
    lengths = completion_mask.sum(1).float()
    ones, rows = torch.ones_like(lengths), (lengths > 0).float()
    weights = {"token": ones, "sequence_mean": 1 / lengths.clamp_min(1), "sequence_sum": ones}
    counts = {"token": lengths, "sequence_mean": rows, "sequence_sum": rows * max_new_tokens}
    if kind not in weights:
        raise ValueError(f"aggregation={kind!r} is unknown; use {', '.join(weights)}")
    return weights[kind][:, None], counts[kind]


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    value_mask: Tensor,
    *,
    clip_range: float | None,
    num_tokens: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value regression, as in the code of Ziegler et al. 2019. clip_range=None is plain regression.

        loss = 1/2 sum_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / num_tokens

    Args:
        values, old_values, returns: (B, T) score units. value_mask: (B, T) bool, the states that have a value.
        num_tokens: states with a value in the whole optimizer step.
    Returns:
        loss: (); metrics: means over the masked states.
    """
    _check_mask(value_mask, values=values, old_values=old_values, returns=returns)
    if clip_range is not None and clip_range <= 0:
        raise ValueError(f"value_clip_range={clip_range} must be null or > 0")
    values, old_values, returns = (torch.where(value_mask, x, 0.0) for x in (values, old_values, returns))  # (B, T)
    error = (values - returns).square()
    if clip_range is None:
        loss, was_clipped = 0.5 * error, torch.zeros_like(error)
    else:
        clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
        loss, was_clipped = 0.5 * torch.maximum(error, clipped), (clipped > error).float()
    metrics = {"value/loss": loss, "value/clip_fraction": was_clipped}
    return loss.sum() / num_tokens, {name: masked(value, value_mask) for name, value in metrics.items()}


PolicyLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
POLICY_LOSSES: dict[str, PolicyLoss] = {"clip": ppo_policy_loss, "gspo": gspo_loss, "cispo": cispo_loss}


class PolicyTerms(NamedTuple):
    """What a policy loss reads."""

    logprobs: Tensor  # (B, T) nats
    old_logprobs: Tensor  # (B, T) nats
    advantages: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T) bool


class ValueTerms(NamedTuple):
    """What the value loss reads."""

    values: Tensor  # (B, T)
    old_values: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    value_mask: Tensor  # (B, T) bool


def ppo_loss(
    policy: PolicyTerms,
    value: ValueTerms,
    clips: Clips,
    *,
    num_tokens: Tensor | float,
    num_states: Tensor | float,
    policy_loss: str = "clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss named `policy_loss` + clips.value_coef * ppo_value_loss, and the metrics of both.

    On a GPU `clip` runs as one fused kernel forward and one backward. On the first minibatch of a run its results are
    compared with those of the definitions.

    Args:
        num_tokens, num_states: divisors of the policy loss and of the value loss, of the whole optimizer step.
    """
    settings = {"clip_range": clips.policy, "clip_range_high": clips.policy_high, "num_tokens": num_tokens}
    settings |= {"dual_clip": clips.dual} if policy_loss == "clip" else {}

    def by_definition(policy: tuple, value: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = POLICY_LOSSES[policy_loss](*policy, **settings)
        value_loss, value_metrics = ppo_value_loss(*value, clip_range=clips.value, num_tokens=num_states)
        return loss + clips.value_coef * value_loss, metrics | value_metrics

    if policy_loss == "clip" and use_triton(policy.logprobs):
        from kernels.ppo import ppo_triton

        def by_kernel(policy: tuple, value: tuple) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
            return ppo_triton(*policy, *value, clips=clips, num_tokens=num_tokens, num_states=num_states)

        check_agreement("losses.py", lambda: _both_results(by_kernel, by_definition, policy, value))
        loss, sums = by_kernel(policy, value)
        return loss, {name: Mean(wide(total), count) for name, (total, count) in sums.items()}
    return by_definition(policy, value)


def _both_results(by_kernel, by_definition, policy: PolicyTerms, value: ValueTerms) -> list[tuple[Tensor, Tensor]]:
    """The loss and its gradients to log-probs and values: pairs of the kernel's tensor and the definition's."""
    results = []
    for loss_of in (by_kernel, by_definition):
        logprobs, values = (x.detach().clone().requires_grad_() for x in (policy.logprobs, value.values))
        loss, _ = loss_of((logprobs, *policy[1:]), (values, *value[1:]))
        results.append((loss, *torch.autograd.grad(loss, (logprobs, values))))
    return list(zip(*results, strict=True))


# ---- checks


def _check_mask(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, got {mask.dtype}; pass `mask.bool()`")
    for name, x in tensors.items():
        if x.shape != mask.shape or x.ndim != 2:
            raise ValueError(f"{name} {tuple(x.shape)} and its mask {tuple(mask.shape)} must be (B, T) alike")


def _clips(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """The lower and the upper bound of the ratio. Raises ValueError where a clip is not positive."""
    high = clip_range if clip_range_high is None else clip_range_high
    if clip_range <= 0 or high <= 0:
        raise ValueError(f"need clip_range > 0 and clip_range_high null or > 0, got {clip_range=}, {clip_range_high=}")
    return 1 - clip_range, 1 + high


def _policy_metrics(
    loss: Tensor, log_ratio: Tensor, clipped: Tensor, ratio: Tensor, completion_mask: Tensor
) -> dict[str, Mean]:
    """The metrics of every policy loss: means over the completion tokens of (B, T) tensors."""
    figures = {"loss": loss, "approx_kl": 0.5 * log_ratio.square(), "clip_fraction": clipped.float(), "ratio": ratio}
    return {f"policy/{name}": masked(value, completion_mask) for name, value in figures.items()}


def _margin(chosen, rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0) -> tuple[Tensor, dict]:
    shapes = [tuple(x.shape) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"preference losses want four (B,) tensors of sequence log-probs, got {shapes}")
    if any_on_host(torch.as_tensor(beta) <= 0) or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"need beta > 0 and 0 <= label_smoothing < 0.5, got {beta=}, {label_smoothing=}")
    chosen_rewards = beta * (chosen - ref_chosen)  # (B,) implicit reward, Rafailov et al. Eq. 5 up to a constant
    rejected_rewards = beta * (rejected - ref_rejected)
    return chosen_rewards - rejected_rewards, _reward_metrics(chosen_rewards, rejected_rewards)


def _reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    margin = chosen_rewards - rejected_rewards
    metrics = {"chosen": chosen_rewards, "rejected": rejected_rewards, "margin": margin, "accuracy": margin > 0}
    return {f"rewards/{name}": value.detach().to(margin.dtype) for name, value in metrics.items()}
