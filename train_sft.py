"""Supervised fine-tuning: the policy learns to write the assistant's turns of real conversations.

    python train_sft.py policy=PATH data.train=[FILES]
    python train_sft.py model=tiny model.vocab_size=2048 data.train=[FILES]     weights and tokenizer from scratch

Ouyang et al. 2022 (arXiv:2203.02155), section 3.5; the loss is the mean over the target tokens of the whole step.
"""

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from data.chat import cut_prompt
from data.encoded import check_window
from data.loader import micro_batches
from data.prompts import encode_prompts
from data.sft import demonstration_texts, eval_examples, sft_loader
from data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from data.view import show_first_batch
from evals.watched import Watched
from kernels.backend import set_kernels
from losses import sft_loss
from model.build import export_model, load_policy, new_policy
from model.config import check_vocab, make_config
from model.experts import router_loss
from model.heads import Policy
from model.lora import add_lora, export_adapter
from model.packing import make_rows
from model.sampling import check as check_sampling
from model.sampling import generate
from runtime.config import check_policy_or_model, check_training, check_whole
from runtime.devices import widest
from runtime.distributed import gathered
from runtime.optim import build_optimizer, clip_grads, set_lr
from runtime.run import Run, main


def train(cfg: DictConfig, run: Run) -> float:
    """Fine-tune a policy on demonstrations. Returns the loss, of held-out rows where there are any."""
    set_kernels(cfg.kernels)
    check_training(cfg, run.world_size)
    check_policy_or_model(cfg)
    check_whole(0, num_samples=cfg.num_samples)

    # ---- one network, its optimizer, its data
    tokenizer, policy = load(cfg)
    policy.transformer.regularise(residual_dropout=tuple(cfg.residual_dropout), neftune_alpha=cfg.neftune_alpha)
    policy.transformer.checkpointing = cfg.activation_checkpointing
    policy = run.shard(policy)
    optimizer = build_optimizer(policy, cfg.optim)
    batches = sft_loader(
        cfg.data, tokenizer, batch_size=cfg.batch_size, seed=cfg.seed, rank=run.rank, world_size=run.world_size
    )
    examples = eval_examples(cfg.data, tokenizer, batches)
    check_window(policy.config.max_length, batches.items, examples)
    has_answers = bool(cfg.data.prompts and cfg.sample_every)
    watched = Watched(cfg.watch, run, seconds=cfg.reward_timeout, has_answers=has_answers)
    held_out = HeldOut(examples, sample_prompts(examples or batches.items, tokenizer, policy, cfg), watched)
    watched.check(held_out.prompts)
    run.resume(policy=policy, optimizer=optimizer, batches=batches)
    show_first_batch(cfg.view, run, tokenizer, batches)

    if run.step == 0:
        log_and_evaluate(cfg, run, policy, tokenizer, held_out, step=0)
        run.log_metrics(step=0)
    while run.step < cfg.num_steps:
        lr = set_lr(optimizer, run.step, cfg.optim)
        parts = micro_batches(next(batches), cfg.micro_batch_size)
        targets = torch.tensor(float(sum(row["completion_mask"].sum() for part in parts for row in part)))
        num_tokens = run.mean(targets)  # mean over ranks, because FSDP2 averages gradients

        # ---- gradients, a few rows at a time
        row_losses = []
        for part in parts:
            rows = make_rows(part, tokenizer.pad_id).to(run.device)
            logprobs = policy.logprobs(*rows)  # (b, T)
            loss, metrics = sft_loss(logprobs, rows.completion_mask, num_tokens=num_tokens)
            router, routed = router_loss(policy, share=1 / len(parts), **cfg.router)  # 0 without experts
            (loss + router).backward()
            run.metrics.add(metrics | routed)
            row_losses.append(-logprobs.detach().sum(1))  # (b,)

        # ---- the step
        grad_norm = clip_grads(policy, cfg.optim.max_grad_norm)
        run.stop_if_not_finite(grad_norm, torch.cat(row_losses), [row["where"] for part in parts for row in part])
        optimizer.step()
        optimizer.zero_grad()
        run.metrics.add({"objective/tokens": num_tokens * run.world_size, "optim/lr": lr, "optim/grad_norm": grad_norm})
        log_and_evaluate(cfg, run, policy, tokenizer, held_out, step=run.step + 1)
        run.end_step(num_tokens=sum(len(row["input_ids"]) for part in parts for row in part))

    export_model(policy, run.dir / "model", tokenizer)
    export_adapter(policy, run.dir / "adapter", cfg.policy)
    return run.finish("eval/loss" if held_out.examples and cfg.eval_every else "objective/loss")


