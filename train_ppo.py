"""PPO: a policy from a reward, with the KL to where it started as the price.

    python train_ppo.py policy=SFT_DIR reward_model=RM_DIR data.prompts=[FILES]
    python train_ppo.py policy=SFT_DIR reward_fn=my_rewards.py:exact_match data.prompts=[FILES]

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
Every variant is a setting of conf/train_ppo.yaml, explained in docs/ppo.md; it lives in a function that the loop calls.
"""

import math
import time

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from advantages import (
    AdaptiveKL,
    FixedKL,
    clip_scores,
    estimate_advantages,
    explained_variance,
    kl_estimate,
    kl_loss,
    missing_eos,
    whiten,
)  # fmt: skip
from data.encoded import warn_of_overlap
from data.engine import LocalEngine, ServerEngine, correct_for_sampler, load_engine
from data.loader import Loader
from data.pretraining import PretrainingMix
from data.prompts import encode_prompts, prompt_loader
from data.rewards import Scorer, check_same_tokenizer, load_reward_function
from data.rollout import in_parts, row_seeds, value_states
from data.tokenizer import Tokenizer, load_tokenizer
from evals.rollouts import credit_samples, evaluate_policy, print_credit, warn_about
from kernels.backend import set_kernels
from losses import ppo_loss, token_rewards
from model.build import export_model, load_policy, load_reward_model, load_value_model
from model.config import check_vocab
from model.ema import WeightAverage
from model.heads import Policy
from model.lora import Reference, add_lora, export_adapter, value_on
from model.packing import Rows
from runtime.config import check_batch, check_choice, check_number, check_positive, check_whole
from runtime.devices import PRECISIONS
from runtime.optim import build_optimizer, clip_grads, set_lr
from runtime.run import Run, main


