"""DPO and related losses: train a policy on comparisons, without a reward model and without sampling.

    python train_dpo.py policy=SFT_DIR data=hh_helpful                      pairs: prompt, chosen, rejected
    python train_dpo.py policy=SFT_DIR data.train=[FILES] loss=kto          rows rated good or bad; see conf/loss

Rafailov et al. 2023 (arXiv:2305.18290), section 4. docs/dpo.md says how details are done that the papers leave open.
The reference costs one forward per row. Its log-probs are cached on disk (model/ref_cache.py).
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.checks.gate import require_agreement
from data.encoded import check_window
from data.loader import micro_batches
from data.preference_batch import Batch, all_rows, collate, mismatched
from data.preferences import PreferenceGroup, check_margins, eval_groups, preference_loader
from data.prompts import encode_prompts
from data.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from data.view import show_first_batch
from evals.held_out_samples import HeldOutSamples, prompts_of_groups, prompts_of_items
from evals.watched import Watched
from kernels.backend import set_kernels
from losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    plackett_luce_loss,
    robust_dpo_loss,
    sft_loss,
    simpo_loss,
)
from model.build import export_model, load_policy, load_reward_model
from model.config import check_vocab
from model.experts import router_loss
from model.heads import Policy
from model.lora import AdaptersOff, add_lora, export_adapter
from model.packing import Rows, make_rows
from model.ref_cache import cached_logprobs, row_key, weights_digest
from runtime.config import check_choice, check_number, check_positive, check_training
from runtime.devices import send
from runtime.distributed import gathered
from runtime.metrics import masked
from runtime.optim import build_optimizer, clip_grads, set_lr
from runtime.run import Run, main

log = logging.getLogger(__name__)

USES = {  # loss -> the settings that it reads besides beta; the others must be 0
    "dpo": ("label_smoothing", "target_margin", "margin_coef"),
    "cdpo": ("label_smoothing", "target_margin", "margin_coef"),
    "robust": ("label_smoothing",),
    "ipo": (),
    "hinge": (),
    "simpo": ("target_margin",),
    "orpo": (),
    "cpo": ("label_smoothing",),
    "kto": (),
    "plackett_luce": (),
}
WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
OF_MEANS = ("simpo", "orpo")  # defined on log-probs per token


def train(cfg: DictConfig, run: Run) -> float:
    """Train a policy on comparisons. Returns the accuracy of its implicit reward, on held-out rows if there are any."""
    set_kernels(cfg.kernels)
    check_dpo(cfg, run.world_size)
    agreement = require_agreement(cfg.agreement, threshold=cfg.agreement_threshold, override=cfg.agreement_override)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.policy, template=cfg.data.template, date=cfg.data.date)

    # ---- the policy learns; the reference is one log-prob per row
    policy = load_policy(cfg.policy, precision=cfg.precision, frozen=cfg.lora.rank > 0)
    check_vocab(policy.config, tokenizer.vocab_size)
    policy.transformer.checkpointing = cfg.activation_checkpointing
    policy = run.shard(add_lora(policy, **cfg.lora, seed=cfg.seed))
    batches = preference_loader(
        cfg.data, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed, rank=run.rank, world_size=run.world_size
    )
    held_out = eval_groups(cfg.data, tokenizer, batches)
    check_groups(cfg, batches.items, held_out)
    check_margins(cfg.margin_coef, cfg.data, batches.items)
    sets = (batches.items, held_out) if cfg.loss == "kto" else ()
    kl_rows = {k: v for items in sets for k, v in mismatched(items, max_length=cfg.data.max_length).items()}
    held_out_samples = load_held_out_samples(cfg, run, policy, tokenizer, held_out or batches.items)
    check_window(policy.config.max_length, batches.items, held_out, list(kl_rows.values()))
    trained = batches.first(cfg.num_steps * cfg.batch_size)  # a short run may not reach all rows
    read = all_rows(itertools.chain(trained, held_out if cfg.eval_every else []), kl_rows)
    reference, ref_models = load_reference(cfg, run, policy, tokenizer, read)
    optimizer = build_optimizer(policy, cfg.optim)
    run.resume(policy=policy, optimizer=optimizer, batches=batches)
    show_first_batch(cfg.view, run, tokenizer, batches)
    if agreement is not None:
        run.terminal.say(agreement)

    def collate_all(groups: Sequence[PreferenceGroup]) -> list[Batch]:
        parts = micro_batches(groups, cfg.micro_batch_size)
        return [collate(part, reference, kl_rows, tokenizer.pad_id, run.device) for part in parts]

    def log_and_evaluate(step: int) -> None:
        with run.off_the_clock(), torch.no_grad(), gathered(policy, *ref_models):
            if held_out and run.due(cfg.eval_every, step):
                evaluate(cfg, run, policy, collate_all(held_out[run.rank :: run.world_size]))
            if run.due(cfg.sample_every, step):
                held_out_samples(policy, step)

    if run.step == 0:
        log_and_evaluate(step=0)
        run.log_metrics(step=0)
    while run.step < cfg.num_steps:
        lr = set_lr(optimizer, run.step, cfg.optim)
        parts = collate_all(next(batches))
        num_groups, num_tokens = count(run, parts)
        kl = reference_point(cfg, run, policy, parts)  # () nats, for KTO; 0 for other losses

        # ---- gradients, a few groups at a time
        step_loss, row_losses = 0.0, []
        for part in parts:
            logprobs = policy.logprobs(*part.rows)  # (b, T); the rows of a group share the prompt
            loss, metrics = objective(cfg, part, logprobs, kl, num_groups=num_groups, num_tokens=num_tokens)
            router, routed = router_loss(policy, share=1 / len(parts), **cfg.router)  # 0 without experts
            (loss + router).backward()
            step_loss += loss.detach()
            row_losses.append(-logprobs.detach().sum(1))
            run.metrics.add(metrics | routed)

        # ---- the step
        grad_norm = clip_grads(policy, cfg.optim.max_grad_norm)
        run.stop_if_not_finite(grad_norm, torch.cat(row_losses), [where for part in parts for where in part.where])
        optimizer.step()
        optimizer.zero_grad()
        run.metrics.add({"objective/loss": step_loss, "optim/lr": lr, "optim/grad_norm": grad_norm})
        log_and_evaluate(step=run.step + 1)
        run.end_step(num_tokens=sum(part.num_tokens for part in parts))

    export_model(policy, run.dir / "model", tokenizer)
    export_adapter(policy, run.dir / "adapter", cfg.policy)
    return run.finish("eval/accuracy" if held_out and cfg.eval_every else "rewards/accuracy")


# ---- the reference


def load_reference(
    cfg: DictConfig, run: Run, policy: Policy, tokenizer, rows: Iterable[dict]
) -> tuple[Callable, list[Policy]]:
    """(function (encoded rows, the same as Rows) -> (b,) nats of the reference, list of the models that it runs).

    The log-probs come from disk, from a second model, or are zeros.
    """
    if cfg.ref == "none":
        return lambda examples, batch: torch.zeros(len(examples), device=run.device), []
    path = cfg.ref_policy or cfg.policy

    def second_model() -> Policy:
        if load_tokenizer(path, template=cfg.data.template, date=cfg.data.date).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"ref_policy={path} has another vocabulary or chat template than policy={cfg.policy}")
        return ref_policy_of(policy, cfg, run)

    if cfg.ref == "live":
        model = AdaptersOff(policy) if cfg.lora.rank and cfg.ref_policy is None else second_model()
        return lambda examples, batch: total_logprobs(model, batch), [model]

    model = policy if cfg.ref_policy is None else second_model()  # equal before the first step

    def compute(examples: list[dict]) -> Tensor:
        log.info("reference log-probs: computing %d rows", len(examples))
        size = 2 * cfg.micro_batch_size
        parts = [examples[start : start + size] for start in range(0, len(examples), size)]
        return torch.cat([total_logprobs(model, make_rows(p, tokenizer.pad_id).to(run.device)) for p in parts])

    in_nf4 = model is policy and cfg.lora.base == "nf4"  # then the reference is quantised too
    precision = f"{cfg.precision} on nf4" if in_nf4 else cfg.precision
    with gathered(model):  # each rank computes its share of the missing rows
        table = cached_logprobs(
            compute,
            rows,
            directory=Path(cfg.ref_cache),
            weights=weights_digest(path),
            precision=precision,
            rank=run.rank,
            world_size=run.world_size,
        )
    return lambda examples, batch: send(torch.tensor([table[row_key(row)] for row in examples]), run.device), []


@torch.no_grad()
def total_logprobs(policy: Policy, rows: Rows) -> Tensor:
    """(b,) nats: the log-prob of each row's completion."""
    return policy.logprobs(*rows).sum(1)


