"""Comparisons: from files to preference groups (K encoded completions of one prompt) and to batches."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import formats
from data.chat import encode_completions
from data.encoded import Encoded, encode_files, make_loader, training_texts, warn_of_overlap
from data.encoder import Encoder, Encoding
from data.loader import Loader
from data.records import Comparison, Ranking, Rated
from data.tokenizer import Tokenizer
from runtime.config import check_whole

log = logging.getLogger(__name__)

# columns with the scores of the two sides, in UltraFeedback-binarized and in others' copies of it
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"))


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt and its completions, best first. A pair has two rows, a ranking K, a rated completion one.

    `rows` are {"input_ids", "completion_mask"}. They share the prompt's tokens and are consecutive, so that packing
    stores the prompt once.
    """

    rows: list[dict]
    ranks: list[float]  # ranks of the rows: lower is better, equal is a tie; [0] for a rated completion
    margin: float  # of a pair, the margin of the chosen side; 0 if it is unknown
    reward: float | None  # of a rated completion, in [0, 1]
    source: str  # name of the file
    where: str  # FILE:LINE

    @property
    def is_good(self) -> bool | None:
        """Whether a rated completion has a rating above 1/2. None at 1/2, which is neither good nor bad."""
        return None if self.reward == 0.5 else self.reward > 0.5

    @property
    def is_tie(self) -> bool:
        """Whether all completions have the same rank."""
        return len(self.rows) > 1 and len(set(self.ranks)) == 1


def preference_loader(data, tokenizer, *, batch_size: int, seed: int, rank: int, world_size: int) -> Loader:
    """Endless batches of this rank's `PreferenceGroup`s from `data.train`. batch_size counts groups.

    `data` is the config group of conf/data/preferences.yaml.
    """
    encoded = encode_preferences("data.train", data.train, data, tokenizer)
    return make_loader(
        encoded, shuffle=data.shuffle, weights=data.weights, proportions=data.proportions,
        batch_size=batch_size, seed=seed, rank=rank, world_size=world_size,
    )  # fmt: skip


def eval_groups(data, tokenizer, train: Loader | None = None) -> Sequence[PreferenceGroup]:
    """All groups of `data.eval`, in file order. Empty if it has no file. Warns where prompts are also in `train`."""
    if not data.eval:
        return []
    encoded = encode_preferences("data.eval", data.eval, data, tokenizer)
    if train is not None:
        warn_of_overlap(train, encoded)
    return encoded.items


def encode_preferences(name: str, files: Sequence[str], data, tokenizer) -> Encoded:
    """The groups of `files`, the value of the config key `name`.

    Raises:
        ValueError: as in `formats.preferences`, or there are comparisons and rated completions in one set.
    """
    check_whole(1, data__max_length=data.max_length, data__max_prompt_length=data.max_prompt_length)
    encoded = encode_files(
        name, files, data, Preferences(tokenizer, data.max_length, data.max_prompt_length, data.kwise)
    )
    (_, rated), (_, compared) = (encoded.marked(kind) for kind in ("rated", "compared"))
    if rated and compared:
        raise ValueError(
            f"rated completions ({rated[0]}) and comparisons ({compared[0]}) need different losses; give {name} one "
            "kind of file"
        )
    count, empty = encoded.marked("empty")
    if count:
        log.warning("%s: %d rated completions are empty: %s", name, count, ", ".join(empty))
    count, against = encoded.marked("against_scores")
    if count:
        message = (
            "%s: the chosen side of %d of %d comparisons has the lower score in its row: %s; are the sides exchanged?"
        )
        log.warning(message, name, count, encoded.marked("compared")[0], ", ".join(against))
    return encoded


@dataclass(frozen=True)
class Preferences(Encoder[Comparison | Ranking | Rated]):
    """Comparisons, rankings and rated completions. Each completion is a row, better ones first."""

    tokenizer: Tokenizer
    max_length: int
    max_prompt_length: int
    kwise: bool

    @property
    def regroup(self) -> Callable[[list], list] | None:
        return regroup_all if self.kwise else None

    def parse(self, row: dict) -> list[Comparison | Ranking | Rated]:
        return formats.preferences(row)

    def encode(self, record: Comparison | Ranking | Rated) -> list[Encoding]:
        completions, note = _ordered(record)
        rows = encode_completions(
            record.prompt,
            completions,
            self.tokenizer,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            tools=record.tools,
        )
        _check_rows(rows, note["ranks"])
        rated = isinstance(record, Rated)
        # An empty answer that was rated is kept and reported.
        empty = isinstance(record, Rated) and not record.completion.strip()
        against = isinstance(record, Comparison) and _against_scores(record.columns)
        marks = {"rated": rated, "compared": not rated, "empty": empty, "against_scores": against}
        return [Encoding(rows, note, tuple(name for name, holds in marks.items() if holds))]

    def item(self, rows: list[dict], note: dict, where: str) -> PreferenceGroup:
        return PreferenceGroup(rows, **note, source=Path(where.rpartition(":")[0]).name.split(".")[0], where=where)

    def settings(self) -> dict:
        return {"max_length": self.max_length, "max_prompt_length": self.max_prompt_length, "kwise": self.kwise}


def preference_texts(data) -> Iterator[str]:
    """Every message and answer of `data.train`, to train a tokenizer on."""
    return training_texts(data, formats.preferences)


