"""The items that a judge gets: a question, its answers, their order and the prompt."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from data.records import Verdict
from evals.prompts import NEED_REFERENCE, Template, pair_fields, single_fields
from evals.verdicts import OTHER, text_hash


@dataclass(frozen=True)
class Item:
    """An item for the judge: the answers of model a and, in pairs, of model b. `shown` is the side shown first."""

    question: dict
    turn: int
    models: tuple[str, ...]
    answers: tuple[list[str], ...]  # up to and including this turn
    reference: list[str] | None
    shown: str = "a"

    @property
    def name(self) -> str:
        """The item's name in messages."""
        return (
            f"question {self.question['question_id']} with {'both answers' if len(self.models) > 1 else 'its answer'}"
        )

    @property
    def asked(self) -> list[str]:
        """The user's turns up to and including this one."""
        return self.question["turns"][: self.turn]


def make_items(questions: list[dict], answers: dict, references: dict, task: DictConfig) -> list[Item]:
    """The items of all questions, turns, pairs (or models) and orders. The outermost loop is over questions.

    Raises:
        ValueError: unknown models, too few of them, or a model without an answer to a question.
    """
    models = list(task.models or answers)
    baselines = task.baseline if isinstance(task.baseline, Mapping | DictConfig) else {"default": task.baseline}
    known = [name for name in baselines.values() if name is not None]
    unknown = [name for name in [*models, *known] if name not in answers]
    if unknown:
        raise ValueError(f"task.answers has no answers of {', '.join(unknown)}; it has those of {', '.join(answers)}")
    items = []
    for question in questions:
        groups = _groups(models, baselines.get(question["category"], baselines.get("default")), task.mode)
        for turn in range(1, min(len(question["turns"]), task.turns) + 1):
            for group in groups:
                texts = tuple(_said(answers, model, question, turn) for model in group)
                reference = references.get(question["question_id"])
                items += [
                    Item(question, turn, group, texts, reference, shown)
                    for shown in _orders(question, turn, group, task)
                ]
    if not items:
        raise ValueError(f"task.mode={task.mode} needs answers of two models, found {', '.join(models)}")
    return items


def _groups(models: list[str], baseline: str | None, mode: str) -> list[tuple[str, ...]]:
    """The models of each item: one model to be graded, the baseline and another model, or every pair."""
    if mode != "pairwise":
        return [(model,) for model in models]
    if baseline is not None:
        return [(baseline, model) for model in models if model != baseline]
    return list(itertools.combinations(models, 2))


def _orders(question: dict, turn: int, group: tuple[str, ...], task: DictConfig) -> tuple[str, ...]:
    """The sides shown first: a and b, or with `both_orders=false` one of them, drawn by question and pair."""
    if task.mode != "pairwise":
        return ("a",)
    if task.both_orders:
        return ("a", "b")
    drawn = text_hash(f"{task.get('seed')} {question['question_id']} {turn} {' '.join(sorted(group))}")
    first = sorted(group)[int(drawn, 16) % 2]
    return ("a" if first == group[0] else "b",)


def _said(answers: dict, model: str, question: dict, turn: int) -> list[str]:
    turns = answers[model].get(question["question_id"]) or answers[model].get(question["turns"][0])
    if turns is None or len(turns) < turn:
        raise ValueError(
            f"{model} has no answer to question {question['question_id']}, turn {turn}; answer all questions with "
            "evaluate.py task=answer, or set task.turns=1"
        )
    return turns[:turn]


def choose_template(item: Item, templates: dict[tuple, Template]) -> Template:
    """The template for the item's turn. Math, reasoning and coding prefer one with a reference answer."""
    needs = item.question["category"] in NEED_REFERENCE and len(item.reference or []) >= item.turn
    keys = [(item.turn, wanted, *own) for wanted in (needs, False) for own in ((item.question["category"],), ())]
    template = next((templates[key] for key in keys if key in templates), None)
    if template is None:
        raise ValueError(f"there is no template for turn {item.turn}; set task.turns=1, or judge.template=fastchat")
    return template


def item_messages(item: Item, template: Template) -> list[dict[str, str]]:
    """The conversation for one item. The answer that is shown first is answer A."""
    if len(item.models) == 1:
        return template.messages(single_fields(item.asked, item.answers[0], item.reference))
    first, second = item.answers if item.shown == "a" else item.answers[::-1]
    return template.messages(pair_fields(item.asked, first, second, item.reference))


def check_fits(names: Sequence[str], lengths: Sequence[int], window: int, suggestion: str) -> None:
    """Raise ValueError, with counts, if prompts are longer than the window. Prompts are never cut.

    Args:
        names: names of the prompts for the message. lengths: in tokens. suggestion: the setting to raise.
    """
    too_long = [i for i, length in enumerate(lengths) if length > window]
    if too_long:
        raise ValueError(
            f"{names[too_long[0]]} is longer than {window} tokens, as are {len(too_long)} of {len(lengths)} prompts "
            f"(the longest takes {max(lengths)}); a judge must read the whole prompt: raise {suggestion}, or shorten "
            "answers"
        )


def pair_verdict(item: Item, judge: str, text: str, outcome: tuple[str, float], shown: str | None) -> Verdict:
    """The verdict on a pair. `outcome` refers to the answers in the order shown, and is mapped back to a and b."""
    verdict, weight = outcome
    answers = ["\n".join(answer) for answer in item.answers]
    return Verdict(
        question=item.question["question_id"],
        model_a=item.models[0],
        model_b=item.models[1],
        verdict=OTHER.get(verdict, verdict) if shown == "b" else verdict,
        judge=judge,
        turn=item.turn,
        category=item.question["category"],
        shown=shown,
        weight=weight,
        length_a=len(answers[0]),
        length_b=len(answers[1]),
        hash_a=text_hash(answers[0]),
        hash_b=text_hash(answers[1]),
        text=text,
    )
