"""PPO: train a policy on a reward, with a penalty on the KL to the reference policy.

    python train_ppo.py policy=SFT_DIR reward_model=RM_DIR data.prompts=[FILES]
    python train_ppo.py policy=SFT_DIR reward=math data.prompts=[FILES]
    python train_ppo.py policy=SFT_DIR reward=[my_rewards.py:kind,{name:length,weight:0.1}] data.prompts=[FILES]

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
Every variant is a setting of conf/train_ppo.yaml, explained in docs/ppo.md, and a function that the loop calls.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from advantages import (
    WITH_VALUES,
    AdaptiveKL,
    FixedKL,
    LinearKL,
    clip_scores,
    estimate_advantages,
    explained_variance,
    kl_estimate,
    kl_loss,
    missing_eos,
    overlong_penalty,
    whiten,
)
from data.encoded import warn_of_overlap
from data.loader import Loader
from data.prompts import encode_prompts, prompt_loader
from data.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from data.view import show_first_batch
from kernels.backend import set_kernels
from kernels.clips import Clips
from losses import PolicyTerms, ValueTerms, aggregation, ppo_loss, token_rewards
from model.build import export_model, load_policy, load_reward_model, load_value_model
from model.config import check_vocab
from model.ema import WeightAverage
from model.experts import router_loss
from model.heads import Policy
from model.lora import AdaptersOff, add_lora, export_adapter, value_on
from model.packing import Stream
from rollouts.engine import Engine, load_sampler
from rollouts.environment import load_environment
from rollouts.evaluate import Evaluation
from rollouts.monitor import Monitor
from rollouts.parts import of_actions, of_states
from rollouts.ppo_settings import check_ppo, check_served_adapter
from rollouts.pretraining import PretrainingMix, pretraining_loader
from rollouts.rewards import Scorer
from rollouts.sampling import draw
from rollouts.sources import Source, check_columns, read_sources
from rollouts.trajectory import Part, Trajectory
from rollouts.values import ValueEpochs
from rollouts.viewer import credit_samples, print_credit, warn_about
from runtime.config import check_positive
from runtime.devices import send
from runtime.metrics import masked
from runtime.optim import build_optimizer, clip_grads, set_lr
from runtime.run import Run, main


def train(cfg: DictConfig, run: Run) -> float:
    """Train a policy on rewards of what it samples. Returns the mean score, of held-out prompts where there are any."""
    set_kernels(cfg.kernels)
    check_ppo(cfg, run.world_size)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.policy, template=cfg.data.template, date=cfg.data.date)
    size, temperature, K = cfg.micro_batch_size, cfg.sampling.temperature, cfg.samples_per_prompt
    clips = clip_ranges(cfg)

    # ---- four networks; two of them learn
    policy, ref_policy = load_policies(cfg, run, tokenizer)
    value_model = load_values(cfg, run, policy)  # starts as the reward model
    score, engine = load_scorer(cfg, run, tokenizer, policy), load_engine(cfg, run, tokenizer, policy)
    learners = {"policy": policy} | ({"value": value_model} if cfg.advantage in WITH_VALUES else {})
    optimizer = build_optimizer([policy, value_model], cfg.optim, lr_scales=[1.0, cfg.optim.value_lr / cfg.optim.lr])
    pretraining, average = load_pretraining(cfg, run, tokenizer, policy), WeightAverage(policy, cfg.ema_decay)
    controller, value_epochs, monitor = kl_controller(cfg), own_epochs(cfg), load_monitor(cfg, run, tokenizer)
    prompts, evaluation = load_prompts(cfg, run, tokenizer, engine, score, monitor)
    state = {"policy": policy, "value_model": value_model, "optimizer": optimizer, "prompts": prompts, "score": score}
    run.resume(**state, pretraining=pretraining, average=average, controller=controller, monitor=monitor, engine=engine)
    show_first_batch(cfg.view, run, tokenizer, prompts, pretraining.loader)
    if run.step == 0:
        evaluation.measure(policy, ref_policy, step=0)
    while run.step < cfg.num_steps:
        lr, started = set_lr(optimizer, run.step, cfg.optim), time.perf_counter()
        kl_coefs = {place: controller.kl_coef if cfg.kl_in == place else 0.0 for place in ("reward", "loss")}

        # ---- 1. rollout: the policy samples completions, and all four networks read them
        with torch.no_grad():
            rollout, source_rewards = draw(run, engine, policy, prompts, score, K, cfg.dynamic_sampling)  # (B, T)
            parts = rollout.parts(size)
            old_logprobs, entropy = of_actions(policy.logprobs_and_entropy, parts, temperature=temperature)
            ref_logprobs = of_actions(ref_policy.logprobs, parts, temperature=temperature)  # (B, T)
            old_values = of_states(value_model, parts)  # (B, T)

        # ---- 2. rewards: those of the sources minus kl_coef * KL on every token; then advantages
        rolled_out, kl = time.perf_counter(), kl_estimate(old_logprobs - ref_logprobs, "k1")  # (B, T) nats
        rewards = shape_rewards(source_rewards, kl, rollout, cfg, kl_coef=kl_coefs["reward"])  # (B, T)
        run.metrics.add(rollout_figures(rollout, source_rewards, rewards, kl, entropy) | score.figures(rollout))
        warn_about(rollout, source_rewards.sum(1), run.step, cfg.missing_eos, cfg.missing_eos_value)
        rollout.leave_out(unlearnable(rollout, cfg))
        mask, value_mask = rollout.action_mask, rollout.value_mask  # (B, T) bool
        advantages = give_credit(rewards, old_values, kl_coefs["reward"] * kl, rollout, cfg, run.mean)  # (B, T)
        returns = advantages + old_values  # (B, T)
        advantages = whiten(advantages, mask, run.mean, shift_mean=True) if whitens(cfg) else advantages
        advantages, old_logprobs, sampled = engine.correct(advantages, old_logprobs, rollout, cfg.off_policy)

        # ---- 3. metrics, samples, KL controller
        run.metrics.add({"value/explained_variance": explained_variance(returns, old_values, value_mask, run.mean)})
        run.metrics.add({"optim/lr": lr, "objective/kl_coef": controller.kl_coef} | sampled | monitor.figures(rollout))
        log_exact_kl(cfg, run, policy, ref_policy, parts)
        credit = {"reward": rewards, "kl": kl, "value": old_values, "advantage": advantages}
        log_credit(cfg, run, tokenizer, rollout, source_rewards.sum(1), credit)
        controller.update(run.mean(kl.sum(1).mean()).item(), num_sequences=cfg.batch_size * K)

        # ---- 4. a few epochs of clipped updates on the same rollout
        learning = time.perf_counter()
        value_epochs.update(run, value_model, optimizer, rollout, old_values, returns)  # if there are any
        weights, counts = aggregation(mask, cfg.aggregation, max_new_tokens=cfg.sampling.max_new_tokens)
        for index, minibatch in enumerate(run.minibatches(len(mask), cfg.ppo_epochs, cfg.minibatch_size, K)):
            minibatch, row_sums, ratios = minibatch.sort().values, [], []  # rows of a prompt stay consecutive
            some = send(minibatch, run.device)
            num_tokens, num_states = (run.mean(n[some].sum().float()).clamp_min(1) for n in (counts, value_mask))
            for part in map(rollout.part, minibatch.split(size)):
                rows, weight = part.index, weights[part.index]
                logprobs, entropy = read_policy(policy, part, cfg)  # (b, T)
                values = value_model(*part.states)  # (b, T)
                loss, metrics = ppo_loss(
                    PolicyTerms(logprobs, old_logprobs[rows], weight * advantages[rows], mask[rows]),
                    ValueTerms(values, old_values[rows], returns[rows], value_mask[rows]),
                    clips, num_tokens=num_tokens, num_states=num_states, policy_loss=cfg.policy_loss,
                )  # fmt: skip
                kl_penalty = penalty(cfg, policy, ref_policy, part, logprobs, ref_logprobs[rows], weight) / num_tokens
                bonus = cfg.entropy_coef * (weight * entropy).sum() / num_tokens
                router, routed = router_loss(policy, value_model, share=len(rows) / len(minibatch), **cfg.router)
                (loss + kl_coefs["loss"] * kl_penalty - bonus + router).backward()
                run.metrics.add(metrics | routed)
                ratios.append(torch.where(mask[rows], logprobs.detach() - old_logprobs[rows], 0.0).exp().flatten())
                row_sums.append(logprobs.detach().sum(1) + values.detach().sum(1))
            pretraining.add_gradients(policy)
            hold_still(policy, value_model, cfg, run.step)
            norms = {name: clip_grads(model, cfg.optim.max_grad_norm) for name, model in learners.items()}
            norm = torch.stack(list(norms.values())).sum()  # not finite where one is not
            run.stop_if_not_finite(norm, torch.cat(row_sums), [rollout.where[i] for i in minibatch.tolist()])
            optimizer.step()
            optimizer.zero_grad()
            average.update(policy)
            run.metrics.add({f"{name}/grad_norm": norm for name, norm in norms.items()} | first_ratio(ratios, index))
        run.metrics.add(speeds(cfg, run, rollout, rolled_out - started, time.perf_counter() - learning))
        with average.swapped_in(policy):  # what is exported is what is evaluated
            evaluation.measure(policy, ref_policy, step=run.step + 1)
        run.end_step(num_tokens=int(rollout.attention_mask.sum()))
    with average.swapped_in(policy):  # with ema_decay the average is exported
        export(cfg, run, policy, value_model, tokenizer)
    return run.finish("eval/score" if evaluation.prompts and cfg.eval_every else "objective/score")


# ---- what the loop calls besides equations


def shape_rewards(
    source_rewards: Tensor, kl: Tensor, rollout: Trajectory, cfg: DictConfig, *, kl_coef: float
) -> Tensor:
    """(B, T) rewards: source_rewards (B, T) minus kl_coef * KL on every token.

    The reward at the end of an episode is clipped. Then the penalty of overlong completions is added, and the rule for
    missing stop tokens is applied. missing_eos=replace also removes the rewards before the end.
    """
    ends, finished = source_rewards.masked_fill(~rollout.done, 0.0).sum(1), rollout.finished  # (B,)
    before = source_rewards.masked_fill(rollout.done, 0.0)
    last = (rollout.turn == rollout.turn.amax(1, keepdim=True)) & rollout.action_mask
    ends = clip_scores(ends, cfg.reward_clip) + overlong_penalty(
        last.sum(1), max_new_tokens=cfg.sampling.max_new_tokens, overlong_tokens=cfg.overlong_tokens
    )
    ends = missing_eos(ends, finished, mode=cfg.missing_eos, value=cfg.missing_eos_value)
    before = before * (finished | (cfg.missing_eos != "replace"))[:, None]
    return token_rewards(ends, kl, rollout.action_mask, rollout.value_mask, kl_coef=kl_coef) + before


def unlearnable(rollout: Trajectory, cfg: DictConfig) -> Tensor:
    """(B,) bool: episodes without a score and, with missing_eos=mask, those without a stop token."""
    return ~rollout.judged | (~rollout.finished & (cfg.missing_eos == "mask"))


def give_credit(
    rewards: Tensor,
    old_values: Tensor,
    penalty: Tensor,
    rollout: Trajectory,
    cfg: DictConfig,
    mean: Callable[[Tensor], Tensor],
) -> Tensor:
    """(B, T) advantages of the actions (with a value model: of the states) before they are whitened."""
    if cfg.whiten_rewards:
        rewards = whiten(rewards, rollout.value_mask, mean, shift_mean=False)
    return estimate_advantages(
        rewards, old_values, rollout.action_mask, rollout.value_mask, rollout.done, kind=cfg.advantage,
        gamma=cfg.gamma, gae_lambda=cfg.gae_lambda, lambda_alpha=cfg.gae_lambda_alpha,
        samples_per_prompt=cfg.samples_per_prompt, mean=mean, penalty=penalty,
    )  # fmt: skip


def whitens(cfg: DictConfig) -> bool:
    """Whether advantages are whitened. Only those of gae are: group advantages have their own scale."""
    return cfg.advantage in WITH_VALUES and cfg.whiten_advantages is not False


def read_policy(policy: Policy, part: Part, cfg: DictConfig) -> tuple[Tensor, Tensor]:
    """(b, T) log-probs of the actions, and (b, T) entropies, which are 0 if entropy_coef is 0."""
    if cfg.entropy_coef:
        return policy.logprobs_and_entropy(*part.rows, temperature=cfg.sampling.temperature)
    logprobs = policy.logprobs(*part.rows, temperature=cfg.sampling.temperature)
    return logprobs, torch.zeros_like(logprobs)


def penalty(
    cfg: DictConfig,
    policy: Policy,
    ref_policy: nn.Module,
    part: Part,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    weight: Tensor,
) -> Tensor:
    """() sum of the KL to the reference as a loss term: estimated from samples, or exact over the vocabulary."""
    if cfg.kl_in != "loss" or cfg.kl_estimator != "exact":
        return kl_loss(logprobs, ref_logprobs, part.rows.completion_mask, cfg.kl_estimator, weight)
    return (weight * policy.exact_kl(ref_policy, *part.rows, temperature=cfg.sampling.temperature)).sum()


def hold_still(policy: Policy, value_model: nn.Module, cfg: DictConfig, step: int) -> None:
    """Drop the policy's gradients in value pretraining, and the value model's if it has its own epochs."""
    if step < cfg.value_pretraining_steps:
        policy.zero_grad(set_to_none=True)
    if cfg.value_epochs is not None:
        value_model.zero_grad(set_to_none=True)


def first_ratio(ratios: list[Tensor], index: int) -> dict[str, Tensor]:
    """The ratio farthest from 1 on a rollout's first minibatch. It should be 1, as there was no update yet."""
    if index:
        return {}
    ratio = torch.cat(ratios)
    return {"policy/ratio_first": ratio[(ratio - 1).abs().argmax()]}


