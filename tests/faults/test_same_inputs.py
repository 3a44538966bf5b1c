"""A run goes on only with what it began with: config, data, models, reward functions and code. And an overwritten run
never comes back: whenever overwrite=true is killed, resume=true afterwards does not go on with the old one."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import train_dpo
import train_ppo
import train_sft
from data.tokenizer import train_sentencepiece
from model.build import export_model, new_policy, new_reward_model
from runtime import directory, inputs
from runtime.run import Run
from tests.faults.kills import die_before
from tests.tiny_models import tiny_config

STEPS = ["batch_size=2", "micro_batch_size=2", "save_every=1", "eval_every=0", "sample_every=0", "log.wandb=disabled"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, another one, a reward model and another one, of one tokenizer."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = train_sentencepiece(["say cat or dog, one of the two: q0 q1 q2 q3"] * 40, 300, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, head_dim=16, max_length=64)
    for name, seed in (("policy", 0), ("other_policy", 1)):
        export_model(new_policy(config, seed=seed), home / name, tokenizer)
    for name, seed in (("rewards", 2), ("other_rewards", 3)):
        export_model(new_reward_model(config, seed=seed, precision="fp32"), home / name, tokenizer)
    return home


@pytest.fixture
def place(models, tmp_path):
    """A directory with every kind of input: SFT rows, pairs, prompts, two models of a kind, a reward function."""
    for name in ("policy", "rewards"):
        shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(models / "other_policy", tmp_path / "reference")
    write(tmp_path / "talks.jsonl", [{"prompt": f"q{i}", "completion": "cat"} for i in range(4)])
    write(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": "cat", "rejected": "dog"} for i in range(4)])
    (tmp_path / "rate.py").write_text("def rate(prompts, completions):\n    return [1.0] * len(prompts)\n")
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(script: str, place: Path) -> list[str]:
    policy = f"policy={place}/policy"
    return STEPS + [f"hydra.run.dir={place}/run"] + {
        "train_sft": [policy, f"data.train=[{place}/talks.jsonl]"],
        "train_dpo": [policy, f"ref_policy={place}/reference", f"data.train=[{place}/pairs.jsonl]",
                      f"ref_cache={place}/cache"],
        "train_ppo": [policy, f"data.prompts=[{place}/talks.jsonl]", f"reward_model={place}/rewards",
                      f"reward={place}/rate.py:rate", "minibatch_size=2", "sampling.max_new_tokens=4"],
    }[script]  # fmt: skip


def swap_answers(place: Path) -> None:  # of the same number of tokens
    talks = place / "talks.jsonl"
    talks.write_text(talks.read_text().replace("cat", "dog"))


def swap_labels(place: Path) -> None:
    write(place / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": "dog", "rejected": "cat"} for i in range(4)])


def replace_weights(name: str, other: str):
    def change(place: Path, models: Path) -> None:
        shutil.rmtree(place / name)
        shutil.copytree(models / other, place / name)

    return change


def edit_reward(place: Path) -> None:
    (place / "rate.py").write_text("def rate(prompts, completions):\n    return [2.0] * len(prompts)\n")


@pytest.mark.parametrize(
    "module, change, named",
    [
        (train_sft, swap_answers, "data.train: {}/talks.jsonl has other content"),
        (train_sft, replace_weights("policy", "other_policy"), "policy: {}/policy/model.safetensors has other"),
        (train_dpo, swap_labels, "data.train: {}/pairs.jsonl has other content"),
        (train_dpo, replace_weights("reference", "policy"), "ref_policy: {}/reference/model.safetensors has other"),
        (train_ppo, replace_weights("rewards", "other_rewards"), "reward_model: {}/rewards/model.safetensors has"),
        (train_ppo, edit_reward, "reward: {}/rate.py has other content"),
    ],
    ids=["answers", "policy", "labels", "reference", "reward model", "reward function"],
)
def test_a_resume_with_another_input_names_it(module, change, named, run_script, place, models, capfd):
    words = [*words_of(module.__name__, place), "optim.schedule=constant"]
    assert run_script(module, *words, "num_steps=1") == 0
    change(*(place, models)[: change.__code__.co_argcount])
    capfd.readouterr()
    assert run_script(module, *words, "num_steps=2", "resume=true") == 2
    told = capfd.readouterr().err
    assert named.format(place) in told and "resume_anyway=true" in told


def test_parts_of_files_and_the_base_of_an_adapter_are_inputs_and_new_ones_are_named(tmp_path):
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    config = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text("{}")
    given = {"policy": str(tmp_path / "adapter"), "data": {"train": [f"{tmp_path}/rows.jsonl@train"]}}
    cfg = OmegaConf.create(given | {"cache": str(tmp_path / "base")})
    names = {"policy: {}/adapter/adapter_config.json", "policy: {}/base/model.safetensors", "data.train: {}/rows.jsonl"}
    found = inputs.input_digests(cfg)
    assert found.keys() == {name.format(tmp_path) for name in names}
    assert inputs.changed_inputs({"inputs": found, "code": {}}, cfg) == []
    first, *others = sorted(found)
    (tmp_path / "rows.jsonl").write_text("[]")
    before = {"inputs": {name: found[name] for name in (first, *others[1:])} | {"gone": ""}, "code": {}}
    assert inputs.changed_inputs(before, cfg) == [f"{first} has other content", "gone is gone", f"{others[0]} is new"]


def test_a_resume_anyway_goes_on_and_is_what_later_resumes_are_compared_with(run_script, place, capfd):
    words = [*words_of("train_sft", place), "optim.schedule=constant"]
    assert run_script(train_sft, *words, "num_steps=1") == 0
    assert run_script(train_sft, *words, "num_steps=2", "resume=true") == 0  # nothing changed
    swap_answers(place)
    more = [*words, "num_steps=3", "resume=true"]
    assert (
        run_script(train_sft, *more, "overwrite=true") == 2
    )  # as a recipe calls its steps: no old model passes for a new
    assert run_script(train_sft, *more, "resume_anyway=true") == 0
    assert run_script(train_sft, *words, "num_steps=4", "resume=true") == 0


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "1 / 0"])
def test_a_reward_function_that_fails_in_a_later_step_is_no_bad_input(body, run_script, place, capfd):
    """Exit code 1, with the row and the checkpoint to go on from; and no model."""
    count = f"{place}/count"
    (place / "rate.py").write_text(
        f"def rate(prompts, completions):\n    open({count!r}, 'a').write('.')\n"
        f"    if len(open({count!r}).read()) > 1:\n        {body}\n    return [1.0] * len(prompts)\n"
    )
    words = [*words_of("train_ppo", place), "num_steps=3"]
    assert run_script(train_ppo, *words) == 1
    told = capfd.readouterr().err
    assert "after step 1: reward function rate raised" in told and "on row 0" in told
    assert "the last good checkpoint is step_000001; the same command with resume=true continues" in told
    assert not (place / "run/model").exists()


def test_a_resume_with_other_code_names_it(run_script, place, monkeypatch, capfd):
    words = [*words_of("train_sft", place), "optim.schedule=constant"]
    assert run_script(train_sft, *words, "num_steps=1") == 0
    digest = inputs.sha256_once
    monkeypatch.setattr(inputs, "sha256_once", lambda path: "edited" if path.name == "losses.py" else digest(path))
    assert run_script(train_sft, *words, "num_steps=2", "resume=true") == 2
    told = capfd.readouterr().err
    assert "the code losses.py has changed" in told and "model/heads.py" not in told


def test_a_run_is_prolonged_under_its_schedule_and_never_shortened(run_script, place, capfd, read_metrics):
    words = [*words_of("train_sft", place), "optim.schedule=cosine"]
    assert run_script(train_sft, *words, "num_steps=3", "optim.num_steps=4") == 0
    assert run_script(train_sft, *words, "num_steps=4", "optim.num_steps=4", "resume=true") == 0
    rows = read_metrics(place / "run")
    assert run_script(train_sft, *words, "num_steps=4", "overwrite=true") == 0
    assert read_metrics(place / "run") == rows  # the same rates as in one go
    assert run_script(train_sft, *words, "num_steps=5", "resume=true") == 2
    assert "set optim.num_steps=4" in capfd.readouterr().err
    assert run_script(train_sft, *words, "num_steps=3", "optim.num_steps=4", "resume=true") == 2
    assert "num_steps=3, but" in capfd.readouterr().err


# ---- overwriting


def draw(home: Path, *, seed: int, **changes) -> list[float]:
    """A run of two steps whose model is the sum of what it drew; the drawn numbers of all steps."""
    cfg = {"name": "draw", "run_dir": str(home), "seed": seed, "resume": False, "resume_anyway": False}
    cfg |= {"overwrite": False, "num_steps": 2, "save_every": 1, "keep_last": 2, "dist": {"strategy": "single"}}
    model = nn.Linear(1, 1, bias=False)
    cfg["log"] = {"backend": "wandb", "wandb": "disabled", "project": "x"}
    with Run(OmegaConf.create(cfg | changes)) as run:
        nn.init.zeros_(model.weight)
        run.resume(model=model)
        while run.step < 2:
            with torch.no_grad():
                model.weight += torch.rand((), generator=run.rng)
            run.metrics.add({"x": model.weight.detach()})
            run.end_step(num_tokens=1)
        (home / "model").mkdir(exist_ok=True)
        (home / "model" / "weight").write_text(str(model.weight.item()))
        run.finish("x")
    return model.weight.item()


def overwrite_and_die(change: int, home: Path, **settings) -> bool:
    """Overwrite the run in a fork that dies before its `change`-th change of the disk; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            die_before(change, inside="begin")
            draw(home, overwrite=True, **settings)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_an_overwriting_killed_at_any_change_of_the_disk_never_gives_the_old_model(tmp_path):
    """The new seed then resumes: it gives the new seed's model, or is refused; the old files are no part of it."""
    old, new = draw(tmp_path / "old", seed=1), draw(tmp_path / "new", seed=2)
    refused = []
    for change in itertools.count(1):
        home = tmp_path / str(change)
        shutil.copytree(tmp_path / "old", home, symlinks=True)
        died = overwrite_and_die(change, home, seed=2)
        try:
            assert draw(home, seed=2, resume=True) == new != old
        except ValueError as error:
            assert "seed: 1 -> 2" in str(error) or "finished run without checkpoints" in str(error)
            refused.append(change)
            assert draw(home, seed=2, overwrite=True) == new
        assert (home / "model" / "weight").read_text() == str(new)
        assert not (home / directory.DELETING).exists()
        shutil.rmtree(home)
        if not died:
            break
    assert change > 20 and refused


