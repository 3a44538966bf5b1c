"""The bars that the kernels must stay under, with the benchmark's own counters: bytes, operations, scratch, time."""

import pytest

from bench.kernels.bench import part_bytes, part_predict, table
from kernels.backend import interpreting
from kernels.logprob import TILES


@pytest.mark.interpreter
def test_every_kernel_moves_each_byte_once_in_one_launch():
    rows = part_bytes()
    assert {row["kernel"] for row in rows} == {
        "_fold_kernel",
        "_unfold_kernel",
        "_forward_kernel",
        "_backward_kernel",
        "_gae_kernel",
    }
    for row in rows:
        assert row["launches"] == 1 and 1.0 <= row["unique"] <= 1.05, row


@pytest.mark.skipif(interpreting(), reason="counts launches that the interpreter would run")
def test_the_log_prob_at_full_size_stays_near_its_floor():
    rows = part_predict()
    assert len(rows) == 4
    for row in rows:
        M = row["size"][0]
        assert row["operations"] == pytest.approx(1.0)  # 2NDV forward, 8NDV with both gradients, and nothing more
        assert row["over_floor"] <= 1.2, row
        assert row["scratch_mb"] * 1e6 <= 4 * M * TILES["gpu"], row  # a tile of logits and what adds up beside it


def test_a_table_has_a_column_for_every_key_and_a_dash_where_there_is_none():
    lines = table([{"size": [2, 3], "a": 1.0}, {"b": None}]).split("\n")
    assert [line.split() for line in lines] == [["size", "a", "b"], ["2", "x", "3", "1.000", "-"], ["-", "-", "-"]]
