"""Checks of settings of train_ppo.py.

Invalid ones are refused before anything is loaded, with a way to correct them.
"""

import math

from omegaconf import DictConfig

from advantages import ADVANTAGES, CORRECTIONS, OF_GROUPS, OF_PAIRS, WITH_VALUES
from losses import POLICY_LOSSES
from runtime.config import RECOMPUTE, check_batch, check_choice, check_number, check_positive, check_whole
from runtime.devices import PRECISIONS


def check_ppo(cfg: DictConfig, world_size: int) -> None:
    """Raise ValueError if settings are wrong, before anything is loaded."""
    at_least_one = (
        "num_steps", "batch_size", "samples_per_prompt", "ppo_epochs", "num_prompts", "keep_last", "max_turns",
        "watch_patience",
    )  # fmt: skip
    check_whole(1, **{key: cfg[key] for key in at_least_one})
    never_or_none = (
        "seed", "save_every", "eval_every", "sample_every", "kl_exact_every", "num_samples", "value_pretraining_steps",
        "overlong_tokens", "dynamic_sampling",
    )  # fmt: skip
    check_whole(0, **{key: cfg[key] for key in never_or_none})
    check_batch(cfg.minibatch_size, cfg.micro_batch_size, world_size, "minibatch_size")
    rows = "batch_size * samples_per_prompt"
    check_batch(cfg.batch_size * cfg.samples_per_prompt, cfg.minibatch_size, 1, rows, "minibatch_size")
    check_positive(optim__lr=cfg.optim.lr, optim__value_lr=cfg.optim.value_lr, clip_range=cfg.clip_range)
    check_positive(reward_timeout=cfg.reward_timeout)
    clips = ("value_clip_range", "clip_range_high", "reward_clip", "dual_clip", "gae_lambda_alpha")
    check_positive(**{key: cfg[key] for key in clips if cfg[key] is not None})
    coefficients = ("kl_coef", "kl_coef_end", "ptx_coef", "value_coef", "entropy_coef", "gamma", "gae_lambda")
    check_number(0, **{key: cfg[key] for key in coefficients})
    check_number(0, **{f"router__{key}": value for key, value in cfg.router.items()})
    check_number(-math.inf, missing_eos_value=cfg.missing_eos_value, sampling__temperature=cfg.sampling.temperature)
    check_choice("precision", cfg.precision, PRECISIONS)
    check_choice("activation_checkpointing", cfg.activation_checkpointing, RECOMPUTE)
    check_choice("score_position", cfg.score_position, ("eos", "after_eos"))
    check_choice("missing_eos", cfg.missing_eos, ("replace", "subtract", "none", "mask"))
    check_choice("kl_in", cfg.kl_in, ("reward", "loss"))
    check_choice("kl_controller", cfg.kl_controller, ("fixed", "adaptive", "linear"))
    check_choice("advantage", cfg.advantage, ADVANTAGES)
    check_choice("policy_loss", cfg.policy_loss, tuple(POLICY_LOSSES))
    check_choice("aggregation", cfg.aggregation, ("token", "sequence_mean", "sequence_sum"))
    check_choice("value_start", cfg.value_start, ("reward_model", "policy"))
    allowed = {"reward": ("k1",), "loss": ("k2", "k3", "exact")}[cfg.kl_in]
    if cfg.kl_estimator not in allowed:
        raise ValueError(
            f"kl_estimator={cfg.kl_estimator} with kl_in={cfg.kl_in}: as a reward only k1 has the gradient of the KL, "
            f"as a loss k1 has none and k2 the right one; use {' or '.join(allowed)}"
        )
    if cfg.advantage in (*OF_GROUPS, *OF_PAIRS) and cfg.samples_per_prompt < 2:
        raise ValueError(f"advantage={cfg.advantage} compares samples of a prompt; set samples_per_prompt to 2 or more")
    if cfg.sampling.temperature <= 0 or cfg.sampling.top_k or cfg.sampling.top_p != 1:
        raise ValueError(
            "PPO samples from the policy itself: sampling.temperature > 0, sampling.top_k=0, sampling.top_p=1; with "
            "anything else the log-probs belong to another distribution, and the KL can come out negative"
        )
    if cfg.advantage not in WITH_VALUES and cfg.whiten_advantages:
        raise ValueError(
            f"whiten_advantages=true with advantage={cfg.advantage}: completions are compared within their group, but "
            "whitening over all groups would give advantages to a group with equal scores; leave it at null"
        )
    if cfg.dual_clip is not None and not cfg.dual_clip > 1:
        raise ValueError(f"dual_clip={cfg.dual_clip} must be null or above 1: it bounds the ratio where A < 0")
    check_fits(cfg)
    check_off_policy(cfg, world_size)
    if cfg.data.ptx and not cfg.ptx_coef:
        raise ValueError("data.ptx has no effect with ptx_coef=0; set ptx_coef (InstructGPT: 27.8), or give no files")
    if cfg.gamma > 1 or cfg.gae_lambda > 1:
        raise ValueError(f"gamma={cfg.gamma} and gae_lambda={cfg.gae_lambda} are discounts and must lie in [0, 1]")


