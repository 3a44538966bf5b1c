"""Check the pilot files of data vendors before buying: token lengths, and vendors whose prompts are too short.

Lengths are counted in tokens of a named tokenizer. A prompt is a user message. The lecture's vendors averaged 22, 54
and 104 tokens, while InstructGPT's prompts had 408, and the rule was to reject prompts that skew under about 50. The
408 tokens are of its SFT prompts, which contractors wrote. The prompts of users (RM, PPO) were shorter.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import ks_2samp, wasserstein_distance

from data.adapters import Layout
from data.checks.texts import TextRow, read_texts
from data.records import BadRows
from data.tokenizer import load_tokenizer
from runtime.config import check_number, check_positive
from runtime.plots import pyplot, save_figure
from runtime.report import bullets, heading, picture, table, write_page, write_result

PERCENTILES = (5, 25, 75, 95, 99)
INSTRUCTGPT = {  # tokens of a prompt, including examples in it: mean; minimum, quartiles, maximum
    "InstructGPT SFT": (408, (1, 37, 283, 632, 2048)),
    "InstructGPT RM": (199, (1, 20, 64, 203, 2032)),
    "InstructGPT PPO": (166, (2, 19, 62, 179, 2044)),
}  # Ouyang et al. 2022 (arXiv:2203.02155), table 9, the training parts
EDGES = 2.0 ** np.arange(13)  # edges of a histogram: 1, 2, 4, ... 4,096 tokens
WORST = 5  # number of prompts per vendor on the page


def check_pilot(
    files: Sequence[str],
    directory: Path,
    *,
    tokenizer: str,
    target: str | None,
    target_mean: float,
    min_tokens: int,
    max_short: float,
    seed: int,
    on_bad_row: str,
    layout: Layout | None = None,
) -> dict:
    """result.json with `vendors.NAME`, one histogram per vendor (PNG), and report.html. A vendor is named by its file.

    Args:
            target: file of reference prompts for the distance and its test; None = only the mean is compared.
            min_tokens: a vendor is rejected if its prompts' mean is below this, or if more than `max_short` of them
                are.
    """
    check_positive(check__target_mean=target_mean, check__min_tokens=min_tokens)
    check_number(0, check__max_short=max_short)
    names = [Path(file).name.split(".")[0] for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"vendors are named by their files, and two names are equal: {', '.join(names)}")
    encode, bad_rows = load_tokenizer(tokenizer).encode, BadRows(on_bad_row)
    wanted = (
        None if target is None else np.array([len(encode(m)) for r in read_texts([target], bad_rows) for m in r.asked])
    )

    vendors, lengths, pool, shortest = {}, {}, [], {}
    for name, file in zip(names, files, strict=True):
        rows = read_texts([file], bad_rows, layout)
        asked = [encode(message) for row in rows for message in row.asked]
        lengths[name] = np.array([len(ids) for ids in asked])
        pool.append(np.concatenate([np.array(ids, dtype=np.int64) for ids in asked]))
        texts = [message for row in rows for message in row.asked]
        order = np.argsort(lengths[name], kind="stable")
        shortest[name] = list({texts[i]: int(lengths[name][i]) for i in order}.items())[:WORST]
        facts = describe(lengths[name], min_tokens) | _rest(rows, encode, seed)
        facts["interval_of_mean"] = _mean_interval(lengths[name], seed)
        facts["share_of_target_mean"] = facts["mean"] / target_mean
        facts["distance_to_target"] = None if wanted is None else distance(lengths[name], wanted)
        facts["verdict"], facts["reason"] = judge(facts, min_tokens=min_tokens, max_short=max_short)
        vendors[name] = facts
    sample = min(map(len, pool))  # the same number of tokens for each, because the ratio falls with the size
    for name, ids in zip(names, pool, strict=True):
        vendors[name]["unique_token_ratio"] = len(np.unique(ids[:sample])) / sample

    lines = [f"{name}: {facts['verdict']} ({facts['reason']})" for name, facts in vendors.items()]
    result = {"vendors": vendors, "tokenizer": tokenizer, "target_mean": target_mean, "skipped_rows": bad_rows.skipped}
    _show(directory, result | {"verdicts": lines}, lengths, wanted, shortest)
    return result | {"verdicts": lines}


def describe(lengths: np.ndarray, min_tokens: int) -> dict:
    """Mean, standard deviation and percentiles of token counts."""
    return {
        "n": len(lengths),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
        "std": float(lengths.std()),
        **{f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES},
        f"share_under_{min_tokens}": float((lengths < min_tokens).mean()),
    }


def distance(lengths: np.ndarray, wanted: np.ndarray) -> dict:
    """Earth mover's distance in tokens, and the two-sample Kolmogorov-Smirnov test."""
    test = ks_2samp(lengths, wanted)
    return {
        "wasserstein": float(wasserstein_distance(lengths, wanted)),
        "ks": float(test.statistic),
        "p_value": float(test.pvalue),
        "target_mean": float(wanted.mean()),
    }


