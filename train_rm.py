"""Reward model: one number per completion, from people's comparisons, rankings or 0/1 rewards.

    python train_rm.py policy=SFT_DIR data=hh_helpful
    python train_rm.py model=tiny model.vocab_size=2048 data=movie_ratings      weights and tokenizer from scratch

Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1. The K completions of a prompt are one preference group. The loss is over
all its C(K, 2) pairs, and costs K forwards that share the prompt. Settings: conf/train_rm.yaml, docs/reward_model.md.
"""

import itertools
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.chat import cut_prompt
from data.checks.gate import require_agreement
from data.encoded import check_window
from data.loader import micro_batches
from data.preferences import PreferenceGroup, check_margins, eval_groups, preference_loader, preference_texts
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from data.view import show_first_batch
from evals.rm_accuracy import check_measurable, evaluate_reward_model, score_preferences
from kernels.backend import set_kernels
from losses import pointwise_reward_loss, reward_loss
from model.build import export_model, load_policy, load_reward_model, new_reward_model, open_weights
from model.config import check_vocab, make_config
from model.experts import router_loss
from model.heads import RewardModel
from model.lora import add_lora, export_adapter
from model.packing import make_rows
from model.sampling import generate
from runtime.config import check_choice, check_number, check_policy_or_model, check_training, check_whole
from runtime.devices import send
from runtime.distributed import gathered
from runtime.optim import build_optimizer, clip_grads, set_lr
from runtime.run import Run, main


def train(cfg: DictConfig, run: Run) -> float:
    """Train a reward model on comparisons or ratings. Returns its held-out accuracy or AUC, else the loss."""
    set_kernels(cfg.kernels)
    check_reward(cfg, run.world_size)
    note = require_agreement(cfg.agreement, threshold=cfg.agreement_threshold, override=cfg.agreement_override)

    # ---- one network, its optimizer, its data
    tokenizer, reward_model = load(cfg)
    reward_model.transformer.checkpointing = cfg.activation_checkpointing
    reward_model = run.shard(reward_model)
    optimizer = build_optimizer(reward_model, cfg.optim)
    batches = preference_loader(
        cfg.data, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed, rank=run.rank, world_size=run.world_size
    )
    held_out = eval_groups(cfg.data, tokenizer, batches)
    check_kinds(batches.items, held_out)
    check_liked(cfg, batches.items)
    check_margins(cfg.margin_coef, cfg.data, batches.items)
    check_window(reward_model.config.max_length, batches.items, held_out)
    run.resume(reward_model=reward_model, optimizer=optimizer, batches=batches)
    show_first_batch(cfg.view, run, tokenizer, batches)
    if note is not None:
        run.terminal.say(note)

    if run.step == 0:
        log_and_evaluate(cfg, run, reward_model, tokenizer, held_out, step=0)
        run.log_metrics(step=0)
    while run.step < cfg.num_steps:
        lr = set_lr(optimizer, run.step, cfg.optim)
        batch, row_sums, places = next(batches), [], []
        num_groups = run.mean(torch.tensor(float(len(batch))))

        # ---- gradients, a few groups at a time
        for part in micro_batches(batch, cfg.micro_batch_size):
            rows = make_rows([row for group in part for row in group.rows], tokenizer.pad_id).to(run.device)
            scores = reward_model.score(*rows)  # (b,)
            loss, metrics = group_loss(scores, part, cfg, num_groups)
            router, routed = router_loss(reward_model, share=len(part) / len(batch), **cfg.router)  # 0 without experts
            (loss + router).backward()
            run.metrics.add(metrics | routed)
            row_sums.append(scores.detach())
            places += [group.where for group in part for _ in group.rows]

        # ---- the step
        grad_norm = clip_grads(reward_model, cfg.optim.max_grad_norm)
        run.stop_if_not_finite(grad_norm, torch.cat(row_sums), places)
        optimizer.step()
        optimizer.zero_grad()
        run.metrics.add({"optim/lr": lr, "optim/grad_norm": grad_norm})
        log_and_evaluate(cfg, run, reward_model, tokenizer, held_out, step=run.step + 1)
        run.end_step(num_tokens=sum(len(row["input_ids"]) for group in batch for row in group.rows))

    export_model(reward_model, run.dir / "model", tokenizer)  # before anything else can fail
    if normalise(cfg, run, reward_model, tokenizer, batches.items):
        export_model(reward_model, run.dir / "model", tokenizer)
    export_adapter(reward_model, run.dir / "adapter", cfg.policy)
    rated = batches.items[0].reward is not None
    return run.finish(("eval/auc" if rated else "eval/accuracy") if held_out and cfg.eval_every else "objective/loss")


