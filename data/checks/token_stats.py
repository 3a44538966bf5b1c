"""Token statistics of rows: lengths, shares that each max_length would cut, targets, turns, languages."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import formats
from data.adapters import Layout
from data.records import BadRows, Record, read_records
from data.view import WHOLE, trace
from runtime.config import check_whole
from runtime.plots import pyplot, save_figure
from runtime.report import bullets, heading, picture, table, write_page, write_result

LENGTHS = (512, 1024, 2048, 4096, 8192)


def check_token_stats(
    files: Sequence[str], directory: Path, *, tokenizer, layout: Layout, max_rows: int, on_bad_row: str
) -> dict:
    """result.json (`files.NAME`), lengths.png and report.html.

    Args:
        max_rows: number of rows per file whose language is guessed, if they have no language field.
    """
    check_whole(0, check__max_rows=max_rows)
    bad_rows, found, lengths = BadRows(on_bad_row), {}, {}
    for file in files:
        rows, guessed = [], 0
        languages: Counter[str] = Counter()
        turns: Counter[int] = Counter()
        for record in read_records(file, formats.any_record, bad_rows, layout):
            with bad_rows.at(record.where):
                rows += _counts(record, tokenizer)
                turns[sum(message["role"] == "user" for message in record.turns)] += 1
                language = record.columns.get("language") or record.columns.get("lang")
                if not isinstance(language, str) and guessed < max_rows:
                    language, guessed = _guess(record), guessed + 1
                languages[language if isinstance(language, str) else "not guessed"] += 1
        if not rows:
            raise ValueError(f"{file} has no usable row: {bad_rows.why}")
        lengths[file] = np.array(rows)
        found[file] = describe(lengths[file]) | {
            "rows": sum(turns.values()),
            "user_turns": dict(sorted(turns.items())),
            "languages": dict(languages.most_common(20)),
            "languages_guessed": guessed,
        }
    result = {"files": found, "skipped_rows": bad_rows.skipped}
    result["verdicts"] = [
        f"{file}: {f['rows']} rows, {f['tokens']} tokens, {f['target_share']:.0%} targets; "
        f"over 1,024: {f['cut']['1024']:.1%}"
        for file, f in found.items()
    ]
    _show(directory, result, lengths)
    return result


def describe(counts: np.ndarray) -> dict:
    """Figures of (rows, 2) tokens of prompt and answer. Targets count as answer, all other tokens as prompt."""
    whole = counts.sum(1)
    facts: dict = {"tokens": int(whole.sum()), "targets": int(counts[:, 1].sum())}
    facts["target_share"] = facts["targets"] / facts["tokens"]
    for name, one in (("prompt", counts[:, 0]), ("answer", counts[:, 1]), ("whole", whole)):
        marks = {f"p{p}": float(np.percentile(one, p)) for p in (5, 50, 95, 99)}
        facts[name] = {"mean": float(one.mean()), "max": int(one.max()), **marks}
    facts["cut"] = {str(length): float((whole > length).mean()) for length in LENGTHS}
    facts["tokens_cut"] = {str(n): float((whole - n).clip(min=0).sum() / whole.sum()) for n in LENGTHS}
    return facts


def _counts(record: Record, tokenizer) -> list[tuple[int, int]]:
    sides = trace(record, tokenizer, max_length=WHOLE, max_prompt_length=WHOLE)
    return [(sum(not t.target for t in s.tokens), sum(t.target for t in s.tokens)) for s in sides]


def _guess(record: Record) -> str:
    """The language of the user's text by langdetect, which is unreliable for less than a sentence."""
    import langdetect

    langdetect.DetectorFactory.seed = 0
    user_text = " ".join(message["content"] for message in record.turns if message["role"] == "user")[:1000]
    try:
        return langdetect.detect(user_text)
    except langdetect.LangDetectException:
        return "none"


def _show(directory: Path, result: dict, lengths: dict[str, np.ndarray]) -> None:
    pictures = []
    for number, (file, counts) in enumerate(lengths.items()):
        figure, axes = pyplot().subplots(1, 3, figsize=(11, 2.8))
        parts = (("prompt", counts[:, 0]), ("answer", counts[:, 1]), ("whole", counts.sum(1)))
        for axis, (name, one) in zip(axes, parts, strict=True):
            top = max(np.percentile(one, 99), 1)
            axis.hist(np.minimum(one, top), bins=40, color="tab:green" if name == "answer" else "tab:blue")
            axis.set_title(f"{name}, mean {one.mean():.0f} (the last bar has all longer ones)", fontsize=8)
            axis.set_xlabel("tokens")
        figure.tight_layout()
        pictures.append((file, directory / f"lengths_{number}.png"))
        save_figure(figure, pictures[-1][1])
    facts = result["files"]
    rows = [["file", "rows", "tokens", "targets", "share", *(f"over {n:,}" for n in LENGTHS)]]
    rows += [
        [file, f["rows"], f["tokens"], f["targets"], f["target_share"], *f["cut"].values()] for file, f in facts.items()
    ]
    blocks = [bullets(result["verdicts"]), table(rows)]
    for file, path in pictures:
        turns = ", ".join(f"{n}: {count}" for n, count in facts[file]["user_turns"].items())
        languages = ", ".join(f"{name} {count}" for name, count in facts[file]["languages"].items())
        blocks += [heading(file), picture(path), bullets([f"rows by user turns: {turns}", f"languages: {languages}"])]
    write_page(directory / "report.html", "Tokens", *blocks)
    write_result(directory, result)
