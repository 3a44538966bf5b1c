"""Each check finds what was planted, agrees with published figures, and names bad rows by file and line."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("krippendorff")
from data.adapters import Layout  # noqa: E402
from data.checks import task_mix  # noqa: E402
from data.checks.agreement import check_agreement  # noqa: E402
from data.checks.contamination import check_contamination, find_spans  # noqa: E402
from data.checks.decontaminate import check_decontaminate  # noqa: E402
from data.checks.dedupe import check_dedupe  # noqa: E402
from data.checks.gate import require_agreement  # noqa: E402
from data.checks.near import NearIndex, jaccard, normal, shingles, sketches  # noqa: E402
from data.checks.pilot import check_pilot, describe, distance, judge, published_shares  # noqa: E402
from data.checks.quality import check_quality  # noqa: E402
from data.checks.selection import k_center, score_parts, word_vectors  # noqa: E402
from data.checks.task_classifier import _threshold  # noqa: E402
from data.checks.task_mix import check_task_mix, classify, compare, draw_to_mix, read_kind  # noqa: E402
from data.checks.texts import TextRow, parse_row, read_texts  # noqa: E402
from data.records import BadRows  # noqa: E402
from generation.scripted_client import ScriptedClient  # noqa: E402

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared/reference/evaluation"
SHARED = ROOT.parent / "shared/data"
AGREEMENT = {
    "level": "nominal",
    "unacceptable": ["neither"],
    "max_unacceptable": 0.2,
    "threshold": 0.4,
    "tie_labels": ["tie"],
    "resamples": 200,
    "max_pairs": 10,
    "min_shared": 10,
    "seed": 0,
    "on_bad_row": "error",
}
COPIES = {"threshold": 0.6, "span_words": 13, "min_words": 4, "on_bad_row": "error"}
QUALITY = {
    "num": 5,
    "pool": 5,
    "threshold": 0.6,
    "min_words": 3,
    "max_words": 500,
    "by": "plain",
    "diversity": "words",
    "policy": None,
    "precision": "fp32",
    "batch_size": 4,
    "max_length": 64,
    "seed": 0,
    "client": None,
    "on_bad_row": "error",
}
needs_shared = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference data of ../shared is not here")


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(user: str, assistant: str = "Yes, that is how it is done.") -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def votes_of(path: Path, labels: dict[str, list]) -> str:
    """`labels[annotator][item]`, None = no row."""
    rows = [
        {"item": item, "annotator": name, "label": label}
        for name, said in labels.items()
        for item, label in enumerate(said)
        if label is not None
    ]
    return write(path, rows)


# ---- agreement


@needs_shared
def test_pandalm_annotators_agree_as_published(tmp_path):
    given = json.loads((REFERENCE / "reference_given.json").read_text())["given"]["pandalm"]
    with gzip.open(REFERENCE / "pandalm/testset_v1_labels.csv.gz", "rt") as file:
        table = list(csv.DictReader(file))
    names = ["annotator1", "annotator2", "annotator3"]
    votes = votes_of(tmp_path / "votes.jsonl", {name: [row[name] for row in table] for name in names})
    result = check_agreement([votes], tmp_path, **AGREEMENT | {"tie_labels": ["0"]})
    assert result["fleiss_kappa"]["value"] == pytest.approx(given["fleiss"], abs=1e-6)
    kappa = result["cohen_kappa"]["annotator1|annotator2"]
    assert kappa["value"] == pytest.approx(given["annotator1|annotator2 cohen"], abs=1e-6)
    assert kappa["lower"] < kappa["value"] < kappa["upper"] and result["passed"]
    assert {facts["verdict"] for facts in result["per_annotator"].values()} == {"ok"}


@needs_shared
def test_llmfao_crowd_agrees_as_published_and_fails_the_gate(tmp_path):
    given = json.loads((REFERENCE / "reference_given.json").read_text())["given"]["llmfao"]
    with open(REFERENCE / "llmfao/crowd-comparisons.csv") as file:
        rows = [
            {"item": f"{r['prompt']}|{r['left']}|{r['right']}", "annotator": r["worker"], "label": r["winner"]}
            for r in csv.DictReader(file)
        ]
    result = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT | {"max_pairs": 0})
    assert result["krippendorff_alpha"]["value"] == pytest.approx(given["alpha_nominal"], abs=1e-6)
    assert result["votes"] == given["n_crowd"] and result["annotators"] == given["workers"] and not result["passed"]


@pytest.mark.parametrize("level, first, second", [("nominal", 1.0, 1.0), ("interval", 4.0, 1.0), ("ordinal", 3.0, 1.0)])
def test_the_most_disputed_items_are_shown_with_every_vote(level, first, second, tmp_path):
    """Two people on a scale of 0, 1, 2, 4: far is 0 and 4, near 1 and 2, and on other items they agree."""
    said = {"near": (1, 2), "far": (0, 4), "alike": (2, 2), "alike too": (4, 4), "same": (0, 0)}
    rows = [
        {"item": item, "annotator": f"p{i}", "label": label, "prompt": f"What is <b>{item}</b>?"}
        for item, labels in said.items()
        for i, label in enumerate(labels)
    ]
    result = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT | {"level": level})
    shown = {one["item"]: one for one in result["most_disputed"]}
    assert set(shown) == {"near", "far"} and (level == "nominal" or next(iter(shown)) == "far")
    assert (shown["far"]["disagreement"], shown["near"]["disagreement"]) == (first, second)
    assert shown["far"]["votes"] == {"p0": "0", "p1": "4"} and shown["far"]["where"].endswith("v.jsonl:3")
    page = (tmp_path / "report.html").read_text()
    assert "p0: 0, p1: 4" in page and "What is &lt;b&gt;far" in page and "alike" not in page


def planted(n: int = 400) -> dict[str, list]:
    """Three sound annotators, one who votes at random, and one who tosses a coin where the truth is a tie."""
    random = np.random.default_rng(0)
    truth = random.choice(["a", "b", "tie"], size=n, p=[0.4, 0.35, 0.25])
    labels = {}
    for name in ("ann", "bea", "cal"):
        slips = random.random(n) < 0.1
        labels[name] = np.where(slips, random.choice(["a", "b", "tie"], n), truth).tolist()
    labels["dice"] = random.choice(["a", "b", "tie"], n).tolist()
    labels["coin"] = np.where(truth == "tie", random.choice(["a", "b"], n), truth).tolist()
    labels["lefty"] = np.where(truth == "tie", "a", truth).tolist()
    return labels


def test_who_votes_at_random_and_who_breaks_ties_is_named(tmp_path):
    result = check_agreement([votes_of(tmp_path / "v.jsonl", planted())], tmp_path, **AGREEMENT)
    verdicts = {name: facts["verdict"] for name, facts in result["per_annotator"].items()}
    assert verdicts == {
        "ann": "ok",
        "bea": "ok",
        "cal": "ok",
        "dice": "votes at chance",
        "coin": "breaks ties at random",
        "lefty": "breaks ties to one side",
    }
    assert (tmp_path / "agreement.png").stat().st_size > 0 and "dice" in (tmp_path / "report.html").read_text()


def test_the_gate_judges_the_interval_and_not_the_point(tmp_path):
    labels = {name: said[:60] for name, said in planted().items() if name != "lefty"}
    votes = votes_of(tmp_path / "v.jsonl", labels)
    alpha = check_agreement([votes], tmp_path, **AGREEMENT)["krippendorff_alpha"]
    between = (alpha["lower"] + alpha["value"]) / 2
    assert alpha["lower"] < between < alpha["value"]
    assert not check_agreement([votes], tmp_path, **AGREEMENT | {"threshold": between})["passed"]
    assert check_agreement([votes], tmp_path, **AGREEMENT | {"threshold": alpha["lower"]})["passed"]


def test_missing_votes_are_no_votes_and_relabelling_changes_nothing(tmp_path):
    labels = planted(120)
    full = check_agreement([votes_of(tmp_path / "a.jsonl", labels)], tmp_path, **AGREEMENT)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    rows += [{"item": f"x{i}", "annotator": "ann", "label": None} for i in range(50)]
    renamed = [row | {"label": {"a": 7, "b": 3}.get(row["label"], row["label"])} for row in rows]
    again = check_agreement([write(tmp_path / "b.jsonl", renamed)], tmp_path, **AGREEMENT)
    assert again["krippendorff_alpha"]["value"] == pytest.approx(full["krippendorff_alpha"]["value"], abs=1e-12)
    assert again["votes"] == full["votes"]


def test_categories_are_judged_apart(tmp_path):
    random = np.random.default_rng(1)
    rows = []
    for item in range(80):
        said = random.choice(["a", "b"])
        for name in "xyz":
            label = said if item < 40 else random.choice(["a", "b"])
            rows.append(
                {"item": item, "annotator": name, "label": str(label), "category": "clear" if item < 40 else "vague"}
            )
    found = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT)["categories"]
    assert found["clear"]["value"] == 1.0 and found["vague"]["upper"] < 0.4


@pytest.mark.parametrize(
    "row, message",
    [
        ({"item": 1, "annotator": "a"}, r"v.jsonl:3: .*label"),
        ({"item": 1, "annotator": "a", "label": ["x"]}, r"v.jsonl:3: label must be text or a number"),
        ({"item": {"id": 1}, "annotator": "a", "label": "x"}, r"v.jsonl:3: item must be text or a number"),
        ({"item": 1, "annotator": "a", "label": ""}, r"v.jsonl:3: label .*null if it is missing"),
        ({"item": 0, "annotator": "a", "label": "y"}, r"v.jsonl:3: .*already voted"),
    ],
)
def test_a_bad_vote_is_named_by_file_and_line(tmp_path, row, message):
    rows = [{"item": 0, "annotator": "a", "label": "x"}, {"item": 0, "annotator": "b", "label": "y"}, row]
    with pytest.raises(ValueError, match=message):
        check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT)
    assert not (tmp_path / "result.json").exists()
    result = check_agreement([str(tmp_path / "v.jsonl")], tmp_path, **AGREEMENT | {"on_bad_row": "skip"})
    assert result["votes"] == 2 and len(result["skipped_rows"]) == 1


def test_numbers_with_missing_votes_are_the_same_labels_as_without(tmp_path):
    """A column with gaps has floats and NaN: 1.0 is 1, NaN no vote."""
    rows = [{"item": i, "annotator": "ann", "label": i % 2} for i in range(20)]
    rows += [{"item": i, "annotator": "bea", "label": float(i % 2) if i % 5 else float("nan")} for i in range(20)]
    result = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT)
    assert result["krippendorff_alpha"]["value"] == 1.0 and result["votes"] == 36
    assert set(result["labels"]) == {"0", "1"}


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"a": ["x", None], "b": [None, "y"]}, "no item has two votes"),
        ({"a": ["x", "x"], "b": ["x", "x"]}, "one label"),
        ({"a": list(range(300)), "b": list(range(300))}, "300 different labels"),
    ],
)
def test_undefined_agreement_is_an_error(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        check_agreement([votes_of(tmp_path / "v.jsonl", labels)], tmp_path, **AGREEMENT)


def gate(path, threshold=0.4, override=False):
    return require_agreement(path and str(path), threshold=threshold, override=override)


def test_trainers_refuse_below_the_threshold_with_the_figure_unless_overridden(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"krippendorff_alpha": {"value": 0.45, "lower": 0.31, "upper": 0.58}}))
    assert gate(None) is None
    with pytest.raises(ValueError, match=r"0\.450 \[0\.310, 0\.580\].*agreement_override=true"):
        gate(file)
    assert "overridden" in gate(file, override=True)
    assert "above 0.3" in gate(file, threshold=0.3)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"krippendorff_alpha": {"value": 1}}', '{"krippendorff_alpha": {"value": null}}']
)
def test_a_gate_without_a_result_is_an_error(tmp_path, text):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match="not a result of"):
        gate(file)


# ---- contamination


def test_planted_copies_are_found_under_their_kind(tmp_path):
    span = "the quick brown fox jumps over the lazy dog while seven wizards brew a very strong tea"
    evaluation = [
        chat("How do I bake rye bread at home without a mill?"),
        chat("What is the shortest way from the old harbour to the central station on foot?"),
        chat("Describe a day at sea.", f"Once {span} and so on."),
        chat("Name three large rivers of northern Europe."),
        chat("Which tea is best in the morning?"),
    ]
    train = [
        chat("how do i bake RYE bread, at home, without a mill"),
        chat("What is the shortest way from the old harbour to the main station on foot?"),
        chat("Complete a pangram.", f"Listen: {span}!"),
        {"messages": [*chat("Hi there")["messages"], *chat("Which tea is best in the morning?")["messages"]]},
        chat("Why do cats purr so loudly at night?"),
    ]
    files = [write(tmp_path / "train.jsonl", train)], [write(tmp_path / "eval.jsonl", evaluation)]
    result = check_contamination(*files, tmp_path, **COPIES)
    assert (result["exact"], result["near"], result["spans"]) == (2, 1, 1)
    pairs = {(m["kind"], m["train"].rpartition(":")[2], m["eval"].rpartition(":")[2]) for m in result["matches"]}
    assert pairs == {("exact", "1", "1"), ("near", "2", "2"), ("span", "3", "3"), ("exact", "4", "5")}
    assert check_contamination(*files, tmp_path, **COPIES | {"span_words": 0})["spans"] == 0


def test_words_of_any_script_count_and_not_only_the_latin_ones(tmp_path):
    sort, slow = "\u7528 Python \u5199\u6392\u5e8f\u7b97\u6cd5", "\u4e3a\u4ec0\u4e48 Python \u8fd9\u4e48\u6162"
    train = write(tmp_path / "train.jsonl", [chat(sort)])
    evaluation = write(tmp_path / "eval.jsonl", [chat(slow), chat(sort.lower() + "\u3002")])
    result = check_contamination([train], [evaluation], tmp_path, **COPIES)
    assert (result["exact"], result["near"]) == (1, 0) and result["matches"][0]["eval"].endswith(":2")


def test_a_span_is_found_wherever_it_stands_and_never_across_two_messages(tmp_path):
    """Against a plain search, with rows in several batches and spans that many rows share."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(["tea", "sea", "bee", "key"], random.integers(3, 14))) for _ in range(1400)]
    rows = [parse_row(chat(a, b))[0] for a, b in zip(texts[::2], texts[1::2], strict=True)]
    train, evaluation, n = rows[:600], rows[600:], 8

    def spans(row):
        tokens = [message["content"].split() for message in row.messages]
        return {tuple(said[i : i + n]) for said in tokens for i in range(len(said) - n + 1)}

    known = set().union(*map(spans, train))
    expected = [row.messages for row in evaluation if spans(row) & known]
    assert 3 < len(expected) < 97
    evaluation = [dataclasses.replace(row, where=f"eval:{i}") for i, row in enumerate(evaluation)]
    found = [evaluation[int(m["eval"].partition(":")[2])].messages for m in find_spans(train, evaluation, n)]
    assert found == expected


