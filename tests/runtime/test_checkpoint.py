import errno
import itertools
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint import find_checkpoint, find_damage, load_checkpoint, prune_checkpoints, save_checkpoint
from tests.faults.kills import die_before


def a_state(seed: int) -> dict:
    """Tensors of several kinds, numbered keys, tuples, text: what models, optimizers and loaders hold."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(seed),
        "optimizer": optimizer.state_dict(),
        "loader": {"taken": seed, "order": "a0f3", "shapes": [[1, 2.5], None, True]},
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def save(root, step: int) -> None:
    save_checkpoint(root, step, a_state(step), {"step": step}, rank=0)


@pytest.fixture
def complaints():
    return []


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    save(tmp_path, 3)
    assert same(load_checkpoint(tmp_path / "step_000003", a_state(99), rank=0), a_state(3))


def test_a_state_whose_shapes_grew_is_loaded_as_it_was_saved(tmp_path):
    save_checkpoint(tmp_path, 1, {"buffer": torch.arange(4)}, {}, rank=0)
    loaded = load_checkpoint(tmp_path / "step_000001", {"buffer": torch.zeros(9)}, rank=0)
    assert torch.equal(loaded["buffer"], torch.arange(4))


def test_latest_points_to_the_last_one_saved(tmp_path, complaints):
    for step in (2, 10):
        save(tmp_path, step)
    assert os.readlink(tmp_path / "latest") == "step_000010"
    path, meta = find_checkpoint(tmp_path, complaints.append)
    assert (path.name, meta["step"], complaints) == ("step_000010", 10, [])


def test_no_checkpoint_is_not_an_error(tmp_path, complaints):
    assert find_checkpoint(tmp_path / "checkpoints", complaints.append) is None


def test_every_flipped_byte_is_noticed(tmp_path):
    save(tmp_path, 1)
    files = sorted((tmp_path / "step_000001").iterdir())
    chance = random.Random(0)
    for trial in range(200):
        file = files[trial % len(files)]
        good = file.read_bytes()
        place = chance.randrange(len(good))
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << chance.randrange(8)]) + good[place + 1 :])
        damage = find_damage(tmp_path / "step_000001")
        assert damage, f"byte {place} of {file.name} flipped unnoticed"
        file.write_bytes(good)
    assert find_damage(tmp_path / "step_000001") is None


@pytest.mark.parametrize("what", ["truncated", "missing", "added", "renamed"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(tmp_path, complaints, what):
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = next((tmp_path / "step_000002").glob("*.tensors"))
    if what == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif what == "missing":
        victim.unlink()
    elif what == "added":
        (victim.parent / "rank_1.json").write_text("{}")
    else:
        victim.rename(victim.with_name("rank_1.tensors"))
    path, _ = find_checkpoint(tmp_path, complaints.append)
    assert path.name == "step_000001"
    assert len(complaints) == 1 and "step_000002 is damaged" in complaints[0]


def test_only_damaged_checkpoints_are_an_error(tmp_path, complaints):
    save(tmp_path, 1)
    (tmp_path / "step_000001" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="overwrite=true"):
        find_checkpoint(tmp_path, complaints.append)


@pytest.mark.parametrize("moment", ["dcp.save", "_checksums", "sync", "os.replace"])
def test_a_save_that_fails_leaves_the_last_good_one(tmp_path, complaints, monkeypatch, moment):
    save(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    module, _, name = moment.rpartition(".")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(getattr(checkpoint, module) if module else checkpoint, name, fail)
        save(tmp_path, 2)
    path, _ = find_checkpoint(tmp_path, complaints.append)
    assert (path.name, complaints, os.readlink(tmp_path / "latest")) == ("step_000001", [], "step_000001")
    save(tmp_path, 2)  # what the failure left behind is in nobody's way
    assert find_checkpoint(tmp_path, complaints.append)[0].name == "step_000002"
    assert not list(tmp_path.glob(".step*"))


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000001" / "meta.json").write_text("{}")
    save(tmp_path, 1)
    assert find_damage(tmp_path / "step_000001") is None


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, step=4, keep_last=2, keep={"step_000001"})
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000001", "step_000003", "step_000004"]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    rows = [{"step": 1, "x": 3.0}, {"step": 2, "x": 1.0}, {"step": 3}, {"step": 4, "x": 2.0}, {"step": 9, "x": 0.0}]
    assert checkpoint.best_step(rows, tmp_path, "x") == {"step_000002"}
    assert checkpoint.best_step(rows, tmp_path, "-x") == {"step_000001"}
    assert checkpoint.best_step(rows, tmp_path, None) == checkpoint.best_step(rows, tmp_path, "y") == set()


def test_a_figure_that_is_not_a_number_is_never_the_best(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    rows = [{"step": 1, "x": float("nan")}, {"step": 2, "x": 5.0}]
    assert checkpoint.best_step(rows, tmp_path, "x") == checkpoint.best_step(rows, tmp_path, "-x") == {"step_000002"}


def test_the_checkpoint_just_saved_is_kept_beside_later_damaged_ones(tmp_path, complaints):
    for step in (3, 4, 5):
        save(tmp_path, step)
    for step in (4, 5):
        (tmp_path / f"step_{step:06d}" / "meta.json").write_text("{}")
    assert find_checkpoint(tmp_path, complaints.append)[0].name == "step_000003"
    save(tmp_path, 4)  # the resumed run's next
    prune_checkpoints(tmp_path, step=4, keep_last=1, keep=set())
    assert find_checkpoint(tmp_path, complaints.append)[0].name == "step_000004"


def test_a_million_steps_are_more_than_999999(tmp_path, complaints):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, step=1_000_000, keep_last=1, keep=set())
    assert find_checkpoint(tmp_path, complaints.append)[0].name == "step_1000000"


def test_a_copy_under_another_name_is_neither_loaded_nor_deleted(tmp_path, complaints):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000001_mine")
    shutil.copytree(tmp_path / "step_000002", tmp_path / "step_000002.bak")
    prune_checkpoints(tmp_path, step=2, keep_last=1, keep=set())
    assert find_checkpoint(tmp_path, complaints.append)[0].name == "step_000002"
    names = {path.name for path in tmp_path.glob("step_*")}
    assert names == {"step_000001_mine", "step_000002", "step_000002.bak"}


def forge(directory, change) -> None:
    """Let `change` edit the index, with checksums that fit: whoever writes a checkpoint can count, too."""
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(change(index) or index))
    (directory / checkpoint.CHECKSUMS).write_text(checkpoint._checksums(directory))
    assert find_damage(directory) is None


def first_chunk(index: dict) -> dict:
    return index["/half"]["chunks"][0]


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda index: first_chunk(index).update(file="../../../../etc/passwd"), "not a file of tensors"),
        (lambda index: first_chunk(index).update(file="/dev/zero"), "not a file of tensors"),
        (lambda index: first_chunk(index).update(start=10**9), "shorter than its chunks"),
        (lambda index: first_chunk(index).update(start=-1), "whole numbers"),
        (lambda index: first_chunk(index).update(offsets=[1]), "is outside of its tensor"),
        (lambda index: index["/half"].update(size=[2**40]), "not the whole tensor"),
        (lambda index: index["/half"].update(size=[2**40]) or first_chunk(index).update(sizes=[2**40]), "share bytes"),
        (lambda index: index.update(again=index["/half"]), "share bytes"),
        (lambda index: index["/half"].update(dtype="object"), "object"),
        (lambda index: index["/half"].update(chunks=[{}]), "offsets"),
        (lambda index: [index], "does not describe"),
        (lambda index: {"a": "b"}, "does not describe"),
    ],
)
def test_an_index_that_its_files_do_not_bear_out_is_refused(tmp_path, change, why):
    save(tmp_path, 1)
    forge(tmp_path / "step_000001", change)
    with pytest.raises(ValueError, match=why):
        load_checkpoint(tmp_path / "step_000001", a_state(1), rank=0)


def test_loading_a_checkpoint_unpickles_nothing(tmp_path, monkeypatch):
    """Neither what a pickle beside it says, nor any tensor."""
    save(tmp_path, 1)
    directory, written = tmp_path / "step_000001", tmp_path / "written"
    (directory / ".metadata").write_bytes(pickle.dumps(Attack(written)))

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert same(load_checkpoint(directory, a_state(9), rank=0), a_state(1))
    assert not written.exists()


class Attack:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def save_and_die(change: int, root, state: dict) -> bool:
    """Save step 2 in a fork that dies before its `change`-th change of the disk; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            die_before(change)
            save_checkpoint(root, 2, state, {"step": 2}, rank=0)
            prune_checkpoints(root, step=2, keep_last=1, keep=set())
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_save_killed_at_any_change_of_the_disk_leaves_a_good_checkpoint(tmp_path, complaints):
    """Every open for writing, mkdir, rename, symlink, unlink and rmdir, of the save and of the pruning after it."""
    states, found = {step: a_state(step) for step in (1, 2)}, []
    for change in itertools.count(1):
        root = tmp_path / str(change)
        save_checkpoint(root, 1, states[1], {}, rank=0)
        died = save_and_die(change, root, states[2])
        path, _ = find_checkpoint(root, complaints.append)
        found.append(int(path.name[-1]))
        assert same(load_checkpoint(path, a_state(9), rank=0), states[found[-1]])
        after = found[-1] + 1
        save(root, after)  # what was left behind is in nobody's way
        prune_checkpoints(root, step=after, keep_last=1, keep=set())
        assert sorted(path.name for path in root.iterdir()) == ["latest", f"step_00000{after}"]
        if not died:
            break
    assert found == sorted(found) and min(found.count(1), found.count(2)) > 6 and not complaints