def judge(facts: dict, *, min_tokens: int, max_short: float) -> tuple[str, str]:
    """("accept" or "reject", the reason with its figure)."""
    short = facts[f"share_under_{min_tokens}"]
    if facts["mean"] < min_tokens:
        return "reject", f"prompts average {facts['mean']:.1f} tokens, below {min_tokens}"
    if short > max_short:
        return "reject", f"{short:.0%} of the prompts are under {min_tokens} tokens, more than {max_short:.0%}"
    return (
        "accept",
        f"prompts average {facts['mean']:.1f} tokens (spread {facts['std']:.1f}), {short:.0%} under {min_tokens}",
    )


def published_shares(quartiles: Sequence[int]) -> np.ndarray:
    """(12,) share of prompts between EDGES, from minimum, quartiles and maximum; uniform in log length between."""
    below = np.interp(np.log2(EDGES), np.log2(quartiles), [0, 0.25, 0.5, 0.75, 1])
    below[0] = 0.0  # the shortest prompts are in the first bin
    return np.diff(below)


def _rest(rows: Sequence[TextRow], encode, seed: int) -> dict:
    """Figures of completions and turns."""
    answers = np.array([len(encode(text)) for row in rows for text in row.answered] or [0])
    turns = np.array([len(row.asked) for row in rows])
    return {
        "rows": len(rows),
        "turns_mean": float(turns.mean()),
        "multi_turn_share": float((turns > 1).mean()),
        "completions": {
            "n": sum(len(row.answered) for row in rows),
            "mean": float(answers.mean()),
            "median": float(np.median(answers)),
            "max": int(answers.max()),
        },
    }


def _mean_interval(lengths: np.ndarray, seed: int) -> list[float]:
    """95 % percentile bootstrap interval; prompts are resampled."""
    random = np.random.default_rng(seed)
    means = [lengths[random.integers(0, len(lengths), len(lengths))].mean() for _ in range(300)]
    return np.percentile(means, [2.5, 97.5]).tolist()


def _shares(lengths: np.ndarray) -> np.ndarray:
    return np.histogram(lengths.clip(EDGES[0], EDGES[-1]), EDGES)[0] / len(lengths)


def _show(
    directory: Path, result: dict, lengths: dict[str, np.ndarray], wanted: np.ndarray | None, shortest: dict
) -> None:
    vendors, pictures = result["vendors"], []
    for name, one in lengths.items():
        figure, axis = pyplot().subplots(figsize=(7, 3))
        axis.stairs(_shares(one), EDGES, color="tab:blue", alpha=0.6, fill=True, label=name)
        if wanted is not None:
            axis.stairs(_shares(wanted), EDGES, color="black", label="target")
        else:
            for (published, (_, quartiles)), style in zip(INSTRUCTGPT.items(), ("-", "--", ":"), strict=True):
                axis.stairs(published_shares(quartiles), EDGES, color="black", linestyle=style, label=published)
        axis.axvline(one.mean(), color="tab:red", linestyle="--", label=f"mean {one.mean():.0f}")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of a prompt")
        axis.set_ylabel("share of prompts")
        axis.set_title(f"{name}: {vendors[name]['verdict']}", fontsize=10)
        axis.legend(fontsize=7)
        pictures.append(directory / f"lengths_{name}.png")
        save_figure(figure, pictures[-1])
    columns = [
        "n",
        "mean",
        "median",
        "std",
        "p95",
        "max",
        next(k for k in vendors[next(iter(vendors))] if "under" in k),
    ]
    columns += ["unique_token_ratio", "turns_mean", "verdict"]
    rows = [["vendor", *columns], *([name, *(facts[c] for c in columns)] for name, facts in vendors.items())]
    marks: list[list] = [["prompts", "mean", "least", "25 %", "half", "75 %", "most"]]
    for name, one in lengths.items():
        marks.append([name, one.mean(), *(float(np.percentile(one, p)) for p in (0, 25, 50, 75, 100))])
    marks += [[name, mean, *quartiles] for name, (mean, quartiles) in INSTRUCTGPT.items()]
    short: list[list] = [["vendor", "tokens", "prompt"]]
    short += [[name, tokens, text[:200]] for name, texts in shortest.items() for text, tokens in texts]
    blocks = [bullets(result["verdicts"]), table(rows), heading("Compared with InstructGPT's prompts"), table(marks)]
    blocks += [*map(picture, pictures), heading("The shortest prompts"), table(short)]
    write_page(directory / "report.html", "Vendor pilot", *blocks)
    write_result(directory, result)
