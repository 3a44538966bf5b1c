"""Runs a list of scripts one after the other in this process: `python run_scripts.py jobs.json`, also under torchrun.

jobs.json holds [[script, word, ...], ...]. The processes of a test import torch once, not once a script.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from hydra.core.global_hydra import GlobalHydra

import runtime.run
from runtime import devices

torch.set_num_threads(1)
devices.native_bf16 = lambda device_type: False  # as tests/conftest.py


def run_scripts(jobs: list[list[str]]) -> None:
    runtime.run.plot_metrics = lambda rows, path: None  # seconds a run; another test draws
    port = int(os.environ.get("MASTER_PORT", "0"))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # every script founds a process group of its own
    for number, (name, *words) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port + 1 + number)
        sys.argv = [name + ".py", *words]
        GlobalHydra.instance().clear()
        module = importlib.import_module(name)
        runtime.run.main(module.train, name)


if __name__ == "__main__":
    run_scripts(json.loads(Path(sys.argv[1]).read_text()))
