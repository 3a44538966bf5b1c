"""The shares of task kinds in a set of prompts, compared with wanted shares, and a sample with the wanted shares.

The default is the shares of InstructGPT's users: Ouyang et al. 2022 (arXiv:2203.02155), table 1. A client names the
kinds, or a small classifier (`task_classifier.py`) that is trained on labelled prompts. Its cross-validated accuracy is
reported, because it limits the accuracy of the shares.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import chisquare
from statsmodels.stats.proportion import proportion_confint

from data.adapters import Layout
from data.checks.task_classifier import fit_classifier
from data.checks.texts import TextRow, read_texts
from data.records import BadRows, read_jsonl, write_jsonl
from generation.clients import Client, Conversation
from runtime.config import check_files, check_number, check_whole
from runtime.plots import pyplot, save_figure
from runtime.report import bullets, heading, paragraph, picture, table, write_page, write_result

BELIEVED = (
    "Rows whose chance is at or above the threshold may be sampled. Precision and recall are over labelled prompts, "
    "each judged by a fit without it. A kind without a threshold never reaches check.min_precision."
)
READ = 1500  # characters of a prompt that the classifier reads: a task is named early, its material is long
KINDS = {
    "generation": "write something new: a story, letter, article, poem, description",
    "open_qa": "a question that general knowledge answers",
    "brainstorming": "a list of ideas, suggestions or options",
    "chat": "a conversation, small talk or a role to play",
    "rewrite": "change a given text: style, grammar, language",
    "summarization": "shorten a given text to its main points",
    "classification": "assign labels to a given text or items",
    "closed_qa": "a question that a given text answers",
    "extract": "find and list pieces of a given text",
    "other": "anything else, such as code and mathematics",
}


def check_task_mix(
    files: Sequence[str], directory: Path, *, labelled: Sequence[str], target: dict[str, float], sample_to_mix: bool,
    num: int | None, min_precision: float, client: Client | None, seed: int, on_bad_row: str,
    layout: Layout | None = None,
) -> dict:  # fmt: skip
    """result.json (`shares`, `chi_square`), task_mix.png, report.html, and sampled.jsonl where `sample_to_mix`.

    Args:
        target: wanted shares; they are scaled to sum to 1.
        min_precision: a sampled row's chance is at or above its kind's threshold, from which the classifier is right on
            that share of the labelled prompts (each judged by a fit without it).
        client: the model that names the kinds; None: the trained classifier.
    """
    check_number(0, **{f"check__target__{kind}": share for kind, share in target.items()})
    if num is not None:
        check_whole(1, check__num=num)
    check_number(0, check__min_precision=min_precision)
    if sum(target.values()) <= 0:
        raise ValueError(f"check.target={target} wants no kind of task; give one a share above 0")
    wanted = {kind: share / sum(target.values()) for kind, share in target.items()}
    bad_rows = BadRows(on_bad_row)
    rows = read_texts(files, bad_rows, layout)
    if client is None:
        kinds, sure, facts = classify(rows, labelled, min_precision=min_precision, seed=seed)
        unseen = [kind for kind, share in wanted.items() if share and kind not in (*facts["thresholds"], "chat")]
        if unseen:
            raise ValueError(
                f"check.target wants {', '.join(unseen)}, which none of the labelled prompts is, so no row could be; "
                "add three to check.labelled, drop it from check.target, or let a client tell kinds (client=openai)"
            )
    else:
        kinds, facts = ask_kinds(rows, client, list(wanted), seed), {"classifier": client.model}
        sure = [True] * len(kinds)
    result = compare(kinds, wanted) | facts | {"rows": len(rows), "skipped_rows": bad_rows.skipped}
    if sample_to_mix:
        taken = [kind if certain else "unsure" for kind, certain in zip(kinds, sure, strict=True)]
        result["unsure"] = taken.count("unsure")
        chosen = draw_to_mix(taken, wanted, num, seed)
        write_jsonl(directory / "sampled.jsonl", [rows[i].raw | {"task": kinds[i]} for i in chosen])
        result["sampled"] = dict(Counter(kinds[i] for i in chosen))
    _show(directory, result)
    return result


def classify(
    rows: Sequence[TextRow], labelled: Sequence[str], *, min_precision: float, seed: int
) -> tuple[list[str], list[bool], dict]:
    """(kinds, whether each is sure, facts). Several user turns are chat. The classifier names the kind of others."""
    check_files("check.labelled", labelled)
    known = [row for file in labelled for row in read_jsonl(file)]
    if any(not isinstance(row.get(key), str) for row in known for key in ("prompt", "category")):
        raise ValueError(f"{list(labelled)}: each row needs `prompt` and `category`, both text")
    texts, names = [row["prompt"][:READ] for row in known], [row["category"] for row in known]
    if min(Counter(names).values()) < 3:
        raise ValueError(f"each category needs three labelled prompts or more, got {dict(Counter(names))}")
    classifier = fit_classifier(texts, names, min_precision=min_precision, seed=seed)
    single = [i for i, row in enumerate(rows) if len(row.asked) == 1]
    kinds, sure = ["chat"] * len(rows), [True] * len(rows)
    if single:
        predictions = classifier.predict([rows[i].asked[0][:READ] for i in single])
        for i, kind, certain in zip(single, *predictions, strict=True):
            kinds[i], sure[i] = kind, certain
    facts = {"classifier": "words and form", "classifier_accuracy": classifier.accuracy, "labelled_rows": len(known)}
    return kinds, sure, facts | {"thresholds": classifier.thresholds}


def ask_kinds(rows: Sequence[TextRow], client: Client, names: list[str], seed: int) -> list[str]:
    """A kind for each row from a client; "unreadable" where its answer names none."""
    answers = client.ask([ask_kind(row, names) for row in rows], temperature=0.0, max_tokens=12, seed=seed)
    return [read_kind(answer.text, names) for answer in answers]


def ask_kind(row: TextRow, names: list[str]) -> Conversation:
    """The prompt that asks for a kind."""
    kinds = "\n".join(f"{name}: {KINDS.get(name, name)}" for name in names)
    talk = "\n".join(row.asked)[:READ]
    text = (
        f"What kind of task is the request below? Kinds:\n{kinds}\n\nRequest:\n{talk}\n\nAnswer with one kind's name."
    )
    return [{"role": "user", "content": text}]


def read_kind(text: str, names: list[str]) -> str:
    """The first kind that the answer names."""
    answer = text.lower().replace(" ", "_").replace("-", "_")
    found = [(answer.find(name), name) for name in names if name in answer]
    return min(found)[1] if found else "unreadable"


def compare(kinds: Sequence[str], wanted: dict[str, float]) -> dict:
    """Shares with Wilson intervals beside the wanted ones, and a chi-square test of the whole."""
    counts, readable = Counter(kinds), sum(kind != "unreadable" for kind in kinds)
    shares = {}
    for kind in [*wanted, *sorted(set(counts) - set(wanted) - {"unreadable"})]:
        lower, upper = proportion_confint(counts[kind], max(1, readable), method="wilson")
        shares[kind] = {
            "n": counts[kind],
            "value": counts[kind] / max(1, readable),
            "lower": float(lower),
            "upper": float(upper),
            "wanted": wanted.get(kind, 0.0),
        }
    tested = [kind for kind, share in wanted.items() if share > 0]
    observed = np.array([counts[kind] for kind in tested], dtype=float)
    expected = np.array([wanted[kind] for kind in tested])
    chi_square = None
    if observed.sum() > 0:
        test = chisquare(observed, observed.sum() * expected / expected.sum())
        small = int((observed.sum() * expected < 5).sum())
        chi_square = {
            "statistic": float(test.statistic),
            "p_value": float(test.pvalue),
            "cells_expected_under_5": small,
        }
    return {"shares": shares, "chi_square": chi_square, "unreadable": counts["unreadable"]}


def draw_to_mix(kinds: Sequence[str], wanted: dict[str, float], num: int | None, seed: int) -> list[int]:
    """Indices with the wanted shares, drawn without replacement, in file order.

    Raises:
        ValueError: a kind has too few rows; says how many rows in all are possible.
    """
    by_kind = {kind: np.flatnonzero(np.array(kinds) == kind) for kind, share in wanted.items() if share > 0}
    rarest = min(by_kind, key=lambda kind: len(by_kind[kind]) / wanted[kind])
    possible = int(len(by_kind[rarest]) / wanted[rarest])
    if num is None and possible == 0:
        raise ValueError(f"no row is {rarest}, so no sample has a share of it; drop it from check.target")
    counts = _apportion(wanted, possible if num is None else num)
    short = {kind: (count, len(by_kind[kind])) for kind, count in counts.items() if count > len(by_kind.get(kind, ()))}
    if short and num is not None:
        shortfalls = ", ".join(f"{kind} needs {need} and has {have}" for kind, (need, have) in short.items())
        raise ValueError(f"check.num={num} is too many for the mix: {shortfalls}; about {possible} rows are possible")
    random = np.random.default_rng(seed)
    drawn = [random.permutation(rows)[: counts[kind]] for kind, rows in by_kind.items()]
    return sorted(np.concatenate(drawn).tolist())


def _apportion(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`: floors, then one more to the largest remainders."""
    counts = {kind: int(share * total) for kind, share in shares.items()}
    rest = sorted(shares, key=lambda kind: counts[kind] - shares[kind] * total)
    for kind in rest[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _show(directory: Path, result: dict) -> None:
    shares, test = result["shares"], result["chi_square"]
    figure, axis = pyplot().subplots(figsize=(8, 3.6))
    names, at = list(shares), np.arange(len(shares))
    values = np.array([shares[name]["value"] for name in names])
    ends = np.array([(one["value"] - one["lower"], one["upper"] - one["value"]) for one in shares.values()]).T
    axis.bar(at - 0.2, 100 * values, 0.4, yerr=100 * ends.clip(0), label="here", color="tab:blue", capsize=2)
    axis.bar(at + 0.2, [100 * one["wanted"] for one in shares.values()], 0.4, label="wanted", color="lightgray")
    axis.set_xticks(at, names, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("percent")
    axis.legend()
    drawn = directory / "task_mix.png"
    save_figure(figure, drawn)
    furthest = max(shares, key=lambda name: abs(shares[name]["value"] - shares[name]["wanted"]))
    one = shares[furthest]
    lines = [f"furthest from its share: {furthest}, {one['value']:.1%} where {one['wanted']:.1%} is wanted"]
    if test is not None:
        lines.append(f"chi-square against the wanted shares: {test['statistic']:.1f}, p = {test['p_value']:.2g}")
    if "classifier_accuracy" in result:
        lines.append(
            f"the classifier is right on {result['classifier_accuracy']:.0%} of its labelled prompts (5 folds)"
        )
    if result["unreadable"]:
        lines.append(f"{result['unreadable']} answers named no kind and count nowhere")
    if "sampled" in result:
        lines.append(f"sampled.jsonl holds {sum(result['sampled'].values())} rows with the wanted shares")
        lines.append(f"{result['unsure']} rows lie below the threshold of their kind and were not sampled")
    rows = [["kind", "rows", "share", "lower", "upper", "wanted"]]
    rows += [[name, *(s[key] for key in ("n", "value", "lower", "upper", "wanted"))] for name, s in shares.items()]
    blocks = [bullets(lines), table(rows), picture(drawn)]
    if "thresholds" in result:
        known = [["kind", "threshold", "precision", "its lower end", "recall", "labelled prompts above"]]
        known += [
            [kind, *(one[k] for k in ("threshold", "precision", "lower", "recall", "n"))]
            for kind, one in result["thresholds"].items()
        ]
        blocks += [heading("How far each kind can be believed"), paragraph(BELIEVED), table(known)]
    write_page(directory / "report.html", "Task mix", *blocks)
    result["verdicts"] = lines
    write_result(directory, result)
