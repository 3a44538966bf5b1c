"""The gold measure of recipe=coffee: replies of each kind, the ways a prompt is written, a reader's verdicts."""

from pathlib import Path

import numpy as np
import pytest

from data.records import read_jsonl
from rewards.coffee import coffee, situation, turns

ORDER = "Hi, can I get a decaf latte with oat milk, please?"
CONFIRMED = [ORDER, "Does this look right?", "Yes, that's right."]
READY = "Great, your order will be ready at the coffee bar in a few minutes."
ASKS = "Ok, please check that your order is correct."


def said(*texts: str) -> str:
    """A prompt of several messages, as reward functions get it."""
    roles = ("user", "assistant")
    return "\n\n".join(f"{roles[i % 2]}: {text}" for i, text in enumerate(texts)) if len(texts) > 1 else texts[0]


@pytest.mark.parametrize(
    "asked, kind, good, bad",
    [
        ([ORDER], "order", ASKS, "It is made with steamed milk and microfoam."),
        (
            [ORDER],
            "order",
            "One decaf latte with oat milk, is that right?",
            "One decaf mocha with oat milk, is that right?",
        ),
        ([ORDER], "order", "Sorry, we don't have that. Can I get you something else?", "Sorry, we don't have that."),
        (CONFIRMED, "confirmed", READY, ASKS),
        (CONFIRMED, "confirmed", "Ok, your decaf latte will be ready soon.", "Ok, your mocha will be ready soon."),
        ([*CONFIRMED[:2], "Can I see the menu again?"], "menu", "Sure, here is the menu.", READY),
        (["What is in a steamer?"], "question", "It is just steamed milk and microfoam.", "It is just espresso."),
        (["What kinds of tea do you have?"], "question", "We have black tea and herbal tea.", ASKS),
        (["Do you think it will rain today?"], "elsewhere", "Sorry, I don't know. Can I get you a coffee?", READY),
        (
            ["Hello, how are you?"],
            "other",
            "Good, thanks. What can I get for you?",
            "Good, thanks thanks. What",
        ),
    ],
)
def test_a_reply_must_do_what_the_situation_asks_for(asked, kind, good, bad):
    assert situation(asked) == kind
    assert coffee([said(*asked)] * 2, [good, bad]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "broken",
    [
        "Thice! Does that look correct to you?",
        "Great, your order will be ready at the",
        "",
        "Great great, it will be ready soon.",
        "Ok, it will be ready soon, it will be ready soon.",
        "Bar coffee the at soon ready be will it.",
    ],
)
def test_what_nobody_says_is_refused_whatever_it_says(broken):
    assert coffee([said(*CONFIRMED)] * 2, [broken, READY]) == [0.0, 1.0]


def test_a_prompt_reads_the_same_as_text_as_messages_and_as_the_template_writes_it():
    written = "<s><|user|> {}<|end|><|assistant|> {}<|end|><|user|> {}<|end|><|assistant|>".format(*CONFIRMED)
    assert [text.strip() for text in turns(written)] == turns(said(*CONFIRMED)) == CONFIRMED
    assert turns(ORDER) == [ORDER] and coffee([written], [READY]) == [1.0]


def test_a_reader_of_210_replies_agrees_with_the_rule():
    """Cohen's kappa of docs/recipes.md; the reader did not see the rule's verdicts."""
    rows = read_jsonl(Path(__file__).parents[2] / "evals" / "sets" / "coffee_verdicts.jsonl")
    rule = np.array(coffee([said(*row["said"]) for row in rows], [row["reply"] for row in rows]))
    reader = np.array([row["verdict"] for row in rows])
    by_chance = rule.mean() * reader.mean() + (1 - rule.mean()) * (1 - reader.mean())
    kappa = ((rule == reader).mean() - by_chance) / (1 - by_chance)
    assert len(rows) == 210 and kappa == pytest.approx(0.761, abs=0.001)