def rollout_figures(
    rollout: Trajectory, source_rewards: Tensor, rewards: Tensor, kl: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    """Metrics of a rollout: score and rewards over the rows with a score, the others over all rows."""
    mask, judged = rollout.action_mask, rollout.judged
    return {
        "objective/score": masked(source_rewards.sum(1), judged),
        "objective/rewards": masked(rewards.sum(1), judged),
        "objective/kl": kl.sum(1),
        "objective/entropy": masked(entropy, mask),
        "objective/length": mask.sum(1),
        "objective/truncated": ~rollout.finished,
    }


def speeds(
    cfg: DictConfig, run: Run, rollout: Trajectory, rollout_seconds: float, train_seconds: float
) -> dict[str, float]:
    """Tokens per second of all ranks: sampled tokens in the rollout, and real tokens of all epochs in training."""
    sampled, real = (int(m.sum()) * run.world_size for m in (rollout.turn >= 0, rollout.attention_mask))
    return {
        "perf/rollout_tokens_per_second": sampled / rollout_seconds,
        "perf/train_tokens_per_second": real * cfg.ppo_epochs / train_seconds,
    }


@torch.no_grad()
def log_exact_kl(cfg: DictConfig, run: Run, policy: Policy, ref_policy: Policy, parts: list[Part]) -> None:
    """Log the KL to the reference over the whole vocabulary, when due."""
    if run.due(cfg.kl_exact_every):
        with run.off_the_clock():
            exact_kl = partial(policy.exact_kl, ref_policy)
            kl = of_actions(exact_kl, parts, temperature=cfg.sampling.temperature)  # (B, T)
            run.metrics.add({"objective/kl_exact": kl.sum(1)})


def log_credit(
    cfg: DictConfig,
    run: Run,
    tokenizer: Tokenizer,
    rollout: Trajectory,
    scores: Tensor,
    credit: dict[str, Tensor],
) -> None:
    """Log samples with their (B, T) figures in `credit`, and print the credit viewer, each when due."""
    with run.off_the_clock():
        if run.due(cfg.sample_every):
            run.log_samples(credit_samples(rollout, tokenizer, scores, credit, count=cfg.num_samples))
        if cfg.view and run.step == 0:
            print_credit(rollout, tokenizer, scores, credit, run.terminal.say)


def export(cfg: DictConfig, run: Run, policy: Policy, value_model: nn.Module, tokenizer: Tokenizer) -> None:
    """Export the policy, its adapter if there is one, and the value model if export_value_model is set."""
    export_model(policy, run.dir / "model", tokenizer)
    export_adapter(policy, run.dir / "adapter", cfg.policy)
    if cfg.export_value_model:
        export_model(value_model, run.dir / "value_model", tokenizer)


# ---- setting up


def load_pretraining(cfg: DictConfig, run: Run, tokenizer: Tokenizer, policy: Policy) -> PretrainingMix:
    """The SFT loss on data.ptx. With ptx_coef=0 it reads nothing and adds nothing."""
    loader = None
    if cfg.ptx_coef:
        loader = pretraining_loader(
            cfg.data, tokenizer, window=policy.config.max_length, batch_size=cfg.minibatch_size,
            seed=cfg.seed, rank=run.rank, world_size=run.world_size,
        )  # fmt: skip
    pad_id, size = tokenizer.pad_id, cfg.micro_batch_size
    return PretrainingMix(run, loader, coef=cfg.ptx_coef, micro_batch_size=size, pad_id=pad_id)


def own_epochs(cfg: DictConfig) -> ValueEpochs:
    """The value model's own epochs; none without value_epochs."""
    return ValueEpochs(
        epochs=cfg.value_epochs or 0,
        minibatch_size=cfg.value_minibatch_size or cfg.minibatch_size,
        micro_batch_size=cfg.micro_batch_size,
        samples_per_prompt=cfg.samples_per_prompt,
        clip_range=cfg.value_clip_range,
        coef=cfg.value_coef,
        max_grad_norm=cfg.optim.max_grad_norm,
    )


def clip_ranges(cfg: DictConfig) -> Clips:
    """The clip ranges of the loss, and the weight of its value part."""
    return Clips(
        policy=cfg.clip_range,
        policy_high=cfg.clip_range_high,
        dual=cfg.dual_clip,
        value=cfg.value_clip_range,
        value_coef=cfg.value_coef,
    )


def kl_controller(cfg: DictConfig) -> FixedKL:
    """The controller of the KL coefficient: fixed, linear or adaptive."""
    if cfg.kl_controller == "fixed":
        return FixedKL(cfg.kl_coef)
    if cfg.kl_controller == "linear":
        return LinearKL(cfg.kl_coef, kl_coef_end=cfg.kl_coef_end, num_steps=cfg.optim.num_steps)
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
    """A value model that returns 0, for advantages that need none (not in WITH_VALUES)."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, stream: Stream | None = None
    ) -> Tensor:
        return torch.zeros(input_ids.shape, device=input_ids.device)


def load_policies(cfg: DictConfig, run: Run, tokenizer: Tokenizer) -> tuple[Policy, nn.Module]:
    """(trained policy, reference policy). The reference is ref_policy, or the policy before training.

    With LoRA the reference is the same weights without the adapters.
    """
    if cfg.ref_policy is not None:
        check_same_tokenizer(cfg.ref_policy, tokenizer, "ref_policy")
    if cfg.lora.rank and cfg.ref_policy is None:
        policy = load_policy(cfg.policy, precision=cfg.precision, frozen=True)
        policy = run.shard(checkpointed(add_lora(policy, **cfg.lora, seed=cfg.seed), cfg))
        return policy, AdaptersOff(policy)
    policy = load_policy(cfg.policy, precision=cfg.precision, frozen=cfg.lora.rank > 0)
    policy = run.shard(checkpointed(add_lora(policy, **cfg.lora, seed=cfg.seed), cfg))
    return policy, run.shard(load_policy(cfg.ref_policy or cfg.policy, precision=cfg.precision, frozen=True))


def checkpointed(model: nn.Module, cfg: DictConfig) -> nn.Module:
    """The model, with activation checkpointing as set in the config."""
    model.transformer.checkpointing = cfg.activation_checkpointing
    return model


def load_values(cfg: DictConfig, run: Run, policy: Policy) -> nn.Module:
    """The value model: value_model, or one that starts from the reward model, or from the policy with a zero head."""
    if cfg.advantage not in WITH_VALUES:
        return NoValues()
    start = cfg.value_model or (cfg.reward_model if cfg.value_start == "reward_model" else None)
    if start is None and cfg.lora.rank and cfg.dist.strategy == "single":  # FSDP2 gives a weight to one model only
        return run.shard(checkpointed(add_lora(value_on(policy), **cfg.lora, seed=cfg.seed + 1), cfg))
    value_model = load_value_model(start or cfg.policy, precision=cfg.precision, frozen=cfg.lora.rank > 0)
    if start is None:
        nn.init.zeros_(value_model.head.weight)  # as in the code of Ziegler et al. 2019
    return run.shard(checkpointed(add_lora(value_model, **cfg.lora, seed=cfg.seed + 1), cfg))


def nothing(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward of 0, for training with the KL penalty alone."""
    return [0.0] * len(completions)


def load_scorer(cfg: DictConfig, run: Run, tokenizer: Tokenizer, policy: Policy) -> Scorer:
    """The reward sources, after checks against the policy."""
    check_vocab(policy.config, tokenizer.vocab_size)
    reward_model = None
    if cfg.reward_model is not None:
        check_same_tokenizer(cfg.reward_model, tokenizer)
        reward_model = run.shard(load_reward_model(cfg.reward_model, precision=cfg.precision, frozen=True))
    sources = read_sources(
        "reward", cfg.reward, run.dir / "rewards", cfg.reward_timeout,
        reward_model=reward_model is not None, environment=cfg.env is not None,
    )  # fmt: skip
    if not sources and cfg.ref_policy and cfg.kl_coef:
        sources = [Source("nothing", nothing)]  # distillation: only the KL to ref_policy counts
    return Scorer(reward_model, sources, tokenizer, micro_batch_size=cfg.micro_batch_size, mean=run.mean)


def load_monitor(cfg: DictConfig, run: Run, tokenizer: Tokenizer) -> Monitor:
    """What is watched beside the reward."""
    sources = read_sources("watch", cfg.watch, run.dir / "watched", cfg.reward_timeout)
    if sources and not (cfg.data.eval and cfg.eval_every):
        raise ValueError("watch scores the answers to data.eval, every eval_every steps; give data.eval=[FILES]")
    picture = run.dir / "hacking.png"
    return Monitor(sources, tokenizer, patience=cfg.watch_patience, mean=run.mean, picture=picture)


def load_engine(cfg: DictConfig, run: Run, tokenizer: Tokenizer, policy: Policy) -> Engine:
    """Where rollouts come from: this process or a server, with the environment of `env` where there is one."""
    check_served_adapter(cfg, policy.config.num_experts)
    sampler = load_sampler(
        cfg.engine, cfg.sampling, tokenizer, window=policy.config.max_length, directory=run.dir / "engine",
        base=cfg.policy,
    )  # fmt: skip
    environment = load_environment(
        cfg.env, tokenizer, window=sampler.window, max_new_tokens=cfg.sampling.max_new_tokens,
        max_turns=cfg.max_turns, directory=run.dir / "env", seconds=cfg.reward_timeout,
    )  # fmt: skip
    position, ahead = cfg.score_position, bool(cfg.engine.ahead)
    return Engine(run, tokenizer, sampler, environment, seed=cfg.seed, score_position=position, ahead=ahead)


def load_prompts(
    cfg: DictConfig, run: Run, tokenizer: Tokenizer, engine: Engine, score: Scorer, monitor: Monitor
) -> tuple[Loader, Evaluation]:
    """Rollout prompts, and the evaluation on held-out ones. Both leave max_new_tokens free in the smallest window."""
    window = engine.sampler.window
    if score.reward_model is not None:
        window = min(window, score.reward_model.config.max_length)
    room = window - cfg.sampling.max_new_tokens
    prompts = prompt_loader(
        cfg.data, tokenizer, max_length=room, batch_size=cfg.batch_size,
        seed=cfg.seed, rank=run.rank, world_size=run.world_size,
    )  # fmt: skip
    check_columns("reward", score.sources.values(), prompts.items)
    held_out: Sequence[dict] = []
    if cfg.data.eval:
        encoded = encode_prompts("data.eval", cfg.data.eval, cfg.data, tokenizer, max_length=room)
        warn_of_overlap(prompts, encoded)
        check_columns("reward", score.sources.values(), encoded.items)
        check_columns("watch", monitor.sources, encoded.items)
        held_out = encoded.items[: cfg.num_prompts]
    return prompts, Evaluation(
        run, engine, score, monitor, held_out, every=cfg.eval_every, micro_batch_size=cfg.micro_batch_size,
        temperature=cfg.sampling.temperature, num_samples=cfg.num_samples, num_steps=cfg.num_steps,
    )  # fmt: skip


if __name__ == "__main__":
    main(train, "train_ppo")
