"""First PPO step against trl==1.12.0's experimental PPOTrainer: same tiny model, prompts, completions and reward model.

    make .venv-bench-ppo/done
    .venv-bench-ppo/bin/python tests/parity/trl_ppo.py            # --write renews tests/trl_ppo_step.json, a test's

TRL runs one update and is listened to; our functions then compute the same rollout with its conventions set: score in
the slot after EOS, missing EOS subtracted, whitening with Bessel's correction. Prints the largest differences.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))

from advantages import estimate_advantages, kl_estimate, missing_eos, whiten
from losses import ppo_policy_loss, ppo_value_loss, token_rewards
from model.build import load_policy, load_reward_model, load_value_model
from model.packing import Rows, make_rows

GOLDEN = Path(__file__).parents[2] / "tests" / "trl_ppo_step.json"
PAD, EOS, VOCABULARY = 0, 1, 32
KL_COEF, GAMMA, LAMBDA, TEMPERATURE, PENALTY, LENGTH = 0.05, 1.0, 0.95, 0.7, 1.0, 12


def make_models(directory: Path) -> dict[str, torch.nn.Module]:
    """Random models, wide enough that log-probs, scores and values differ; the reference is not the policy."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, pad_token_id=PAD, eos_token_id=EOS,
        bos_token_id=None, num_labels=1,
    )  # fmt: skip
    kinds = {"policy": LlamaForCausalLM, "ref_policy": LlamaForCausalLM}
    kinds |= dict.fromkeys(("reward_model", "value_model"), LlamaForSequenceClassification)
    models = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        models[name] = kind(config).eval()
        models[name].save_pretrained(directory / name)
        if kind is LlamaForSequenceClassification:  # ours keeps the head's bias and normalisation beside it
            path = directory / name / "model.safetensors"
            beside = {"score.bias": torch.zeros(1), "score.gain": torch.ones(()), "score.shift": torch.zeros(())}
            save_file(load_file(path) | beside, path, metadata={"format": "pt"})
    return models


def run_trl(models: dict, prompts: list[list[int]], directory: Path) -> dict:
    """One update of PPOTrainer; what passes through its helpers is kept."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    vocabulary = {"[PAD]": PAD, "[EOS]": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="w2")),
        pad_token="[PAD]",
        eos_token="[EOS]",
        padding_side="left",
    )
    heard: dict[str, list] = {"whiten": [], "generation": [], "scores": []}
    listen(ppo_trainer, "masked_whiten", lambda args, out: heard["whiten"].append((args[0], args[1], out)))
    listen(ppo_trainer, "batch_generation", lambda args, out: heard["generation"].append((args[1], out)))
    listen(ppo_trainer, "get_reward", lambda args, out: heard["scores"].append(out))
    args = PPOConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=1, total_episodes=len(prompts), response_length=LENGTH, stop_token="eos",
        temperature=TEMPERATURE, kl_coef=KL_COEF, gamma=GAMMA, lam=LAMBDA, missing_eos_penalty=PENALTY,
        num_sample_generations=0, report_to="none", use_cpu=True, bf16=False, learning_rate=0.0, save_strategy="no",
        local_rollout_forward_batch_size=len(prompts), seed=0, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=models["policy"],
        ref_model=models["ref_policy"],
        reward_model=models["reward_model"],
        value_model=models["value_model"],
        train_dataset=data,
        eval_dataset=data,
    )
    torch.manual_seed(0)
    trainer.train()
    heard["log"] = trainer.state.log_history[0]
    return heard


def listen(module, name: str, hear) -> None:
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        out = original(*args, **kwargs)
        hear(args, out)
        return out

    setattr(module, name, wrapped)


def our_rows(queries: torch.Tensor, query_responses: torch.Tensor) -> tuple[Rows, torch.Tensor, Rows]:
    """TRL's left-padded rows as ours; one column more for the state after EOS."""
    context, examples, finished = queries.shape[1], [], []
    for query, row in zip(queries.tolist(), query_responses.tolist(), strict=True):
        prompt, response = [i for i in query if i != PAD], row[context:]
        finished.append(EOS in response)
        response = response[: response.index(EOS) + 1] if EOS in response else response
        response = response[: response.index(PAD)] if PAD in response else response  # a sampled pad ends a row there
        examples.append(
            {"input_ids": prompt + response, "completion_mask": [False] * len(prompt) + [True] * len(response)}
        )
    rows = make_rows(examples, PAD)
    spare = torch.zeros(len(examples), 1, dtype=torch.bool)
    rows = Rows(torch.nn.functional.pad(rows.input_ids, (0, 1)), *(torch.cat([m, spare], 1) for m in rows[1:]))
    lengths = rows.attention_mask.sum(1)
    after = torch.zeros_like(spare.expand_as(rows.input_ids))
    room = rows.completion_mask.sum(1) < LENGTH
    after[torch.arange(len(examples))[room], lengths[room]] = True
    value_rows = Rows(rows.input_ids, rows.attention_mask | after, rows.completion_mask | after)
    return rows, torch.tensor(finished), value_rows


