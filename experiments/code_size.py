"""The size of code and docs: `python -m experiments.code_size 40e4cb1 HEAD` prints a column for each commit."""

import ast
import subprocess
import sys


def git(*words: str, text: str = "") -> bytes:
    """What git prints."""
    return subprocess.run(["git", *words], input=text.encode(), capture_output=True, check=True).stdout


def read_files(commit: str) -> dict[str, str]:
    """Path -> text of the Python files and the pages of a commit, without data sets."""
    listed = git("ls-tree", "-r", "--name-only", commit).decode().split("\n")
    wanted = [path for path in listed if path.endswith((".py", ".md"))]
    left = git("cat-file", "--batch", text="\n".join(f"{commit}:{path}" for path in wanted))
    files = {}
    for path in wanted:  # "<id> blob <bytes>\n<content>\n"
        head, left = left.split(b"\n", 1)
        size = int(head.split()[-1])
        files[path], left = left[:size].decode(), left[size + 1 :]
    return files


def measure(commit: str) -> dict[str, str]:
    """The rows of the table."""
    files = read_files(commit)
    code = {path: text for path, text in files.items() if path.endswith(".py") and not path.startswith("tests/")}
    tests = [text for path, text in files.items() if path.endswith(".py") and path.startswith("tests/")]
    functions = [
        (node.end_lineno - node.lineno + 1, arguments(node), f"{path}:{node.name}")
        for path, text in code.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)  # they take pointers
    ]
    longest, widest = max(functions), max(functions, key=lambda row: row[1])
    pages = [text for path, text in files.items() if path.startswith("docs/")]
    sentences = [line for text in pages for line in text.splitlines() if not line.startswith("|")]
    return {
        "files of code": f"{len(code):,}",
        "lines of code, without tests": f"{sum(text.count(chr(10)) for text in code.values()):,}",
        "lines of tests": f"{sum(text.count(chr(10)) for text in tests):,}",
        "pages of docs/": f"{len(pages)}",
        "words of docs/": f"{sum(len(text.split()) for text in pages):,}",
        "words of docs/ outside tables": f"{sum(len(line.split()) for line in sentences):,}",
        "functions": f"{len(functions):,}",
        "lines of a function, mean": f"{sum(row[0] for row in functions) / len(functions):.1f}",
        "longest function": f"{longest[0]} ({longest[2]})",
        "arguments of a function, mean": f"{sum(row[1] for row in functions) / len(functions):.2f}",
        "most arguments": f"{widest[1]} ({widest[2]})",
        "functions with more than seven arguments": f"{sum(row[1] > 7 for row in functions)}",
        "`fmt: skip`": f"{sum(text.count('fmt: ' + 'skip') for text in (*code.values(), *tests))}",
    }


def arguments(node) -> int:
    """The number of named arguments, without self."""
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


if __name__ == "__main__":
    columns = [measure(commit) for commit in sys.argv[1:]]
    print(f"| | {' | '.join(sys.argv[1:])} |\n|---|{'---|' * len(columns)}")
    for row in columns[0]:
        print(f"| {row} | {' | '.join(column[row] for column in columns)} |")
