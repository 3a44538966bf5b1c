"""Reference log-probs on disk: computed once, resumable, checked, and never those of another model or other data."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import ref_cache
from model.ref_cache import cached_logprobs, row_key, weights_digest

ROWS = [{"input_ids": [1, 5, i, 7], "completion_mask": [False, False, True, True]} for i in range(23)]


class Counter:
    """Stands in for the model: counts the rows that it was asked for."""

    def __init__(self, scale=1.0, stop_after=None):
        self.seen, self.scale, self.stop_after = 0, scale, stop_after

    def __call__(self, rows):
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(rows)
        return torch.tensor([-self.scale * row["input_ids"][2] / 3 for row in rows])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(ref_cache, "PART_ROWS", 5)


def cached(compute, directory, rows=ROWS, weights="a" * 64, precision="fp32", rank=0, world_size=1):
    ranks = {"rank": rank, "world_size": world_size}
    return cached_logprobs(compute, rows, directory=directory, weights=weights, precision=precision, **ranks)


def test_what_is_read_back_is_what_was_computed_and_is_not_computed_again(tmp_path):
    first, second = Counter(), Counter()
    live = first(ROWS)
    table = cached(first, tmp_path)
    assert torch.equal(torch.tensor([table[row_key(row)] for row in ROWS]), live)
    assert cached(second, tmp_path) == table
    assert second.seen == 0


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached(Counter(stop_after=10), tmp_path)
    rest = Counter()
    assert len(cached(rest, tmp_path)) == len(ROWS)
    assert rest.seen == len(ROWS) - 10
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("change", [{"weights": "b" * 64}, {"precision": "bf16"}])
def test_another_model_or_precision_never_finds_an_old_cache(tmp_path, change):
    cached(Counter(), tmp_path)
    changed = Counter(scale=2.0)
    assert cached(changed, tmp_path, **change)[row_key(ROWS[5])] == pytest.approx(-10 / 3)
    assert changed.seen == len(ROWS)


@pytest.mark.parametrize(
    "row", [ROWS[0] | {"completion_mask": [False, False, False, True]}, ROWS[0] | {"input_ids": [2, 5, 0, 7]}]
)
def test_of_other_data_only_the_rows_that_differ_are_computed(tmp_path, row):
    cached(Counter(), tmp_path)
    changed = Counter()
    table = cached(changed, tmp_path, rows=[row, *ROWS[4:], *ROWS[4:6]])
    assert changed.seen == 1 and table.keys() == {row_key(r) for r in (row, *ROWS[4:])}


def test_a_longer_run_computes_what_the_shorter_did_not_read(tmp_path):
    cached(Counter(), tmp_path, rows=ROWS[:7])
    longer = Counter()
    assert cached(longer, tmp_path) == pytest.approx({row_key(row): -row["input_ids"][2] / 3 for row in ROWS})
    assert longer.seen == len(ROWS) - 7


def test_ranks_share_the_work(tmp_path):
    one, two = Counter(), Counter()
    with pytest.raises(ValueError, match="lacks 10 rows"):  # without a process group nobody waits for the other
        cached(one, tmp_path, rank=0, world_size=2)
    other = tmp_path / "other"  # as both would see it: nothing there yet
    with pytest.raises(ValueError, match="lacks 13 rows"):
        cached(two, other, rank=1, world_size=2)
    assert (one.seen, two.seen) == (13, 10)
    for path in other.rglob("*.safetensors"):
        path.rename(next(tmp_path.glob("*/")) / path.name)
    rest = Counter()
    assert len(cached(rest, tmp_path)) == len(ROWS) and rest.seen == 0


def test_damaged_and_stale_files_are_refused_by_name(tmp_path):
    cached(Counter(), tmp_path)
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it"):
        cached(Counter(), tmp_path)
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        cached(Counter(), tmp_path)
    path.write_bytes(whole)
    save_file(load_file(path), path, metadata={"key": "c" * 64, "sha256": ""})
    with pytest.raises(ValueError, match=f"{path.name} is stale"):
        cached(Counter(), tmp_path)


def test_digest_of_a_sharded_checkpoint_sees_every_file(tmp_path):
    """A cache of the model before its second file changed would be stale without anybody knowing."""
    (tmp_path / "config.json").write_text("{}")
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(3)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    digests = {weights_digest(tmp_path)}
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(3)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 3


def test_digest_of_a_checkpoint_sees_every_byte_of_weights_and_config(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 1e4}))
    before = weights_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert weights_digest(tmp_path) == before
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 1e5}))
    other_config = weights_digest(tmp_path)
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert len({before, other_config, weights_digest(tmp_path)}) == 3
