"""Select a small set of good and diverse rows, as LIMA: Zhou et al. 2023 (arXiv:2305.11206).

Three steps; reasons.jsonl has the result of each row with its reason. (1) A row is dropped for a plain fault, or
scored by a named selection (data/checks/selection.py). (2) Of near duplicates (prompts) the best one is kept. (3) Among
the `pool` x `num` best rows, greedy k-center picks rows that are far from those already picked. Of a comparison the
better side is scored, and it is a fault if both sides are nearly equal.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.adapters import Layout
from data.checks.near import NearIndex, jaccard, normal, shingles, sketches
from data.checks.selection import BY, DIVERSITY, Reader, k_center, length_scores, score_parts, word_vectors
from data.checks.texts import TextRow, read_texts
from data.records import BadRows, write_jsonl
from generation.clients import Client
from generation.filters import words
from generation.preferences import rate
from runtime.config import check_choice, check_whole
from runtime.devices import PRECISIONS
from runtime.plots import pyplot, save_figure
from runtime.report import bullets, heading, paragraph, picture, table, write_page, write_result

READ = 4000  # number of characters of a row from which its n-grams are taken
SAME = 0.9  # Jaccard similarity from which the two sides of a comparison count as equal
WORST = 8  # number of rows on the page
BEATS = (
    "No selection is known to beat random rows for every model and set (docs/data_checks.md has the measurements): "
    "compare with training on equally many random rows, check.by=random check.diversity=none."
)


def check_quality(
    files: Sequence[str], directory: Path, *, num: int, pool: int, by: str, diversity: str, threshold: float,
    min_words: int, max_words: int, policy: str | None, precision: str, batch_size: int, max_length: int, seed: int,
    client: Client | None, on_bad_row: str,
    layout: Layout | None = None,
) -> dict:  # fmt: skip
    """selected.jsonl (the chosen rows, best first), reasons.jsonl (a line for every row), result.json, report.html.

    Args:
        pool: multiple of `num`: the number of best rows among which diversity chooses.
        by: plain | length | difficulty | random. diversity: words | embeddings | none. See data/checks/selection.py.
        policy: the model for by=difficulty and diversity=embeddings. It reads `batch_size` rows,
            each cut to `max_length` tokens.
        client: a judge that scores helpfulness and instruction following of the pool; None = the score of `by`.
    """
    check_whole(1, check__num=num, check__pool=pool, check__batch_size=batch_size, check__max_length=max_length)
    check_choice("check.precision", precision, PRECISIONS)
    needs_model = _needs_model(by, diversity, policy)
    bad_rows = BadRows(on_bad_row)
    rows = read_texts(files, bad_rows, layout)
    if not any(row.answered for row in rows):
        raise ValueError(f"{', '.join(files)}: no row has an answer, and check=quality selects rows by their answers")
    size = {"batch_size": batch_size, "max_length": max_length}
    reader = Reader(policy, precision=precision, **size) if needs_model else None
    parts = [score_parts(row) for row in rows]
    faults = [fault_of(row, min_words=min_words, max_words=max_words) for row in rows]
    scores = _scores(rows, parts, faults, by, reader, seed)
    reasons: list[str | None] = list(faults)

    ranked = [int(i) for i in np.argsort(-scores, kind="stable") if faults[i] is None]
    unique = _drop_repeats(rows, ranked, threshold, reasons, limit=num * pool)
    judged = _judge(rows, list(unique), client) if client is not None else {}
    best = [i for i in unique if judged.get(i, scores[i]) is not None]
    scores[best] = [judged.get(i, scores[i]) for i in best]
    picked = {best[at]: distance for at, distance in _spread(rows, best, scores, num, diversity, reader)}
    for i in unique:
        reasons[i] = _fate(i, picked, judged, diversity)
    reasons = [reason or "score_too_low" for reason in reasons]

    order = list(picked)
    chosen = [rows[i].raw | {"quality": {"score": float(scores[i]), "distance": picked[i]}} for i in order]
    write_jsonl(directory / "selected.jsonl", chosen)
    write_jsonl(directory / "reasons.jsonl", _fates(rows, reasons, scores, parts))
    counts = dict(Counter(reason.split(" ")[0] for reason in reasons).most_common())
    result = {
        "rows": len(rows),
        "selected": len(order),
        "reasons": counts,
        "skipped_rows": bad_rows.skipped,
        "mean_score": float(scores.mean()),
        "mean_score_of_selected": float(scores[order].mean()) if order else None,
        "distinct_words": len({word for i in order for word in words(_text(rows[i]))}),
        "by": by,
        "diversity": diversity,
        "scored_by": client.model if client else by,
        "pairs": _pairs(rows),
        "pairs_selected": _pairs([rows[i] for i in order]),
    }
    _show(directory, result, scores, order, rows, reasons)
    return result


def _needs_model(by: str, diversity: str, policy: str | None) -> bool:
    """Whether a model reads the rows. Raises ValueError if it is missing, or a choice is unknown."""
    check_choice("check.by", by, BY)
    check_choice("check.diversity", diversity, DIVERSITY)
    needed = by == "difficulty" or diversity == "embeddings"
    if policy is None and needed:
        raise ValueError("check.by=difficulty and check.diversity=embeddings need a model: set policy=PATH")
    return needed


def _fates(rows: Sequence[TextRow], reasons: list, scores: np.ndarray, parts: list[dict]) -> list[dict]:
    facts = zip(rows, reasons, scores, parts, strict=True)
    return [{"row": row.where, "reason": why, "score": float(score), **part} for row, why, score, part in facts]


def _scores(rows: Sequence[TextRow], parts: list[dict], faults: list, by: str, reader: Reader | None, seed: int):
    """(n,) scores in [0, 1]. With by=difficulty, rows whose prompt makes the answer less likely get a fault."""
    if by == "plain":
        return np.array([sum(part.values()) / len(part) for part in parts])
    if by == "length":
        return length_scores(rows)
    if by == "random":
        return np.random.default_rng(seed).random(len(rows))
    scores, sound = np.zeros(len(rows)), [i for i, fault in enumerate(faults) if fault is None]
    if sound:
        scores[sound] = reader.difficulty([rows[i] for i in sound])
    for i in sound:
        if scores[i] >= 1:
            faults[i] = "does_not_follow_from_prompt"
    return scores.clip(0, 1)


def _spread(
    rows: Sequence[TextRow], best: list[int], scores: np.ndarray, num: int, diversity: str, reader: Reader | None
):
    """(place in `best`, distance) of the `num` rows that are far from each other; the best ones where that is none."""
    if diversity == "none":
        order = np.argsort(-scores[best], kind="stable")[:num]
        return [(int(at), 1.0) for at in order]
    chosen = [rows[i] for i in best]
    vectors = word_vectors([_text(row) for row in chosen]) if diversity == "words" and chosen else None
    if vectors is None:
        vectors = reader.embeddings(chosen) if chosen else np.zeros((0, 1))
    return k_center(vectors, scores[best], num)


def _pairs(rows: Sequence[TextRow]) -> dict | None:
    """Statistics of the comparisons among the rows. None if there are none."""
    pairs = [(row.answered[-1], row.weaker) for row in rows if row.weaker is not None]
    if not pairs:
        return None
    longer = [len(words(better)) > len(words(worse)) for better, worse in pairs]
    return {
        "n": len(pairs),
        "better_is_longer": float(np.mean(longer)),
        "similarity_of_sides": float(np.mean([_similarity(*pair) for pair in pairs])),
    }


def fault_of(row: TextRow, *, min_words: int, max_words: int) -> str | None:
    """A plain reason against learning from a row. None if there is no such reason."""
    if not row.answered or not row.answered[-1].strip():
        return "no_answer"
    count = len(row.answered[-1].split())
    if count < min_words:
        return "answer_too_short"
    if count > max_words:
        return "answer_too_long"
    if any(answer.strip() == asked.strip() for answer, asked in zip(row.answered, row.asked, strict=False)):
        return "answer_repeats_prompt"
    if "\ufffd" in row.answered[-1]:
        return "broken_characters"
    if row.weaker is not None and _similarity(row.answered[-1], row.weaker) >= SAME:
        return "sides_say_the_same"
    return None


def _drop_repeats(
    rows: Sequence[TextRow], ranked: list[int], threshold: float, reasons: list, *, limit: int
) -> list[int]:
    """The first `limit` rows, best first, without those whose prompt is nearly equal to that of a better row."""
    index = NearIndex(threshold)
    kept: list[int] = []
    for i, sketch in zip(ranked, sketches(normal(rows[i].prompt) for i in ranked), strict=True):
        if len(kept) == limit:
            break
        near = index.near(sketch)
        if near:
            reasons[i] = f"repeats {rows[kept[near[0][0]]].where} (similarity {near[0][1]:.2f})"
        else:
            index.add(sketch)
            kept.append(i)
    return kept


def _judge(rows: Sequence[TextRow], best: list[int], client: Client) -> dict[int, float | None]:
    """A judge's mean rating of each row's last answer, scaled to [0, 1]."""
    answered = [([m for m in rows[i].messages[: _last(rows[i])]], rows[i].answered[-1]) for i in best]
    ratings = rate(client, answered, aspects=["helpfulness", "instruction_following"], seed=0)
    return {i: None if r is None else (sum(r.values()) / len(r) - 1) / 4 for i, r in zip(best, ratings, strict=True)}


def _last(row: TextRow) -> int:
    return max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")


def _fate(i: int, picked: dict[int, float], judged: dict, diversity: str) -> str:
    if i in picked:
        return f"selected (distance {picked[i]:.2f})"
    if i in judged and judged[i] is None:
        return "rating_not_parsed"
    return "score_too_low" if diversity == "none" else "like_the_selected"


def _similarity(one: str, other: str) -> float:
    return float(jaccard(shingles(normal(one)), shingles(normal(other))))


def _text(row: TextRow) -> str:
    return "\n".join(message["content"] for message in row.messages)[:READ]


def _show(
    directory: Path, result: dict, scores: np.ndarray, order: list[int], rows: Sequence[TextRow], reasons: list[str]
) -> None:
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3))
    bins = np.linspace(0, 1, 41)
    left.hist(scores, bins=bins, color="lightgray", label=f"all {len(scores)}")
    left.hist(scores[order], bins=bins, color="tab:blue", label=f"selected {len(order)}")
    left.set(xlabel=f"score ({result['scored_by']})", yscale="log")
    lengths = np.array([len(words(row.answered[-1])) if row.answered else 0 for row in rows])
    edges = 2.0 ** np.arange(13)
    for chosen, color, label in ((lengths, "lightgray", "all"), (lengths[order], "tab:blue", "selected")):
        share = np.histogram(chosen.clip(1, 4095), edges)[0] / max(len(chosen), 1)
        right.stairs(share, edges, color=color, label=label, fill=color == "lightgray")
    right.set(xlabel="words of the answer", xscale="log", ylabel="share of rows")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    drawn = directory / "quality.png"
    save_figure(figure, drawn)
    lines = [
        f"{result['selected']} of {result['rows']} rows selected by {result['scored_by']}, see selected.jsonl; the "
        "reasons against "
        "the others are in reasons.jsonl"
    ]
    if result["pairs"]:
        lines.append(
            f"of {result['pairs']['n']} pairs the better side is longer in {result['pairs']['better_is_longer']:.0%}; "
            f"the sides share {result['pairs']['similarity_of_sides']:.0%} of their words and word pairs"
        )
    fates = [["fate", "rows"], *([reason, count] for reason, count in result["reasons"].items())]
    dropped = [i for i, reason in enumerate(reasons) if not reason.startswith(("selected", "like_", "score_"))]
    low = [int(i) for i in np.argsort(scores, kind="stable") if reasons[i] == "score_too_low"]
    shown: list[list] = [["row", "why", "score", "asked", "answered"]]
    for i in [*dropped[:WORST], *low[:WORST]]:
        prompt_and_answer = (rows[i].prompt, rows[i].answered[-1] if rows[i].answered else "")
        shown.append([rows[i].where, reasons[i], float(scores[i]), *(text[:200] for text in prompt_and_answer)])
    blocks = [bullets(lines), table(fates), picture(drawn), paragraph(BEATS), heading("The worst rows"), table(shown)]
    result["verdicts"] = lines
    write_page(directory / "report.html", "Few but good", *blocks)
    write_result(directory, result)
