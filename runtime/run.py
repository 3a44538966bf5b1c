"""Run: what a training loop needs besides the algorithm. Seeds, device, run directory, log, resume, teardown.

main(train, "train_sft")                   the entry point: config, exit codes
with Run(cfg) as run:                      inside `main`; refuses a directory that holds a run
    run.resume(policy=policy, ...)         names the training state; loads it where resume=true
    while run.step < cfg.num_steps:        run.step = completed steps
        ...
        run.end_step(num_tokens=...)       writes the row of metrics; saves when due, and after a signal to stop
    return run.finish("objective/loss")
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from runtime import checkpoint, directory, distributed, host, optim
from runtime.board import Board, check_board
from runtime.config import check_at_most, check_whole, write_config
from runtime.devices import choose_precision
from runtime.display import Terminal, complain
from runtime.files import sync
from runtime.inputs import code_digests, input_digests
from runtime.metrics import Metrics, append_row, drop_rows_after, each_log_row
from runtime.plots import plot_metrics
from runtime.resume import fault_of_resume
from runtime.script import INTERRUPTED, RunFailed, enter
from runtime.seeds import LARGEST
from runtime.shares import places_of
from runtime.stopping import StopSignals

LOGS = ("metrics.jsonl", "samples.jsonl")  # each row has a `step`


class Run:
    """One run in one directory, on one rank."""

    def __init__(self, cfg: DictConfig):
        check_board(cfg)
        check_whole(0, seed=cfg.seed)
        check_at_most(LARGEST, seed=cfg.seed)
        self.cfg, self.dir = cfg, Path(cfg.run_dir)
        self.step, self.tokens_seen = 0, 0  # completed steps; attention-mask tokens of all ranks
        self.metrics = Metrics()
        self._state: dict[str, Any] = {}  # name -> an object with a state, for checkpoints
        self._origin: dict[str, Any] = {}  # digests of inputs and code, for checkpoints
        self._saved_step, self._begun, self._signals = -1, False, StopSignals()
        self._board: Board | None = None
        self._board_id: str | None = None  # the id of the run that this one continues

    def __enter__(self) -> "Run":
        host.tune_allocator()
        self.rank, self.world_size, self.device = distributed.start_ranks(self.cfg.dist.strategy)
        if (
            "precision" in self.cfg
        ):  # replaces auto in config.yaml, so that a resume on another machine computes the same
            self.cfg.precision = choose_precision(self.cfg.precision, self.device)
        self.is_main = self.rank == 0
        may_hold_run = self.cfg.resume or self.cfg.overwrite
        self._lock = directory.claim(self.dir, may_hold_run=may_hold_run) if self.is_main else None
        self.rng = host.seed_all(self.cfg.seed + self.rank)
        self.terminal = Terminal(self.cfg.name, self.cfg.get("num_steps") or 0, quiet=not self.is_main)
        self._signals.start()
        self._paused, self._clock = 0.0, time.perf_counter()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Release everything, because the next job of a sweep starts in this process."""
        self._signals.close()
        self.terminal.close()
        if self._board is not None:
            self._board.close(0 if kind is None else 1)
        self._state.clear()
        distributed.stop_ranks()
        if self._lock is not None:
            (self.dir / directory.LOCK).unlink(missing_ok=True)
            self._lock.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # ---- models and ranks

    def shard(self, model: nn.Module) -> nn.Module:
        """The model on this rank's device. With dist=fsdp or hsdp its weights are sharded over the ranks."""
        how = self.cfg.dist
        if how.strategy == "single":
            return model.to(self.device)
        size, offload = how.get("shard_size"), how.cpu_offload
        return distributed.shard_model(model, self.device, shard_size=size, cpu_offload=offload)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks."""
        return distributed.mean_over_ranks(value)

    def minibatches(self, num_rows: int, epochs: int, size: int, samples_per_prompt: int = 1) -> Iterator[Tensor]:
        """Yield the indices of this rank's share of each minibatch. Minibatches do not depend on the number of ranks.

        The rows of all ranks form a table with `size` columns, which starts with the first sample of all prompts. Each
        epoch permutes every column separately, and a minibatch is a row of the table. A rank has every world_size-th
        prompt, so it has whole columns, and every minibatch has rows for every rank.

        Args:
            num_rows: of this rank, with the samples of a prompt consecutive. size: rows of a minibatch on all ranks.
        Raises:
            ValueError: the rows do not split evenly.
        """
        rows, own_prompts = num_rows * self.world_size, num_rows // samples_per_prompt  # prompts of this rank
        if size % self.world_size or rows % size:
            raise ValueError(f"minibatch_size={size} does not divide {rows} rows on {self.world_size} ranks evenly")
        table = np.arange(rows).reshape(-1, size)
        for epoch in range(epochs):
            drawn = np.random.default_rng([self.cfg.seed, self.step, epoch]).permuted(table, axis=0)
            for minibatch in (places_of(numbers, self.rank, self.world_size) for numbers in drawn):
                yield torch.from_numpy(minibatch % own_prompts * samples_per_prompt + minibatch // own_prompts)

    # ---- the course of a run

    def begin(self) -> None:
        """Start writing the directory after the checks of inputs. `resume` and scripts that do not train call it."""
        if self._begun:
            return
        again = self.step == 0 and (self.cfg.overwrite or self.cfg.resume)
        if again:
            self._check_not_trained()
        self._begun = True
        if self.is_main:
            if again:
                directory.clear(self.dir)
            write_config(self.cfg, self.dir / "config.yaml")
            host.write_origin(self.cfg, self.dir)
            self._board = Board(
                self.cfg, self.dir, job=host.job_name(self.cfg.name), run_id=self._board_id, say=self.terminal.say
            )
        self._paused, self._clock = 0.0, time.perf_counter()

    def resume(self, **state: Any) -> None:
        """Register the objects (with state_dict and load_state_dict) of a checkpoint, and load it if resume=true.

        Raises:
            ValueError: the config, an input or the code changed so that results would change, every checkpoint is
                damaged, or the run is finished and has no checkpoint.
        """
        self._state = state
        if self.is_main:
            config = OmegaConf.to_container(self.cfg, resolve=True)
            self._origin = {"config": config, "inputs": input_digests(self.cfg), "code": code_digests()}
        for value in state.values():
            if isinstance(value, torch.optim.Optimizer):
                optim.init_state(value)
        if self.cfg.resume:
            found = checkpoint.find_checkpoint(self.dir / "checkpoints", complain)
            self._check_unchanged(*found or (None, None))
            if found is not None:
                self._load(found[0])
            elif host.is_finished(self.dir) and not self.cfg.overwrite:
                problem = "holds a finished run without checkpoints, so there is nothing to resume"
                raise ValueError(f"{self.dir} {problem}; set overwrite=true to repeat it")
        self.begin()

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether the current step (or `step`) is a multiple of `every` or the last. every=0: never; step 0: always."""
        step = self.step + 1 if step is None else step
        return every > 0 and (step % every == 0 or step == self.cfg.num_steps)

    @property
    def is_last_step(self) -> bool:
        """Whether no step comes after the current one."""
        return self.step + 1 == self.cfg.num_steps

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Time in the block, such as evaluation, sampling or saving, does not count as time of the step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def log_samples(self, samples: list[dict], step: int | None = None) -> None:
        """Log sample texts of the current step (or `step`) to samples.jsonl, the terminal and the board."""
        step = self.step + 1 if step is None else step
        if not self.is_main:
            return
        for sample in samples:
            append_row(self.dir / "samples.jsonl", {"step": step} | sample)
        for sample in samples[:2]:
            texts = [f"    {name}: {value}" for name, value in sample.items() if not isinstance(value, list | dict)]
            self.terminal.say("\n".join(texts))  # lists have a number per token, and are only for the file
        self._board.log_samples(step, samples)

    def log_metrics(self, step: int) -> None:
        """Write the metrics since the last row as the row of `step`."""
        figures = self.metrics.flush()
        if not figures or not self.is_main:
            return
        append_row(self.dir / "metrics.jsonl", {"step": step} | figures)
        self.terminal.show(step, figures)
        self._board.log(step, figures)

    def end_step(self, num_tokens: int | None = None) -> None:
        """End a step: write its metrics, and a checkpoint when due. After a stop signal it exits with 75.

        Args:
            num_tokens: attention-mask tokens of this rank's rows in the step.
        """
        seconds = time.perf_counter() - self._clock - self._paused
        if num_tokens is not None:
            total = round(float(self.mean(torch.tensor(float(num_tokens)))) * self.world_size)
            self.tokens_seen += total
            self.metrics.add({"perf/tokens_per_second": total / seconds})
        self.metrics.add({"perf/peak_memory_gb": host.peak_memory_gb(self.device), "perf/step_seconds": seconds})
        due = self.due(self.cfg.save_every)
        self.step += 1
        self.log_metrics(self.step)
        host.trim_memory(self.step)
        stop = distributed.any_rank(self.stopping, self.device)
        if due or stop:
            self.save()
        if stop:
            complain(f"stopped after step {self.step}, which is saved; the same command with resume=true continues")
            raise SystemExit(INTERRUPTED)
        self._paused, self._clock = 0.0, time.perf_counter()

    def stop_if_not_finite(self, value: Tensor, row_losses: Tensor, rows: list[str]) -> None:
        """Stop before the optimizer's step if `value` is not finite. The rows at fault are written to bad_rows.jsonl.

        Args:
            value: () the gradient norm, which is not finite if the loss is not.
            row_losses: (B,). rows: FILE:LINE of each row.
        Raises:
            FloatingPointError: the value is not finite on some rank.
        """
        if not distributed.any_rank(not torch.isfinite(value).item(), self.device):
            return
        bad = [rows[i] for i in (~torch.isfinite(row_losses)).nonzero().flatten().tolist()]
        for row in bad:
            append_row(self.dir / "bad_rows.jsonl", {"step": self.step + 1, "rank": self.rank, "row": row})
        self._write_state(self.dir / "nonfinite")
        named = f"from {', '.join(bad)} (also in bad_rows.jsonl)" if bad else "though each row's loss is finite"
        raise FloatingPointError(
            f"step {self.step + 1}: the loss or its gradient is not finite ({value.item()}), {named}; no step was "
            f"taken, and the state before it is in {self.dir / 'nonfinite'}. Check the rows, or lower optim.lr"
        )

    def save(self) -> None:
        """Write a checkpoint of the last completed step. `end_step` calls it when save_every is due."""
        if self._saved_step == self.step:
            return
        self._write_state(self.dir / "checkpoints")
        self._saved_step = self.step
        if self.is_main:
            rows = self.dir / "metrics.jsonl"
            root, metric = self.dir / "checkpoints", self.cfg.get("keep_best")
            best = checkpoint.best_step(each_log_row(rows), root, metric)
            if metric is not None and not best:
                complain(f"keep_best={metric}: no checkpoint has a finite figure of that name in metrics.jsonl")
            checkpoint.prune_checkpoints(root, step=self.step, keep_last=self.cfg.keep_last, keep=best)
            plot_metrics(each_log_row(rows), self.dir / "curves.png")

    def finish(self, key: str) -> float:
        """Plot the metrics, print the directory, and return the last value of the metric `key`, for sweeps."""
        rows = self.dir / "metrics.jsonl"
        if self.is_main:
            plot_metrics(each_log_row(rows), self.dir / "curves.png")
            host.write_finish(self.dir, self.step)
            self.terminal.say(f"done: {self.dir}")
        found = [row[key] for row in each_log_row(rows) if key in row] if self.is_main else []
        return found[-1] if found else float("nan")

    def failure(self, error: OSError | ValueError) -> Exception:
        """The exception to raise for an error such as a full disk or a reward function that fails.

        Before the run began it is the error itself (bad input). Later it is a RunFailed that says how to go on.
        """
        if not self._begun or (isinstance(error, ValueError) and not self.step):
            return error
        latest = self.dir / "checkpoints" / "latest"
        good = f"the last good checkpoint is {latest.resolve().name}; " if latest.exists() else "nothing was saved; "
        return RunFailed(f"after step {self.step}: {error}; {good}the same command with resume=true continues")

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM or SIGINT arrived, for scripts that wait and have no steps."""
        return self._signals.asked

    # ---- inside

    def _write_state(self, root: Path) -> None:
        meta = {"step": self.step, "tokens_seen": self.tokens_seen, "git_sha": host.git_sha()} | self._origin
        if self.is_main:  # a resume drops later rows and cannot restore missing ones, so they must be on the disk first
            for path in filter(Path.exists, (self.dir / name for name in LOGS)):
                sync(path)
        checkpoint.save_checkpoint(root, self.step, self._snapshot(), meta, rank=self.rank)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "state": {name: value.state_dict() for name, value in self._state.items()},
            "random": host.random_state(self.rng, self.device),
            "tokens_seen": self.tokens_seen,
            "world_size": self.world_size,
            "board_id": self._board.id if self._board else self._board_id,
        }

    def _check_unchanged(self, path: Path | None, meta: dict[str, Any] | None) -> None:
        """Raise ValueError unless config and inputs equal the checkpoint's, or the config equals config.yaml's."""
        fault = fault_of_resume(self.cfg, self.dir, path, meta) if self.is_main else None  # one rank reads all files
        if fault := distributed.from_main(fault):
            raise ValueError(fault)

    def _check_not_trained(self) -> None:
        """Raise ValueError if a script without a training state would resume in the directory of a training."""
        trained = any((self.dir / name).exists() for name in ("model", "checkpoints"))
        if trained and not self._state and not self.cfg.overwrite:
            raise ValueError(
                f"{self.dir} has a trained model, which resume=true would delete; choose another hydra.run.dir"
            )

    def _load(self, path: Path) -> None:
        try:
            saved = checkpoint.load_checkpoint(path, self._snapshot(), rank=self.rank)
            for name, value in self._state.items():
                value.load_state_dict(saved["state"][name])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            problem = f"{path} has the state of another training ({error}); set overwrite=true to begin again"
            raise ValueError(problem) from error
        if saved.get("world_size", self.world_size) == self.world_size:
            host.set_random_state(saved["random"], self.rng, self.device)
        else:  # new ranks have no saved state, and two ranks must not draw the same numbers
            self.rng = host.seed_all(self.cfg.seed + self.rank + (checkpoint.step_of(path) << 32))
        self.tokens_seen = saved["tokens_seen"]
        self.step = self._saved_step = checkpoint.step_of(path)
        if self.is_main:
            checkpoint.point_latest(
                path
            )  # the process may have been killed before it moved `latest`, or the newest one is damaged
            for name in LOGS:
                drop_rows_after(self.dir / name, self.step)
        self._board_id = saved["board_id"]
        self.terminal.say(f"resumed from {path}")


def main(job: Callable[[DictConfig, Run], float], config_name: str) -> None:
    """The entry point of a script: compose conf/`config_name`.yaml with the command line, call `job(cfg, run)`."""

    def in_a_run(cfg: DictConfig) -> float:
        run = Run(cfg)
        try:
            with run:
                return job(cfg, run)
        except (OSError, ValueError) as error:
            raise run.failure(error) from error

    enter(in_a_run, config_name)
