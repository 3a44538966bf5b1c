"""Votes of every format: known counts, traps of labels and coordinates, bad files named with their line."""

import gzip
import json

import pytest

from evals.readers import FORMATS, read_votes
from evals.verdicts import fold_orders, sort_pairs
from tests.published_votes import annotations, battles, given, published, write_lines

FILES = {
    "mtbench": ["mtbench/human.jsonl", "mtbench/gpt4_pair.jsonl"],
    "pandalm": ["pandalm/testset_v1_labels.csv.gz"],
    "llmbar": ["llmbar/vanilla_both_orders.csv.gz"],
    "llmfao": [
        "llmfao/crowd-comparisons.csv",
        "llmfao/gpt4-crowd-comparisons.csv",
        "llmfao/pairs_crowd_lengths.csv.gz",
    ],
}


def test_mt_bench_votes_are_counted_as_published():
    votes, expected = read_votes(published(*FILES["mtbench"]), "mtbench"), given("mtbench")["counts"]
    people, judge = votes[votes["human"]], votes[~votes["human"]]
    assert len(people) == expected["human_votes"] and people["judge"].nunique() == expected["human_judges"]
    assert (people["verdict"] == "tie").sum() == expected["human_tie"]
    assert (
        len(judge) == expected["gpt4"]
        and (judge["text"] == "tie (inconsistent)").sum() == expected["gpt4_inconsistent"]
    )
    assert (judge["text"] == "tie").sum() == expected["gpt4_tie"]


def test_llmfao_votes_are_counted_as_published():
    votes, expected = read_votes(published(*FILES["llmfao"]), "llmfao"), given("llmfao")
    people = votes[votes["human"]]
    assert (len(people), people["judge"].nunique()) == (expected["n_crowd"], expected["workers"])
    names = {"tie": "tie", "left": "a", "right": "b"}
    for part, section in ((people, "winners"), (votes[~votes["human"]], "gpt4_winners")):
        assert part["verdict"].value_counts().to_dict() == {names[k]: v for k, v in expected[section].items()}
    assert votes["length_a"].notna().all()


def test_pandalm_has_three_people_and_two_judges():
    votes = read_votes(published(*FILES["pandalm"]), "pandalm")
    assert set(votes.loc[votes["human"], "judge"]) == {"annotator1", "annotator2", "annotator3"}
    assert (
        len(votes[votes["judge"] == "pandalm7b"].query("verdict != 'error'"))
        == given("pandalm")["pandalm7b"]["n_parsed"]
    )


def test_two_games_of_one_row_fold_to_fastchats_figures():
    votes = read_votes(published("mtbench/phi3_dpo_gpt4_pair.jsonl"), "mtbench")
    expected, folded = given("position_bias_phi3_dpo")["all_75"], fold_orders(votes)
    assert len(votes) == 2 * expected["n"] and len(folded) == expected["n"]
    counts = folded["verdict"].value_counts()
    assert counts[["b", "a", "tie"]].tolist() == [expected["dpo_win"], expected["dpo_loss"], expected["tie"]]
    assert len(folded) - counts["error"] == expected["n_ok"]


@pytest.mark.parametrize(
    "first, second, folded",
    [
        ("a", "a", "a"),
        ("a", "b", "tie"),
        ("a", "tie", "tie"),
        ("tie", "tie", "tie"),
        ("a", "error", "error"),
        ("error",) * 3,
    ],
)
def test_a_win_needs_both_orders_and_an_error_is_no_tie(first, second, folded):
    votes = battles(("x", "y", first), ("x", "y", second)).assign(question="q", shown=["a", "b"])
    assert fold_orders(votes)["verdict"].tolist() == [folded]


def test_people_who_saw_different_orders_are_not_folded_into_one():
    votes = battles(("x", "y", "a"), ("x", "y", "b"), human=True).assign(question="q", shown=["a", "b"])
    assert fold_orders(votes)["verdict"].tolist() == ["a", "b"]


def test_sorting_a_pair_turns_everything_that_speaks_about_a_side():
    votes = battles(("y", "x", "a"), length_a=3, length_b=7, hash_a="h", hash_b="k", shown="a", preference=0.2)
    row = sort_pairs(votes).iloc[0].to_dict()
    expected = {
        "model_a": "x",
        "model_b": "y",
        "verdict": "b",
        "shown": "b",
        "length_a": 7,
        "length_b": 3,
        "preference": 0.8,
    }
    assert {name: row[name] for name in expected} == expected and row["hash_a"] == "k"