def reference_point(cfg: DictConfig, run: Run, policy: Policy, parts: list[Batch]) -> Tensor:
    """() nats: KTO's z_0, the mean log-ratio of the mismatched rows of the whole step, at least 0; 0 for other losses.

    With average_logprobs it is in nats per token.
    """
    ratios = [
        (total_logprobs(policy, part.mismatched) - part.mismatched_ref_logprobs) / unit(cfg, part.mismatched)
        for part in parts
        if part.mismatched is not None
    ]
    zero = torch.zeros((), device=run.device)
    if cfg.loss != "kto":
        return zero
    total, count = run.mean(torch.stack([sum(map(torch.sum, ratios), zero), zero + sum(map(len, ratios))]))
    return (total / count.clamp(min=1)).clamp(min=0)


def ref_policy_of(policy: Policy, cfg: DictConfig, run: Run) -> Policy:
    """The reference as a model: ref_policy, or the policy before training, with LoRA the same weights without it."""
    if cfg.lora.rank and cfg.ref_policy is None:
        return AdaptersOff(policy)
    return run.shard(load_policy(cfg.ref_policy or cfg.policy, precision=cfg.precision, frozen=True))


# ---- the loss


def count(run: Run, parts: list[Batch]) -> tuple[Tensor, Tensor]:
    """The divisors of the objective: (groups, tokens of chosen completions), as means over ranks."""
    groups = sum(len(part.margins) for part in parts)
    tokens = sum(part.num_targets for part in parts)
    num_groups, num_tokens = run.mean(torch.tensor([float(groups), float(tokens)]))
    return num_groups, num_tokens.clamp(min=1)


