"""Count how often the four training scripts make the host wait for the device. No device is needed.

    python -m bench.host_syncs

On a GPU the host runs ahead until it needs a value (`.item()`, `if tensor`, an index by a bool mask, `nonzero`) or
copies from memory that is not pinned. Then it waits for all queued work. Here the scripts run on the CPU with a tiny
model. Every tensor on the run's device, or computed from one, is marked. Every operation that would wait for it is
counted with its source line. Two waits per step are necessary: whether the gradient is finite, and the row of metrics.
"""

import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from runtime.report import print_table  # noqa: E402

READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "masked_select",
         "equal", "allclose", "unique", "__contains__", "is_nonzero", "argwhere")  # fmt: skip
ON_HOST = (
    "any_on_host",
    "_check",
    "send",
)  # functions that handle a GPU's tensors and do not wait, or copy from pinned memory
COPIES = ("tensor", "as_tensor")  # they copy a list to the device from memory that is not pinned


class HostSyncs(TorchFunctionMode):
    """Counts the operations that would wait for the device, by source line, while the mode is active."""

    def __init__(self):
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = (resolve_name(function) or getattr(function, "__name__", "")).rpartition(".")[2]
        given = any(on_device(x) for x in flat((args, tuple(kwargs.values()))))
        moved = name == "to" and not given and targets_device(args[1:], kwargs)
        copied = (moved and not kwargs.get("non_blocking")) or (name in COPIES and kwargs.get("device") is not None)
        if copied or (given and self.reads(name, args)):
            self.count(name)
        # the mode is inactive inside a torch function, where the gradients of our own functions run
        if name == "backward":
            loss = args[0]
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        out = function(*args, **kwargs)
        if name == "cpu":
            return out.detach().view_as(out)  # the host's own copy is not marked
        if name in ("tolist", "numpy"):
            return out
        if moved and out is args[0]:  # on a CPU `to` returns the tensor itself, which stays the host's
            out = out.view_as(out)
        if given or moved or kwargs.get("device") is not None:
            for x in flat((out,)):
                if isinstance(x, Tensor):
                    x.of_device = True
        return out

    def count(self, name: str) -> None:
        """Add one at the project's line nearest to the call. Lines that do not run on a GPU are left out."""
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
                if frame.name not in ON_HOST:
                    self.sites[f"{path.relative_to(ROOT)}:{frame.lineno} {name}"] += 1
                return

    def reads(self, name: str, args: tuple) -> bool:
        """Whether the host needs a value: a method of READS, an index by a mask, or lengths on the device."""
        if name in ("__getitem__", "__setitem__"):
            indices = [x for x in flat((args[1],)) if isinstance(x, Tensor)]
            return on_device(args[0]) and any(x.dtype == torch.bool or not on_device(x) for x in indices)
        return name in READS


def flat(value):
    """The leaves of nested tuples and lists."""
    for x in value:
        if isinstance(x, (tuple, list)):
            yield from flat(x)
        else:
            yield x


def on_device(x) -> bool:
    return isinstance(x, nn.Parameter) or (isinstance(x, Tensor) and getattr(x, "of_device", False))


def targets_device(args: tuple, kwargs: dict) -> bool:
    return isinstance(args[0] if args else kwargs.get("device"), (torch.device, str))


WINDOW = (2, 4)  # the steps that are counted, after one-time work


def count(script: str, overrides: list[str]) -> Counter[str]:
    """Syncs by source line in the steps of WINDOW of a run of `script`, without evaluation or sampling."""
    import importlib

    import runtime.run

    module, mode, ends = importlib.import_module(script), HostSyncs(), runtime.run.Run.end_step

    def end_step(run, *args, **kwargs):
        out = ends(run, *args, **kwargs)
        if run.step == WINDOW[0]:
            mode.__enter__()
        if run.step == WINDOW[1]:
            mode.__exit__(None, None, None)
        return out

    sys.argv = [f"{script}.py", *overrides]
    with patch.object(runtime.run.Run, "end_step", end_step):
        runtime.run.main(module.train, script)
    return mode.sites


def files(directory: Path) -> dict[str, Path]:
    """Demonstrations, pairs and prompts of a few words each."""
    import json

    rows = {
        "sft": [{"prompt": f"say {i}", "completion": f"it is {i}, as you said"} for i in range(32)],
        "pairs": [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": f"no, not {i}, never"} for i in range(32)],
        "prompts": [{"prompt": f"say {i}"} for i in range(32)],
    }
    paths = {name: directory / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return paths


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        paths, rows = files(directory), []
        for script, overrides in jobs(directory, paths):
            sites = count(script, overrides)
            steps = WINDOW[1] - WINDOW[0]
            rows.append((script, f"{sum(sites.values()) / steps:g}", ""))
            rows += [("", f"{times / steps:g}", where) for where, times in sites.most_common()]
        print_table("host synchronisations per step", ("script", "a step", "where"), rows)


def jobs(directory: Path, paths: dict[str, Path]) -> list[tuple[str, list[str]]]:
    """The four scripts on a tiny model, with two micro-batches per step."""
    os.chdir(directory)
    common = ["num_steps=5", "eval_every=0", "sample_every=0", "save_every=0", "log.wandb=disabled"]
    model = ["model=tiny", "model.vocab_size=300", f"data.train=[{paths['sft']}]", "batch_size=8", "micro_batch_size=4"]
    learned = [f"policy={directory}/sft/model", "batch_size=8", "micro_batch_size=4"]
    pairs, prompts = f"data.train=[{paths['pairs']}]", f"data.prompts=[{paths['prompts']}]"
    ppo = ["minibatch_size=4", "micro_batch_size=2", "batch_size=8", "sampling.max_new_tokens=6", "ppo_epochs=1"]
    ppo += [f"policy={directory}/sft/model", f"reward_model={directory}/rm/model"]
    return [
        ("train_sft", [*common, *model, "hydra.run.dir=sft"]),
        ("train_rm", [*common, *learned, pairs, "hydra.run.dir=rm"]),
        ("train_dpo", [*common, *learned, pairs, "hydra.run.dir=dpo"]),
        ("train_ppo", [*common, *ppo, prompts, "hydra.run.dir=ppo"]),
    ]


if __name__ == "__main__":
    main()
