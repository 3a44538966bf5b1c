"""What TRL's GRPOTrainer and verl's core_algos make of one minibatch, for tests/test_peer_losses.py.

    python tests/parity/group_losses.py VERL        VERL: a checkout; writes tests/peer_losses.json

TRL's `_compute_loss` runs with a stand-in for the trainer that hands it our log-probs; of verl the source of its
functions runs, with `masked_*` of its torch_functional. Losses and their gradients; advantages where both have them.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

GOLDEN = Path(__file__).parents[2] / "tests" / "peer_losses.json"
LOW, HIGH, MOST, BETA = 0.2, 0.28, 8, 0.04


def minibatch() -> dict[str, torch.Tensor]:
    """Six completions of unequal lengths, two prompts of three; no dtype but float64."""
    generator = torch.Generator().manual_seed(0)
    logprobs, noise, far = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([5, 1, 3, 4, 2, 5])
    mask = torch.arange(5) < lengths[:, None]
    logprobs = -logprobs.abs() - 0.1
    scores = torch.tensor([1.0, 0.0, 2.5, -1.0, -1.0, 0.5], dtype=torch.float64)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * noise,
        "ref": logprobs + 0.5 * far,
        "mask": mask,
        "scores": scores,
    }


def of_trl(batch: dict) -> dict[str, dict]:
    """{name: loss and gradient} of GRPOTrainer's losses, with GRPO's own standardised advantages."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    groups = batch["scores"].view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    found = {}
    kinds = {
        "grpo": {},
        "dapo": {},
        "dr_grpo": {},
        "cispo": {"epsilon_high": 1 + HIGH},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        "grpo_kl": {"loss_type": "grpo", "beta": BETA},
    }
    for name, settings in kinds.items():
        logprobs = batch["logprobs"].clone().requires_grad_()
        trainer = MagicMock()
        own = {
            "loss_type": name,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon_low": LOW,
            "epsilon_high": HIGH,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "use_vllm": False,
            "aux_loss_enabled": False,
            "max_completion_length": MOST,
            "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": 1,
        }
        for key, value in (own | settings).items():
            setattr(trainer, key, value)
        trainer.model.training = False
        trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
        trainer.accelerator.num_processes = 1
        trainer.accelerator.gather = lambda value: value
        trainer._get_per_token_logps_and_entropies.return_value = (logprobs, torch.zeros_like(logprobs), None)
        ids = torch.zeros(6, 5, dtype=torch.long)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": ids[:, :1],
            "completion_ids": ids,
            "completion_mask": batch["mask"].int(),
            "advantages": advantages,
            "old_per_token_logps": batch["old"],
            "ref_per_token_logps": batch["ref"],
            "num_items_in_batch": batch["mask"].sum(),
        }
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        found[name] = {"loss": loss.item(), "gradient": logprobs.grad.tolist()}
    return found | {"advantages": advantages.tolist()}


def of_verl(batch: dict, checkout: Path) -> dict[str, dict]:
    """The same of verl's policy losses, and its advantages."""
    space: dict[str, Any] = {
        "torch": torch,
        "np": np,
        "defaultdict": defaultdict,
        "Any": Any,
        "AlgoConfig": int,
        "ActorConfig": SimpleNamespace,
        "__annotations__": {},
    }
    masked = ("masked_sum", "masked_mean", "masked_var", "masked_whiten")
    space["verl_F"] = SimpleNamespace(
        **{name: defined(checkout / "verl/utils/torch_functional.py", masked)[name] for name in masked}
    )
    names = (
        "agg_loss",
        "compute_policy_loss_vanilla",
        "compute_policy_loss_gspo",
        "compute_policy_loss_cispo",
        "compute_grpo_outcome_advantage",
        "compute_rloo_outcome_advantage",
        "compute_reinforce_plus_plus_outcome_advantage",
    )
    functions = defined(checkout / "verl/trainer/ppo/core_algos.py", names, space)
    mask, found = batch["mask"].double(), {}
    ends = torch.arange(5) == mask.sum(1, keepdim=True) - 1
    rewards, index = torch.where(ends, batch["scores"][:, None], 0.0), np.array([0, 0, 0, 1, 1, 1])
    for name, settings in {
        "grpo": {"norm_adv_by_std_in_grpo": True},
        "dr_grpo": {"norm_adv_by_std_in_grpo": False},
    }.items():
        advantages, _ = functions["compute_grpo_outcome_advantage"](rewards.clone(), mask, index, **settings)
        found[f"advantages_{name}"] = advantages.tolist()
    advantages = functions["compute_rloo_outcome_advantage"](rewards.clone(), mask, index)[0]
    found["advantages_rloo"] = advantages.tolist()
    config = SimpleNamespace(gamma=1.0)
    found["advantages_reinforce_pp"] = functions["compute_reinforce_plus_plus_outcome_advantage"](
        rewards, mask, config
    )[0].tolist()

    class Config(SimpleNamespace):
        def get(self, name, default):
            return getattr(self, name, default)

    space["ActorConfig"] = Config
    config = Config(clip_ratio=LOW, clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=3.0, global_batch_info={})
    for name in ("vanilla", "gspo", "cispo"):
        for mode in ("token-mean", "seq-mean-token-mean"):
            logprobs = batch["logprobs"].clone().requires_grad_()
            function = functions[f"compute_policy_loss_{name}"]
            loss, _ = function(batch["old"], logprobs, advantages, mask, loss_agg_mode=mode, config=config)
            loss.backward()
            found[f"{name}_{mode}"] = {"loss": loss.item(), "gradient": logprobs.grad.tolist()}
    return found


def defined(path: Path, names: tuple[str, ...], space: dict | None = None) -> dict:
    """The functions of a file by name, without its imports, decorators and annotations."""
    space = {"torch": torch} if space is None else space
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list, node.returns = [], None
            for argument in node.args.args + node.args.kwonlyargs:
                argument.annotation = None
            exec(compile(ast.Module([node], []), str(path), "exec"), space)
    return space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verl", type=Path, help="a checkout of verl")
    checkout = parser.parse_args().verl
    import trl

    batch = minibatch()
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    version = (checkout / "verl/version/version").read_text().strip()
    found = {
        "trl": {"version": trl.__version__, "file": "trl/trainer/grpo_trainer.py"} | of_trl(batch),
        "verl": {"version": version, "commit": sha, "file": "verl/trainer/ppo/core_algos.py"}
        | of_verl(batch, checkout),
    }
    GOLDEN.write_text(json.dumps({"batch": {name: x.tolist() for name, x in batch.items()}} | found) + "\n")
    print(f"wrote {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
