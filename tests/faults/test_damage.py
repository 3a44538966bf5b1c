"""Every kind of file that this project writes, damaged: what reads it notices and names it, or reads what was written.

    pytest -s -m slow tests/faults/test_damage.py     600 damages; prints what became of each kind

Logs (metrics.jsonl, samples.jsonl) have no checksums: a digit that changes in one is not noticed, and no weight depends
on it.
"""

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import run_recipe
from arena.store import Store
from data.files import read_rows
from data.records import write_jsonl
from data.tokenizer import load_tokenizer, train_sentencepiece
from generation.answer_store import AnswerStore
from model.build import export_model, load_policy, new_policy
from model.lora import add_lora, export_adapter
from model.ref_cache import cached_logprobs
from runtime.files import write_sums
from tests.faults.test_same_inputs import draw  # noqa: F401 - a fixture
from tests.tiny_models import tiny_config


def flip(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def blank(content: bytes, chance: random.Random) -> bytes:
    """A lost sector."""
    at = chance.randrange(len(content))
    return content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :]


def repeat(content: bytes, chance: random.Random) -> bytes:
    """A piece written twice."""
    at, length = chance.randrange(len(content)), chance.randrange(1, 64)
    return content[: at + length] + content[at:]


def garbage(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    noise = chance.randbytes(chance.randrange(1, 64))
    return content[:at] + noise + content[at + len(noise) :]


DAMAGES = (flip, flip, cut, blank, repeat, garbage)

# ---- what is written, and the value that is read back


def digest(tensors) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def make_run(home: Path) -> None:
    draw(home / "run", seed=1)


def resume_run(home: Path):
    return draw(home / "run", seed=1, resume=True)


def make_model(home: Path) -> None:
    tokenizer = train_sentencepiece(["say cat or dog, one of the two: q0 q1 q2 q3"] * 40, 300, home / "tokenizer")
    config = tiny_config(vocab_size=tokenizer.vocab_size, head_dim=16, max_length=64)
    export_model(new_policy(config, seed=0), home / "base", tokenizer)
    policy = add_lora(load_policy(home / "base"), rank=2, alpha=4.0, targets=["qkv"], seed=0)
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter)
    export_adapter(policy, home / "adapter", str(home / "base"))


def read_model(home: Path):
    tokenizer = load_tokenizer(home / "base")
    return (
        digest(dict(load_policy(home / "base").named_parameters())),
        tokenizer.encode("cat or dog q0"),
        tokenizer.eos_id,
    )


def read_adapter(home: Path):
    return digest(dict(load_policy(home / "adapter").named_parameters()))


KEYS = {"input_ids": [1, 2, 3], "completion_mask": [False, True, True]}


def reference(home: Path, compute: Callable) -> dict:
    settings = {"weights": "w", "precision": "fp32", "rank": 0, "world_size": 1}
    return cached_logprobs(compute, [KEYS], directory=home / "cache", **settings)


def make_reference(home: Path) -> None:
    reference(home, lambda rows: torch.tensor([-1.5]))


def read_reference(home: Path):
    return reference(home, lambda rows: torch.tensor([-1.5]))  # what is gone is computed again


def make_answers(home: Path) -> None:
    store = AnswerStore(home)
    for number in range(40):
        store.put(str(number), {"text": f"answer {number} " * 20})
    store.close()


def read_answers(home: Path):
    store = AnswerStore(home)
    try:
        return [store.get(str(number)) for number in range(40)]
    finally:
        store.close()


def make_arena(home: Path) -> None:
    store = Store(home / "arena.sqlite")
    for number in range(40):
        store.begin_battle(f"b{number}", "v", "x", "y")
        store.add_turn(f"b{number}", 0, f"prompt {number}", "one", "two")
        store.vote(f"b{number}", "v", "ab"[number % 2])
    store.close()


def read_arena(home: Path):
    store = Store(home / "arena.sqlite")
    try:
        return [{**battle, "began": 0, "at": 0} for battle in store.battles()]
    finally:
        store.close()


def make_data(home: Path) -> None:
    write_jsonl(home / "data.jsonl", [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(50)])
    write_sums(home, ["data.jsonl"])


def read_data(home: Path):
    return [row for _, row in read_rows(str(home / "data.jsonl"))]


def make_manifest(home: Path) -> None:
    (home / "step").mkdir()
    (home / "step/out").write_text("model")
    outputs = run_recipe.hash_files(home / "step")
    run_recipe.write_manifest(home / "step.json", {"key": "k" * 64, "seconds": 1.0, "outputs": outputs})


def read_manifest(home: Path):
    """Whether the step is done; a step that is done again is harmless."""
    return run_recipe.is_done(home / "step.json", "k" * 64, home / "step") or True


def make_scores(home: Path) -> None:
    np.savez_compressed(home / "scores.npz", gold=np.arange(64, dtype=np.float32).reshape(4, 16))


KINDS = {  # name: (what writes, the files of it that are damaged, what reads)
    "checkpoint": (make_run, "run/checkpoints/step_000002/*", resume_run),
    "run": (make_run, "run/*.*", resume_run),
    "model": (make_model, "base/*", read_model),
    "adapter": (make_model, "adapter/*", read_adapter),
    "reference cache": (make_reference, "cache/*/*", read_reference),
    "answers": (make_answers, "answers.sqlite", read_answers),
    "arena": (make_arena, "arena.sqlite", read_arena),
    "data": (make_data, "*", read_data),
    "manifest": (make_manifest, "step.json", read_manifest),
}


def attack(kind: str, home: Path, *, times: int) -> Counter:
    """What became of so many damages to the files of one kind."""
    make, pattern, read = KINDS[kind]
    whole, chance, found = home / "whole", random.Random(kind), Counter()
    whole.mkdir(parents=True)
    make(whole)
    shutil.copytree(whole, home / "first", symlinks=True)
    expected = read(home / "first")
    files = sorted(path.relative_to(whole) for path in whole.glob(pattern) if path.is_file() and path.stat().st_size)
    for number in range(times):
        copy = home / "copy"
        shutil.copytree(whole, copy, symlinks=True)
        name, damage = files[number % len(files)], DAMAGES[number // len(files) % len(DAMAGES)]
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(damage(content, chance))
        try:
            got = read(copy)
            outcome = "harmless" if got == expected else f"SILENT {name} {damage.__name__}"
        except (ValueError, OSError) as error:
            outcome = "named" if str(copy) in str(error) else f"UNNAMED {name} {damage.__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 - a traceback is no refusal
            outcome = f"TRACEBACK {name} {damage.__name__}: {type(error).__name__}: {error}"
        found[outcome] += 1
        shutil.rmtree(copy)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed_or_harmless(kind, tmp_path):
    found = attack(kind, tmp_path, times=14)
    assert found.keys() <= {"named", "harmless"}, found


@pytest.mark.slow
def test_600_damages_are_noticed_or_harmless(tmp_path, capsys):
    found = {kind: attack(kind, tmp_path / kind, times=67) for kind in KINDS}
    with capsys.disabled():
        for kind, outcomes in found.items():
            print(f"{kind}: {dict(outcomes)}")
    assert sum(outcomes.total() for outcomes in found.values()) >= 600
    assert all(outcomes.keys() <= {"named", "harmless"} for outcomes in found.values())
