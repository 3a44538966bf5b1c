"""Run a recipe, a chain of scripts in conf/recipe/*.yaml: the steps that are not done yet, then a report.

    python run_recipe.py recipe=coffee              a tiny chatbot from scratch, the default
    python run_recipe.py recipe=smollm2 dir=DIR all.seed=1 all.log.wandb=disabled

A step is done if its command, config and input files equal those in its manifest and its outputs are unchanged. At the
end it writes one page, dir/report.html (evals/recipe_report.py).
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from evals.recipe_report import report
from runtime.config import check_at_most, check_whole, flat
from runtime.files import read_object, sha256_of, write_whole
from runtime.inputs import NO_INPUTS, file_named_by, matches_of
from runtime.script import INTERRUPTED, enter
from runtime.seeds import LARGEST

ROOT = Path(__file__).parent
UNHASHED = ("checkpoints", "wandb", ".lock")  # large, or rewritten when they are read
console = Console(highlight=False)


def run_recipe(cfg: DictConfig) -> None:
    """Compose all steps, run those that are not done, and write the report."""
    os.chdir(ROOT)  # paths in a recipe are the project's
    home = Path(cfg.dir).absolute()
    for step in cfg.steps:  # an error in the last step must show before the first one runs
        seed = compose(step, cfg).seed
        check_whole(0, **{f"{step.name}.seed": seed})
        check_at_most(LARGEST, **{f"{step.name}.seed": seed})
    for number, step in enumerate(cfg.steps, 1):
        head = f"[{number}/{len(cfg.steps)}] {step.name}"
        key = fingerprint(step, cfg, home)
        manifest = home / "manifests" / f"{step.name}.json"
        if is_done(manifest, key, home / step.name):
            console.print(f"{head}: done before, nothing changed", markup=False)
            continue
        command = [*command_line(step, cfg), f"hydra.run.dir={home / step.name}"]
        record = read_manifest(manifest)
        record = (
            record if record.get("key") == key else {"key": key, "seconds": 0.0, "replaces": origin(home / step.name)}
        )
        record.pop("outputs", None)
        write_manifest(manifest, record)
        # The same step is resumed, but only after its script replaced the directory of an earlier run (run.json
        # changed). Until then the checkpoints there belong to the earlier run.
        begun = origin(home / step.name) != record.get("replaces")
        command += ["resume=true", "overwrite=true"] if begun else ["overwrite=true"]
        console.print(f"{head}: python {shlex.join(command)}", markup=False, soft_wrap=True)
        start = time.time()
        try:
            wait_for([sys.executable, *launcher(step), *command], step.name)
        finally:
            record["seconds"] += time.time() - start
            write_manifest(manifest, record)
        write_manifest(manifest, record | {"outputs": hash_files(home / step.name)})
    seconds = {step.name: read_manifest(home / "manifests" / f"{step.name}.json")["seconds"] for step in cfg.steps}
    commands = {step.name: f"python {shlex.join(command_line(step, cfg))}" for step in cfg.steps}
    report(home, cfg.steps, seconds, commands, name=cfg.name, question=cfg.get("question"))


def origin(directory: Path) -> str | None:
    """The sha256 of run.json. It differs for each run that started in this directory."""
    path = directory / "run.json"
    return sha256_of(path) if path.is_file() else None


def command_line(step: DictConfig, cfg: DictConfig) -> list[str]:
    """The command line of the step: script, its overrides, and the overrides for all steps.

    A step with its own `seed=N` runs with N + 1000 * all.seed. So the seeds of one training differ, and a repeated
    recipe has new ones.
    """
    words, shared = shlex.split(step.run), flat(cfg["all"])
    own = [word.removeprefix("seed=") for word in words if re.fullmatch(r"seed=\d+", word)]
    if own and isinstance(shared.get("seed"), int):
        shared["seed"] = int(own[-1]) + 1000 * shared["seed"]
    return words + [f"{key}={value}" for key, value in shared.items()]


def compose(step: DictConfig, cfg: DictConfig) -> DictConfig:
    """The config of the step's script. Raises Hydra's error where an override does not fit."""
    script, *overrides = command_line(step, cfg)
    return hydra.compose(script.removesuffix(".py"), overrides)


def launcher(step: DictConfig) -> list[str]:
    """The launch command of a step with several `processes`, or an empty list."""
    processes = step.get("processes", 1)
    return [] if processes == 1 else ["launch.py", "--standalone", f"--nproc-per-node={processes}"]


def fingerprint(step: DictConfig, cfg: DictConfig, home: Path) -> str:
    """A hash of everything that determines the step's results: its config, and every file that the config names."""
    config = OmegaConf.to_container(compose(step, cfg), resolve=False)
    named = {text: file_named_by(text) for text in sorted(set(texts_in(config)))}
    inputs = {text: hash_files(path) for text, path in named.items() if path and path.resolve() != ROOT}
    for text in (text for text, path in named.items() if path is None):  # of a pattern all files that match
        found = {name: sha256_of(Path(name)) for name in sorted(matches_of(text)) if Path(name).is_file()}
        inputs |= {text: found} if found else {}
    whole = json.dumps([command_line(step, cfg), config, inputs], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def texts_in(value) -> list[str]:
    """Every string in a nested config that may name an input."""
    if isinstance(value, dict):
        value = [item for key, item in value.items() if key not in NO_INPUTS]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def hash_files(path: Path) -> dict[str, str]:
    """{relative path: sha256} of a file or of the files under a directory."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    hashes = {}
    for file in files:
        name = str(file.relative_to(path))
        if name.split("/")[0] not in UNHASHED:
            hashes[name] = sha256_of(file)
    return hashes


def is_done(manifest: Path, key: str, directory: Path) -> bool:
    """Whether the step is complete with the same inputs, and its outputs are unchanged."""
    record = read_manifest(manifest)
    return record.get("key") == key and "outputs" in record and record["outputs"] == hash_files(directory)


def read_manifest(path: Path) -> dict:
    """The manifest of a step, empty if it never began. Raises ValueError where the file is damaged."""
    return read_object(path, "delete it, and its step is done again")


def write_manifest(path: Path, value: dict) -> None:
    """Creates its directory where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1))


def wait_for(command: list[str], name: str) -> None:
    """Run a script to its end. A signal to the recipe is passed to the script, which saves; then the recipe stops."""
    child = subprocess.Popen(command)
    handlers = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in (signal.SIGTERM,)}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code == -signal.SIGTERM:  # it got SIGTERM before it handled that signal, or after it had ended
        code = INTERRUPTED
    if code:
        again = "the same command goes on with it" if code == INTERRUPTED else "the same command tries it again"
        what = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        what = "was interrupted" if code == INTERRUPTED else what
        console.print(f"step {name} {what}; {again}, finished steps are kept", markup=False, style="bold red")
        raise SystemExit(code if code > 0 else 1)


if __name__ == "__main__":
    enter(run_recipe, "run_recipe")
