"""One piece of work by TRL or transformers. It runs in the peers' environment (bench/requirements.txt).

    .venv-bench/bin/python bench/peer.py sft|rm|dpo|ppo|generate --model DIR --rows FILE --out FILE --precision bf16

It writes {"seconds": [per step], "tokens": [per step]}. Tokens are the attention-mask tokens of the step's rows.
"""

import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every optimizer step, including the loading of the next step's data, as in our scripts."""

    def __init__(self):
        self.seconds, self.began = [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)


def settings(args, **more):
    """Common settings of all TRL configs: 8 rows per step, no saving, no logging service, no dropout in the model."""
    return dict(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=8, learning_rate=1e-6,
        bf16=args.precision == "bf16", use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
        logging_steps=1, gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def train_sft(args, tokenizer, rows):
    """Train on encoded rows {"input_ids", "completion_mask"}, so that both sides have the same targets."""
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings(args, max_length=512, completion_only_loss=True))
    return run_trainer(SFTTrainer, args, tokenizer, rows, config)


def train_dpo(args, tokenizer, rows):
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**settings(args, max_length=512, beta=0.1, precompute_ref_log_probs=args.precompute))
    return run_trainer(DPOTrainer, args, tokenizer, pairs(rows), config)


def train_rm(args, tokenizer, rows):
    from trl import RewardConfig, RewardTrainer

    args.model_class = AutoModelForSequenceClassification
    config = RewardConfig(**settings(args, max_length=512))
    return run_trainer(RewardTrainer, args, tokenizer, pairs(rows), config)


def pairs(rows: list[dict]) -> list[dict]:
    rows = [
        {
            "prompt": r["prompt"],
            **{side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")},
        }
        for r in rows
    ]
    return rows


def run_trainer(trainer_class, args, tokenizer, data, config) -> list[float]:
    kwargs = {"num_labels": 1} if args.model_class is AutoModelForSequenceClassification else {}
    model = args.model_class.from_pretrained(args.model, dtype=torch.float32, **kwargs)
    model.config.pad_token_id = tokenizer.pad_token_id
    clock = Clock()
    trainer = trainer_class(
        model=model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    return clock.seconds


def train_ppo(args, tokenizer, rows):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def network(kind, **kwargs):
        return kind.from_pretrained(args.model, dtype=torch.float32, **kwargs)

    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"][-480:] for r in rows]
    config = PPOConfig(**{k: v for k, v in settings(args).items() if k != "max_steps"} | dict(
        response_length=32, num_ppo_epochs=2, num_mini_batches=1, total_episodes=8 * args.steps, temperature=1.0,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, local_rollout_forward_batch_size=8,
        num_sample_generations=0, stop_token="eos", missing_eos_penalty=1.0,
    ))  # fmt: skip
    one = {"num_labels": 1}
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=network(AutoModelForCausalLM),
        ref_model=network(AutoModelForCausalLM),
        reward_model=network(AutoModelForSequenceClassification, **one),
        value_model=network(AutoModelForSequenceClassification, **one),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:8]}),
    )
    stamps = [time.perf_counter()]
    log = trainer.log

    def timed_log(*args, **kwargs):  # once per update
        stamps.append(time.perf_counter())
        return log(*args, **kwargs)

    trainer.log = timed_log
    trainer.train()
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


@torch.no_grad()
def generate(args, tokenizer, rows):
    """transformers' generate on left-padded prompts.

    Lengths are forced per row, so that both sides write as many tokens.
    """
    from transformers import StoppingCriteria

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)
    tokenizer.padding_side = "left"
    lengths = json.loads(args.lengths)
    texts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in rows]

    class Lengths(StoppingCriteria):
        def __init__(self, wanted, width):
            self.wanted, self.width = torch.tensor(wanted, device=device), width

        def __call__(self, ids, scores, **kwargs):
            return ids.shape[1] - self.width >= self.wanted

    def whole() -> float:
        began = time.perf_counter()
        for start in range(0, len(lengths), args.batch):
            wanted = lengths[start : start + args.batch]
            batch = tokenizer(
                texts[start : start + args.batch],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=400,
                add_special_tokens=False,
            ).to(device)
            model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(wanted),
                min_new_tokens=max(wanted),
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[Lengths(wanted, batch["input_ids"].shape[1])],
            )
        return time.perf_counter() - began

    return [whole() for _ in range(args.steps)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["sft", "rm", "dpo", "ppo", "generate"])
    for name in ("model", "rows", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precompute", action="store_true", help="dpo: the reference's log-probs beforehand")
    parser.add_argument("--lengths", help="generate: JSON list, new tokens of each row")
    parser.add_argument("--batch", type=int, default=64, help="generate: rows together")
    args = parser.parse_args()
    args.model_class = AutoModelForCausalLM
    with open(args.rows) as file:
        rows = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    works = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo, "generate": generate}
    seconds = works[args.work](args, tokenizer, rows)
    memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}
    with open(args.out, "w") as file:
        json.dump({"seconds": seconds} | memory, file)


if __name__ == "__main__":
    main()