@needs_shared
def test_the_seed_tasks_are_found_in_the_set_made_of_them(tmp_path):
    train, tasks = SHARED / "sft_seed_train.jsonl.gz", SHARED / "self_instruct_seed_tasks.jsonl.gz"
    result = check_contamination([str(train)], [str(tasks)], tmp_path, **COPIES)
    assert result["exact"] == 175 and result["share"] == 1.0
    other = check_contamination([str(SHARED / "sft_oasst_train.jsonl.gz")], [str(tasks)], tmp_path, **COPIES)
    assert other["exact"] == other["near"] == 0


def test_a_prompt_that_everyone_says_does_not_list_every_pair(tmp_path):
    many = write(tmp_path / "many.jsonl", [chat("I would like a coffee please", f"Number {i}.") for i in range(300)])
    result = check_contamination([many], [many], tmp_path, **COPIES)
    assert result["exact"] == 300 and len(result["matches"]) == 300 * 20


def test_shingles_ignore_case_and_marks_and_measure_change():
    def shingled(text):
        return shingles(normal(text))

    a, b = shingled("What is the way to the station?"), shingled("what is the WAY to the station")
    assert jaccard(a, b) == 1.0
    assert 0.5 < jaccard(a, shingled("What is the way to the harbour?")) < 0.9
    assert jaccard(a, shingled("Bake bread with rye flour")) == 0.0