def read_rollout(directory: Path, heard: dict) -> dict[str, torch.Tensor]:
    """TRL's completions as our models read them."""
    queries, (query_responses, _) = heard["generation"][0]
    rows, finished, value_rows = our_rows(queries, query_responses)
    policy, ref_policy = (load_policy(directory / name) for name in ("policy", "ref_policy"))
    reward_model = load_reward_model(directory / "reward_model", precision="fp32")
    value_model = load_value_model(directory / "value_model", precision="fp32")  # there a sequence classifier
    with torch.no_grad():
        return {
            "logprobs": policy.logprobs(*rows, temperature=TEMPERATURE),
            "ref_logprobs": ref_policy.logprobs(*rows, temperature=TEMPERATURE),
            "values": value_model(*value_rows),
            "scores": reward_model.score(*rows),
            "mask": rows.completion_mask,
            "value_mask": value_rows.completion_mask,
            "finished": finished,
        }


def take_step(rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first step by our functions, in TRL's conventions."""
    logprobs, values, mask, value_mask = (rollout[name] for name in ("logprobs", "values", "mask", "value_mask"))
    scores = missing_eos(rollout["scores"], rollout["finished"], mode="subtract", value=PENALTY)
    kl = kl_estimate(logprobs - rollout["ref_logprobs"], "k1")
    rewards = token_rewards(scores, kl, mask, value_mask, kl_coef=KL_COEF)
    advantages = estimate_advantages(
        rewards, values, mask, value_mask, kind="gae", gamma=GAMMA, gae_lambda=LAMBDA, samples_per_prompt=1
    )
    n, returns = mask.sum(), advantages + values
    whitened = whiten(advantages, mask, lambda x: x, shift_mean=True) * math.sqrt((n - 1) / n)  # Bessel's correction
    policy_loss, _ = ppo_policy_loss(logprobs, logprobs, whitened, mask, clip_range=0.2, dual_clip=None, num_tokens=n)
    value_loss, _ = ppo_value_loss(values, values, returns, value_mask, clip_range=0.2, num_tokens=value_mask.sum())
    return {
        "scores": scores,
        "values": values,
        "rewards": rewards,
        "advantages": advantages,
        "whitened advantages": whitened,
        "policy loss": policy_loss,
        "value loss": value_loss,
        "KL per sequence": kl.sum(1).mean(),
    }


def align(theirs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, response) columns from 0 -> ours: the k-th completion column of each row."""
    out = torch.zeros(mask.shape, dtype=theirs.dtype)
    order = mask.cumsum(1) - 1
    return torch.where(mask, theirs.gather(1, order.clamp(0, theirs.shape[1] - 1)), out)


def what_trl_got(heard: dict, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TRL's figures, in the columns of `rollout`."""
    (advantages, _, whitened) = heard["whiten"][0]
    (full_values, _, _), (_, scores, _) = heard["scores"][:2]
    context = heard["generation"][0][0].shape[1]
    values = align(full_values[:, context - 1 : -1].squeeze(-1), rollout["value_mask"])
    aligned = align(advantages, rollout["value_mask"])
    rewards = aligned - GAMMA * LAMBDA * later(aligned) - GAMMA * later(values) + values  # GAE undone
    log = heard["log"]
    return {
        "scores": torch.where(rollout["finished"], scores, scores - PENALTY),
        "values": values,
        "rewards": torch.where(rollout["value_mask"], rewards, 0.0),
        "advantages": aligned,
        "whitened advantages": align(whitened, rollout["mask"]),
        "policy loss": torch.tensor(log["loss/policy_avg"]),
        "value loss": torch.tensor(log["loss/value_avg"]),
        "KL per sequence": torch.tensor(log["objective/kl"]),
    }


def later(x: torch.Tensor) -> torch.Tensor:
    """(B, T) with column t holding what column t + 1 held."""
    return torch.nn.functional.pad(x, (0, 1))[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"also renew {GOLDEN.name}, which a test compares with")
    args = parser.parse_args()
    torch.manual_seed(1)
    prompts = [torch.randint(2, VOCABULARY, (int(n),)).tolist() for n in torch.randint(3, 9, (16,))]
    with tempfile.TemporaryDirectory() as name:
        models = make_models(Path(name))
        heard = run_trl(models, prompts, Path(name))
        rollout = read_rollout(Path(name), heard)
    theirs, ours = what_trl_got(heard, rollout), take_step(rollout)
    print(f"{int(rollout['finished'].sum())} of {len(prompts)} completions ended with EOS")
    for key in ours:
        print(f"{key:>20}  max |TRL - ours| = {(theirs[key].float() - ours[key].float()).abs().max():.1e}")
    if args.write:
        step = {"trl": "1.12.0", "rollout": rollout, "theirs": theirs}
        GOLDEN.write_text(json.dumps(step, default=lambda x: x.tolist()), encoding="utf-8")


if __name__ == "__main__":
    main()
