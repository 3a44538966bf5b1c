"""Whether settings have the kinds of their defaults in conf/. Otherwise `resume=maybe` would resume."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.config import CONF, kind_of

CHECKED_ELSEWHERE = ("activation_checkpointing",)  # false, true or a word
MAY_BE_NULL = ("value_clip_range", "optim.max_grad_norm")  # although their default is a number
OTHER_TEMPLATES = ("check", "client", "method", "task")  # groups whose scripts call check_types
WANTED = {"a whole number": "a finite number", "a number": "a finite number"}  # a default of 1 does not forbid 0.5
FITS = {"a finite number": ("a number", "a whole number"), "a list": ("a list", "null")}


def check_kinds(cfg: DictConfig, config_name: str, choices: Mapping[str, str | None]) -> None:
    """Raise ValueError unless each setting with a default has its kind: a flag, a number, a text or a list.

    Args:
        choices: the chosen file of each group, {"optim": "adamw", ...}.
    """
    for key, default, file in _defaults(config_name, choices):
        wanted = WANTED.get(_kind(default), _kind(default))
        value = OmegaConf.select(cfg, key, default=default)
        if key in CHECKED_ELSEWHERE or wanted not in ("true or false", "a finite number", "text", "a list"):
            continue
        allowed = (*FITS.get(wanted, (wanted,)), *(["null"] if key in MAY_BE_NULL else []))
        if _kind(value) not in allowed:
            quotes = f"; for a text write '{key}=\"{value}\"'" if wanted == "text" and "number" in _kind(value) else ""
            raise ValueError(
                f"{key}={_written(value)} must be {wanted}; its default in conf/{file} is {_written(default)}{quotes}"
            )


def _defaults(config_name: str, choices: Mapping[str, str | None]) -> Iterator[tuple[str, Any, str]]:
    """(key, default, file of conf/) of every setting that has a default of its own."""
    script = OmegaConf.load(CONF / f"{config_name}.yaml")
    if "run" in script.get("defaults", []):
        yield from _leaves(OmegaConf.load(CONF / "run.yaml"), "", "run.yaml")
    for group, choice in choices.items():
        path = CONF / group / f"{choice}.yaml"
        if group in OTHER_TEMPLATES or not path.is_file() or path.read_text().startswith("# @package _global_"):
            continue
        yield from _leaves(OmegaConf.load(path), f"{group}.", f"{group}/{path.name}")
    yield from _leaves(script, "", f"{config_name}.yaml")


def _leaves(cfg: DictConfig, prefix: str, file: str) -> Iterator[tuple[str, Any, str]]:
    for key in cfg:
        if key in ("defaults", "hydra") or OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        if isinstance(cfg[key], DictConfig):
            yield from _leaves(cfg[key], f"{prefix}{key}.", file)
        else:
            yield f"{prefix}{key}", cfg[key], file


def _kind(value: Any) -> str:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return "a list" if isinstance(plain, list) else kind_of(plain)


def _written(value: Any) -> str:
    """As on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
