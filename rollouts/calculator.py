"""A calculator as a tool: the policy may ask for sums before it answers, and is rewarded if its answer is right.

    python train_ppo.py env=rollouts/calculator.py:Calculator data.prompts=[sums.jsonl] ...

A record has a `prompt` and its `answer`. The policy writes <calc>3 * (4 + 5)</calc> and receives 27, as often as
max_turns allows; a turn without <calc> is its answer, whose last number counts. Every call costs a little, so that a
policy that can do without learns to.
"""

import ast
import operator
import re

CALL = re.compile(r"<calc>([^<>]{1,80})</calc>")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PRICE = 0.05  # of a call
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.USub: operator.neg,
}  # fmt: skip


class Calculator:
    """One episode."""

    def reset(self, record: dict) -> list[dict]:
        """The record's own messages."""
        self.answer = float(record["answer"])
        return record["messages"]

    def step(self, messages: list[dict]) -> tuple[list[dict], float, bool]:
        """The result of a call; or the end, and 1 where the answer is right."""
        said = messages[-1]["content"]
        if call := CALL.search(said):
            return [{"role": "tool", "content": calculate(call[1])}], -PRICE, False
        numbers = NUMBER.findall(said)
        return [], float(bool(numbers) and abs(float(numbers[-1]) - self.answer) < 1e-6), True


def calculate(text: str) -> str:
    """The value of a sum of numbers, + - * / and brackets; "error" for anything else. Nothing is executed."""
    try:
        return f"{value_of(ast.parse(text.strip(), mode='eval').body):.10g}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return "error"


def value_of(node: ast.AST) -> float:
    """Raises ValueError for what is no arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError(f"{ast.dump(node)[:80]} is no arithmetic")
