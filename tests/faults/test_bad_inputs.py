"""docs/errors.md is true: every row of its table gives its message and exit code 2, and nothing is written."""

import gzip
import itertools
import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from data.tokenizer import train_sentencepiece
from model.build import export_model, new_policy, new_reward_model
from runtime.run import main
from runtime.script import enter
from tests.tiny_models import tiny_config

ROOT = Path(__file__).parents[2]
CELLS = re.compile(r"^\| ([a-z_]+) \| `(.*)` \| (.*) \|$", re.MULTILINE)
ROWS = [
    tuple(cell.replace("\\|", "|") for cell in row)
    for row in CELLS.findall((ROOT / "docs/errors.md").read_text(encoding="utf-8"))
]
COMMON = ["log.wandb=disabled", "batch_size=8", "micro_batch_size=4", "num_steps=2", "sampling.max_new_tokens=6"]
SIZES = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
TINY = ["model=tiny", "model.vocab_size=400", *(f"model.{name}={size}" for name, size in SIZES.items())]
WITHOUT_A_RUN = {"plan": [], "run_recipe": ["dir=run"]}  # and how they are told where to write
SCRIPTS = {  # a good command line; the row's words come on top
    "train_sft": [*TINY, "data.train=[TALKS]"],
    "train_rm": ["policy=SFT_DIR", "data.train=[PAIRS]"],
    "train_dpo": ["policy=SFT_DIR", "data.train=[PAIRS]", "ref_cache=CACHE"],
    "train_ppo": ["policy=SFT_DIR", "reward_model=RM_DIR", "data.prompts=[TALKS]", "minibatch_size=4"],
    "generate": ["policy=SFT_DIR", "data.prompts=[TALKS]", "sampling.max_new_tokens=6"],
    "evaluate": [],
    "make_data": [],
    "check_data": [],
    "arena": [],
    "plan": [],
    "run_recipe": [],
}
JOBS = {"generate": "run_generate", "arena": "serve", "plan": "show"}  # others are called `train`, or like their file


@pytest.fixture(scope="module")
def files(tmp_path_factory, coffee) -> dict[str, Path]:
    """What the words in capitals stand for."""
    home = tmp_path_factory.mktemp("bad")
    pairs, rated = (read(name) for name in ("pref_hh_helpful_train", "reward_movie_train"))
    texts = [row[side] for row in pairs for side in ("chosen", "rejected")]
    tokenizer, other = (train_sentencepiece(texts, size, home / str(size)) for size in (400, 420))
    config = tiny_config(vocab_size=400, max_length=160)
    export_model(new_policy(config, seed=0), home / "SFT_DIR", tokenizer)
    export_model(new_reward_model(config, seed=1, precision="fp32"), home / "RM_DIR", tokenizer)
    other_config = tiny_config(vocab_size=420, max_length=160)
    export_model(new_reward_model(other_config, seed=1, precision="fp32"), home / "OTHER_RM", other)
    for name in ("CUT", "PICKLE"):
        shutil.copytree(home / "SFT_DIR", home / name, ignore=shutil.ignore_patterns("SHA256SUMS"))
    weights = home / "CUT" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (home / "PICKLE" / "model.safetensors").rename(home / "PICKLE" / "pytorch_model.bin")
    said = [{"role": "user", "content": "a"}, {"role": "nobody", "content": "b"}]
    rows = {
        "PAIRS": pairs,
        "RATED": [row | {"reward": float(i % 2)} for i, row in enumerate(rated)],
        "ALL_GOOD": [row | {"reward": 1.0} for row in rated[:12]],
        "NO_ROLE": [{"messages": said}],
        "SAME": [{"prompt": "a", "chosen": "b", "rejected": "b"}],
        "EMPTY": [],
        "NOT_JSON": [],
    }
    for name, lines in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    (home / "NOT_JSON.jsonl").write_text("{'messages': []}\n")
    directories = ("SFT_DIR", "RM_DIR", "OTHER_RM", "CUT", "PICKLE", "CACHE")
    there = {name: home / f"{name}.jsonl" for name in rows} | {name: home / name for name in directories}
    return there | {"TALKS": coffee["train"]}


def read(name: str) -> list[dict]:
    with gzip.open(ROOT / f"data/embedded/{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, 24)]


def test_the_table_lists_each_bad_input_once_and_the_text_counts_them():
    assert len({(script, words) for script, words, _ in ROWS}) == len(ROWS) >= 60
    assert {script for script, _, _ in ROWS} == SCRIPTS.keys()
    assert f"runs each of its {len(ROWS)} rows" in (ROOT / "docs/errors.md").read_text(encoding="utf-8")


def run_script(name: str, words: list[str], monkeypatch) -> int:
    """The exit code of `python NAME.py WORDS`, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    GlobalHydra.instance().clear()
    module = import_module("arena.serving" if name == "arena" else name)  # `arena` is the package
    job = getattr(module, "train" if name.startswith("train") else JOBS.get(name, name))
    with pytest.raises(SystemExit) as stopped:
        (enter if name in WITHOUT_A_RUN else main)(job, name)
    GlobalHydra.instance().clear()
    return stopped.value.code


# Every second row is slow: half a second each, and there are two hundred.
PARAMS = [pytest.param(*row, marks=pytest.mark.slow if i % 2 else ()) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name, words, message", PARAMS, ids=lambda cell: cell[:60])
def test_bad_input_gets_its_message_exit_code_2_and_writes_nothing(
    name, words, message, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "run" / "metrics.jsonl"  # of an earlier run, which overwrite=true would replace
    old.parent.mkdir()
    old.write_text('{"step": 1}\n')
    given = words.split("` `")
    keys = {word.split("=")[0] for word in given}
    common = COMMON if name.startswith("train") else []
    good = [word for word in [*common, *SCRIPTS[name]] if word.split("=")[0] not in keys]
    capital = re.compile("|".join(sorted(files, key=len, reverse=True)))
    line = [capital.sub(lambda found: str(files[found[0]]), word) for word in [*good, *given]]
    line += WITHOUT_A_RUN.get(name, ["hydra.run.dir=run", "overwrite=true"])
    assert run_script(name, line, monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1 and "Traceback" not in told
    assert message in told.partition("error:")[2]  # before it Hydra repeats the words
    written = (path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [str(path) for path in written if path.parts[0] != "artifacts"] == ["run/metrics.jsonl"]  # tokens are kept
    assert old.read_text() == '{"step": 1}\n'
