"""bench/gpu.py runs whole on a CPU with --tiny: the first GPU must not find its typing errors."""

import json
import sys

from bench import gpu


def test_the_bench_measures_every_part_and_writes_three_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    steps = {(row["shape"], row["work"]) for row in found["training"] + found["ppo"] if row.get("seconds", 0) > 0}
    works = ["sft", "rm", "dpo", "ppo: rollout", "ppo: read", "ppo: learn"]
    assert {(shape, work) for shape in ("tiny", "tiny, LoRA") for work in works} <= steps
    assert all(0 < row["share"] < 1 for row in found["training"] + found["ppo"])
    assert [row["rows"] for row in found["decoding"]] == [1, 4] and not found["left_out"]
    assert (tmp_path / "gpu.png").stat().st_size > 1000 and "| tiny | sft |" in (tmp_path / "gpu.md").read_text()
    assert "Limits:" in capsys.readouterr().out
