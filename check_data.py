"""Check data before it is used: one check a run. Writes result.json, pictures, and report.html.

python check_data.py check=pilot check.input=[vendor_a.jsonl,vendor_b.jsonl]
python check_data.py check=agreement check.input=[votes.jsonl]
Checks: pilot, task_mix, agreement, contamination, quality. A failed verdict is a result, not an error: exit code 0.
"""

from importlib import import_module

from omegaconf import DictConfig, OmegaConf

from data.clients import build_client
from runtime.config import check_choice, check_files, check_types
from runtime.run import Run, main

CHECKS = ("pilot", "task_mix", "agreement", "contamination", "quality")  # data/checks/NAME.py has check_NAME
DRAWS = ("pilot", "task_mix", "agreement")  # those that need a seed
ASKS = ("task_mix", "quality")  # those that can ask a client


def check_data(cfg: DictConfig, run: Run) -> float:
    if cfg.get("check") is None:
        raise ValueError(f"name a check: check={'|'.join(CHECKS)}")
    check_choice("check.name", cfg.check.get("name"), CHECKS)
    check_types(cfg.check, f"check/{cfg.check.name}", "check")
    settings = OmegaConf.to_container(cfg.check, resolve=True, throw_on_missing=True)
    name, files = settings.pop("name"), settings.pop("input")
    for key, value in {"input": files, "against": settings.get("against", files)}.items():
        check_files(f"check.{key}", value)
    if name in DRAWS:
        settings["seed"] = cfg.seed
    if name in ASKS:
        settings["client"] = build_client(cfg.client) if cfg.get("client") is not None else None
    check = getattr(import_module(f"data.checks.{name}"), f"check_{name}")
    result = check(files, directory=run.dir, **settings)
    run.begin()
    for line in result["verdicts"]:
        run.terminal.say(line)
    run.terminal.say(f"wrote {run.dir}/result.json and report.html")
    return float(len(result["verdicts"]))


if __name__ == "__main__":
    main(check_data, "check_data")
