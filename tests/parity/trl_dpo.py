"""Our losses and TRL's trainers on the same token ids, step by step in float32; prints the largest differences.

    python3.11 -m venv TRL && TRL/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    TRL/bin/python tests/parity/trl_dpo.py --ours .venv/bin/python

TRL's trainers run here; ours runs as a command under `--ours`. TRL's tokenisation is bypassed (a template may add text
after the stop token), nothing else is, but for one thing: its ORPO also trains on the prompt, so that its NLL is taken
over the completion here.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH, BETA, SMOOTHING, RATE = 10, 8, 0.1, 0.2, 1e-3
OURS = {  # TRL's name -> our words
    "sigmoid": "loss=dpo",
    "sigmoid_norm": "loss=dpo average_logprobs=true",
    "ipo": "loss=ipo",
    "hinge": "loss=hinge",
    "robust": f"loss=robust label_smoothing={SMOOTHING}",
    "cpo": "loss=cpo",
    "simpo": f"loss=simpo target_margin=0.05 beta={BETA}",
    "orpo": "loss=orpo",
    "kto": "loss=kto",
}


def make_inputs(home: Path) -> None:
    """Runs under our environment: a tiny policy, real pairs, and the ids that our loader makes of them."""
    sys.path.insert(0, str(ROOT))
    from omegaconf import OmegaConf

    from data.preference_batch import mismatched
    from data.preferences import eval_groups
    from data.records import read_jsonl, write_jsonl
    from data.tokenizer import train_sentencepiece
    from model.build import export_model, new_policy
    from model.config import make_config
    from model.ref_cache import row_key

    rows = read_jsonl(ROOT / "data/embedded/pref_hh_helpful_train.jsonl.gz")
    rows.sort(key=lambda row: len(str(row["prompt"]) + row["chosen"] + row["rejected"]))  # nothing is cut at 512
    rows = rows[100 : 100 + STEPS * BATCH]
    rated = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "reward": float(i % 2)}
        for i, row in enumerate(rows)
    ]
    write_jsonl(home / "pairs.jsonl", rows)
    write_jsonl(home / "rated.jsonl", rated)
    tokenizer = train_sentencepiece([row["chosen"] for row in rows], 500, home / "tokenizer")
    sizes = OmegaConf.merge(OmegaConf.load(ROOT / "conf/model/tiny.yaml"), {"num_layers": 2})
    policy = new_policy(make_config(sizes, tokenizer.vocab_size), seed=0)
    with torch.no_grad():  # far from uniform, or the losses could not tell rows apart
        for weight in policy.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    export_model(policy, home / "policy", tokenizer)
    for name in ("pairs", "rated"):
        data = OmegaConf.load(ROOT / "conf/data/preferences.yaml")
        data.eval = [str(home / f"{name}.jsonl")]
        groups = eval_groups(data, tokenizer)
        kl_rows = mismatched(groups)
        (home / f"{name}_ids.json").write_text(json.dumps([ids_of(group, kl_rows, row_key) for group in groups]))


def ids_of(group, kl_rows, row_key) -> dict:
    start = int(group.rows[0]["completion_mask"].argmax())
    answers = [row["input_ids"][start:].tolist() for row in group.rows]
    prompt = group.rows[0]["input_ids"][:start].tolist()
    if group.reward is None:
        return {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}
    other = kl_rows[row_key(group.rows[0])]["input_ids"][start:]
    return {"prompt_ids": prompt, "completion_ids": answers[0], "KL_completion_ids": other, "label": group.reward > 0.5}


def run_ours(python: str, home: Path, name: str) -> list[dict]:
    """Our script's metrics, one row a step."""
    command = OURS[name].split()
    data = home / ("rated.jsonl" if name == "kto" else "pairs.jsonl")
    common = [
        f"hydra.run.dir={home / name}", f"policy={home / 'policy'}", f"data.train=[{data}]", "data.shuffle=false",
        f"num_steps={STEPS}", f"batch_size={BATCH}", f"micro_batch_size={BATCH}", f"optim.lr={RATE}",
        "optim.schedule=constant", "optim.warmup_steps=0", "eval_every=0", "sample_every=0", "save_every=0",
        "log.wandb=disabled", "overwrite=true", f"ref_cache={home / 'cache'}",
    ]  # fmt: skip
    beta = [] if any(word.startswith("beta=") for word in command) else [f"beta={BETA}"]
    subprocess.run([python, "train_dpo.py", *common, *command, *beta], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]


