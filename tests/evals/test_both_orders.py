"""Judges where the answer is known: JudgeBench's own rule, and what is refused."""

import json

from tests.published_votes import SCRIPT, published, write_lines


def row(number, label, first, second, source="mmlu-pro-law"):
    """A pair of JudgeBench; the second decision speaks about the answers as they were shown, in the other order."""
    said = [None if decision is None else {"decision": decision} for decision in (first, second)]
    return {
        "pair_id": f"p{number}",
        "source": source,
        "label": label,
        "judge_name": "j",
        "judgments": said,
        "response_A": "one",
        "response_B": "other",
    }


ROWS = [
    row(0, "A>B", "A>B", "B>A"),  # right in both orders
    row(1, "A>B", "A>B", "A=B"),  # right once, then a tie: right by JudgeBench's rule
    row(2, "B>A", "B>A", "B>A"),  # names the second shown twice: once right, once wrong
    row(3, "B>A", "A>B", "B>A", "livebench-math"),  # wrong in both orders
    row(4, "B>A", "B>A", None, "livebench-math"),  # right once, then nothing
    row(5, "A>B", "A=B", "A=B", "livecodebench"),
]


def test_judgebench_counts_what_is_right_oftener_than_wrong(tmp_path, run_script, capsys):
    file = write_lines(tmp_path / "j.jsonl", ROWS)
    words = ("task=both_orders", "task.format=judgebench")
    assert run_script(SCRIPT, *words, f"task.input=[{file}]", f"hydra.run.dir={tmp_path}/out") == 0
    groups = json.loads((tmp_path / "out/result.json").read_text())["judges"]["j"]
    values = {name: groups["all"][name]["value"] for name in ("acc_ab", "acc_ba", "acc_both", "judgebench")}
    assert values == {"acc_ab": 4 / 6, "acc_ba": 1 / 6, "acc_both": 1 / 6, "judgebench": 3 / 6}
    assert (
        groups["mmlu-pro"]["judgebench"]["value"] == 2 / 3 and groups["livebench-math"]["judgebench"]["value"] == 1 / 2
    )
    assert groups["all"]["errors"] == 1 and groups["all"]["order"]["flips"]["to_second"] == 1
    once = write_lines(tmp_path / "once.jsonl", [ROWS[0] | {"judgments": ROWS[0]["judgments"][:1]}])
    assert run_script(SCRIPT, *words, f"task.input=[{once}]", f"hydra.run.dir={tmp_path}/bad") == 2
    assert "judged only one order of 1 of 1" in capsys.readouterr().err


def test_llmbars_published_accuracies_come_out_of_the_command(tmp_path, run_script):
    (file,) = published("llmbar/vanilla_both_orders.csv.gz")
    words = ("task=both_orders", f"task.input=[{file}]", "task.format=llmbar", f"hydra.run.dir={tmp_path}/out")
    assert run_script(SCRIPT, *words) == 0
    manual = json.loads((tmp_path / "out/result.json").read_text())["judges"]["ChatGPT"]["Manual"]
    found = [round(100 * manual[name]["value"], 6) for name in ("acc_avg", "acc_both", "agreement_rate")]
    assert found == [34.782609, 10.869565, 52.173913]  # as LLMBar's own table has them