@pytest.mark.parametrize(
    "a, b, near",
    [
        ("How do I treat the flu?", "How do I treat the fungus?", False),
        ("What is the flu?", "What is the fungus?", False),
        ("flu", "flu!", True),
        ("Which of the many old harbours is near to us?", "Which of the many old harbours is far from us?", False),
        ("one two three four five six seven eight", "one two three four five six seven nine", True),
        ("one two three four five six seven", "one two three four five six nine", False),
        ("word " * 10 + "tea", "word " * 10 + "sea", False),
    ],
)
def test_a_short_text_is_no_copy_of_another_that_differs_in_what_it_is_about(a, b, near):
    index = NearIndex(0.5)
    first, second = sketches(map(normal, (a, b)))
    index.add(first)
    assert bool(index.near(second)) is near


# ---- dedupe and decontaminate


def test_repeats_go_across_files_and_their_pairs_are_written(tmp_path):
    long = "A rye loaf needs a long rest: mix the dough in the evening and bake it slowly the next day in a hot oven."
    first = [chat("Bread?", long), chat("What is the flu?"), chat("Bread?", long.upper())]
    second = [chat("Bread", long.replace("hot", "warm")), chat("What is the fungus?"), chat("New?")]
    files = [write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)]
    out = tmp_path / "out"
    result = check_dedupe(files, out, by="conversation", threshold=0.8, on_bad_row="error")
    assert (result["kept"], result["exact"], result["near"]) == (4, 1, 1)
    kept = [[json.loads(line)["messages"] for line in (out / f"{n}.jsonl").read_text().splitlines()] for n in "ab"]
    assert kept == [[row["messages"] for row in first[:2]], [row["messages"] for row in second[1:]]]
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [(p["kind"], p["row"], p["repeats"]) for p in pairs] == [
        ("exact", f"{files[0]}:3", f"{files[0]}:1"),
        ("near", f"{files[1]}:1", f"{files[0]}:1"),
    ]
    assert "warm oven" in pairs[1]["text"] and "hot oven" in pairs[1]["of"]
    by_prompt = check_dedupe(files, out, by="prompt", threshold=0.8, on_bad_row="error")
    assert (by_prompt["kept"], by_prompt["exact"]) == (4, 2)
    with pytest.raises(ValueError, match="two names are equal"):
        check_dedupe([files[0], files[0]], out, by="prompt", threshold=0.8, on_bad_row="error")


