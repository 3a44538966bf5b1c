"""Agreement of judges with people: FastChat's published figures, kappa, alpha, and what intervals do."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals.agreement import (
    agreement_of,
    alpha,
    by_group,
    human_pairs,
    judge_pairs,
    kappa,
    majority,
    majority_agreement,
    split_judge,
    vote_tables,
)
from evals.benchmarks.both_orders import order_accuracy
from evals.biases import position, preference_for_more
from evals.readers import read_votes
from evals.verdicts import decisive
from tests.published_votes import SCRIPT, battles, given, published

SETTINGS = {"level": 0.95, "rounds": 50}
CLOSE = {"abs": 1e-6}


@pytest.fixture(scope="module")
def mt_bench():
    return read_votes(published("mtbench/human.jsonl", "mtbench/gpt4_pair.jsonl"), "mtbench")


def test_agreement_on_mt_bench_is_fastchats(mt_bench):
    people, judge = split_judge(mt_bench, judge=None, humans="expert_*")
    for name, pairs in (("gpt4-pair|human", judge_pairs(people, judge)), ("human|human", human_pairs(people))):
        first = agreement_of(pairs[pairs["turn"] == 1], symmetric=False, **SETTINGS)
        for key, kind, n in (("agreement", "with_tie", "n"), ("agreement_no_ties", "no_tie", "n_no_ties")):
            expected = given("mtbench_official_agreement")[f"turn1|{name}|{kind}"]
            assert first[key] == pytest.approx(expected["ratio"], abs=1e-9) and first[n] == expected["total"]


def test_the_majority_of_all_people_on_mt_bench_has_the_published_agreement(mt_bench):
    result, expected = (
        majority_agreement(*split_judge(mt_bench, judge=None, humans="*")),
        given("mtbench")["majority_canonical"],
    )
    names = {"agreement": "agreement", "kappa": "cohen_kappa", "n": "n", "agreement_no_ties": "agreement_decisive"}
    names |= {
        "kappa_no_ties": "cohen_kappa_decisive",
        "n_no_ties": "n_decisive",
        "spearman": "spearman",
        "pearson": "pearson",
    }
    assert as_written(result) == pytest.approx({name: expected[key] for name, key in names.items()}, **CLOSE)


def as_written(result):
    """The figures with each pair in one order only, which is how they were published."""
    return {name: value for name, value in (result | result["as_written"]).items() if name != "as_written"}


def test_alpha_of_people_on_mt_bench_is_the_published_one(mt_bench):
    people, _ = split_judge(mt_bench, judge=None, humans="*")
    expected = given("mtbench")["human_alpha_nominal_ordinal"]
    assert [alpha(people, level, as_written=True) for level in ("nominal", "ordinal")] == pytest.approx(
        [expected["nominal"], expected["ordinal"]]
    )


def test_gpt_4_against_the_crowd_has_the_published_agreement():
    files = published("llmfao/crowd-comparisons.csv", "llmfao/gpt4-crowd-comparisons.csv")
    votes, expected = read_votes(files, "llmfao"), given("llmfao")
    people, judge = votes[votes["human"]], votes[~votes["human"]]  # sides as in the files: kappa depends on them
    result = majority_agreement(people, judge)
    names = {"agreement": "agreement", "kappa": "kappa", "n": "n", "agreement_no_ties": "agreement_decisive"}
    names |= {"n_no_ties": "n_decisive", "spearman": "spearman"}
    assert {n: as_written(result)[n] for n in names} == pytest.approx(
        {n: expected["gpt4_vs_crowd"][k] for n, k in names.items()}, **CLOSE
    )
    assert alpha(people, "nominal", as_written=True) == pytest.approx(expected["alpha_nominal"], **CLOSE)
    shares = [(decisive(part)["verdict"] == "a").mean() for part in (judge, people)]
    expected = expected["gpt4_vs_crowd"]
    assert shares == pytest.approx([expected["left_share"], expected["human_left_share"]], abs=0.01)


def test_shares_of_longer_winners_on_llmfao_are_published():
    lengths = "llmfao/pairs_crowd_lengths.csv.gz"
    for name in ("gpt4", "gpt3"):
        votes = read_votes(published(f"llmfao/{name}-crowd-comparisons.csv", lengths), "llmfao")
        expected = given("llmfao")["prefers_longer_gap30"][name]
        figure = preference_for_more(votes[:0], votes, "length", min_gap=30, level=0.95)
        assert (figure["n"], figure["judge"]) == pytest.approx((expected["n"], expected["p"]))
    crowd = majority(read_votes(published("llmfao/crowd-comparisons.csv", lengths), "llmfao"))
    expected = given("llmfao")["prefers_longer_gap30"]["human_majority"]
    figure = preference_for_more(crowd[:0], crowd, "length", min_gap=30, level=0.95)
    assert (figure["n"], figure["judge"]) == pytest.approx((expected["n"], expected["p"]))


def test_agreement_on_pandalm_is_the_published_one():
    votes, expected = read_votes(published("pandalm/testset_v1_labels.csv.gz"), "pandalm"), given("pandalm")
    one, two = (votes[votes["judge"] == f"annotator{i}"] for i in (1, 2))
    tables = vote_tables(judge_pairs(one, two), symmetric=False)
    assert kappa(tables.sum(0)) == pytest.approx(expected["annotator1|annotator2 cohen"], **CLOSE)
    people = votes[votes["human"]]
    codes = {"a": "1", "b": "2", "tie": "0"}
    counts = majority(people)["verdict"].map(codes).value_counts().to_dict()
    assert counts == expected["majority_distribution"]
    judge = votes[(votes["judge"] == "pandalm7b") & (votes["verdict"] != "error")]
    result, expected = majority_agreement(people, judge), expected["pandalm7b"]
    assert result["agreement"] == pytest.approx(expected["accuracy"])
    assert as_written(result)["kappa"] == pytest.approx(expected["cohen_kappa"], **CLOSE)
    assert (result["n_no_ties"], result["agreement_no_ties"]) == pytest.approx(
        (expected["n_decisive"], expected["decisive_agreement"])
    )


def test_llmbars_accuracies_are_published_and_its_kappas_are_wrong():
    """LLMBar's code maps winner 2 to 0 while labels are 1 and 2, so its kappas are far too low."""
    votes = read_votes(published("llmbar/vanilla_both_orders.csv.gz"), "llmbar")
    for key, expected in given("llmbar_both_orders").items():
        subset, judge = key.split("|")
        part = votes[(votes["category"] == subset) & (votes["human"] | (votes["judge"] == judge))]
        result = order_accuracy(part)
        names = ("acc_ab", "acc_ba", "acc_avg", "acc_both", "agreement_rate")
        assert {n: result[n]["value"] for n in names} == pytest.approx({n: expected[n] for n in names}), key
        assert result["n"] == expected["n"] and all(0 <= result[n]["lower"] <= result[n]["upper"] <= 1 for n in names)
        people, first = part[part["human"]], part[part["shown"] == "a"]
        ours = kappa(vote_tables(judge_pairs(people, first[first["verdict"] != "error"]), symmetric=False).sum(0))
        if not expected["other"]:
            assert ours == pytest.approx(expected["kappa_ab_vs_label"], **CLOSE), key
            assert abs(ours - expected["published_kappa_False_WRONG"]) > 0.005
            bias = position(part[~part["human"]], level=0.95)
            assert bias["value"] == pytest.approx(expected["first_share"])
            assert (bias["flips"]["to_first"], bias["flips"]["to_second"]) == (
                expected["flip_to_first"],
                expected["flip_to_second"],
            )


