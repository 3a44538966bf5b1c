"""Check data before it is used: one check per run. It writes result.json, plots and report.html.

python check_data.py check=pilot check.input=[vendor_a.jsonl,vendor_b.jsonl]
python check_data.py check=agreement check.input=[votes.jsonl]
Checks: convert, view, token_stats, dedupe, decontaminate, pilot, task_mix, agreement, contamination, quality.
A failed verdict is a result, not an error: exit code 0.
"""

from importlib import import_module

from omegaconf import DictConfig, OmegaConf

from data.adapters import Layout
from data.tokenizer import load_tokenizer
from generation.build_client import build_client
from runtime.config import check_choice, check_files, check_types
from runtime.run import Run, main

CHECKS = (  # data/checks/NAME.py has check_NAME
    "convert",
    "view",
    "token_stats",
    "dedupe",
    "decontaminate",
    "pilot",
    "task_mix",
    "agreement",
    "contamination",
    "quality",
)
TOKENIZES = ("view", "token_stats")  # those that need policy=PATH, whose tokenizer and template they read with
READS = ("quality",)  # those that can read rows with policy=PATH
DRAWS = ("pilot", "task_mix", "agreement", "quality")  # those that need a seed
ASKS = ("task_mix", "quality")  # those that can ask a client


def check_data(cfg: DictConfig, run: Run) -> float:
    """Run the check that `check=` names, write its results, and return its main figure."""
    if cfg.get("check") is None:
        raise ValueError(f"name a check: check={'|'.join(CHECKS)}")
    check_choice("check.name", cfg.check.get("name"), CHECKS)
    check_types(cfg.check, f"check/{cfg.check.name}", "check")
    settings = OmegaConf.to_container(cfg.check, resolve=True, throw_on_missing=True)
    name, files = settings.pop("name"), settings.pop("input")
    for key, value in {"input": files, "against": settings.get("against", files)}.items():
        check_files(f"check.{key}", value)
    if "columns" in settings:
        how = {key: settings.pop(key) for key in ("format", "columns", "languages")}
        settings["layout"] = Layout.of(OmegaConf.create(how))
    if name in TOKENIZES:
        if cfg.policy is None:
            raise ValueError(f"check={name} needs a tokenizer and a chat template: set policy=PATH")
        template = {"template": settings.pop("template"), "date": settings.pop("date")}
        settings["tokenizer"] = load_tokenizer(cfg.policy, **template)
    if name in READS:
        settings["policy"] = cfg.policy
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
