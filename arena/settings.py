"""Checks of the arena's settings: models, limits, addresses and accounts."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from runtime.config import check_files, check_number, check_positive, check_whole


def check(cfg: DictConfig) -> list[tuple[str, str]] | None:
    """(name, password) of each account in `auth`, or None. Raises ValueError if settings are wrong or unsafe."""
    if not isinstance(cfg.models, DictConfig | None):
        raise ValueError(f"models={cfg.models} must map names to models: models={{NAME: PATH, ...}}")
    if not cfg.export and len(cfg.models or {}) < 2 and not cfg.annotate:
        raise ValueError("the arena needs two models or more (models={NAME: PATH, ...}), or annotate=[FILES]")
    if (files := OmegaConf.to_container(cfg)["annotate"]) != []:
        check_files("annotate", files)
    names = ("max_turns", "max_characters", "messages_per_minute", "parallel", "max_waiting", "port")
    check_whole(1, **{name: cfg[name] for name in names})
    check_positive(refresh_seconds=cfg.refresh_seconds)
    if cfg.port > 65535:
        raise ValueError(f"port={cfg.port} must be at most 65535")
    check_number(0, double_share=cfg.double_share)
    if cfg.hosts:
        check_files("hosts", OmegaConf.to_container(cfg)["hosts"])
    if cfg.auth is not None:
        return read_accounts(Path(str(cfg.auth)))
    if not is_loopback(cfg.host) or cfg.hosts:
        raise ValueError(
            f"host={cfg.host} hosts={cfg.hosts} opens the page to other machines without a login; give auth=FILE "
            "(a name:password on each line), or keep host=127.0.0.1 hosts=[]"
        )
    return None


def allowed_names(host: str, hosts: Sequence[str]) -> list[str]:
    """The host names that a request may name: those of this machine and `hosts`. Empty: any name."""
    if not is_loopback(host) and not hosts:
        return []
    return ["localhost", "127.0.0.1", "::1", host, *hosts]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """(name, password) of every line of the file."""
    if not path.is_file():
        raise ValueError(f"auth={path} is no file; it must have a name:password on each line")
    if path.stat().st_mode & 0o077:
        raise ValueError(f"auth={path} holds passwords that other users of this machine can read; run chmod 600 {path}")
    lines = [line.partition(":") for line in path.read_text().splitlines() if line.strip()]
    if not lines or not all(name and password for name, _, password in lines):
        raise ValueError(f"auth={path} must have a name:password on each line")  # the lines themselves are secret
    return [(name, password) for name, _, password in lines]