@pytest.mark.parametrize("name", ["checkpoints", "model", "metrics.jsonl", "checkpoints/step_000002", ".lock"])
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_linked_part_of_a_run_is_refused_and_what_it_leads_to_stays(name, how, tmp_path):
    draw(tmp_path / "run", seed=1)
    part, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    part.rename(elsewhere) if part.exists() else elsewhere.write_text("precious")
    part.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} or elsewhere.read_bytes()
    with pytest.raises(ValueError, match=r"is a link to|cannot write hydra.run.dir"):
        draw(tmp_path / "run", seed=1, **{how: True})
    assert before == ({path: path.read_bytes() for path in before} if elsewhere.is_dir() else elsewhere.read_bytes())


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl"])
def test_a_damaged_small_file_of_a_run_is_named(name, tmp_path):
    draw(tmp_path / "run", seed=1, save_every=0)
    path = tmp_path / "run" / name
    if name == "metrics.jsonl":
        shutil.rmtree(tmp_path / "run")
        draw(tmp_path / "run", seed=1)
        path.write_bytes(b"\0{" + path.read_bytes()[2:])
        shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\0\x80")
    with pytest.raises(ValueError, match=f"{name}.* is damaged"):
        draw(tmp_path / "run", seed=1, resume=True)


def test_a_refused_run_leaves_the_users_own_empty_directory(run_script, place, capfd):
    words = [word for word in words_of("train_sft", place) if not word.startswith("data")]
    (place / "run").mkdir()
    assert run_script(train_sft, *words, "data.train=[nothing.jsonl]") == 2
    assert (place / "run").is_dir() and not list((place / "run").iterdir())
    (place / "run").rmdir()
    assert run_script(train_sft, *words, "data.train=[nothing.jsonl]") == 2
    assert not (place / "run").exists()  # what Hydra made
