"""Door: a policy from a reward, with the KL to where it started as the price.

PPO with a value model as Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325) and Ouyang et
al. 2022 (arXiv:2203.02155) ran it. Departures and every variant are settings of conf/train_ppo.yaml, explained in
docs/ppo.md; the loop below is the same for all of them.
"""

import torch
from omegaconf import DictConfig

from advantages import clip_scores, estimate_advantages, explained_variance, kl_estimate, missing_eos
from data.prompts import prompt_loader
from data.tokenizer import load_tokenizer
from losses import kl_loss, ppo_policy_loss, ppo_value_loss, token_rewards, whiten
from model.ema import WeightAverage
from runtime.distributed import gathered
from runtime.optim import clip_grads, set_lr
from runtime.run import Run, main


def train(cfg: DictConfig, run: Run) -> float:
    """The algorithm box: rollout, reward, a few epochs of clipped updates; returns the last mean score."""
    check_ppo(cfg, run.world_size)
