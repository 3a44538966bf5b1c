"""The entry point of every script: Hydra composes the config, and errors become exit codes."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runtime.config import CONF
from runtime.display import Output, complain
from runtime.setting_kinds import check_kinds

FAILED, BAD_INPUT = 1, 2
INTERRUPTED = 75  # EX_TEMPFAIL: the run stopped early and can be resumed, so a recipe must not go on
MEMORY_KEYS = ("micro_batch_size", "data.max_length", "sampling.slots", "sampling.max_new_tokens")  # if they exist
UNREADABLE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class RunFailed(Exception):
    """A run that failed although its input was good. The message says why, and how to go on."""


def enter(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose conf/`config_name`.yaml with the command line and call `job(cfg)`, with -m for each combination.

    Exit codes: 0 done; 1 failed; 2 bad input (one message, no traceback); 75 interrupted, resume=true continues.
    HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    composed = hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        composed(_prepared(job, config_name))()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra itself would print and exit with 1
    output: Any = Output(sys.stdout) if sys.stdout else None  # None where it was closed: `>&-`
    try:
        with contextlib.redirect_stdout(output):
            composed(_prepared(job, config_name))()
    except UNREADABLE as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)  # some give a text alone
        complain(f"error: {what}; name another file or directory")
        raise SystemExit(BAD_INPUT) from None
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        complain(f"error: {error}")
        raise SystemExit(BAD_INPUT) from None
    except (RunFailed, FloatingPointError, OSError) as error:
        complain(f"error: {error}")
        raise SystemExit(FAILED) from None
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if output:
            output.flush()


def _prepared(job: Callable[[DictConfig], Any], config_name: str) -> Callable[[DictConfig], Any]:
    """The job with these changes. Settings must have the kinds of their defaults. Where memory runs out, the error
    names the settings to lower. Child processes do not inherit HYDRA_FULL_ERROR. Hydra creates the directory of the
    run; refused input does not leave an empty one."""
    started = time.time()

    def prepared(cfg: DictConfig) -> Any:
        os.environ.pop("HYDRA_FULL_ERROR", None)  # it is for this process, not for the scripts that a recipe starts
        try:
            with _removed_if_empty(Path(HydraConfig.get().runtime.output_dir), started):
                check_kinds(cfg, config_name, HydraConfig.get().runtime.choices)
                return job(cfg)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
            if not short:
                raise
            given = [(key, OmegaConf.select(cfg, key)) for key in MEMORY_KEYS]
            there = [f"{key}={value}" for key, value in given if value is not None]
            suggestion = f"lower {' or '.join(there)}" if there else "use smaller files"
            if OmegaConf.select(cfg, "precision") == "fp32":
                suggestion += ", or set precision=bf16"
            raise RunFailed(f"out of memory ({str(error).splitlines()[0]}); {suggestion}") from error
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    return prepared


@contextlib.contextmanager
def _removed_if_empty(path: Path, since: float) -> Iterator[None]:
    """After the block, delete the directory if it is empty and was created after the time `since` (seconds)."""
    made_here = path.exists() and path.stat().st_ctime > since
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if made_here:
                path.rmdir()