def test_every_training_row_that_matches_a_benchmark_goes_and_fastchats_questions_are_read(tmp_path):
    span = "the quick brown fox jumps over the lazy dog while seven wizards brew a very strong tea"
    benchmark = [
        {
            "question_id": 81,
            "category": "writing",
            "turns": ["Compose a travel blog post about Hawaii.", "Rewrite it."],
        },
        {"question_id": 82, "category": "writing", "turns": [f"Continue: {span}."]},
    ]
    train = [chat("compose a TRAVEL blog post about hawaii")] * 25 + [
        chat("Complete a pangram.", f"Listen: {span}!"),
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
    ]
    files = [write(tmp_path / "train.jsonl", train)], [write(tmp_path / "mt_bench.jsonl", benchmark)]
    settings = {name: value for name, value in COPIES.items()}
    result = check_decontaminate(*files, tmp_path / "out", **settings)
    assert (result["kept"], result["exact"], result["near"], result["span"]) == (1, 25, 0, 1)
    (kept,) = map(json.loads, (tmp_path / "out/train.jsonl").read_text().splitlines())
    assert (kept["chosen"], kept["rejected"]) == ("Me.", "You.")
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 26 and pairs[0]["of"] == benchmark[0]["turns"][0] and "quick brown fox" in pairs[-1]["text"]
    assert check_contamination(*files, tmp_path, **COPIES)["exact"] == 1
    ours = check_decontaminate(files[0], [str(ROOT / "evals/sets/mt_bench.jsonl")], tmp_path / "b", **settings)
    assert ours["eval_rows"] == 80


@pytest.mark.parametrize("kind", ["fastchat", "messages"])
def test_a_benchmarks_later_turns_are_found_too(kind, tmp_path):
    later = "Rewrite your previous response and start every sentence with the letter A."
    benchmark = {"question_id": 81, "turns": ["Compose a travel blog post about Hawaii.", later, "Thanks."]}
    if kind == "messages":
        talk = [turn for text in benchmark["turns"] for turn in chat(text, "So be it.")["messages"]]
        benchmark = {"messages": talk}
    train = [chat(later), chat(later.replace("every sentence", "each sentence")), chat("Thanks."), chat("Who is it?")]
    files = [write(tmp_path / "train.jsonl", train)], [write(tmp_path / "bench.jsonl", [benchmark])]
    result = check_decontaminate(*files, tmp_path / "out", **COPIES)
    assert (result["kept"], result["exact"], result["near"]) == (2, 1, 1)  # a short turn is no question
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert [pair["of"] for pair in pairs] == [later, later]
    matches = check_contamination(*files, tmp_path, **COPIES)["matches"]
    assert [(match["kind"], match["text"]) for match in matches] == [("exact", later)]


@pytest.mark.parametrize("level, published", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_each_level_is_krippendorffs_own(level, published, tmp_path):
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability": four observers, twelve units."""
    table = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")
    rows = [
        {"item": str(i), "annotator": name, "label": None if label == "." else int(label)}
        for name, line in zip("ABCD", table, strict=True)
        for i, label in enumerate(line.split())
    ]
    result = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT | {"level": level})
    assert result["krippendorff_alpha"]["value"] == pytest.approx(published, abs=6e-4)
    assert result["level"] == level and f"{level} alpha" in result["verdicts"][0]


