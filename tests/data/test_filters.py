"""The novelty filter is exact, and each rule drops what it names."""

import gzip
import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.filters import (
    Novelty,
    drop_conflicting,
    instance_fault,
    instruction_fault,
    lcs_length,
    lcs_masks,
    rouge_l,
    words,
)

ROOT = Path(__file__).parents[2]
TEXT = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12).map(" ".join)


def count(text: str) -> int:
    return len(words(text))


def real_texts() -> list[str]:
    with gzip.open(ROOT / "data/embedded/sft_rasbt_train.jsonl.gz", "rt") as file:
        return [message["content"] for line in file for message in json.loads(line)["messages"]]


def similar_pairs(count: int) -> list[tuple[str, str]]:
    """Real texts, half of the pairs made alike by dropping and adding words."""
    random, texts, pairs = Random(0), real_texts(), []
    for _ in range(count):
        a, b = random.choice(texts), random.choice(texts)
        if random.random() < 0.5:
            b = " ".join([w for w in a.split() if random.random() < 0.75] + b.split()[: random.randrange(4)])
        pairs.append((a, b))
    return pairs


def test_rouge_l_equals_rouge_score_on_two_thousand_pairs():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    for a, b in ((a, b) for a, b in similar_pairs(2000) if (a + b).isascii()):  # it drops all other letters
        assert rouge_l(a, b) == scorer.score(a, b)["rougeL"].fmeasure


@given(TEXT, TEXT)
def test_lcs_equals_the_textbook_table(a, b):
    x, y = a.split(), b.split()
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, u in enumerate(x):
        for j, v in enumerate(y):
            table[i + 1][j + 1] = table[i][j] + 1 if u == v else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length(lcs_masks(x), len(x), y) == table[-1][-1]


@given(st.lists(TEXT, max_size=8), TEXT, st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_novelty_finds_the_most_similar_text_that_a_search_of_all_finds(kept, text, threshold):
    scores = [rouge_l(text, other) for other in kept]
    best = max(scores, default=0.0)
    found = Novelty(threshold, kept).most_similar(text)
    if best < threshold:
        assert found is None
    else:
        assert found[1] == best == scores[found[0]]


def test_novelty_decides_as_a_search_of_all_on_real_texts():
    pairs = similar_pairs(400)
    kept = [a for a, _ in pairs]
    index = Novelty(0.7, kept)
    for _, text in pairs[:100]:
        assert (index.most_similar(text) is not None) == (max(rouge_l(text, other) for other in kept) >= 0.7)


def test_a_score_on_the_threshold_is_too_similar():
    kept = "a b c d e f g h i j"
    text = "a b c d e f g x y z"  # LCS 7 of 10 and 10: exactly rouge-score's 0.7
    assert rouge_l(kept, text) == pytest.approx(0.7)
    assert (Novelty(0.7, [kept]).most_similar(text) is not None) == (rouge_l(kept, text) >= 0.7)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Go there", "instruction_too_short"),
        ("word " * 200, "instruction_too_long"),
        ("Describe what you see in the image below.", "keyword_beyond_text"),
        ("- write a poem about the sea", "starts_with_punctuation"),
        ("écris un poème sur la mer", None),
        ("写一首关于大海的诗，要有四行。", None),
        ("اكتب قصيدة عن البحر من فضلك", None),
        ("समुद्र के बारे में एक कविता लिखो", None),
        ("#include <stdio.h> is missing here: why?", None),
        ("`sort` and `uniq`: explain the difference", None),
        ("<div> or <span> for a label, and why?", None),
        ("# A heading of some kind", "starts_with_punctuation"),
        ("* write a poem about the sea", "starts_with_punctuation"),
        ("— write a poem about the sea", "starts_with_punctuation"),
        ("I'm sorry, but I can't write that.", "refusal"),
        ("Write a program that sorts a list.", "write_a_program"),
        ("Write a poem about the sea.", None),
        ('"To be or not to be": explain the line.', None),
        ("Draught beer or bottled: which is better?", None),
    ],
)
def test_an_instruction_is_dropped_for_the_named_reason(text, reason):
    assert instruction_fault(text, count, least=4, most=150) == reason


@pytest.mark.parametrize(
    "given, output, reason",
    [
        ("", " ", "empty_output"),
        ("same", "same", "output_repeats_input"),
        ("x", "Name the sea.", "output_repeats_input"),
        ("", "The list is:", "output_unfinished"),
        ("", "w " * 30, "output_too_long"),
        ("see the attached file", "It is red.", "keyword_beyond_text"),
        ("", "The Baltic.", None),
        ("", "As an AI language model, I have no favourite sea.", "refusal"),
        ("", "I’m sorry, but I can't help with that.", "refusal"),
        ("", "抱歉，我无法回答。", "refusal"),
        ("", "I can see the Baltic from here.", None),
        ("", "以下是列表：", "output_unfinished"),
    ],
)
def test_an_instance_is_dropped_for_the_named_reason(given, output, reason):
    assert instance_fault("Name the sea.", given, output, count, most=20) == reason
    assert instance_fault("Name the sea.", "", "w " * 3000, count, most=None) is None  # paid for, so kept


def test_an_input_with_two_outputs_loses_both_and_repeats_count_once():
    kept, drops = drop_conflicting([("a", "1"), ("a", "2"), ("b", "3"), ("b", "3 "), ("", "4")])
    assert kept == [("b", "3"), ("", "4")]
    assert [reason for reason, _ in drops] == ["same_input_different_output"] * 2 + ["duplicate_instance"]


def test_a_threshold_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="0.7"):
        Novelty(1.5)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Straße & Größe_2", ["straße", "größe", "2"]),
        ("大海的诗", ["大", "海", "的", "诗"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("قصيدة البحر", ["قصيدة", "البحر"]),
        ("стих о море", ["стих", "о", "море"]),
    ],
)
def test_words_are_of_any_script(text, expected):
    assert words(text) == expected


def test_novelty_tells_texts_of_other_scripts_apart():
    kept = Novelty(0.7, ["写一首关于大海的诗", "напиши стих о море"])
    assert kept.most_similar("写一首关于大海的诗歌") is not None and kept.most_similar("解释量子力学的原理") is None
    assert kept.most_similar("объясни теорему Пифагора") is None
