"""`watch` in SFT and DPO: asked about the answers to data.prompts, through the whole command."""
# ruff: noqa: F811 - fixtures of other test files

import json

import pytest

from runtime.metrics import read_log
from tests.test_train_dpo import dpo, inputs  # noqa: F401 - fixtures
from tests.test_train_sft import sft  # noqa: F401 - a fixture

COUNTS = """
def letters(prompts, completions, weight):
    return [None if w is None else w * len(c) + 1000 * len(p) for p, c, w in zip(prompts, completions, weight)]
"""


@pytest.fixture
def asked(tmp_path):
    """Prompts of three lengths, the second of which the watched reward cannot judge; words that watch it."""
    rows = [{"prompt": "Tea" * (i + 1), "weight": weight} for i, weight in enumerate((1.0, None, 2.0))]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fn.py").write_text(COUNTS)
    return [f"data.prompts=[{tmp_path}/asked.jsonl]", f"watch={tmp_path}/fn.py:letters", "num_samples=3"]


def expected(directory) -> dict[int, float]:
    """{step: what the watched reward says on average}, from the texts in samples.jsonl."""
    said: dict[int, list[str]] = {}
    for row in read_log(directory / "samples.jsonl"):
        said.setdefault(row["step"], []).append(row["completion"])
    return {step: (len(a) + 3000 + 2 * len(c) + 9000) / 2 for step, (a, _, c) in said.items()}


def test_sft_reports_what_is_watched_of_the_answers_that_it_logs(sft, asked, tmp_path):
    assert sft(tmp_path / "run", *asked, "sample_every=3", "num_steps=3") == 0
    told = {
        row["step"]: row["eval/watch/letters"]
        for row in read_log(tmp_path / "run" / "metrics.jsonl")
        if "eval/watch/letters" in row
    }
    assert told == pytest.approx(expected(tmp_path / "run")) and set(told) == {0, 3}


def test_dpo_reports_what_is_watched_of_the_answers_that_it_logs(dpo, asked, tmp_path):
    assert dpo(*asked, "sample_every=3") == 0
    told = {
        row["step"]: row["eval/watch/letters"]
        for row in read_log(tmp_path / "run" / "metrics.jsonl")
        if "eval/watch/letters" in row
    }
    assert told == pytest.approx(expected(tmp_path / "run")) and set(told) == {0, 3}
    fields = [row["columns"] for row in read_log(tmp_path / "run" / "samples.jsonl")]
    assert fields == [{"weight": 1.0}, {"weight": None}, {"weight": 2.0}] * 2  # a measure taken later can read them


def test_without_prompts_to_answer_nothing_can_be_watched(dpo, asked, capfd):
    assert dpo(asked[1], "sample_every=3") == 2
    assert "watch scores the answers to data.prompts" in capfd.readouterr().err
    assert dpo(*asked, "sample_every=0") == 2


@pytest.mark.parametrize("script", ["sft", "dpo"])
@pytest.mark.parametrize(
    "watch, message", [("ifeval", "ifeval reads the column instruction_id_list"), ("math", "is not one number")]
)
def test_what_a_watched_reward_cannot_judge_is_found_before_the_first_step(
    request, script, watch, message, tmp_path, capfd
):
    """A column that no prompt has, and an answer that is no number, in the last prompt."""
    rows = [{"prompt": "1 + 1", "answer": answer} for answer in ("2", "two")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.prompts=[{tmp_path}/asked.jsonl]", f"watch={watch}", "num_samples=2", "sample_every=3"]
    run = request.getfixturevalue(script)
    code = run(tmp_path / "run", *words) if script == "sft" else run(*words)
    assert code == 2 and message in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