def check_fits(cfg: DictConfig) -> None:
    """Raise ValueError if a setting has no effect with the others."""
    if cfg.dual_clip is not None and cfg.policy_loss != "clip":
        raise ValueError(
            f"dual_clip={cfg.dual_clip} belongs to policy_loss=clip; policy_loss={cfg.policy_loss} has none"
        )
    if cfg.overlong_tokens >= cfg.sampling.max_new_tokens:
        raise ValueError(
            f"overlong_tokens={cfg.overlong_tokens} must be below sampling.max_new_tokens="
            f"{cfg.sampling.max_new_tokens}: it is the distance to the limit from which on a completion loses reward"
        )
    if cfg.dynamic_sampling and cfg.samples_per_prompt < 2:
        raise ValueError("dynamic_sampling draws groups whose scores differ; set samples_per_prompt to 2 or more")
    if cfg.advantage not in WITH_VALUES:
        needless = {
            "value_model": cfg.value_model,
            "export_value_model": cfg.export_value_model,
            "value_pretraining_steps": cfg.value_pretraining_steps,
            "gae_lambda_alpha": cfg.gae_lambda_alpha,
            "value_epochs": cfg.value_epochs,
        }
        if asked := [f"{key}={value}" for key, value in needless.items() if value]:
            raise ValueError(f"{', '.join(asked)}: advantage={cfg.advantage} has no value model; remove these settings")


def check_served_adapter(cfg: DictConfig, num_experts: int) -> None:
    """Raise ValueError if a server would get adapters on experts. No server was seen to read them."""
    if cfg.engine.get("weights") == "lora" and num_experts and not set(cfg.lora.targets) <= {"qkv", "out"}:
        raise ValueError(
            f"engine.weights=lora with lora.targets={list(cfg.lora.targets)} sends a server adapters on experts, which "
            "it may ignore; say engine.weights=disk, or lora.targets=[qkv,out]"
        )


def check_off_policy(cfg: DictConfig, world_size: int) -> None:
    """Raise ValueError if settings for off-policy rollouts contradict others."""
    check_choice("off_policy.correction", cfg.off_policy.correction, CORRECTIONS)
    check_choice("off_policy.old_logprobs", cfg.off_policy.old_logprobs, ("trainer", "sampler"))
    check_positive(off_policy__max_weight=cfg.off_policy.max_weight)
    rows = cfg.batch_size * cfg.samples_per_prompt
    check_choice("engine.ahead", cfg.engine.ahead, (0, 1))
    if cfg.engine.get("weights") == "lora" and not cfg.lora.rank:
        raise ValueError("engine.weights=lora sends an adapter, and lora.rank=0 has none; say engine.weights=disk")
    if cfg.engine.ahead and (cfg.engine.kind == "local" or cfg.dynamic_sampling):
        raise ValueError(
            "engine.ahead=1 samples a rollout during the update on another one: it needs a server (engine=vllm) and "
            "dynamic_sampling=0, because the scores that decide whether more is sampled come later"
        )
    if cfg.advantage in OF_PAIRS:
        wanted = {"ppo_epochs": 1, "minibatch_size": rows, "kl_in": "reward", "policy_loss": "clip"}
        if wrong := [f"{key}={value}" for key, value in wanted.items() if cfg[key] != value]:
            raise ValueError(
                f"advantage={cfg.advantage} is DPO's gradient on the policy that sampled: one step per rollout, beta = "
                f"kl_coef; set {' '.join(wrong)}"
            )
        if cfg.aggregation == "sequence_mean" or not cfg.kl_coef:
            raise ValueError(
                f"advantage={cfg.advantage} sums log-probs over a completion and multiplies them by kl_coef: "
                "aggregation=sequence_sum (or token), kl_coef > 0"
            )
    if cfg.value_epochs is not None:
        size = cfg.value_minibatch_size or cfg.minibatch_size
        check_whole(1, value_epochs=cfg.value_epochs)
        check_batch(size, cfg.micro_batch_size, world_size, "value_minibatch_size")
        check_batch(rows, size, 1, "batch_size * samples_per_prompt")
    elif cfg.value_minibatch_size is not None:
        raise ValueError("value_minibatch_size belongs to value_epochs, which is null; set both")
