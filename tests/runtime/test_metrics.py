import json
import tracemalloc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from runtime import plots
from runtime.metrics import Metrics, append_row, drop_rows_after, each_log_row, read_log


def test_a_mean_is_over_elements_not_over_micro_batches():
    metrics = Metrics()
    metrics.add({"objective/loss": torch.tensor([1.0, 2.0, 3.0])})
    metrics.add({"objective/loss": torch.tensor([10.0])})
    assert metrics.flush() == {"objective/loss": 4.0}


def test_a_million_small_numbers_add_up_in_float64():
    metrics = Metrics()
    for _ in range(10):
        metrics.add({"x": torch.full((100_000,), 0.1, dtype=torch.float32)})
    assert metrics.flush()["x"] == pytest.approx(float(torch.tensor(0.1, dtype=torch.float32)), rel=1e-12)


def test_flush_forgets():
    metrics = Metrics()
    metrics.add({"x": 2.0})
    metrics.flush()
    assert metrics.flush() == {}


def test_metrics_hold_no_graph():
    metrics = Metrics()
    metrics.add({"x": torch.ones(3, requires_grad=True) * 2})
    assert not metrics.sums["x"].requires_grad


def _rank(rank: int, port: int, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics = Metrics()
    metrics.add({"loss": torch.arange(3.0) if rank == 0 else torch.tensor([9.0]), "lr": 0.5})
    (path / f"{rank}.json").write_text(json.dumps(metrics.flush()))
    dist.destroy_process_group()


def test_ranks_with_unequal_counts_agree_on_the_exact_mean(tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, args=(port, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"loss": (0 + 1 + 2 + 9) / 4, "lr": 0.5}


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "x": 1 / 3}, {"step": 2, "x": 1e-300, "text": "naïve\u2028line"}]
    for row in rows:
        append_row(path, row)
    assert read_log(path) == rows


def test_a_long_log_is_read_without_holding_it(tmp_path):
    """A run reads its whole log at every save: what that takes must not grow with the log."""
    path = tmp_path / "metrics.jsonl"
    row = {f"objective/{number}": 1 / 3 for number in range(30)}
    path.write_text("".join(json.dumps({"step": step} | row) + "\n" for step in range(3000)))
    tracemalloc.start()
    assert sum(1 for _ in each_log_row(path)) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000  # bytes; all rows together take 10 MB


def test_a_long_curve_is_drawn_from_few_points_and_the_last(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.plot_metrics(({"step": step, "x": 2.0 * step} for step in range(1, 12346)), tmp_path / "curves.png")
    (line,) = figures[0].axes[0].lines
    assert 900 < len(line.get_xdata()) <= plots.POINTS and max(line.get_xdata()) == 12345
    assert all(y == 2 * x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_a_line_cut_by_a_kill_is_left_out_and_forgotten_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_row(path, {"step": step})
    with open(path, "a") as file:
        file.write('{"step": 4, "x": 0.')
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    drop_rows_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_name_without_elements_has_no_mean():
    metrics = Metrics()
    metrics.add({"rewards/chosen": torch.empty(0), "rewards/rejected": torch.ones(3)})
    assert metrics.flush() == {"rewards/rejected": 1.0}