def regroup_all(records: list) -> list:
    """`regroup_by_prompt`. Logs how many prompts have a ranking. Raises ValueError if no prompt of several has one."""
    texts: dict[str, set[str]] = {}
    for record in records:
        if isinstance(record, Comparison):
            texts.setdefault(str((record.prompt, record.tools)), set()).update((record.chosen, record.rejected))
    several = sum(len(completions) > 2 for completions in texts.values())
    kept = regroup_by_prompt(records)
    made = sum(isinstance(record, Ranking) for record in kept) - sum(isinstance(r, Ranking) for r in records)
    if 2 * several > len(texts) and not made:
        raise ValueError(
            f"{records[0].where.rpartition(':')[0]}: data.kwise=true makes rankings of pairs, but for none of the "
            f"{several} prompts with three completions or more are the pairs complete and consistent "
            "(method.min_margin "
            "of make_data.py leaves close pairs out); set data.kwise=false to train on pairs"
        )
    if several:
        log.info("the pairs of %d of %d prompts with three completions or more became one ranking each", made, several)
    return kept


def regroup_by_prompt(records: list) -> list:
    """Replace the pairs of one prompt by one ranking, if they are complete and consistent with an order.

    This is InstructGPT's K-wise batch element: C(K, 2) comparisons cost K forwards and are not spread over an epoch.
    Incomplete or contradictory pairs stay pairs. A ranking has no margins, so those of its pairs are lost
    (`check_margins` refuses margin_coef then). A ranking takes the place of its first pair.
    """
    groups: dict[str, list[Comparison]] = {}
    for record in records:
        if isinstance(record, Comparison):
            groups.setdefault(str((record.prompt, record.tools)), []).append(record)
    rankings = {key: _ranking(pairs) for key, pairs in groups.items()}
    kept, done = [], set()
    for record in records:
        key = str((record.prompt, record.tools))
        ranking = rankings.get(key) if record in groups.get(key, []) else None
        if ranking is None:
            kept.append(record)
        elif key not in done:
            done.add(key)
            kept.append(ranking)
    return kept


def _ranking(pairs: list[Comparison]) -> Ranking | None:
    """The ranking given by `pairs`, or None. The rank of a completion is the number of better ones."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected)))
    better = {(p.chosen, p.rejected) for p in pairs if not p.tie}
    ties = {frozenset((p.chosen, p.rejected)) for p in pairs if p.tie}
    ranks = {text: float(sum((other, text) in better for other in texts)) for text in texts}
    agree = all(ranks[chosen] < ranks[rejected] for chosen, rejected in better)
    agree &= all(len({ranks[text] for text in tie}) == 1 for tie in ties)
    complete = {frozenset(pair) for pair in better} | ties == set(map(frozenset, itertools.combinations(texts, 2)))
    if not (agree and complete and len(texts) > 2):
        return None
    texts.sort(key=ranks.__getitem__)
    first = pairs[0]
    order = [ranks[text] for text in texts]
    return Ranking(first.prompt, texts, order, where=first.where, tools=first.tools, columns=first.columns)


def check_margins(margin_coef: float, data, groups: Sequence[PreferenceGroup]) -> None:
    """Raise ValueError if margin_coef is set and the data have no margins."""
    if margin_coef and data.kwise:
        raise ValueError(
            f"margin_coef={margin_coef} uses the margins of pairs, but data.kwise=true makes rankings of "
            "pairs, which have none; disable one of the two"
        )
    if margin_coef and not any(group.margin for group in groups):
        raise ValueError(f"margin_coef={margin_coef}, but no row of data.train has a margin; set margin_coef=0")


def _ordered(record: Comparison | Ranking | Rated) -> tuple[list[str], dict]:
    """(the completions, better ones first; ranks, margin and reward of the group)."""
    if isinstance(record, Comparison):
        ranks = [0.0, 0.0 if record.tie else 1.0]
        return [record.chosen, record.rejected], {"ranks": ranks, "margin": record.margin, "reward": None}
    if isinstance(record, Ranking):
        order = sorted(range(len(record.ranks)), key=record.ranks.__getitem__)
        ranks = [record.ranks[i] for i in order]
        return [record.completions[i] for i in order], {"ranks": ranks, "margin": 0.0, "reward": None}
    return [record.completion], {"ranks": [0.0], "margin": 0.0, "reward": record.reward}


def _against_scores(columns: dict) -> bool:
    """Whether the row has scores of both sides, as UltraFeedback's, and the rejected side's is higher."""
    scores = [(columns.get(chosen), columns.get(rejected)) for chosen, rejected in SCORES]
    known = [pair for pair in scores if all(isinstance(score, int | float) for score in pair)]
    return any(chosen < rejected for chosen, rejected in known)


def _check_rows(rows: list[dict], ranks: list[float]) -> None:
    prompts = {tuple(row["input_ids"][: row["completion_mask"].index(True)]) for row in rows}
    assert len(prompts) == 1, "completions of one group share the prompt's tokens"
    answers = [tuple(row["input_ids"]) for row in rows]
    if len(set(answers)) < len(answers) and len(set(ranks)) > 1:
        raise ValueError("two completions are identical within data.max_length tokens; raise data.max_length")
