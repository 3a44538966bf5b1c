"""Whether a run may be resumed: what has changed since its checkpoint, or its config.yaml, was written."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.config import FREE_TO_CHANGE, flat, read_config
from runtime.inputs import changed_inputs


def fault_of_resume(cfg: DictConfig, directory: Path, path: Path | None, meta: dict[str, Any] | None) -> str | None:
    """Why the run in `directory` cannot be resumed. None: it can.

    Args:
        path, meta: the newest checkpoint and its meta.json; None: the run has no checkpoint.
    """
    if meta is not None:
        if meta["step"] > cfg.get("num_steps", meta["step"]):
            return f"num_steps={cfg.num_steps}, but {path} has completed {meta['step']} steps; raise num_steps"
        if "inputs" not in meta:
            return f"{path} was written by another version of this program; set overwrite=true to begin again"
        changed = changed_keys(OmegaConf.create(meta["config"]), cfg) + changed_inputs(meta, cfg)
    elif (directory / "config.yaml").exists() and not cfg.overwrite:
        changed = changed_keys(read_config(directory / "config.yaml"), cfg)
    else:
        changed = []
    if changed and not cfg.resume_anyway:
        return (
            f"resume=true, but this has changed since {directory} began: {'; '.join(changed)}. Undo the change, begin "
            "again with only overwrite=true, or set resume_anyway=true to continue with other numbers"
        )
    return None


def changed_keys(before: DictConfig, now: DictConfig) -> list[str]:
    """The dotted keys, with both values, whose values differ and would change results."""
    old, new = flat(before), flat(now)
    free = set()
    if now.get("optim", {}).get("schedule") == "constant":
        # a constant learning rate does not depend on the length, so the run may be longer
        free = {"num_steps", "optim.num_steps"}
    elif old.get("optim.num_steps") == new.get("optim.num_steps"):
        free = {"num_steps"}  # the length of the schedule is set separately and did not change
    differ = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    free |= set(FREE_TO_CHANGE)
    named = [key for key in differ if not {key, key.split(".")[0]} & free]
    changes = [f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in named]
    if "optim.num_steps" in named and "num_steps" in named:
        changes[-1] += f" (to prolong the run under its schedule, set optim.num_steps={old['optim.num_steps']})"
    return changes