def train(cfg: DictConfig, run: Run) -> float:
    set_kernels(cfg.kernels)
    check_ppo(cfg, run.world_size)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.policy, template=cfg.data.template, date=cfg.data.date)
    size, temperature, K = cfg.micro_batch_size, cfg.sampling.temperature, cfg.samples_per_prompt

    # ---- four networks; two of them learn
    policy, ref_policy = load_policies(cfg, run)
    value_model = load_values(cfg, run, policy)  # starts as the reward model
    score = load_scorer(cfg, run, tokenizer, policy)
    learners = {"policy": policy} | ({"value": value_model} if cfg.advantage == "gae" else {})
    lr_scales = [1.0, cfg.optim.value_lr / cfg.optim.lr][: len(learners)]
    optimizer = build_optimizer(learners.values(), cfg.optim, lr_scales=lr_scales)
    pretraining, average = PretrainingMix(cfg, run, tokenizer, policy.config), WeightAverage(policy, cfg.ema_decay)
    engine, controller = load_engine(cfg.engine, cfg.sampling, tokenizer, run.dir / "engine"), kl_controller(cfg)
    prompts, held_out = load_prompts(cfg, run, tokenizer, policy, score)
    state = {"policy": policy, "value_model": value_model, "optimizer": optimizer, "prompts": prompts}
    run.resume(**state, pretraining=pretraining, average=average, controller=controller)

    if run.step == 0:
        evaluate_policy(cfg, run, policy, ref_policy, tokenizer, score, held_out, step=0)
    while run.step < cfg.num_steps:
        lr, started = set_lr(optimizer, run.step, cfg.optim), time.perf_counter()
        kl_coefs = {place: controller.kl_coef if cfg.kl_in == place else 0.0 for place in ("reward", "loss")}

        # ---- 1. rollout: the policy answers a batch of prompts, everyone reads the answers
        batch = [prompt for prompt in next(prompts) for _ in range(K)]
        with torch.no_grad():
            rollout, states, finished, drawn_logprobs = answer(cfg, run, policy, engine, batch)
            mask, value_mask = rollout.completion_mask, states.completion_mask  # (B, T) bool
            old_logprobs, entropy = in_parts(policy.logprobs_and_entropy, rollout, size, temperature=temperature)
            ref_logprobs = in_parts(ref_policy.logprobs, rollout, size, temperature=temperature)  # (B, T)
            old_values = in_parts(value_model, states, size)  # (B, T)
            scores = score(rollout, batch)  # (B,)
        rolled_out = time.perf_counter()

        # ---- 2. reward: the score at the end, minus kl_coef * KL on every token; then who deserves it
        kl = kl_estimate(old_logprobs - ref_logprobs, "k1")  # (B, T) nats
        rewards = token_rewards(final_scores(scores, finished, cfg), kl, mask, value_mask, kl_coef=kl_coefs["reward"])
        paid = whiten(rewards, value_mask, run.mean, shift_mean=False) if cfg.whiten_rewards else rewards  # (B, T)
        kind = {"kind": cfg.advantage, "gamma": cfg.gamma, "gae_lambda": cfg.gae_lambda, "samples_per_prompt": K}
        advantages = estimate_advantages(paid, old_values, mask, value_mask, **kind)  # (B, T)
        returns = advantages + old_values  # (B, T)
        advantages = whiten(advantages, mask, run.mean, shift_mean=True) if whitens(cfg) else advantages
        advantages, weights = correct_for_sampler(advantages, old_logprobs, drawn_logprobs, mask, cfg.engine)

        # ---- 3. what a person would want to know of it
        run.metrics.add({
            "objective/score": scores, "objective/rewards": rewards.sum(1), "objective/kl": kl.sum(1),
            "objective/entropy": entropy[mask], "objective/length": mask.sum(1), "objective/truncated": ~finished,
            "value/explained_variance": explained_variance(returns, old_values, value_mask, run.mean),
            "optim/lr": lr, "objective/kl_coef": kl_coefs[cfg.kl_in], **weights,
        })  # fmt: skip
        credit = {"reward": rewards, "kl": kl, "value": old_values, "advantage": advantages}
        warn_about(scores, finished, cfg, run)
        look(cfg, run, policy, ref_policy, tokenizer, rollout, finished, scores, credit)
        controller.update(run.mean(kl.sum(1).mean()).item(), num_sequences=cfg.batch_size * K)

        # ---- 4. a few epochs of clipped updates on the same rollout
        learning = time.perf_counter()
        shares = {"epochs": cfg.ppo_epochs, "size": cfg.minibatch_size, "samples_per_prompt": K}
        for index, minibatch in enumerate(run.minibatches(len(mask), **shares)):
            num_tokens, num_states = (run.mean(m[minibatch].sum().float()) for m in (mask, value_mask))
            minibatch, row_sums, ratios = minibatch.sort().values, [], []  # siblings stay neighbours: one prompt
            for rows in minibatch.split(size):
                logprobs = policy.logprobs(*rollout.select(rows), temperature=temperature)  # (b, T)
                values = value_model(*states.select(rows))  # (b, T)
                loss, metrics = ppo_loss(
                    logprobs, old_logprobs[rows], advantages[rows], mask[rows],
                    values, old_values[rows], returns[rows], value_mask[rows],
                    clip_range=cfg.clip_range, dual_clip=cfg.dual_clip, value_clip_range=cfg.value_clip_range,
                    value_coef=cfg.value_coef, num_tokens=num_tokens, num_states=num_states,
                )  # fmt: skip
                kl_penalty = kl_loss(logprobs, ref_logprobs[rows], mask[rows], cfg.kl_estimator) / num_tokens
                (loss + kl_coefs["loss"] * kl_penalty).backward()
                run.metrics.add(metrics)
                ratios.append((logprobs.detach() - old_logprobs[rows])[mask[rows]].exp())
                row_sums.append(logprobs.detach().sum(1) + values.detach().sum(1))
            pretraining.add_gradients(policy)
            norms = {name: clip_grads(model, cfg.optim.max_grad_norm) for name, model in learners.items()}
            norm = torch.stack(list(norms.values())).sum()  # not finite where one is not
            run.stop_if_not_finite(norm, torch.cat(row_sums), [batch[i]["where"] for i in minibatch.tolist()])
            optimizer.step()
            optimizer.zero_grad()
            average.update(policy)
            run.metrics.add({f"{name}/grad_norm": norm for name, norm in norms.items()} | first_ratio(ratios, index))
        run.metrics.add(speeds(cfg, run, rollout, rolled_out - started, time.perf_counter() - learning))
        with average.swapped_in(policy):  # what is exported is what is evaluated
            evaluate_policy(cfg, run, policy, ref_policy, tokenizer, score, held_out, step=run.step + 1)
        run.end_step(num_tokens=int(rollout.attention_mask.sum()))

    with average.swapped_in(policy):  # the average is the result where ema_decay asks for one
        export_model(policy, run.dir / "model", tokenizer)
        export_adapter(policy, run.dir / "adapter", cfg.policy)
    return run.finish("eval/score" if held_out and cfg.eval_every else "objective/score")