def test_a_scale_has_its_order_whatever_its_labels_spell(tmp_path):
    """Of -3..3 as text, "-1" sorts before "-3": distances must not follow that."""
    near = [("-3", "-2"), ("2", "3"), ("-1", "0"), ("1", "2"), ("-3", "-3")] * 4
    rows = [
        {"item": i, "annotator": a, "label": x} for i, pair in enumerate(near) for a, x in zip("ab", pair, strict=True)
    ]
    file = write(tmp_path / "v.jsonl", rows)
    found = {
        level: check_agreement([file], tmp_path, **AGREEMENT | {"level": level})["krippendorff_alpha"]["value"]
        for level in ("nominal", "ordinal", "interval")
    }
    assert found["nominal"] < 0.2 and found["ordinal"] > 0.8 and found["interval"] > 0.9
    with pytest.raises(ValueError, match="check.level=ordinal needs labels that are numbers, got 'a'"):
        check_agreement(
            [votes_of(tmp_path / "w.jsonl", {"p": ["a", "b"], "q": ["a", "b"]})],
            tmp_path,
            **AGREEMENT | {"level": "ordinal"},
        )


@pytest.mark.parametrize("share, verdict", [(0.0, "ok"), (0.2, "unclear"), (0.5, "answers too weak to compare")])
def test_answers_that_nobody_accepts_are_said(share, verdict, tmp_path):
    labels = ["neither" if i < 50 * share else "ab"[i % 2] for i in range(50)]
    rows = [{"item": i, "annotator": name, "label": label} for i, label in enumerate(labels) for name in "pq"]
    result = check_agreement([write(tmp_path / "v.jsonl", rows)], tmp_path, **AGREEMENT)
    assert result["unacceptable"]["verdict"] == verdict and result["unacceptable"]["value"] == share
    assert any("accept neither answer" in line for line in result["verdicts"]) == (share > 0)


# ---- pilot


class Words:
    @staticmethod
    def encode(text: str) -> list[int]:
        return [hash(word) % 50_000 for word in text.split()]


@pytest.fixture
def words_as_tokens(monkeypatch):
    monkeypatch.setattr("data.checks.pilot.load_tokenizer", lambda path: Words)


