"""Find the Python code in an answer of a model, and what it needs of the prompt."""

import ast
import re
import textwrap

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+.#-]*)[^\n`]*\n(?P<code>.*?)"
    r"(?:^[ \t]*(?P=mark)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
PYTHON = ("python", "python3", "py", "py3")
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)


def code_of(answer: str) -> str:
    """The code of an answer: its blocks that are marked as Python, else its unmarked blocks, else the whole answer.

    Blocks of other languages, and blocks that are not Python beside others that are (an output, a session with >>>), do
    not count. A block that the token limit cuts goes to the end of the answer.
    """
    blocks: dict[str, list[str]] = {}
    for found in FENCE.finditer(answer.replace("\r\n", "\n")):
        code = re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        blocks.setdefault(found["language"].lower(), []).append(code)
    named = [code for language in PYTHON for code in blocks.get(language, [])]
    chosen = named or blocks.get("", [])
    chosen = [code for code in chosen if _tree(code)] or chosen
    return "\n".join(chosen) if chosen else answer


def needs_of(prompt: str, entry_point: str) -> str:
    """The prompt's imports and helpers before the function `entry_point`. Empty if they are not Python."""
    lines = prompt.replace("\r\n", "\n").split("\n")
    heads = [i for i, line in enumerate(lines) if re.match(rf"\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", line)]
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:import|from|def|class|async def)\s", line)]
    if not heads or not starts or starts[0] >= heads[0]:
        return ""
    before = textwrap.dedent("\n".join(lines[starts[0] : heads[0]]))
    tree = _tree(before)
    return f"{before}\n" if tree and all(isinstance(node, DEFINES) for node in tree.body) else ""


def defines(code: str, entry_point: str) -> bool:
    """Whether the code has the head of the function."""
    return re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE) is not None


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
