"""A calculator as a tool. The policy may use it before it answers, and gets a reward if its answer is right.

    python train_ppo.py env=rollouts/calculator.py:Calculator data.prompts=[sums.jsonl] ...

A record has a `prompt` and its `answer`. The policy writes <calc>3 * (4 + 5)</calc> and receives 27, at most max_turns
times. A turn without <calc> is its answer, of which the last number counts. Every call costs a little, so that a policy
that does not need calls learns to avoid them.
"""

import ast
import operator
import re
from collections.abc import Callable

CALL = re.compile(r"<calc>([^<>]{1,80})</calc>")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PRICE = 0.05  # cost of a call
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Calculator:
    """One episode."""

    def reset(self, record: dict) -> list[dict]:
        """The messages of the record."""
        self.answer = float(record["answer"])
        return record["messages"]

    def step(self, messages: list[dict]) -> tuple[list[dict], float, bool]:
        """The result of a call. At the end no messages, and the reward 1 if the answer is right."""
        text = messages[-1]["content"]
        if call := CALL.search(text):
            return [{"role": "tool", "content": calculate(call[1])}], -PRICE, False
        numbers = NUMBER.findall(text)
        return [], float(bool(numbers) and abs(float(numbers[-1]) - self.answer) < 1e-6), True


def calculate(text: str) -> str:
    """The value of numbers with + - * / and brackets, or "error" for any other text. Nothing is executed."""
    try:
        return f"{value_of(ast.parse(text.strip(), mode='eval').body):.10g}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return "error"


def value_of(node: ast.AST) -> float:
    """The value of the tree. Raises ValueError if it is not arithmetic."""
    if isinstance(node, ast.Constant) and (type(node.value) is int or type(node.value) is float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError(f"{ast.dump(node)[:80]} is not arithmetic")