def vendor(path: Path, mean: float, cap: int, seed: int) -> str:
    """Prompts with log-normal lengths of about the mean."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.lognormal(np.log(mean) - 0.32, 0.8, 800), cap).astype(int) + 1
    return write(path, [{"prompt": "word " * int(n), "completion": "It is so."} for n in lengths])


def test_the_lectures_vendors_are_told_apart(tmp_path, words_as_tokens):
    sizes = {"scale": (22, 116), "sagemaker": (54, 300), "surge": (104, 500), "instructgpt": (408, 2000)}
    files = [vendor(tmp_path / f"{name}.jsonl", mean, cap, i) for i, (name, (mean, cap)) in enumerate(sizes.items())]
    result = check_pilot(
        files,
        tmp_path,
        tokenizer="words",
        target=files[-1],
        target_mean=408,
        min_tokens=50,
        max_short=0.6,
        seed=0,
        on_bad_row="error",
    )
    vendors = result["vendors"]
    assert [vendors[name]["verdict"] for name in sizes] == ["reject", "reject", "accept", "accept"]
    assert "below 50" in vendors["scale"]["reason"] and "under 50" in vendors["sagemaker"]["reason"]
    gaps = [vendors[name]["distance_to_target"]["wasserstein"] for name in sizes]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] == 0.0
    assert (
        vendors["surge"]["distance_to_target"]["p_value"]
        < 1e-6
        < vendors["instructgpt"]["distance_to_target"]["p_value"]
    )
    assert all((tmp_path / f"lengths_{name}.png").exists() for name in sizes)


def test_a_vendors_page_shows_instructgpts_prompts_beside_it_and_its_shortest_ones(tmp_path, words_as_tokens):
    rows = [{"prompt": text, "completion": "It is so."} for text in ("Go <on>", "Go <on>", "one two three " * 40)]
    check_pilot(
        [write(tmp_path / "acme.jsonl", rows)],
        tmp_path,
        tokenizer="words",
        target=None,
        target_mean=408,
        min_tokens=50,
        max_short=0.6,
        seed=0,
        on_bad_row="error",
    )
    page = (tmp_path / "report.html").read_text()
    for line in ("InstructGPT SFT", "Go &lt;on&gt;", "The shortest prompts"):
        assert page.count(line) == 1
    shares = published_shares((1, 37, 283, 632, 2048))
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all()
    below = np.cumsum(shares)  # up to 2, 4, 8, ...
    assert below[3] < 0.25 < below[5] and below[7] < 0.5 < below[8] and below[8] < 0.75 < below[9]


def test_figures_of_a_vendor_are_those_of_its_lengths():
    facts = describe(np.array([10, 20, 30, 100]), 50)
    assert (facts["mean"], facts["median"], facts["max"], facts["share_under_50"]) == (40.0, 25.0, 100, 0.75)
    assert judge(facts, min_tokens=50, max_short=0.6)[0] == "reject"
    assert judge(facts | {"mean": 60.0}, min_tokens=50, max_short=0.8)[0] == "accept"
    assert distance(np.array([1, 2, 3]), np.array([3, 4, 5]))["wasserstein"] == pytest.approx(2.0)


def test_each_user_message_is_a_prompt_and_turns_are_counted(tmp_path, words_as_tokens):
    talk = {"messages": [*chat("one two")["messages"], *chat("three four five six")["messages"]]}
    result = check_pilot(
        [write(tmp_path / "v.jsonl", [talk])],
        tmp_path,
        tokenizer="words",
        target=None,
        target_mean=408,
        min_tokens=50,
        max_short=0.6,
        seed=0,
        on_bad_row="error",
    )
    found = result["vendors"]["v"]
    assert found["n"] == 2 and found["mean"] == 3.0 and found["turns_mean"] == 2.0 and found["completions"]["n"] == 2


# ---- task mix


def test_kinds_are_told_better_than_by_guessing_and_dialogues_are_chat():
    rows = [
        TextRow([{"role": "user", "content": "Summarize the following article in two sentences."}]),
        TextRow([{"role": "user", "content": "Write a poem about the moon."}]),
        TextRow(parse_row({"messages": [*chat("Hi")["messages"], *chat("And you?")["messages"]]})[0].messages),
    ]
    kinds, sure, facts = classify(rows, [str(ROOT / "data/embedded/task_kinds.jsonl")], min_precision=0.8, seed=0)
    assert kinds == ["summarization", "generation", "chat"] and all(sure)
    assert facts["classifier_accuracy"] >= 0.70  # 10 kinds; the commonest is 15 %
    for kind, one in facts["thresholds"].items():
        assert one["threshold"] is None or one["precision"] >= 0.8 and one["n"] >= 5, kind
    assert sum(one["threshold"] is not None for one in facts["thresholds"].values()) >= 8


def test_a_threshold_is_the_lowest_that_is_precise_enough():
    chances, right = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]), np.array([1, 1, 1, 0, 1, 1, 0], bool)
    found = _threshold(chances, right, of_kind=10, min_precision=0.8)
    assert found == {
        "threshold": 0.4,
        "precision": 5 / 6,
        "lower": pytest.approx(0.4365, abs=1e-3),
        "recall": 0.5,
        "n": 6,
    }
    assert _threshold(chances, ~right, of_kind=10, min_precision=0.8)["threshold"] is None


def test_only_rows_above_their_threshold_are_sampled(tmp_path, monkeypatch):
    labelled = write(tmp_path / "l.jsonl", [{"prompt": f"{k} {i}", "category": k} for k in "ab" for i in range(3)])
    threshold = {"threshold": 0.5, "precision": 0.9, "lower": 0.8, "recall": 0.7, "n": 9}

    class Stub:
        accuracy, thresholds = 0.9, {"a": threshold, "b": threshold}

        def predict(self, texts):
            return [text[0] for text in texts], ["sure" in text for text in texts]

    monkeypatch.setattr(task_mix, "fit_classifier", lambda *given, **settings: Stub())
    file = write(
        tmp_path / "d.jsonl", [chat(f"{kind} {how} {i}") for kind in "ab" for how in ("sure", "hm") for i in (1, 2)]
    )
    settings = {"num": None, "min_precision": 0.8, "client": None, "seed": 0, "on_bad_row": "error"}
    result = check_task_mix(
        [file], tmp_path, labelled=[labelled], target={"a": 1, "b": 1}, sample_to_mix=True, **settings
    )
    rows = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all("sure" in row["messages"][0]["content"] for row in rows) and result["unsure"] == 4
    with pytest.raises(ValueError, match="wants coding, which none of the labelled prompts is"):
        check_task_mix([file], tmp_path, labelled=[labelled], target={"coding": 1}, sample_to_mix=False, **settings)


def test_shares_are_tested_against_the_wanted_ones():
    wanted = {"generation": 0.5, "chat": 0.3, "extract": 0.2}
    right = compare(["generation"] * 50 + ["chat"] * 30 + ["extract"] * 20, wanted)
    wrong = compare(["generation"] * 90 + ["chat"] * 5 + ["extract"] * 5, wanted)
    assert right["chi_square"]["p_value"] == pytest.approx(1.0) and wrong["chi_square"]["p_value"] < 1e-9
    share = right["shares"]["generation"]
    assert share["lower"] < 0.5 < share["upper"] and share["wanted"] == 0.5


@pytest.mark.parametrize("num", [None, 7, 20])
def test_a_sample_has_the_wanted_shares(num):
    kinds = ["generation"] * 500 + ["chat"] * 40 + ["extract"] * 10
    chosen = draw_to_mix(kinds, {"generation": 0.5, "chat": 0.3, "extract": 0.2}, num, seed=0)
    found = [kinds[i] for i in chosen]
    total = num or 50
    assert len(set(chosen)) == len(found) == total
    assert all(abs(found.count(k) - s * total) < 1 for k, s in (("generation", 0.5), ("chat", 0.3), ("extract", 0.2)))


def test_a_mix_that_the_set_cannot_give_says_how_many_rows_can():
    with pytest.raises(ValueError, match="chat needs 30 and has 4.*about 13 rows"):
        draw_to_mix(["generation"] * 500 + ["chat"] * 4, {"generation": 0.7, "chat": 0.3}, 100, seed=0)
    with pytest.raises(ValueError, match="no row is chat"):
        draw_to_mix(["generation"] * 5, {"generation": 0.7, "chat": 0.3}, None, seed=0)


def test_a_client_tells_kinds_and_what_it_garbles_counts_nowhere(tmp_path):
    client = ScriptedClient(lambda r: "Closed QA." if "river" in r.messages[0]["content"] else "dunno")
    file = write(tmp_path / "d.jsonl", [chat("Which river?"), chat("Which sea?")])
    result = check_task_mix(
        [file],
        tmp_path,
        labelled=[],
        target={"closed_qa": 1, "chat": 1},
        sample_to_mix=False,
        num=None,
        min_precision=0.8,
        client=client,
        seed=0,
        on_bad_row="error",
    )
    assert result["shares"]["closed_qa"]["value"] == 1.0 and result["unreadable"] == 1
    assert read_kind("It is open-QA or chat", ["chat", "open_qa"]) == "open_qa"


# ---- quality


def test_every_row_gets_a_fate_and_the_best_of_repeats_stays(tmp_path):
    good = "A rye loaf needs a long rest: mix the dough in the evening, and bake it slowly the next day."
    rows = [
        chat("How do I bake rye bread at home?", good),
        chat("How do I bake rye bread at home", "Bake it then"),
        chat("What is a fjord?", "A narrow inlet of the sea between cliffs, carved by a glacier."),
        chat("What is a fjord?", ""),
        chat("Say it", "no"),
        chat("Repeat this after me now", "Repeat this after me now"),
    ]
    result = check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **QUALITY)
    fates = [json.loads(line)["reason"].split(" ")[0] for line in (tmp_path / "reasons.jsonl").read_text().splitlines()]
    assert fates == ["selected", "repeats", "selected", "no_answer", "answer_too_short", "answer_repeats_prompt"]
    selected = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    assert [row["messages"] for row in selected] == [rows[0]["messages"], rows[2]["messages"]]
    assert result["selected"] == 2 and sum(result["reasons"].values()) == 6


def test_k_center_covers_all_clusters_before_it_repeats_one():
    texts = [f"{topic} {extra}" for topic in ("red apple pie", "deep sea whale", "old jazz record") for extra in "abcd"]
    chosen = [at for at, _ in k_center(word_vectors(texts), np.ones(12), 3)]
    assert {at // 4 for at in chosen} == {0, 1, 2}
    everything = k_center(word_vectors(texts), np.ones(12), 50)
    assert sorted(at for at, _ in everything) == list(range(12))
    distances = [distance for _, distance in everything]
    assert distances == sorted(distances, reverse=True)  # greedy: each pick is nearer to the picked than the last


def test_num_caps_the_selection_and_a_loop_scores_below_a_sentence(tmp_path):
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    rows = [chat(" ".join(random.choice(words, 12)), " ".join(random.choice(words, 20)) + ".") for _ in range(40)]
    assert check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **QUALITY)["selected"] == 5
    loop, plain = (
        parse_row(chat("Ask away", text))[0]
        for text in ("go on go on go on go on go on go on.", rows[0]["messages"][1]["content"])
    )
    assert sum(score_parts(loop).values()) < sum(score_parts(plain).values())


def test_a_judge_decides_where_one_is_given(tmp_path):
    judge_client = ScriptedClient(
        lambda r: "Rating: [[5]]" if "short but right" in r.messages[0]["content"] else "Rating: [[1]]"
    )
    long = "A very long and winding answer about many other things entirely, indeed."
    rows = [chat("What is tin made of, please?", long), chat("Who drew the map here?", "It is short but right.")]
    settings = QUALITY | {"num": 1, "client": judge_client}
    check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **settings)
    assert "short but right" in (tmp_path / "selected.jsonl").read_text()


def test_pairs_and_trees_are_selected_by_their_better_answer_and_the_trainers_read_what_is_written(tmp_path):
    from data import formats

    good = "A rye loaf needs a long rest: mix the dough in the evening, and bake it slowly the next day."
    user = {"role": "user", "content": "How do I bake rye bread at home?"}
    sides = {
        name: [user, {"role": "assistant", "content": text}] for name, text in (("chosen", good), ("rejected", "No."))
    }
    raw = {
        "chosen": f"\n\nHuman: Name a large river.\n\nAssistant: {good}",
        "rejected": "\n\nHuman: Name a large river.\n\nAssistant: No.",
    }
    node = {
        "message_id": "r",
        "role": "prompter",
        "text": "What is a fjord, and where?",
        "replies": [{"message_id": "a", "role": "assistant", "text": good, "rank": 0, "replies": []}],
    }
    rows = [sides, raw, {"message_tree_id": "t", "prompt": node}]
    result = check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **QUALITY)
    assert result["selected"] == 3
    written = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    assert all(row.pop("quality") for row in written)
    kinds = {tuple(sorted(row)): row for row in written}
    assert len(formats.examples(kinds["message_tree_id", "messages"])) == 1
    pairs = [formats.preferences(row)[0] for row in written if "chosen" in row]
    assert {pair.chosen for pair in pairs} == {good} and {pair.rejected for pair in pairs} == {"No."}
    assert [read_texts([write(tmp_path / "h.jsonl", [raw])], BadRows("error"))[0].answered] == [[good]]


def fates(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "reasons.jsonl").read_text().splitlines()]


def test_a_named_selection_ranks_by_what_it_is_named_after(tmp_path):
    answers = ["It is a river.", "It is a narrow inlet of the sea between two cliffs.", "A long bay with steep sides."]
    rows = [chat(f"What is a fjord{mark} my friend number {mark}?", a) for mark, a in zip("abc", answers, strict=True)]
    file = write(tmp_path / "d.jsonl", rows)
    for diversity in ("none", "words"):
        check_quality([file], tmp_path, **QUALITY | {"by": "length", "num": 1, "diversity": diversity})
        assert "narrow inlet" in (tmp_path / "selected.jsonl").read_text()
    assert [row["score"] for row in fates(tmp_path)] == pytest.approx([4 / 11, 1, 6 / 11])
    drawn = set()
    for seed in range(8):
        check_quality([file], tmp_path, **QUALITY | {"by": "random", "num": 1, "diversity": "none", "seed": seed})
        drawn.add((tmp_path / "selected.jsonl").read_text().split("content")[2][:30])
    assert len(drawn) == 3
    for words in ({"by": "difficulty"}, {"diversity": "embeddings"}):
        with pytest.raises(ValueError, match="set policy=PATH"):
            check_quality([file], tmp_path, **QUALITY | words)


def test_difficulty_and_embeddings_are_a_policys_own_losses_and_states(tmp_path):
    """Against one forward a row and torch's cross-entropy; a row whose prompt does not help its answer is dropped."""
    import torch

    from data.checks.selection import Reader
    from data.tokenizer import train_sentencepiece
    from model.build import export_model, new_policy
    from tests.tiny_models import tiny_config

    answers = ["Mix the dough and let it rest.", "It lies far north of here.", "Nobody knows that bird by name."]
    rows = [chat(f"Please tell me of the {x}.", a) for x, a in zip(("bread", "fjord", "bird"), answers, strict=True)]
    tokenizer = train_sentencepiece(
        [m["content"] for r in rows for m in r["messages"]] * 9, 300, tmp_path / "tokenizer"
    )
    policy = new_policy(tiny_config(vocab_size=tokenizer.vocab_size, max_length=128), seed=0)
    with torch.no_grad():
        for weight in policy.parameters():  # a new network's losses are all alike
            weight *= 6 if weight.dim() == 2 else 1
    export_model(policy, tmp_path / "policy", tokenizer)
    reader = Reader(str(tmp_path / "policy"), precision="fp32", batch_size=2, max_length=100)
    parsed = [parse_row(row)[0] for row in rows]

    def alone(ids: list[int], start: int) -> tuple[float, torch.Tensor]:
        """Mean loss of ids[start:], and the mean state that predicts ids[1:]."""
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.bool)}
        stream = pack(*row.values(), torch.arange(len(ids))[None] > 0)
        logits = policy(stream.tokens, stream.positions, stream.blocks).detach()
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])).item()
        return loss, policy.hidden_states(stream).detach().mean(0)

    from data.chat import encode_completion
    from model.packing import pack

    ratios, states = [], []
    for row in rows:
        (user, said) = row["messages"]
        encoded = encode_completion([user], said["content"], tokenizer, max_length=100, max_prompt_length=50)
        ids, start = encoded["input_ids"], encoded["completion_mask"].index(True)
        ratios.append(alone(ids, start)[0] / alone(ids[:1] + ids[start:], 1)[0])
        states.append(alone(ids, start)[1])
    assert reader.difficulty(parsed) == pytest.approx(ratios, rel=1e-4)
    assert reader.embeddings(parsed) == pytest.approx(
        torch.nn.functional.normalize(torch.stack(states), dim=1).numpy(), abs=1e-5
    )
    settings = QUALITY | {"by": "difficulty", "diversity": "embeddings", "policy": str(tmp_path / "policy")}
    check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **settings | {"max_length": 100})
    found = fates(tmp_path)
    assert {r["reason"].split(" ")[0] for r, ifd in zip(found, ratios, strict=True) if ifd < 1} <= {"selected"}
    assert all(r["reason"] == "does_not_follow_from_prompt" for r, ifd in zip(found, ratios, strict=True) if ifd >= 1)
    assert min(ratios) < 1 < max(ratios)  # both kinds are in the test