def test_kappa_of_a_table_is_cohens():
    table = np.array([[20.0, 5, 0], [10, 15, 0], [0, 0, 0]])
    assert kappa(table) == pytest.approx(0.4)  # Cohen's textbook case
    assert np.isnan(kappa(np.diag([4.0, 0, 0])))


def test_agreement_does_not_know_how_a_pair_is_written():
    rows = [("x", "y", "a"), ("x", "y", "b"), ("x", "y", "tie"), ("x", "y", "a")]
    people, judge = battles(*rows, human=True), battles(*[("x", "y", "a")] * 4)
    turned = battles(*[("y", "x", "b")] * 4)
    straight, mirrored = ([*split_judge(pd_concat(people, j), judge=None, humans="*")] for j in (judge, turned))
    figures = [by_group(judge_pairs(*sides), symmetric=False, **SETTINGS) for sides in (straight, mirrored)]
    assert figures[0] == figures[1] and figures[0]["agreement"] == 0.5 and figures[0]["n_no_ties"] == 3


def pd_concat(*tables):
    import pandas as pd

    return pd.concat(tables, ignore_index=True)


def test_votes_that_share_questions_make_wider_intervals():
    rng = np.random.default_rng(0)
    hits = np.repeat(rng.random(40) < 0.5, 25)
    rows = [("x", "y", "a" if hit else "b") for hit in hits]
    people, judge = battles(*[("x", "y", "a")] * 1000, human=True), battles(*rows)
    clustered = [
        table.assign(question=np.repeat(np.arange(40).astype(str), 25), turn=np.arange(1000))
        for table in (people, judge)
    ]
    apart = [table.assign(turn=np.arange(1000)) for table in (people, judge)]
    width = [
        np.ptp(agreement_of(judge_pairs(*sides), symmetric=False, **SETTINGS)["agreement_interval"])
        for sides in (clustered, apart)
    ]
    assert width[0] > 3.5 * width[1]


