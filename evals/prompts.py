"""The judge's prompts: which template an item gets, and how a verdict is read from what the judge wrote."""

import re
from dataclasses import dataclass
from pathlib import Path

from evals.readers import read_rows

HERE = Path(__file__).parent / "templates"
NEED_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
STRONG = {"[[A>>B]]": ("a", 3.0), "[[A>B]]": ("a", 1.0), "[[A=B]]": ("tie", 1.0), "[[B>A]]": ("b", 1.0)}
STRONG["[[B>>A]]"] = ("b", 3.0)


@dataclass(frozen=True)
class Template:
    """One prompt: `{question}`, `{answer_a}` and so on are filled in; `output_format` says how a verdict looks."""

    name: str
    system: str
    text: str
    output_format: str  # [[A]] | [[A>>B]] | rank | m for pairs, [[rating]] for one answer

    def messages(self, fields: dict[str, str]) -> list[dict[str, str]]:
        """The conversation that the judge gets. Braces inside of questions and answers stay as they are."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text.format(**fields)}]


def load_templates(name: str, mode: str) -> dict[tuple[int, bool], Template]:
    """{(turn, with reference): template} of a set of ours (fastchat, alpaca_eval, alpaca_eval_clf, short) or a file.

    A file has one JSON object a line: name, type (pairwise | single), system_prompt, prompt_template, output_format.
    "multi-turn" in its name makes it the second turn's, a {ref_answer_1} in its text the one with references.

    Raises:
        ValueError: no such set, or it has no template of this mode.
    """
    ours = HERE / f"{name}.jsonl"
    if not ours.exists() and not Path(name).is_file():
        known = ", ".join(sorted(path.stem for path in HERE.glob("*.jsonl")))
        raise ValueError(f"judge.template={name!r} is neither a file nor one of ours: {known}")
    templates: dict[tuple[int, bool], Template] = {}
    for where, row in read_rows(str(ours if ours.exists() else name)):
        missing = [
            key for key in ("name", "type", "system_prompt", "prompt_template", "output_format") if key not in row
        ]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        if row["type"] != mode:
            continue
        turn = 2 if "multi-turn" in row["name"] else 1
        key = turn, "{ref_answer_1}" in row["prompt_template"]
        if key in templates:
            raise ValueError(f"{where}: {row['name']} and {templates[key].name} serve the same turn; keep one")
        parts = (row[key] for key in ("name", "system_prompt", "prompt_template", "output_format"))
        templates[key] = Template(*parts)
        if templates[key].output_format not in PARSERS:
            raise ValueError(
                f"{where}: output_format must be one of {', '.join(PARSERS)}, got {row['output_format']!r}"
            )
    if (1, False) not in templates:
        raise ValueError(f"judge.template={name} has no {mode} template for a first turn without reference")
    return templates


def read_letter(text: str) -> tuple[str, float]:
    """FastChat's rule: the first of [[A]], [[B]], [[C]] in this order that occurs anywhere, else an error."""
    for mark, verdict in (("[[A]]", "a"), ("[[B]]", "b"), ("[[C]]", "tie")):
        if mark in text:
            return verdict, 1.0
    return "error", 1.0


def read_strength(text: str) -> tuple[str, float]:
    """arena-hard's verdicts; a strong one weighs three. Two different ones are an error."""
    found = {mark for mark in STRONG if mark in text}
    return STRONG[found.pop()] if len(found) == 1 else ("error", 1.0)


def read_rank(text: str) -> tuple[str, float]:
    """AlpacaEval's list of {'model': model_1 | model_2, 'rank': 1 | 2}."""
    ranks = re.findall(r"['\"]model['\"]:\s*['\"]?(model_[12])['\"]?,\s*['\"]rank['\"]:\s*(\d{1,9})\b", text)
    by_model = {model: int(rank) for model, rank in ranks}
    if len(ranks) != 2 or set(by_model) != {"model_1", "model_2"} or by_model["model_1"] == by_model["model_2"]:
        return "error", 1.0
    return ("a" if by_model["model_1"] < by_model["model_2"] else "b"), 1.0


def read_identifier(text: str) -> tuple[str, float]:
    """AlpacaEval's one token: m or M."""
    return {"m": "a", "M": "b"}.get(text.strip(" \n.\"'`"), "error"), 1.0


def read_rating(text: str) -> float | None:
    """FastChat's rule: the number in [[..]], else in [..]; None where there is none or it is not in 1..10."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    rating = float(match.group(1)) if match else None
    return rating if rating is not None and 1 <= rating <= 10 else None


PARSERS = {
    "[[A]]": read_letter,
    "[[A>>B]]": read_strength,
    "rank": read_rank,
    "m": read_identifier,
    "[[rating]]": read_rating,
}


def pair_fields(question: list[str], answer_a: list[str], answer_b: list[str], reference: list[str] | None) -> dict:
    """What a pairwise template of any turn may ask for; lists hold one text a turn."""
    fields = {"question": question[0], "answer_a": answer_a[0], "answer_b": answer_b[0]}
    named = {"question": question, "answer_a": answer_a, "answer_b": answer_b, "ref_answer": reference or []}
    return fields | {f"{name}_{i}": text for name, texts in named.items() for i, text in enumerate(texts, 1)}


def single_fields(question: list[str], answer: list[str], reference: list[str] | None) -> dict:
    """What a grading template of any turn may ask for."""
    named = {"question": question, "answer": answer, "ref_answer": reference or []}
    fields = {f"{name}_{i}": text for name, texts in named.items() for i, text in enumerate(texts, 1)}
    return fields | {"question": question[0], "answer": answer[0]}
