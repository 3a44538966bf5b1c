"""The order of rows: the same for every number of ranks, whole epochs, and resumable anywhere."""

from collections import Counter

import pytest

from data.loader import Loader, micro_batches, num_tokens


def items(n, start=0):
    return [{"input_ids": [0] * (1 + i % 5), "name": i} for i in range(start, start + n)]


def loader(n=23, *, rank=0, world_size=1, batch_size=4, seed=0, shuffle=True, **more):
    return Loader(items(n), batch_size=batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, **more)


def names(batch):
    return [item["name"] for item in batch]


def take(source, steps):
    return [names(next(source)) for _ in range(steps)]


def test_without_shuffling_rows_come_in_file_order_and_start_over():
    assert take(loader(5, batch_size=2, shuffle=False), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order():
    rows = sum(take(loader(23, batch_size=1), 46), [])
    assert sorted(rows[:23]) == sorted(rows[23:]) == list(range(23))
    assert rows[:23] != rows[23:] != list(range(23))


def test_the_seed_decides():
    assert take(loader(seed=1), 9) == take(loader(seed=1), 9) != take(loader(seed=2), 9)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_rank(world_size):
    alone = loader(batch_size=8)
    ranks = [loader(batch_size=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(7):  # beyond two epochs
        shares = [names(next(rank)) for rank in ranks]
        assert {len(share) for share in shares} == {8 // world_size}
        assert sum(shares, []) != (whole := names(next(alone)))
        assert [shares[i % world_size][i // world_size] for i in range(8)] == whole


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 17])
def test_resumed_at_any_step_it_goes_on_as_if_never_stopped(stop):
    whole = take(loader(), 20)
    first = loader()
    take(first, stop)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert take(second, 20 - stop) == whole[stop:]


def test_it_resumes_on_another_number_of_ranks():
    whole = take(loader(), 12)
    first = [loader(rank=rank, world_size=2) for rank in range(2)]
    for part in first:
        take(part, 5)
    second = loader()
    second.load_state_dict(first[1].state_dict())
    assert take(second, 7) == whole[5:]


@pytest.mark.parametrize("changed", [{"n": 24}, {"seed": 1}, {"shuffle": False}, {"file_sizes": [3, 20]}])
def test_a_checkpoint_of_other_data_is_refused(changed):
    with pytest.raises(ValueError, match="data differs from that of the checkpoint"):
        loader(**changed).load_state_dict(loader().state_dict())


def test_a_file_comes_as_often_as_its_weight_says():
    source = loader(30, batch_size=1, file_sizes=[10, 20], weights=[2.5, 0.3])
    assert source.epoch_size == 25 + 6
    chosen = []
    for _ in range(4):
        counts = Counter(sum(take(source, 31), []))
        first, second = ([counts[i] for i in rows] for rows in (range(10), range(10, 30)))
        assert sorted(first) == [2] * 5 + [3] * 5 and sorted(second) == [0] * 14 + [1] * 6
        chosen.append([i for i in range(30) if counts[i] in (1, 3)])
    assert len({tuple(rows) for rows in chosen}) == 4  # the fraction is drawn anew in each epoch


def test_weighted_files_without_shuffling_stay_in_file_order():
    source = loader(5, batch_size=1, shuffle=False, file_sizes=[2, 3], weights=[2, 1])
    assert sum(take(source, 7), []) == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"n": 0}, "no row to train on"),
        ({"batch_size": 3, "world_size": 2}, "batch_size=3 must be a positive multiple of the 2 ranks"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"file_sizes": [3, 20], "weights": [1]}, "1 entries for 2 files"),
        ({"file_sizes": [3, 20], "weights": [1, 0]}, "must be positive"),
        ({"file_sizes": [23], "weights": [0.001]}, "select no row"),
    ],
)
def test_bad_settings_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        loader(**settings)


def test_micro_batches_hold_every_row_longest_first():
    batch = items(11)
    parts = micro_batches(batch, 4)
    assert [len(part) for part in parts] == [4, 4, 3]
    lengths = [num_tokens(item) for part in parts for item in part]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(names(sum(parts, []))) == names(batch)
