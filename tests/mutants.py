"""One-line faults, and whether the tests see them: `make mutants`, or `python tests/mutants.py [words]` for some.

Each line of mutants.tsv is a fault: file, what stands there once, what takes its place, the tests that have to fail. It
is put into a copy of the project, the tests run in a process forked from one that has imported the libraries, and the
line is put back. docs/mutants.md gets a row for every fault; those that were not run keep what the page says of them.
Exit code 1: more than 5 % survive, or a line does not fit.
"""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 400  # of CPU for the tests of one fault, and four times as many by the clock; what never ends is found too
MOST = 0.05  # of the faults may survive
LIBRARIES = ("torch", "hydra", "pandas", "scipy.stats", "statsmodels.api", "sklearn.linear_model", "transformers")


def read_faults(words: list[str]) -> list[list[str]]:
    """[file, before, after, tests, reason why it may live] of every line that holds one of the words."""
    lines = (ROOT / "tests" / "mutants.tsv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    faults = [(row + [""])[:5] for row in rows if row and not row[0].startswith("#")]
    return [fault for fault in faults if not words or any(word in "\t".join(fault) for word in words)]


def copy_project(place: Path) -> None:
    """The files that git knows, and those it would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)


def tests_fail(place: Path, tests: str) -> bool:
    """Whether these tests (words of pytest) fail in the copy, in a child that has the libraries already."""
    child = os.fork()
    if not child:
        import pytest

        if tests.endswith("-m interpreter"):
            os.environ["TRITON_INTERPRET"] = "1"  # read as a kernel is defined
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(4 * SECONDS)
        os.chdir(place)
        sys.path.insert(0, str(place))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        words = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={place}", "-m", "not gpu", *shlex.split(tests)]
        os._exit(int(pytest.main(words)))  # the last -m rules
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1, 2, -signal.SIGALRM, -signal.SIGPROF):  # 1: a test failed, 2: one could not be collected
        raise SystemExit(f"pytest {tests}: exit code {code}; the tests that the line names do not run")
    return code != 0


def try_fault(place: Path, fault: list[str], sound: dict[str, bool]) -> str:
    """killed, survived, or what is wrong with the line."""
    name, before, after, tests, _ = fault
    path = place / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(before) != 1 or before == after:
        return f"stale: {text.count(before)} times in {name}"
    if tests not in sound:
        sound[tests] = not tests_fail(place, tests)
    if not sound[tests]:
        return "its tests fail without the fault"
    path.write_text(text.replace(before, after), encoding="utf-8")
    try:
        return "killed" if tests_fail(place, tests) else "survived"
    finally:
        path.write_text(text, encoding="utf-8")


def write_table(results: list[tuple[list[str], str]]) -> None:
    """docs/mutants.md: every fault and what became of it, now or when it was last run."""
    page = ROOT / "docs" / "mutants.md"
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    outcomes = dict(line.removesuffix(" |").rsplit(" | ", 1) for line in lines if line.startswith("| `"))
    outcomes |= {head_of(fault): outcome for fault, outcome in results}
    faults = read_faults([])
    known = [outcomes.get(head_of(fault), "not run").partition(":")[0] for fault in faults]
    rows = [
        f"{head_of(fault)} | {outcome}{': ' + fault[4] if fault[4] else ''} |"
        for fault, outcome in zip(faults, known, strict=True)
    ]
    head = (
        "# One-line faults that the tests see\n\n"
        "`make mutants` puts each fault of `tests/mutants.tsv` into a copy and runs the tests that are to see it; with "
        "`ARGS=data/` those whose line holds that word.\n"
        f"Of {len(faults)} faults {known.count('killed')} were killed, {known.count('survived')} survived, "
        f"{known.count('not run')} were not run. Last run {time.strftime('%Y-%m-%d')}, 2 cores.\n\n"
        "| file | stands there | fault | |\n|---|---|---|---|\n"
    )
    page.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


def head_of(fault: list[str]) -> str:
    """A fault's row of the table, without what became of it."""
    name, before, after = fault[:3]
    return f"| `{name}` | `{escape(before)}` | `{escape(after)}`"


def escape(text: str) -> str:
    return text.replace("|", "\\|").strip()


def main(words: list[str]) -> int:
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for module in LIBRARIES:
        __import__(module)
    sys.path = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
    results, sound = [], {}
    with tempfile.TemporaryDirectory() as directory:
        copy_project(Path(directory))
        for fault in read_faults(words):
            outcome = try_fault(Path(directory), fault, sound)
            results.append((fault, outcome))
            print(f"{outcome:10s} {fault[0]}: {fault[1].strip()}  ->  {fault[2].strip()}", flush=True)
    survivors, wrong = (
        sum(outcome == "survived" for _, outcome in results),
        sum(outcome not in ("killed", "survived") for _, outcome in results),
    )
    print(f"{len(results)} faults, {survivors} survived, {wrong} lines do not fit")
    write_table(results)
    return int(wrong > 0 or survivors > MOST * len(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