def test_a_judge_that_is_not_named_must_be_the_only_one(mt_bench):
    two = pd_concat(mt_bench, battles(("x", "y", "a")))
    with pytest.raises(ValueError, match="gpt4_pair, j"):
        split_judge(two, judge=None, humans="expert_*")


def test_the_script_gives_fastchats_figures_with_turns_categories_and_people(tmp_path, run_script):
    files = ",".join(published("mtbench/human.jsonl", "mtbench/gpt4_pair.jsonl"))
    words = [f"task.input=[{files}]", "task.format=mtbench", "task.rounds=10", f"hydra.run.dir={tmp_path}/out"]
    assert run_script(SCRIPT, "task=agreement", *words) == 0
    result = json.loads(Path(tmp_path / "out/result.json").read_text())
    expected = given("mtbench_official_agreement")
    assert result["turns"]["1"]["agreement"] == pytest.approx(expected["turn1|gpt4-pair|human|with_tie"]["ratio"])
    ceiling = result["human_human"]["turns"]["1"]
    assert ceiling["agreement_no_ties"] == pytest.approx(expected["turn1|human|human|no_tie"]["ratio"])
    assert set(result["categories"]) >= {"math", "coding", "writing"} and len(result["categories"]) == 8
    assert result["majority"]["as_written"]["kappa"] == pytest.approx(
        given("mtbench")["majority_canonical"]["cohen_kappa"], **CLOSE
    )
    assert {"agreement", "agreement_no_ties", "kappa", "n"} <= set(result) and (tmp_path / "out/agreement.png").exists()


def test_no_figure_depends_on_how_the_models_are_called():
    """Renaming models turns pairs round; the same votes must give the same kappa, rank correlation and alpha."""
    rng = np.random.default_rng(1)
    rows = [(*rng.choice(["m1", "m2", "m3"], 2, replace=False), "aabtie"[0]) for _ in range(200)]
    verdicts = rng.choice(["a", "b", "tie"], (3, 200), p=[0.6, 0.2, 0.2])

    def figures(rename):
        sides = []
        for voter, own in enumerate(verdicts):
            named = [(rename[a], rename[b], v) for (a, b, _), v in zip(rows, own, strict=True)]
            sides.append(battles(*named, judge=f"v{voter}", human=voter < 2))
        people, judge = split_judge(pd_concat(*sides), judge="v2", humans="*")
        result = majority_agreement(people, judge)
        pairs = by_group(judge_pairs(people, judge), symmetric=False, **SETTINGS)
        return [result[n] for n in ("kappa", "kappa_no_ties", "spearman", "pearson")] + [
            pairs["kappa"],
            alpha(people, "nominal"),
            alpha(people, "ordinal"),
            result["as_written"]["kappa"],
        ]

    one, other = figures({"m1": "x", "m2": "y", "m3": "z"}), figures({"m1": "z", "m2": "x", "m3": "y"})
    assert one[:-1] == pytest.approx(other[:-1]) and one[-1] != pytest.approx(other[-1])


def test_errors_of_other_judges_are_not_counted(tmp_path, run_script):
    rows = [
        {"question": str(q), "model_a": "x", "model_b": "y", "verdict": v, "judge": j, "human": j == "p"}
        for q in range(12)
        for j, v in (("p", "ab"[q % 2]), ("one", "ab"[q % 2]), ("two", "error"))
    ]
    file = tmp_path / "v.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"task.input=[{file}]", "task.format=verdicts", "task.judge=one", "task.rounds=10", "task.questions=null"]
    assert run_script(SCRIPT, "task=agreement", *words, f"hydra.run.dir={tmp_path}/out") == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["errors"] == 0
