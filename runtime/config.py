"""Checks of the config before anything is loaded, and the comparison of configs at a resume."""

import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from runtime.devices import PRECISIONS
from runtime.files import write_whole

CONF = Path(__file__).parents[1] / "conf"

# Settings that may differ between a run and its resume: they change what is shown and kept, not what is computed.
# A name includes all keys under it.
FREE_TO_CHANGE = (
    "name", "run_dir", "resume", "resume_anyway", "overwrite", "save_every", "eval_every", "sample_every", "keep_last",
    "keep_best", "log", "dist", "view", "reward_timeout", "ref_cache", "data.cache",
)  # fmt: skip

OPTIONAL = {  # settings whose default is null or ??? -> their type
    "base_url": "text", "cache": "text", "license": "text", "model": "text", "policy": "text", "reward_fn": "text",
    "reward_model": "text", "script": "text", "served_as": "text", "reasoning_effort": "text", "pre_query": "text",
    "extra_body": "a mapping", "target": "text", "max_cost": "a number", "num": "a whole number",
    "requests_per_minute": "a number", "max_instruction_tokens": "a whole number",
    "max_output_tokens": "a whole number", "system": "text",
}  # fmt: skip


def check_positive(**values: int | float) -> None:
    """Raise ValueError unless each value is a finite number above 0. Keywords are config keys (`__` for a dot)."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{key.replace('__', '.')}={value} must be a number above 0")


def check_number(least: float, **values: int | float) -> None:
    """Raise ValueError unless each value is a finite number of at least `least`."""
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < least:
            at_least = f" of at least {least}" if math.isfinite(least) else ""
            raise ValueError(f"{key.replace('__', '.')}={value} must be a finite number{at_least}")


RECOMPUTE = (False, "selective", True, "offload")  # values of activation_checkpointing


def check_whole(least: int, **values: int) -> None:
    """Raise ValueError unless each value is a whole number of at least `least`."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key.replace('__', '.')}={value} must be a whole number of at least {least}")


def check_at_most(most: int, **values: int) -> None:
    """Raise ValueError unless each value is at most `most`."""
    for key, value in values.items():
        if value > most:
            raise ValueError(f"{key.replace('__', '.')}={value} must be at most {most}")


def check_choice(key: str, value: object, choices: tuple) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; use one of {', '.join(map(str, choices))}")


def check_types(given: DictConfig, defaults: str, key: str, *, nullable: tuple = ()) -> None:
    """Raise ValueError unless each value under `key` has the type of its default in conf/`defaults`.yaml.

    Where the default is null, OPTIONAL has the type.
    """
    known = OmegaConf.to_container(OmegaConf.load(CONF / f"{defaults}.yaml"))
    for name, value in OmegaConf.to_container(given, resolve=True, throw_on_missing=True).items():
        if name not in known:
            raise ValueError(f"{key}.{name} is not a setting of {defaults}; it has {', '.join(known)}")
        default = known[name]
        kind, wanted = kind_of(value), OPTIONAL.get(name) if default in (None, "???") else kind_of(default)
        fits = wanted in (kind, None) or (kind, wanted) == ("a whole number", "a number")
        may_be_null = default is None or name in nullable
        if not fits and not (value is None and may_be_null):
            or_null = " or null" if may_be_null else ""
            raise ValueError(f"{key}.{name}={value} must be {wanted}{or_null}; conf/{defaults}.yaml says {default}")


def kind_of(value: object) -> str:
    """The type of a setting's value, in words."""
    if isinstance(value, list):
        plain = not any(one is None or isinstance(one, list | dict) for one in value)
        return "a list of plain values" if plain else "a list of other things"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    kinds = {dict: "a mapping", str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return kinds.get(type(value), "null")


def check_files(key: str, files: object) -> None:
    """Raise ValueError unless the value is a list of names."""
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{key}={files} must list files: {key}=[a.jsonl,b.jsonl]")


def check_batch(
    whole: int, part: int, world_size: int, key: str = "batch_size", part_key: str = "micro_batch_size"
) -> None:
    """Raise ValueError unless `whole` rows split evenly over ranks and into parts of `part` rows."""
    check_whole(1, **{key: whole, part_key: part})
    chunk = part * world_size
    if whole % chunk:
        low = whole // chunk * chunk
        fits = " or ".join(str(n) for n in (low, low + chunk) if n)
        ranks = f" x {world_size} ranks = {chunk}" if world_size > 1 else ""
        parts = [n for n in range(1, part) if whole % (n * world_size) == 0]
        fits += f", or {part_key}={parts[-1]}" if parts else ""
        raise ValueError(f"{key}={whole} is not a multiple of {part_key}={part}{ranks}; use {fits}")


def check_training(cfg: DictConfig, world_size: int) -> None:
    """Check the settings of all training scripts: batch sizes, numbers of steps, precision, router."""
    check_whole(1, num_steps=cfg.num_steps, keep_last=cfg.keep_last)
    check_batch(cfg.batch_size, cfg.micro_batch_size, world_size)
    check_choice("precision", cfg.precision, PRECISIONS)
    check_choice("activation_checkpointing", cfg.activation_checkpointing, RECOMPUTE)
    check_number(0, **{f"router__{key}": value for key, value in cfg.router.items()})
    check_whole(0, seed=cfg.seed, save_every=cfg.save_every, eval_every=cfg.eval_every, sample_every=cfg.sample_every)


def check_policy_or_model(cfg: DictConfig) -> None:
    """Raise ValueError unless exactly one of policy (a checkpoint) and model (sizes) is given."""
    model = "(sizes)" if cfg.get("model") else "null"
    if (cfg.policy is None) == (model == "null"):
        raise ValueError(
            f"policy={cfg.policy or 'null'} and model={model}: give exactly one; policy=PATH starts from a checkpoint, "
            "model=tiny (a file of conf/model) from random weights"
        )
    if cfg.policy is None and cfg.lora.rank:
        raise ValueError(f"lora.rank={cfg.lora.rank} adapts a trained model; give policy=PATH, or lora.rank=0")


def flat(cfg: DictConfig, prefix: str = "") -> dict[str, Any]:
    """{'data.max_length': 512, ...}; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in OmegaConf.to_container(cfg, resolve=True).items():
        if isinstance(value, dict):
            leaves |= flat(OmegaConf.create(value), f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def write_config(cfg: DictConfig, path: Path) -> None:
    """Write the resolved config to a temporary file, then rename it."""
    write_whole(path, OmegaConf.to_yaml(cfg, resolve=True))


def read_config(path: Path) -> DictConfig:
    """The config that `write_config` wrote. Raises ValueError if the file is damaged."""
    try:
        cfg = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0]}); set overwrite=true to begin again"
        ) from None
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{path} is damaged (it is not a mapping); set overwrite=true to begin again")
    return cfg