def load(cfg: DictConfig) -> tuple[Tokenizer, Policy]:
    """(tokenizer, policy) from a checkpoint, or with random weights of the shape `cfg.model`.

    With random weights the tokenizer is `cfg.tokenizer`, or it is trained here.
    """
    if cfg.policy is not None:
        tokenizer = load_tokenizer(cfg.tokenizer or cfg.policy, template=cfg.data.template, date=cfg.data.date)
        policy = load_policy(cfg.policy, precision=cfg.precision, frozen=cfg.lora.rank > 0)
        check_vocab(policy.config, tokenizer.vocab_size)
        return tokenizer, add_lora(policy, **cfg.lora, seed=cfg.seed)
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(cfg.tokenizer, template=cfg.data.template, date=cfg.data.date)
    elif cfg.model.vocab_size is None:
        raise ValueError(
            "model= starts from nothing: say model.vocab_size=2048 to train a tokenizer, or tokenizer=PATH"
        )
    else:
        texts = demonstration_texts(cfg.data)
        with TemporaryDirectory() as directory:  # the export writes it where it belongs
            tokenizer = train_sentencepiece(texts, cfg.model.vocab_size, directory)
    return tokenizer, new_policy(make_config(cfg.model, tokenizer.vocab_size), seed=cfg.seed, precision=cfg.precision)


class HeldOut(NamedTuple):
    """What the policy is measured on while it trains."""

    examples: Sequence[dict]  # conversations of data.eval
    prompts: list[dict]  # their answers are logged
    watched: Watched  # rewards of these answers


@torch.no_grad()
def log_and_evaluate(
    cfg: DictConfig, run: Run, policy: Policy, tokenizer: Tokenizer, held_out: HeldOut, *, step: int
) -> None:
    """Log the loss on held-out conversations, and samples for a few prompts, each when due."""
    with run.off_the_clock(), gathered(policy):
        if held_out.examples and run.due(cfg.eval_every, step):
            run.metrics.add(evaluate(cfg, run, policy, tokenizer, held_out.examples))
        if held_out.prompts and run.due(cfg.sample_every, step):
            answers = generate(
                policy,
                [row["prompt_ids"] for row in held_out.prompts],
                **cfg.sampling,
                stop_ids=tokenizer.stop_ids,
                seeds=[cfg.seed + i for i in range(len(held_out.prompts))],
                pad_id=tokenizer.pad_id,
            )
            samples = sample_rows(answers, held_out.prompts, tokenizer)
            texts = [sample["completion"] for sample in samples]
            run.metrics.add(held_out.watched.figures(held_out.prompts, texts))
            run.log_samples(samples, step)


def evaluate(cfg: DictConfig, run: Run, policy: Policy, tokenizer: Tokenizer, examples: Sequence[dict]) -> dict:
    """Mean negative log-likelihood per assistant token over all examples, and its exponential."""
    totals = torch.zeros(2, dtype=widest(run.device), device=run.device)  # nats, tokens
    for part in micro_batches(examples[run.rank :: run.world_size], cfg.micro_batch_size):
        rows = make_rows(part, tokenizer.pad_id).to(run.device)
        totals += torch.stack([-policy.logprobs(*rows).sum(dtype=totals.dtype), rows.completion_mask.sum()])
    nats, tokens = run.mean(totals)
    return {"eval/loss": nats / tokens, "eval/perplexity": (nats / tokens).exp()}


def sample_prompts(items: Sequence[dict], tokenizer: Tokenizer, policy: Policy, cfg: DictConfig) -> list[dict]:
    """The first `num_samples` prompts of `data.prompts`; without any, conversations up to their last assistant turn."""
    room, shown = policy.config.max_length - cfg.sampling.max_new_tokens, []
    if cfg.data.prompts:
        asked = encode_prompts("data.prompts", cfg.data.prompts, cfg.data, tokenizer, max_length=room)
        shown = [row | {"prompt_ids": row["input_ids"], "reference_ids": []} for row in asked.items[: cfg.num_samples]]
    for item in [] if cfg.data.prompts else items[: cfg.num_samples]:
        mask = list(item["completion_mask"])
        end = len(mask) - mask[::-1].index(True)  # past the last target
        start = max((t for t in range(end) if not mask[t]), default=-1) + 1
        ids = list(map(int, item["input_ids"]))
        prompt = cut_prompt(ids[:start], tokenizer, max_length=room)
        shown.append({"prompt_ids": prompt, "reference_ids": ids[start:end]})
    if shown and cfg.sample_every:
        check_sampling(policy, [row["prompt_ids"] for row in shown], **cfg.sampling)
    return shown


def sample_rows(answers, shown: list[dict], tokenizer: Tokenizer) -> list[dict]:
    """Rows of samples.jsonl: the samples as texts, with the completion in the data."""
    rows = answers.rows
    return [
        {
            "prompt": tokenizer.decode(row["prompt_ids"], specials=True),
            "completion": tokenizer.decode(rows.input_ids[i][rows.completion_mask[i]].tolist()),
            "reference": tokenizer.decode(row["reference_ids"]),
            "finish_reason": answers.finish_reasons[i],
        }
        for i, row in enumerate(shown)
    ]


if __name__ == "__main__":
    main(train, "train_sft")
