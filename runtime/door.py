"""The entry of every door: Hydra composes the config, errors become exit codes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from runtime.display import complain

CONF = Path(__file__).parents[1] / "conf"
FAILED, BAD_INPUT = 1, 2
INTERRUPTED = 75  # EX_TEMPFAIL: the run stopped early and can go on, so no chain may take it for done
UNREADABLE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def enter(job: Callable[[DictConfig], Any], config_name: str) -> None:
    """Compose conf/`config_name`.yaml with the command line and call `job(cfg)`; with -m, once for every combination.

    Exit codes: 0 done; 2 bad input (one message, no traceback); 1 failed; 75 interrupted, resume=true goes on.
    HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    start = hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(job)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        start()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra itself would print and exit with 1
    try:
        start()
    except (ValueError, HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        complain(f"error: {error}")
        raise SystemExit(BAD_INPUT) from None
    except (torch.OutOfMemoryError, MemoryError) as error:
        complain(f"error: out of memory ({error}); lower micro_batch_size or data.max_length, or say precision=bf16")
        raise SystemExit(FAILED) from None
    except OSError as error:
        complain(f"error: {error}")
        raise SystemExit(FAILED) from None
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