def test_sides_that_say_the_same_are_a_fault_and_pairs_are_described(tmp_path):
    good = "A rye loaf needs a long rest: mix the dough in the evening, and bake it slowly the next day."
    rows = [
        {"prompt": "How do I bake rye bread?", "chosen": good, "rejected": good.upper() + "!"},
        {"prompt": "Where do I find good rye flour?", "chosen": good, "rejected": "At a mill."},
        {"prompt": "Who eats rye bread nowadays?", "completions": ["Nobody at all.", good], "ranks": [1, 0]},
    ]
    result = check_quality([write(tmp_path / "d.jsonl", rows)], tmp_path, **QUALITY)
    assert [row["reason"].split(" ")[0] for row in fates(tmp_path)] == ["sides_say_the_same", "selected", "selected"]
    assert result["pairs"]["n"] == 3 and result["pairs_selected"]["n"] == 2
    assert result["pairs_selected"]["better_is_longer"] == 1 and result["pairs"]["better_is_longer"] == 2 / 3
    page = (tmp_path / "report.html").read_text()
    assert "the better side is longer in 67%" in page and "sides_say_the_same" in page


def test_a_kind_that_no_labelled_prompt_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="check.target wants poems, which none of the labelled prompts is"):
        check_task_mix(
            [write(tmp_path / "d.jsonl", [chat("Which river?")])],
            tmp_path,
            labelled=[str(ROOT / "data/embedded/task_kinds.jsonl")],
            target={"open_qa": 1, "poems": 1},
            sample_to_mix=False,
            num=None,
            min_precision=0.8,
            client=None,
            seed=0,
            on_bad_row="error",
        )