def objective(
    cfg: DictConfig, part: Batch, logprobs: Tensor, kl: Tensor, *, num_groups: Tensor, num_tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The training objective: the preference loss per group + nll_coef * the NLL per token of chosen completions.

    Args:
        logprobs: (b, T) of the part's rows. num_groups, num_tokens: of the whole step, so that its parts add up.
    """
    loss, metrics = preference_loss(cfg, part, logprobs.sum(1), kl)
    nll, _ = sft_loss(logprobs[part.chosen_rows], part.rows.completion_mask[part.chosen_rows], num_tokens=num_tokens)
    return loss * len(part.margins) / num_groups + cfg.nll_coef * nll, metrics


def unit(cfg: DictConfig, rows: Rows) -> Tensor | int:
    """The divisor of a completion's log-prob: its number of tokens with average_logprobs, else 1."""
    return rows.completion_mask.sum(1) if cfg.average_logprobs else 1


def preference_loss(cfg: DictConfig, part: Batch, logprobs: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss named in the config, metrics), from (b,) log-probs of the part's rows. kl: from `reference_point`."""
    metrics = {
        "logprobs/chosen": masked(logprobs, part.is_chosen),
        "logprobs/rejected": masked(logprobs, ~part.is_chosen),
    }
    logprobs, ref_logprobs = (x / unit(cfg, part.rows) for x in (logprobs, part.ref_logprobs))
    if cfg.loss == "kto":
        loss, more = kto_loss(
            logprobs, ref_logprobs, part.is_chosen, kl, beta=cfg.beta,
            desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight,
        )  # fmt: skip
        return loss, metrics | more | {"objective/reference_point": kl}
    if cfg.loss == "plackett_luce":
        loss, more = plackett_luce_loss(logprobs, ref_logprobs, part.group_ids, part.ranks, beta=cfg.beta)
        return loss, metrics | more
    pair = (*logprobs.view(-1, 2).unbind(1), *ref_logprobs.view(-1, 2).unbind(1))  # rows alternate: chosen, rejected
    smoothing, margin = cfg.label_smoothing, cfg.target_margin + cfg.margin_coef * part.margins
    if cfg.loss in ("dpo", "cdpo"):
        loss, more = dpo_loss(*pair, beta=cfg.beta, label_smoothing=smoothing, target_margin=margin)
    elif cfg.loss == "cpo":
        loss, more = dpo_loss(*pair, beta=cfg.beta, label_smoothing=smoothing)
    elif cfg.loss == "robust":
        loss, more = robust_dpo_loss(*pair, beta=cfg.beta, label_smoothing=smoothing)
    elif cfg.loss == "ipo":
        loss, more = ipo_loss(*pair, beta=cfg.beta)
    elif cfg.loss == "hinge":
        loss, more = hinge_loss(*pair, beta=cfg.beta)
    elif cfg.loss == "simpo":
        loss, more = simpo_loss(*pair[:2], beta=cfg.beta, target_margin=cfg.target_margin)
    else:  # orpo
        loss, more = orpo_loss(*pair[:2], beta=cfg.beta)
    return loss, metrics | more


def evaluate(cfg: DictConfig, run: Run, policy: Policy, parts: list[Batch]) -> None:
    """Log the training objective, accuracy, margin and implicit rewards on held-out groups."""
    kl, total = reference_point(cfg, run, policy, parts), torch.zeros((), device=run.device)
    num_groups, num_tokens = count(run, parts)
    for part in parts:
        logprobs = policy.logprobs(*part.rows)  # (b, T)
        loss, metrics = objective(cfg, part, logprobs, kl, num_groups=num_groups, num_tokens=num_tokens)
        total += loss
        held_out = {
            name.replace("rewards/", "eval/").replace("logprobs/", "eval/logprobs_"): v for name, v in metrics.items()
        }
        held_out.pop("objective/reference_point", None)
        run.metrics.add(held_out)
    run.metrics.add({"eval/loss": total})


def load_held_out_samples(
    cfg: DictConfig, run: Run, policy: Policy, tokenizer: Tokenizer, groups: Sequence[PreferenceGroup]
) -> HeldOutSamples:
    """Samples for the prompts of data.prompts, or of the groups, with what measures them."""
    room = policy.config.max_length - cfg.sampling.max_new_tokens
    if cfg.sample_every and room < 1:
        raise ValueError(
            f"sampling.max_new_tokens={cfg.sampling.max_new_tokens} leaves no tokens for a prompt in the window of "
            f"{policy.config.max_length}; lower it, or set sample_every=0"
        )
    has_answers = bool(cfg.data.prompts and cfg.sample_every)
    watched = Watched(cfg.watch, run, seconds=cfg.reward_timeout, has_answers=has_answers)
    if cfg.data.prompts is None:
        prompts = prompts_of_groups(groups, tokenizer, num_prompts=cfg.num_prompts, max_length=room, seed=cfg.seed)
    else:
        encoded = encode_prompts("data.prompts", cfg.data.prompts, cfg.data, tokenizer, max_length=room)
        watched.check(encoded.items[: cfg.num_prompts])
        prompts = prompts_of_items(encoded.items[: cfg.num_prompts], seed=cfg.seed)
    reward_model = None
    if cfg.reward_model is not None:
        check_same_tokenizer(cfg.reward_model, tokenizer)
        reward_model = run.shard(load_reward_model(cfg.reward_model, precision=cfg.precision, frozen=True))
    return HeldOutSamples(
        run,
        tokenizer,
        prompts[run.rank :: run.world_size],
        load_reference=partial(ref_policy_of, cfg=cfg, run=run),
        reward_model=reward_model,
        watched=watched,
        sampling=cfg.sampling,
        micro_batch_size=cfg.micro_batch_size,
        num_samples=cfg.num_samples,
    )


# ---- checks


def check_dpo(cfg: DictConfig, world_size: int) -> None:
    """Raise ValueError where settings are wrong, before anything is loaded."""
    check_training(cfg, world_size)
    check_choice("loss", cfg.loss, tuple(USES))
    check_choice("ref", cfg.ref, ("cached", "live", "none"))
    check_positive(beta=cfg.beta)
    check_number(0, nll_coef=cfg.nll_coef, label_smoothing=cfg.label_smoothing)
    check_number(0, desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight)
    check_number(-math.inf, target_margin=cfg.target_margin, margin_coef=cfg.margin_coef)
    for key in ("label_smoothing", "target_margin", "margin_coef"):
        if cfg[key] and key not in USES[cfg.loss]:
            raise ValueError(f"loss={cfg.loss} has no {key}, but {key}={cfg[key]}; set it to 0")
    if cfg.label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing={cfg.label_smoothing} must lie in [0, 0.5): it is the share of wrong labels")
    if cfg.loss in WITHOUT_REFERENCE and cfg.ref != "none":
        raise ValueError(f"loss={cfg.loss} has no reference; say ref=none, not ref={cfg.ref}")
    if cfg.ref == "none" and cfg.ref_policy is not None:
        raise ValueError(f"ref=none does not read ref_policy={cfg.ref_policy}; leave one of them out")
    if cfg.loss in OF_MEANS and not cfg.average_logprobs:
        raise ValueError(f"loss={cfg.loss} is defined on log-probs per token; leave average_logprobs=true")


def check_groups(cfg: DictConfig, groups: Sequence[PreferenceGroup], held_out: Sequence[PreferenceGroup]) -> None:
    """Raise ValueError unless every group fits the loss, and KTO has good and bad completions."""
    ratings = set()  # of the training groups: True, False: rated good, bad; None: not rated
    for number, group in enumerate(itertools.chain(groups, held_out)):
        K, rated = len(group.rows), group.reward is not None
        if cfg.loss == "plackett_luce":
            fits, wants = K > 1, "rankings or pairs"
        elif cfg.loss == "kto":
            fits = group.is_good is not None if rated else K == 2 and not group.is_tie
            wants = "completions rated above or below 0.5, or pairs without ties"
        else:
            fits, wants = K == 2 and not group.is_tie, "pairs without ties (loss=plackett_luce takes rankings)"
        if not fits:
            kind = "a tie" if group.is_tie else f"{K} completions"
            kind = f"a rated completion ({group.reward:g})" if rated else kind
            raise ValueError(f"{group.where}: loss={cfg.loss} wants {wants}, this is {kind}")
        if number < len(groups):
            ratings.add(group.is_good if rated else None)
    if cfg.loss == "kto" and ratings in ({True}, {False}):
        kind = "good" if True in ratings else "bad"
        raise ValueError(
            f"loss=kto tells good completions from bad ones, but all {len(groups)} are rated {kind}: "
            f"it would only {'raise' if kind == 'good' else 'lower'} every probability; add rows of the other kind"
            + (", or train_sft.py on these" if kind == "good" else "")
        )


if __name__ == "__main__":
    main(train, "train_dpo")