# ---- what the loop calls besides equations


def answer(
    cfg: DictConfig, run: Run, policy: Policy, engine: LocalEngine | ServerEngine, batch: list[dict]
) -> tuple[Rows, Rows, Tensor, Tensor | None]:
    """One completion per prompt: Rows of the actions, Rows of the states that have a value, (B,) bool who stopped.

    Last, (B, T) the log-probs that a server drew them with; None where the policy itself drew.
    """
    K = cfg.samples_per_prompt
    numbers = [(i // K * run.world_size + run.rank) * K + i % K for i in range(len(batch))]  # among all ranks' rows
    rows, finished, logprobs = engine.sample(policy, batch, seeds=row_seeds(cfg.seed, run.step, numbers))
    settings = {"score_position": cfg.score_position, "max_new_tokens": cfg.sampling.max_new_tokens}
    return *value_states(rows, finished, **settings), finished, logprobs


def whitens(cfg: DictConfig) -> bool:
    """Whether advantages are whitened: only gae's, as a group's are on a scale of their own, and 0 where all agree."""
    return cfg.advantage == "gae" and cfg.whiten_advantages is not False


def final_scores(scores: Tensor, finished: Tensor, cfg: DictConfig) -> Tensor:
    """(B,) what the scores become before they are paid: clipped, then the rule for missing stop tokens."""
    clipped = clip_scores(scores, cfg.reward_clip)
    return missing_eos(clipped, finished, mode=cfg.missing_eos, value=cfg.missing_eos_value)


def first_ratio(ratios: list[Tensor], index: int) -> dict[str, Tensor]:
    """The ratio farthest from 1 on a rollout's first minibatch, where nothing has been learned yet: it must be 1."""
    ratio = torch.cat(ratios)
    return {"policy/ratio_first": ratio[(ratio - 1).abs().argmax()]} if index == 0 else {}


def speeds(cfg: DictConfig, run: Run, rollout: Rows, rollout_seconds: float, train_seconds: float) -> dict[str, float]:
    """Tokens per second of all ranks: sampled ones while rolling out, real ones of each epoch while learning."""
    sampled, real = (int(m.sum()) * run.world_size for m in (rollout.completion_mask, rollout.attention_mask))
    return {
        "perf/rollout_tokens_per_second": sampled / rollout_seconds,
        "perf/train_tokens_per_second": real * cfg.ppo_epochs / train_seconds,
    }


@torch.no_grad()
def look(
    cfg: DictConfig, run: Run, policy: Policy, ref_policy: Policy, tokenizer: Tokenizer,
    rollout: Rows, finished: Tensor, scores: Tensor, credit: dict[str, Tensor],
) -> None:  # fmt: skip
    """What a person would want to see of this step: warnings, the exact KL, samples, the viewer; each when due."""
    with run.off_the_clock():
        if run.due(cfg.kl_exact_every):
            settings = {"temperature": cfg.sampling.temperature}
            exact = in_parts(
                lambda *rows: policy.exact_kl(ref_policy, *rows, **settings), rollout, cfg.micro_batch_size
            )
            run.metrics.add({"objective/kl_exact": exact.sum(1)})
        if run.due(cfg.sample_every):
            run.log_samples(credit_samples(rollout, tokenizer, finished, scores, credit, count=cfg.num_samples))
        if cfg.view and run.step == 0:
            print_credit(rollout, tokenizer, scores, credit, run.terminal.say)


# ---- setting up


def check_ppo(cfg: DictConfig, world_size: int) -> None:
    """Settings that cannot be meant, before anything is loaded."""
    counts = ("num_steps", "batch_size", "samples_per_prompt", "ppo_epochs", "num_prompts", "keep_last")
    check_whole(1, **{key: cfg[key] for key in counts})
    counts = ("seed", "save_every", "eval_every", "sample_every", "kl_exact_every", "num_samples")
    check_whole(0, **{key: cfg[key] for key in counts})  # 0 = never, or none
    check_batch(cfg.minibatch_size, cfg.micro_batch_size, world_size, "minibatch_size")
    check_batch(cfg.batch_size * cfg.samples_per_prompt, cfg.minibatch_size, 1, "batch_size * samples_per_prompt")
    check_positive(optim__lr=cfg.optim.lr, optim__value_lr=cfg.optim.value_lr, clip_range=cfg.clip_range)
    clips = ("value_clip_range", "reward_clip", "dual_clip")
    check_positive(**{key: cfg[key] for key in clips if cfg[key] is not None})
    check_number(0, **{key: cfg[key] for key in ("kl_coef", "ptx_coef", "value_coef", "gamma", "gae_lambda")})
    check_number(-math.inf, missing_eos_value=cfg.missing_eos_value, sampling__temperature=cfg.sampling.temperature)
    check_choice("precision", cfg.precision, PRECISIONS)
    check_choice("score_position", cfg.score_position, ("eos", "after_eos"))
    check_choice("missing_eos", cfg.missing_eos, ("replace", "subtract", "none"))
    check_choice("kl_in", cfg.kl_in, ("reward", "loss"))
    check_choice("kl_controller", cfg.kl_controller, ("fixed", "adaptive"))
    check_choice("advantage", cfg.advantage, ("gae", "rloo", "grpo"))
    check_choice("value_start", cfg.value_start, ("reward_model", "policy"))
    allowed = {"reward": ("k1",), "loss": ("k2", "k3")}[cfg.kl_in]
    if cfg.kl_estimator not in allowed:
        raise ValueError(
            f"kl_estimator={cfg.kl_estimator} with kl_in={cfg.kl_in}: as a reward only k1 has the gradient of the KL, "
            f"as a loss k1 has none and k2 the right one; use {' or '.join(allowed)}"
        )
    if cfg.advantage != "gae" and cfg.samples_per_prompt < 2:
        raise ValueError(f"advantage={cfg.advantage} compares samples of a prompt; set samples_per_prompt to 2 or more")
    if cfg.sampling.temperature <= 0 or cfg.sampling.top_k or cfg.sampling.top_p != 1:
        raise ValueError(
            "PPO samples from the policy itself: sampling.temperature > 0, sampling.top_k=0, sampling.top_p=1; with "
            "anything else the log-probs belong to another distribution, and the KL can come out negative"
        )
    if cfg.advantage != "gae" and cfg.whiten_advantages:
        raise ValueError(
            f"whiten_advantages=true with advantage={cfg.advantage}: completions are compared within their group, and "
            "whitening over all groups would teach something from one whose scores are equal; leave it at null"
        )
    if cfg.dual_clip is not None and not cfg.dual_clip > 1:
        raise ValueError(f"dual_clip={cfg.dual_clip} must be null or above 1: it bounds the ratio where A < 0")
    if cfg.data.ptx and not cfg.ptx_coef:
        raise ValueError("data.ptx would not be read, as ptx_coef=0; give it a weight (InstructGPT 27.8) or no files")
    if cfg.gamma > 1 or cfg.gae_lambda > 1:
        raise ValueError(f"gamma={cfg.gamma} and gae_lambda={cfg.gae_lambda} are discounts and must lie in [0, 1]")


def kl_controller(cfg: DictConfig) -> FixedKL:
    """The coefficient of the KL penalty, fixed or steered to a target."""
    if cfg.kl_controller == "fixed":
        return FixedKL(cfg.kl_coef)
    target, num_sequences = cfg.kl_target_nats_per_sequence, cfg.batch_size * cfg.samples_per_prompt
    horizon = 5 * num_sequences if cfg.kl_horizon is None else cfg.kl_horizon
    check_positive(kl_target_nats_per_sequence=target, kl_horizon=horizon)
    if num_sequences >= 5 * horizon:  # the formula moves by at most 0.2 * num_sequences / horizon at once
        raise ValueError(
            f"kl_horizon={horizon} lets one rollout of {num_sequences} completions take kl_coef below 0; "
            f"set it above {num_sequences / 5:g}"
        )
    return AdaptiveKL(cfg.kl_coef, target_nats_per_sequence=target, horizon=horizon)


class NoValues(nn.Module):
    """The value model of advantage=rloo|grpo, which have baselines of their own: 0 everywhere, nothing to learn."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        return torch.zeros(input_ids.shape, device=input_ids.device)


def load_policies(cfg: DictConfig, run: Run) -> tuple[Policy, nn.Module]:
    """The policy that learns, and the one it must stay close to: with LoRA the same weights, without the adapters."""
    if cfg.lora.rank:
        policy = load_policy(cfg.policy, precision=cfg.precision, frozen=True)
        policy = run.shard(checkpointed(add_lora(policy, **cfg.lora, seed=cfg.seed), cfg))
        return policy, Reference(policy)
    policy = run.shard(checkpointed(load_policy(cfg.policy, precision=cfg.precision), cfg))
    return policy, run.shard(load_policy(cfg.policy, precision=cfg.precision, frozen=True))


def checkpointed(model: nn.Module, cfg: DictConfig) -> nn.Module:
    """The model, which computes each layer again in the backward pass where activation_checkpointing says so."""
    model.transformer.checkpointing = cfg.activation_checkpointing
    return model


def load_values(cfg: DictConfig, run: Run, policy: Policy) -> nn.Module:
    """The value model: the reward model's weights and head, or the policy's and a zero head (also without a model)."""
    if cfg.advantage != "gae":
        return NoValues()
    start = cfg.reward_model if cfg.value_start == "reward_model" else None
    if start is None and cfg.lora.rank and cfg.dist.strategy == "single":  # FSDP2 gives a weight to one model only
        return run.shard(checkpointed(add_lora(value_on(policy), **cfg.lora, seed=cfg.seed + 1), cfg))
    value_model = load_value_model(start or cfg.policy, precision=cfg.precision, frozen=cfg.lora.rank > 0)
    if start is None:
        nn.init.zeros_(value_model.head.weight)  # as Ziegler et al. 2019's code: no opinion before the first return
    return run.shard(checkpointed(add_lora(value_model, **cfg.lora, seed=cfg.seed + 1), cfg))


def load_scorer(cfg: DictConfig, run: Run, tokenizer: Tokenizer, policy: Policy) -> Scorer:
    """What gives the reward, checked against the policy."""
    check_vocab(policy.config, tokenizer.vocab_size)
    reward_model = None
    if cfg.reward_model is not None:
        check_same_tokenizer(cfg.reward_model, tokenizer)
        reward_model = run.shard(load_reward_model(cfg.reward_model, precision=cfg.precision, frozen=True))
    specs = [cfg.reward_fn] if isinstance(cfg.reward_fn, str) else list(cfg.reward_fn or [])
    functions = [load_reward_function(spec) for spec in specs]
    return Scorer(reward_model, functions, cfg.reward_weights, tokenizer, micro_batch_size=cfg.micro_batch_size)


def load_prompts(
    cfg: DictConfig, run: Run, tokenizer: Tokenizer, policy: Policy, score: Scorer
) -> tuple[Loader, list[dict]]:
    """Rollout prompts and held-out ones, which leave room for max_new_tokens in the smallest window."""
    windows = [model.config.max_length for model in (policy, score.reward_model) if model is not None]
    room = min(windows) - cfg.sampling.max_new_tokens
    settings = {"batch_size": cfg.batch_size, "seed": cfg.seed, "rank": run.rank, "world_size": run.world_size}
    prompts = prompt_loader(cfg.data, tokenizer, max_length=room, **settings)
    if not cfg.data.eval:
        return prompts, []
    held_out = encode_prompts("data.eval", cfg.data.eval, cfg.data, tokenizer, max_length=room)
    warn_of_overlap(prompts, held_out)
    return prompts, held_out.items[: cfg.num_prompts]


if __name__ == "__main__":
    main(train, "train_ppo")
