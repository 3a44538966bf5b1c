"""A chain of doors, as listed in conf/recipe/*.yaml: runs what is not done yet, then shows what came of it.

    python run_recipe.py recipe=coffee              a tiny chatbot from scratch, the default
    python run_recipe.py recipe=smollm2 dir=DIR all.seed=1 all.log.wandb=disabled

A step is done when its command, config and input files are those of its manifest and its outputs are unchanged.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from runtime.config import flat
from runtime.door import INTERRUPTED, enter
from runtime.metrics import read_rows

ROOT = Path(__file__).parent
UNHASHED = ("checkpoints", "wandb", ".lock")  # large, or rewritten by looking at them
console = Console(highlight=False)


def run_recipe(cfg: DictConfig) -> None:
    os.chdir(ROOT)  # paths in a recipe are the project's
    home = Path(cfg.dir).absolute()
    for step in cfg.steps:
        compose(step, cfg)  # a wrong key in the last step must not wait for the first
    for number, step in enumerate(cfg.steps, 1):
        head = f"[{number}/{len(cfg.steps)}] {step.name}"
        key = fingerprint(step, cfg, home)
        manifest = home / "manifests" / f"{step.name}.json"
        if is_done(manifest, key, home / step.name):
            console.print(f"{head}: done before, nothing changed", markup=False)
            continue
        command = [*words(step, cfg), f"hydra.run.dir={home / step.name}"]
        command.append("resume=true" if read_manifest(manifest).get("key") == key else "overwrite=true")
        write_manifest(manifest, {"key": key})  # begun: the same step resumes, a changed one starts anew
        console.print(f"{head}: python {shlex.join(command)}", markup=False, soft_wrap=True)
        start = time.time()
        wait_for([sys.executable, *launcher(step), *command], step.name)
        write_manifest(manifest, {"key": key, "seconds": time.time() - start, "outputs": hash_files(home / step.name)})
    report(cfg, home)


def words(step: DictConfig, cfg: DictConfig) -> list[str]:
    """The step's command line: door, overrides, and those given for all steps."""
    return shlex.split(step.run) + [f"{key}={value}" for key, value in flat(cfg["all"]).items()]


def compose(step: DictConfig, cfg: DictConfig) -> DictConfig:
    """The config that the step's door will see. Raises Hydra's error where an override does not fit."""
    door, *overrides = words(step, cfg)
    return hydra.compose(door.removesuffix(".py"), overrides)


def launcher(step: DictConfig) -> list[str]:
    """What starts the ranks of a step that asks for several `processes`."""
    processes = step.get("processes", 1)
    return [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def fingerprint(step: DictConfig, cfg: DictConfig, home: Path) -> str:
    """A hash of all that decides what the step will compute: its config, and every file that the config names."""
    config = OmegaConf.to_container(compose(step, cfg), resolve=False)
    files = {name: value for name, value in config.items() if name != "lora"}  # its targets name layers, not files
    named = sorted({text.split("@")[0] for text in texts_in(files)} - {""})  # FILE@train is a part of FILE
    inputs = {text: hash_files(Path(text)) for text in named if Path(text).absolute() != ROOT and exists(text)}
    whole = json.dumps([words(step, cfg), config, inputs], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def exists(text: str) -> bool:
    """Whether the text is a path to something; most texts of a config are not."""
    try:
        return Path(text).exists()
    except OSError:  # too long for a path
        return False


def texts_in(value) -> list[str]:
    """Every string in a nested config."""
    if isinstance(value, dict):
        value = list(value.values())
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
            with open(file, "rb") as handle:
                hashes[name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashes


def is_done(manifest: Path, key: str, directory: Path) -> bool:
    """Whether the step ran to its end from the same inputs, and left what is still there."""
    told = read_manifest(manifest)
    return told.get("key") == key and "outputs" in told and told["outputs"] == hash_files(directory)


def read_manifest(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write_manifest(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def wait_for(command: list[str], name: str) -> None:
    """Run a door to its end. Interrupting the recipe interrupts the door, which saves; then the chain stops."""
    child = subprocess.Popen(command)
    handlers = {number: signal.signal(number, lambda n, _: child.send_signal(n)) for number in (signal.SIGTERM,)}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both
    try:
        code = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code:
        again = "the same command goes on with it" if code == INTERRUPTED else "the same command tries it again"
        what = "was interrupted" if code == INTERRUPTED else f"failed with exit code {code}"
        console.print(f"step {name} {what}; {again}, finished steps are kept", markup=False, style="bold red")
        raise SystemExit(code if code > 0 else 1)


def report(cfg: DictConfig, home: Path) -> None:
    """What came of it: figures, texts before and after, pictures."""
    table = Table("step", "figure", "first", "last", "minutes", title=f"recipe {cfg.name}")
    for step in cfg.steps:
        minutes = read_manifest(home / "manifests" / f"{step.name}.json").get("seconds", 0) / 60
        for i, figure in enumerate(step.get("figures", [])):
            first, last = (f"{value:.4g}" for value in first_and_last(home / step.name, figure))
            table.add_row(step.name if i == 0 else "", figure, first, last, f"{minutes:.1f}" if i == 0 else "")
    console.print(table)
    for step in cfg.steps:
        for sample in before_and_after(home / step.name):
            console.print(f"\n{step.name}, {shorten(sample['prompt'], 400)}", markup=False, soft_wrap=True, style="dim")
            for when in ("before", "after", "reference"):
                console.print(f"  {when}: {shorten(sample[when], 240)}", markup=False, soft_wrap=True)
    pictures = sorted(path for step in cfg.steps for path in (home / step.name).glob("*.png"))
    console.print("\npictures: " + "  ".join(map(str, pictures)), markup=False, soft_wrap=True)


def first_and_last(directory: Path, figure: str) -> tuple[float, float]:
    """A metric at the first and at the last step that has it; or FILE.json:KEY, a figure of a report, twice."""
    if ".json:" in figure:
        file, key = figure.split(":", 1)
        value = json.loads((directory / file).read_text())[key]
        return value, value
    values = [row[figure] for row in read_rows(directory / "metrics.jsonl") if figure in row]
    if not values:
        raise ValueError(f"the recipe shows {figure!r}, which {directory}/metrics.jsonl does not have")
    return values[0], values[-1]


def shorten(text: str, most: int) -> str:
    """The text on one line; its middle left out where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def before_and_after(directory: Path, most: int = 2) -> list[dict]:
    """The same prompts answered at the first and at the last sampling."""
    rows = [row for row in read_rows(directory / "samples.jsonl") if "completion" in row]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return []
    early = {row["prompt"]: row["completion"] for row in rows if row["step"] == steps[0]}
    late = [row for row in rows if row["step"] == steps[-1] and row["prompt"] in early]
    return [
        {"prompt": row["prompt"], "before": early[row["prompt"]], "after": row["completion"]}
        | {"reference": row.get("reference", "")}
        for row in late[:most]
    ]


if __name__ == "__main__":
    enter(run_recipe, "run_recipe")