# ---- rows


@pytest.mark.parametrize(
    "row, asked, answered",
    [
        ({"prompt": "a", "completion": "b"}, ["a"], ["b"]),
        ({"prompt": "a"}, ["a"], []),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}, ["a"], ["b"]),
        ({"instruction": "a", "input": "i", "output": "b"}, ["a\n\ni"], ["b"]),
        ({"instruction": "a", "instances": [{"input": "", "output": "b"}], "is_classification": False}, ["a"], ["b"]),
        (chat("a", "b"), ["a"], ["b"]),
    ],
)
def test_any_row_that_a_script_reads_is_read(row, asked, answered):
    found = parse_row(*Layout().adapt(row))[0]
    assert found.asked == asked and found.answered == answered


UNUSABLE = [
    {"text": "a"},
    {"prompt": " "},
    {"messages": []},
    {"instruction": 3},
    {"instruction": "a", "instances": "b"},
]


@pytest.mark.parametrize("row", UNUSABLE)
def test_a_row_without_a_prompt_is_named_or_counted(tmp_path, row):
    file = write(tmp_path / "d.jsonl", [chat("fine"), row])
    with pytest.raises(ValueError, match="d.jsonl:2"):
        read_texts([file], BadRows("error"))
    skipping = BadRows("skip")
    assert len(read_texts([file], skipping)) == 1 and len(skipping.skipped) == 1
    with pytest.raises(ValueError, match="no row of .* can be used: 1 skipped; the first was skipped for: .*e.jsonl:1"):
        read_texts([write(tmp_path / "e.jsonl", [row])], BadRows("skip"))