def test_a_joined_pair_needs_the_pair_sorted_first():
    """Without it a third of MT-Bench's items is lost."""
    votes = read_votes(published(*FILES["mtbench"]), "mtbench")
    key = ["question", "turn", "model_a", "model_b"]
    joined = [
        table[table["human"]][key].drop_duplicates().merge(table[~table["human"]][key].drop_duplicates())
        for table in (votes, sort_pairs(votes))
    ]
    assert len(joined[1]) == given("mtbench")["counts"]["joined"] and len(joined[0]) < 0.75 * len(joined[1])


@pytest.mark.parametrize(
    "label, verdict",
    [("model_a", "a"), ("tie", "tie"), ("Tie", "tie"), ("tie (bothbad)", "tie")]
    + [(label, "error") for label in ("garbage", "$ERROR$", None)],
)
def test_labels_of_battles(label, verdict, tmp_path):
    rows = [{"model_a": "x", "model_b": "y", "winner": label}]
    assert read_votes([write_lines(tmp_path / "b.jsonl", rows)], "arena")["verdict"].tolist() == [verdict]


def test_arena_conversations_give_lengths(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "abc"}]
    rows = [{"model_a": "x", "model_b": "y", "winner": "tie", "conversation_a": talk, "conversation_b": talk * 2}]
    vote = read_votes([write_lines(tmp_path / "b.jsonl", rows)], "arena").iloc[0]
    assert (vote["length_a"], vote["length_b"]) == (3, 6)


def test_alpaca_annotations_keep_lengths_hashes_and_preferences(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(annotations("phi-2")[:50]))
    votes = read_votes([str(tmp_path / "a.json")], "alpaca_eval")
    assert votes["question"].nunique() == 50 and votes["preference"].between(0, 1).all()
    assert votes["length_a"].min() > 0 and votes["hash_b"].notna().all()


def test_our_own_verdicts_come_back_as_they_were_written(tmp_path):
    rows = [
        {"question": "q", "model_a": "x", "model_b": "y", "verdict": "tie", "judge": "j", "shown": "b", "text": "so"}
    ]
    path = tmp_path / "v.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    vote = read_votes([str(path)], "verdicts").iloc[0]
    assert {name: vote[name] for name in rows[0]} == rows[0]


@pytest.mark.parametrize(
    "format, text, words",
    [
        ("arena", '{"model_a": "x"', r"votes.jsonl:1: not JSON"),
        ("arena", '\n{"model_a": "x", "winner": "tie"}', r"votes.jsonl:2 lacks model_b"),
        ("arena", "[1]", r"votes.jsonl:1: expected a JSON object, got list"),
        ("arena", '{"model_a": null, "model_b": "y", "winner": "tie"}', r"votes.jsonl:1: model_a is null"),
        ("arena", "", "no vote in"),
        (
            "verdicts",
            '{"question": "q", "model_a": "x", "model_b": "y", "verdict": "won", "judge": "j"}',
            "verdict='won'",
        ),
        ("nonsense", "{}", "task.format='nonsense' is unknown"),
        ("pandalm", '{"idx": 1, "cmp_key": "gpt_neo_opt", "annotator1": 1}', r"votes.jsonl:1: .* got 'gpt_neo_opt'"),
    ],
)
def test_bad_files_are_named_with_their_line(format, text, words, tmp_path):
    (tmp_path / "votes.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_votes([str(tmp_path / "votes.jsonl")], format)


def test_a_byte_order_mark_is_no_text_and_another_encoding_names_the_file(tmp_path):
    row = '{"model_a": "\u00e9t\u00e9", "model_b": "y", "winner": "tie"}'
    (tmp_path / "votes.jsonl").write_text(row, encoding="utf-8-sig")
    assert list(read_votes([str(tmp_path / "votes.jsonl")], "arena")["model_a"]) == ["\u00e9t\u00e9"]
    (tmp_path / "votes.jsonl").write_text(row, encoding="latin-1")
    with pytest.raises(ValueError, match=r"votes.jsonl:1: the file is not UTF-8"):
        read_votes([str(tmp_path / "votes.jsonl")], "arena")


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match="no data file 'nowhere.jsonl'"):
        read_votes(["nowhere.jsonl"], "arena")
    assert "verdicts" in FORMATS