def load(cfg: DictConfig) -> tuple[Tokenizer, RewardModel]:
    """(tokenizer, reward model) from a policy or reward model, or with random weights.

    With random weights the tokenizer is `cfg.tokenizer`, or it is trained here.
    """
    if cfg.policy is not None:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.policy, template=cfg.data.template, date=cfg.data.date)
        frozen = cfg.lora.rank > 0
        reward_model = load_reward_model(cfg.policy, precision=cfg.precision, frozen=frozen, seed=cfg.seed)
        check_vocab(reward_model.config, tokenizer.vocab_size)
        return tokenizer, add_lora(reward_model, **cfg.lora, seed=cfg.seed)
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(cfg.tokenizer, template=cfg.data.template, date=cfg.data.date)
    elif cfg.model.vocab_size is None:
        raise ValueError(
            "model= starts from nothing: say model.vocab_size=2048 to train a tokenizer, or tokenizer=PATH"
        )
    else:
        with TemporaryDirectory() as directory:  # the export writes it where it belongs
            texts = preference_texts(cfg.data)
            tokenizer = train_sentencepiece(texts, cfg.model.vocab_size, directory)
    config = make_config(cfg.model, tokenizer.vocab_size)
    return tokenizer, new_reward_model(config, seed=cfg.seed, precision=cfg.precision)


def check_reward(cfg: DictConfig, world_size: int) -> None:
    """Raise ValueError where settings are wrong, before anything is loaded."""
    check_training(cfg, world_size)
    check_policy_or_model(cfg)
    check_choice("normalise", cfg.normalise, ("none", "reference_mean", "gain_bias"))
    check_whole(1, normalise_samples=cfg.normalise_samples)
    check_number(0, center_coef=cfg.center_coef, margin_coef=cfg.margin_coef)
    if cfg.normalise == "gain_bias":
        check_policy_can_answer(cfg)


def check_policy_can_answer(cfg: DictConfig) -> None:
    """Raise ValueError now where normalise=gain_bias could not sample from the policy after training."""
    if cfg.policy is None:
        raise ValueError(
            "normalise=gain_bias scores samples of the policy, but policy=null; use none or reference_mean"
        )
    weights = open_weights(cfg.policy)
    if weights.kind != "policy":
        raise ValueError(f"normalise=gain_bias samples from the policy, but {cfg.policy} holds a {weights.kind} model")
    if cfg.sampling.max_new_tokens >= weights.config.max_length:
        raise ValueError(
            f"sampling.max_new_tokens={cfg.sampling.max_new_tokens} leaves no room for a prompt in the policy's window "
            f"of {weights.config.max_length}; lower it"
        )


def check_kinds(training: Sequence[PreferenceGroup], held_out: Sequence[PreferenceGroup]) -> None:
    """Raise ValueError unless both sets are of one kind (ratings or comparisons) and data.eval can be measured."""
    if held_out and (training[0].reward is None) != (held_out[0].reward is None):
        raise ValueError("data.train and data.eval differ in kind (comparisons, rated completions); give files of one")
    if held_out:
        check_measurable(held_out)


def check_liked(cfg: DictConfig, groups: Sequence[PreferenceGroup]) -> None:
    """Raise ValueError where normalise=reference_mean would have no completion that people liked."""
    if cfg.normalise == "reference_mean" and not any(map(is_liked, groups)):
        kind = "ratings is above 0.5" if groups[0].reward is not None else "comparisons has a better side"
        raise ValueError(
            f"normalise=reference_mean sets the mean score of completions that people liked to 0, but none of the "
            f"{len(groups)} {kind}; use normalise=none or gain_bias, or add such rows"
        )


