"""Select a small set of good and diverse rows, as LIMA: Zhou et al. 2023 (arXiv:2305.11206).

reasons.jsonl has the result for each row with its reason. The steps:
    1. A row with a plain fault is dropped. The others get a score.
    2. Of rows with nearly equal prompts, the best one stays.
    3. Of the `pool` x `num` best rows, greedy k-center over hashed word n-grams selects rows far from those already
       selected (Sener and Savarese 2018, arXiv:1708.00489, here without embeddings).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from data.adapters import Layout
from data.checks.near import NearIndex, normal, sketches
from data.checks.texts import TextRow, read_texts
from data.clients import Client
from data.methods.filters import words
from data.methods.preferences import rate
from data.records import BadRows, write_jsonl
from runtime.config import check_whole
from runtime.plots import pyplot, save_figure
from runtime.report import bullets, picture, table, write_page, write_result

READ = 4000  # characters of a row that its n-grams are taken from


def check_quality(
    files: Sequence[str], directory: Path, *, num: int, pool: int, threshold: float, min_words: int, max_words: int,
    client: Client | None, on_bad_row: str,
    layout: Layout | None = None,
) -> dict:  # fmt: skip
    """selected.jsonl (the chosen rows, best first), reasons.jsonl (a line for every row), result.json, quality.png.

    Args:
        pool: times `num` is the number of best rows from which step 3 selects.
        client: a judge that rates helpfulness and instruction following of these rows; None: the plain score.
    """
    check_whole(1, check__num=num, check__pool=pool)
    bad_rows = BadRows(on_bad_row)
    rows = read_texts(files, bad_rows, layout)
    if not any(row.answered for row in rows):
        raise ValueError(f"{', '.join(files)}: no row has an answer, and check=quality selects rows by their answers")
    parts = [score_parts(row) for row in rows]
    faults = [fault_of(row, min_words=min_words, max_words=max_words) for row in rows]
    scores = np.array([sum(part.values()) / len(part) for part in parts])
    reasons: list[str | None] = list(faults)

    ranked = [int(i) for i in np.argsort(-scores, kind="stable") if faults[i] is None]
    unique = _drop_repeats(rows, ranked, threshold, reasons, limit=num * pool)
    best = list(unique)
    judged = _judge(rows, best, client) if client is not None else {}
    best = [i for i in best if client is None or judged[i] is not None]
    for i in best if client is not None else []:
        scores[i] = judged[i]
    chosen = k_center([_text(rows[i]) for i in best], scores[best], num)
    picked = {best[at]: distance for at, distance in chosen}
    for i in unique:
        reasons[i] = _fate(i, picked, judged)
    reasons = [reason or "score_too_low" for reason in reasons]

    order = list(picked)
    facts = [{"score": float(scores[i]), "distance": picked[i]} for i in order]
    write_jsonl(directory / "selected.jsonl", [rows[i].raw | {"quality": f} for i, f in zip(order, facts, strict=True)])
    lines = [
        {"row": r.where, "reason": why, "score": float(s), **p}
        for r, why, s, p in zip(rows, reasons, scores, parts, strict=True)
    ]
    write_jsonl(directory / "reasons.jsonl", lines)
    counts = dict(Counter(reason.split(" ")[0] for reason in reasons).most_common())
    result = {
        "rows": len(rows), "selected": len(order), "reasons": counts, "skipped_rows": bad_rows.skipped,
        "mean_score": float(scores.mean()), "mean_score_of_selected": float(scores[order].mean()) if order else None,
        "distinct_words": len({word for i in order for word in words(_text(rows[i]))}),
        "scored_by": client.model if client else "plain",
    }  # fmt: skip
    _show(directory, result, scores, order)
    return result


def fault_of(row: TextRow, *, min_words: int, max_words: int) -> str | None:
    """The reason why a row is dropped, or None."""
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
    return None


def score_parts(row: TextRow) -> dict[str, float]:
    """The parts of the plain score, each in [0, 1]. The score is their mean. It is only for ranking."""
    answer = row.answered[-1] if row.answered else ""
    tokens = words(" ".join(row.answered))
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return {
        "length": min(1.0, np.log1p(len(tokens)) / np.log1p(200)),  # up to 200 words a longer answer tells more
        "fresh": len(set(trigrams)) / len(trigrams) if trigrams else 0.5,  # loops repeat themselves
        "finished": float(answer.rstrip()[-1:] in tuple(".!?)]}\"'`:") or answer.rstrip()[-1:].isdigit()),
        "prompt": min(1.0, np.log1p(len(words(row.prompt))) / np.log1p(50)),  # the lecture: short prompts teach little
        "own_words": 1.0 - _copied(tokens, words(row.prompt)),
    }


def k_center(texts: Sequence[str], scores: np.ndarray, num: int) -> list[tuple[int, float]]:
    """(index, cosine distance to the nearest chosen before) of `num` rows, the best-scored first, then the furthest.

    The distance is multiplied by the score, so that of distant rows the better one is chosen.
    """
    if not texts:
        return []
    vectors = HashingVectorizer(n_features=1 << 18, ngram_range=(1, 2), alternate_sign=False).transform(texts)
    nearest = np.ones(len(texts))
    at, chosen, distance = int(scores.argmax()), [], 1.0
    for _ in range(min(num, len(texts))):
        chosen.append((at, distance))
        centre = np.asarray(vectors[at].todense()).ravel()
        nearest = np.minimum(nearest, 1.0 - vectors @ centre)
        nearest[at] = -1.0  # chosen
        gain = np.where(nearest < 0, -np.inf, nearest * scores)
        at = int(gain.argmax())
        distance = float(max(nearest[at], 0.0))
    return chosen


def _drop_repeats(
    rows: Sequence[TextRow], ranked: list[int], threshold: float, reasons: list, *, limit: int
) -> list[int]:
    """The first `limit` rows, best first, without rows whose prompt nearly equals that of a better row."""
    index, kept = NearIndex(threshold), []
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
    """A judge's mean rating scaled to [0, 1], of each row's last answer."""
    answered = [([m for m in rows[i].messages[: _last(rows[i])]], rows[i].answered[-1]) for i in best]
    ratings = rate(client, answered, aspects=["helpfulness", "instruction_following"], seed=0)
    return {i: None if r is None else (sum(r.values()) / len(r) - 1) / 4 for i, r in zip(best, ratings, strict=True)}


def _last(row: TextRow) -> int:
    return max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")


def _fate(i: int, picked: dict[int, float], judged: dict) -> str:
    if i in picked:
        return f"selected (distance {picked[i]:.2f})"
    if i in judged and judged[i] is None:
        return "rating_not_parsed"
    return "like_the_selected"


def _copied(tokens: list[str], prompt: list[str]) -> float:
    """Share of the answer's words that the prompt has too."""
    known = set(prompt)
    return sum(token in known for token in tokens) / len(tokens) if tokens else 0.0


def _text(row: TextRow) -> str:
    return "\n".join(message["content"] for message in row.messages)[:READ]


def _show(directory: Path, result: dict, scores: np.ndarray, order: list[int]) -> None:
    figure, axis = pyplot().subplots(figsize=(7, 3))
    bins = np.linspace(0, 1, 41)
    axis.hist(scores, bins=bins, color="lightgray", label=f"all {len(scores)}")
    axis.hist(scores[order], bins=bins, color="tab:blue", label=f"selected {len(order)}")
    axis.set_xlabel("score")
    axis.set_yscale("log")
    axis.legend()
    drawn = directory / "quality.png"
    save_figure(figure, drawn)
    lines = [
        f"{result['selected']} of {result['rows']} rows selected, see selected.jsonl; why not the others: reasons.jsonl"
    ]
    rows = [["fate", "rows"], *([reason, count] for reason, count in result["reasons"].items())]
    result["verdicts"] = lines
    write_page(directory / "report.html", "Few but good", bullets(lines), table(rows), picture(drawn))
    write_result(directory, result)
