"""reward=code: whether a completion's code passes unit tests."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from evals.benchmarks.sandbox import passes_tests, program_of


class Code:
    """1.0 if a completion's code passes the tests, else 0.0. None if the record has no tests.

    Columns: `test` and `entry_point` (HumanEval; the prompt's text is put before a function body), or `test_list` (the
    asserts of MBPP).

    Args:
        run_code: must be true, because code of a model runs in a process with limits, which does not fully isolate it.
        seconds, megabytes: limits of one program. max_parallel: number of programs that run at the same time.
    """

    def __init__(self, run_code: bool = False, seconds: float = 5.0, megabytes: int = 1024, max_parallel: int = 4):
        if run_code is not True:
            raise ValueError("reward=code runs code of the policy; set run_code: true on a machine that you can lose")
        self.passes = partial(passes_tests, seconds=float(seconds), megabytes=int(megabytes))
        self.max_parallel = max_parallel

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        test: list | None = None,
        entry_point: list | None = None,
        test_list: list | None = None,
    ) -> list[float | None]:
        if test_list is None and (test is None or entry_point is None):
            raise ValueError("no prompt has the columns test and entry_point (HumanEval), or test_list (MBPP)")

        def passes(row: int) -> float | None:
            tests = (column[row] if column else None for column in (test, entry_point, test_list))
            program = program_of(prompts[row], completions[row], *tests)
            return None if program is None else float(self.passes(program))

        with ThreadPoolExecutor(self.max_parallel) as pool:
            return list(pool.map(passes, range(len(completions))))