def group_loss(
    scores: Tensor, groups: list[PreferenceGroup], cfg: DictConfig, num_groups: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of some groups of a step.

    Args:
        scores: (b,) of the groups' rows, in their order. num_groups: groups of the whole step.
    """
    if groups[0].reward is not None:
        labels = send(torch.tensor([group.reward for group in groups]), scores.device)
        loss, metrics = pointwise_reward_loss(scores, labels, center_coef=cfg.center_coef, num_groups=num_groups)
    else:
        better, worse, weights, margins, ties = group_pairs(groups, cfg.margin_coef, scores.device)
        loss, metrics = reward_loss(
            scores[better],
            scores[worse],
            weights,
            margins,
            ties,
            center_coef=cfg.center_coef,
            num_groups=num_groups,
        )
    mean_loss = (loss.detach() * num_groups / len(groups)).expand(len(groups))  # weighted by the number of groups
    return loss, metrics | {"objective/loss": mean_loss, "objective/score": scores.detach()}


def group_pairs(groups: list[PreferenceGroup], margin_coef: float, device) -> tuple[Tensor, ...]:
    """All C(K, 2) pairs of each group: (P,) better row, worse row, weight 1 / C(K, 2), margin, tie."""
    pairs, first = [], 0
    for group in groups:
        K = len(group.rows)
        for i, j in itertools.combinations(range(K), 2):  # rows are sorted, best first
            tie = group.ranks[i] == group.ranks[j]
            pairs.append((first + i, first + j, 2 / (K * (K - 1)), margin_coef * group.margin, tie))
        first += K
    better, worse, weights, margins, ties = zip(*pairs, strict=True)
    return tuple(send(torch.tensor(column), device) for column in (better, worse, weights, margins, ties))


@torch.no_grad()
def log_and_evaluate(
    cfg: DictConfig,
    run: Run,
    reward_model: RewardModel,
    tokenizer: Tokenizer,
    held_out: list[PreferenceGroup],
    *,
    step: int,
) -> None:
    """Log held-out figures and draw the calibration plot, when due. Every rank scores the whole set, which is small."""
    if not held_out or not run.due(cfg.eval_every, step):
        return
    with run.off_the_clock():
        scores = score_preferences(
            reward_model.score,
            held_out,
            pad_id=tokenizer.pad_id,
            micro_batch_size=cfg.micro_batch_size,
            device=run.device,
        )
        plot = run.dir / "calibration.png" if run.is_main and step else None
        objective, _ = group_loss(torch.tensor(np.concatenate(scores)), held_out, cfg, torch.tensor(len(held_out)))
        run.metrics.add(evaluate_reward_model(held_out, scores, plot=plot) | {"eval/loss": objective})


@torch.no_grad()
def normalise(
    cfg: DictConfig, run: Run, reward_model: RewardModel, tokenizer: Tokenizer, groups: Sequence[PreferenceGroup]
) -> bool:
    """Set the model's gain and shift, so that kl_coef means the same for every reward model. Returns whether it did.

    reference_mean: completions that people preferred get mean score 0 (Huang et al. 2024, arXiv:2403.17031).
    gain_bias: samples of the policy get mean 0 and standard deviation 1 (Ziegler et al. 2019, section 2.1).
    """
    if cfg.normalise == "none":
        return False
    if cfg.normalise == "reference_mean":
        numbers = [number for number, group in enumerate(groups) if is_liked(group)]
        rows = [groups[number].rows[0] for number in subsample(numbers, cfg.normalise_samples)]
    else:
        rows = policy_samples(cfg, run, tokenizer, groups)
    parts = [
        make_rows(rows[i : i + cfg.micro_batch_size], tokenizer.pad_id)
        for i in range(0, len(rows), cfg.micro_batch_size)
    ]
    scores = torch.cat([reward_model.score(*part.to(run.device)) for part in parts])
    deviation = scores.std(correction=0).clamp_min(1e-6) if cfg.normalise == "gain_bias" else torch.ones_like(scores[0])
    reward_model.gain.div_(deviation)
    reward_model.shift.sub_(scores.mean()).div_(deviation)
    run.terminal.say(
        f"normalise={cfg.normalise}: {len(scores)} scores had mean {scores.mean():.4f}, deviation {scores.std():.4f}"
    )
    return True


def is_liked(group: PreferenceGroup) -> bool:
    """Whether people preferred the group's first completion or rated it good. In a tie nobody preferred one."""
    return not group.is_tie if group.reward is None else bool(group.is_good)


def subsample(things: Sequence, count: int) -> Sequence:
    """At most `count` of the things, evenly spaced, because files are not in random order."""
    return things[:: max(1, len(things) // count)][:count]


def policy_samples(cfg: DictConfig, run: Run, tokenizer: Tokenizer, groups: Sequence[PreferenceGroup]) -> list[dict]:
    """Rows of completions that the policy samples for prompts of the training set."""
    policy = run.shard(load_policy(cfg.policy, precision=cfg.precision, frozen=True))
    room = policy.config.max_length - cfg.sampling.max_new_tokens
    prompts = []
    for group in subsample(groups, cfg.normalise_samples):
        row = group.rows[0]
        ids = row["input_ids"][~row["completion_mask"]].tolist()
        prompts.append(cut_prompt(ids, tokenizer, max_length=room))
    with gathered(policy):
        answers = generate(
            policy,
            prompts,
            **cfg.sampling,
            stop_ids=tokenizer.stop_ids,
            seeds=[cfg.seed + i for i in range(len(prompts))],
            pad_id=tokenizer.pad_id,
        )
    rows = answers.rows
    return [
        {"input_ids": ids[real].tolist(), "completion_mask": mask[real].tolist()}
        for ids, real, mask in zip(*rows[:3], strict=True)
    ]


if __name__ == "__main__":
    main(train, "train_rm")