def run_trl(home: Path, name: str) -> list[dict]:
    """TRL's loss and rewards, one row a step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer_class, config_class, settings = trl_classes(name)
    rows = json.loads((home / f"{'rated' if name == 'kto' else 'pairs'}_ids.json").read_text())
    if name in ("cpo", "simpo", "orpo"):
        rows = [as_labels(row) for row in rows]
    losses = []

    class Recording(trainer_class):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def tokenize_row(self, feature, model=None):  # CPO and ORPO map it over the data
            return {}

        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            losses.append((out[0] if isinstance(out, tuple) else out).item())
            return out

        def concatenated_forward(self, model, batch):
            out = list(super().concatenated_forward(model, batch))
            if name == "orpo":
                logits, labels = out[2], batch["chosen_labels"]
                width = labels.shape[1]
                flat = logits[:, : width - 1].reshape(-1, logits.shape[-1])
                out[4] = torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100)
            return tuple(out)

    args = config_class(
        output_dir=str(home / "trl"), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
        train_sampling_strategy="sequential", beta=BETA, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(home / "policy", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(home / "policy"),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return [row | {"loss": loss} for loss, row in zip(losses, logged, strict=True)]


def trl_classes(name: str):
    if name == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig, {}
    if name in ("cpo", "simpo"):
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        alpha = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.05} if name == "simpo" else {}
        return CPOTrainer, CPOConfig, alpha
    if name == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig, {}
    from trl import DPOConfig, DPOTrainer

    smoothing = {"label_smoothing": SMOOTHING} if name == "robust" else {}
    return DPOTrainer, DPOConfig, {"loss_type": [name], **smoothing}


def as_labels(row: dict) -> dict:
    """What CPO's and ORPO's tokenisation returns."""
    prompt, out = row["prompt_ids"], {}
    for side in ("chosen", "rejected"):
        ids = prompt + row[f"{side}_ids"]
        out[f"{side}_input_ids"], out[f"{side}_attention_mask"] = ids, [1] * len(ids)
        out[f"{side}_labels"] = [-100] * len(prompt) + row[f"{side}_ids"]
    return out | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def gap(row: dict) -> float:
    return row["rewards/chosen"] - row["rewards/rejected"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default=str(ROOT / ".venv/bin/python"), help="Python of our environment")
    parser.add_argument("--home", type=Path, default=ROOT / "artifacts/parity_trl_dpo")
    parser.add_argument("--make", action="store_true", help="only make the inputs (runs under our environment)")
    parser.add_argument("--losses", nargs="*", default=list(OURS))
    given = parser.parse_args()
    home = given.home.resolve()
    if given.make:
        return make_inputs(home)
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run([given.ours, __file__, "--make", "--home", str(home)], check=True, cwd=ROOT)
    print(f"{'TRL':14}{'first loss':>12}{'last loss':>12}   largest difference over {STEPS} steps")
    worst = 0.0
    for name in given.losses:
        ours, theirs = run_ours(given.ours, home, name), run_trl(home, name)
        pairs = list(zip(ours, theirs, strict=True))
        far = {"loss": max(abs(a["objective/loss"] - b["loss"]) for a, b in pairs)}
        if name not in ("ipo", "sigmoid_norm"):  # of means: TRL logs the rewards of the sums beside them
            for side in ("chosen", "rejected"):
                far[side] = max(abs(a[f"rewards/{side}"] - b[f"rewards/{side}"]) for a, b in pairs)
            far["margin"] = max(abs(gap(a) - gap(b)) for a, b in pairs)
        worst = max(worst, *far.values())
        listed = "  ".join(f"{k} {v:.1e}" for k, v in far.items())
        print(f"{name:14}{ours[0]['objective/loss']:12.6f}{ours[-1]['objective/loss']:12.6f}   {listed}", flush=True)
    print(f"largest: {worst:.1e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
