"""reward={name: judge, client: {...}}: another model's verdict on a completion."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from evals.judge import grade_of, read_answer
from evals.judge_items import Item, choose_template, item_messages, pair_verdict
from evals.prompts import load_templates, parser_of
from evals.verdicts import text_hash
from generation.build_client import client_of
from runtime.config import check_choice
from runtime.metrics import append_row

POINTS = {"a": 0.0, "tie": 0.5, "b": 1.0}


class Judge:
    """A grade from 1 to 10, or whether a completion beats a baseline: 1, 0.5 or 0, the mean of both orders.

    None if a verdict cannot be read. Pairs are stored in directory/verdicts.jsonl, which `evaluate.py task=audit
    task.format=verdicts` reads, and grades in grades.jsonl. A model of a pair is named by its completion's hash.

    Args:
        directory: for the verdicts and the client's answers. client: the judge (`client_of`).
        mode: single, or pairwise, which compares with the column `baseline`, another answer to the prompt.
        template, rule, max_tokens, temperature: as in conf/judge/llm.yaml. seed: seed of the judge's sampling.
    """

    def __init__(
        self,
        directory: Path,
        client: dict,
        mode: str = "single",
        template: str = "fastchat",
        rule: str = "last",
        max_tokens: int = 2048,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        check_choice("judge.mode", mode, ("single", "pairwise"))
        self.directory, self.pairwise = directory, mode == "pairwise"
        self.templates = load_templates(template, mode)
        self.parsers = parser_of(rule, self.templates)
        self.client = client_of(client, directory)
        self.sample = partial(self.client.ask, temperature=temperature, max_tokens=max_tokens, seed=seed)

    def __call__(self, prompts: list[str], completions: list[str], baseline: list | None = None) -> list[float | None]:
        if self.pairwise and baseline is None:
            raise ValueError("mode: pairwise compares with the column baseline, which no prompt has")
        return self.compare(prompts, completions, baseline) if self.pairwise else self.grade(prompts, completions)

    def compare(self, prompts: list[str], completions: list[str], baseline: list) -> list[float | None]:
        """The share of both orders in which the completion wins. None without a baseline or a readable verdict."""
        rows = [row for row, text in enumerate(baseline) if text is not None]
        items = [
            Item(
                question(prompts[row]),
                1,
                ("baseline", model_of(completions[row])),
                ([baseline[row]], [completions[row]]),
                None,
                shown,
            )
            for row in rows
            for shown in ("a", "b")
        ]
        points: dict[int, list[float | None]] = {row: [] for row in rows}
        for row, item, (answer, reading) in zip([r for r in rows for _ in "ab"], items, self.ask(items), strict=True):
            text = answer.text or answer.error
            verdict = pair_verdict(item, self.client.model, text, (reading.verdict, reading.weight), item.shown)
            append_row(self.directory / "verdicts.jsonl", asdict(verdict))
            points[row].append(POINTS.get(verdict.verdict))
        mean = {row: None if None in both else sum(both) / 2 for row, both in points.items()}
        return [mean.get(row) for row in range(len(completions))]

    def grade(self, prompts: list[str], completions: list[str]) -> list[float | None]:
        """The grades, 1 to 10."""
        pairs = zip(prompts, completions, strict=True)
        items = [Item(question(prompt), 1, (model_of(text),), ([text],), None) for prompt, text in pairs]
        grades = []
        for item, (answer, reading) in zip(items, self.ask(items), strict=True):
            grades.append(float(reading.weight) if reading.verdict == "grade" else None)
            about = {"question": item.question["question_id"], "model": item.models[0], "judge": self.client.model}
            append_row(
                self.directory / "grades.jsonl", about | {"grade": grades[-1], "text": answer.text or answer.error}
            )
        return grades

    def ask(self, items: list[Item]) -> list[tuple]:
        """(the judge's answer, the parser of its verdict) for every item."""
        chosen = [choose_template(item, self.templates) for item in items]
        talks = [item_messages(item, template) for item, template in zip(items, chosen, strict=True)]
        answers = self.sample(talks) if talks else []
        parsers = [self.parsers[template.output_format] for template in chosen]
        parsers = parsers if self.pairwise else [grade_of(parser) for parser in parsers]
        return [(answer, read_answer(answer, parser)) for answer, parser in zip(answers, parsers, strict=True)]


def question(prompt: str) -> dict:
    """The prompt as a question of the judge's items."""
    return {"question_id": text_hash(prompt), "category": None, "turns": [prompt]}


def model_of(completion: str) -> str:
    """The name of the model that gave this completion. A policy in training is another model each time."""
    return f"policy {text_hash(completion)}"
