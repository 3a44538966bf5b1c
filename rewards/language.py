"""reward=language: 1 if a completion is in the required language."""

from evals.benchmarks.ifeval import check_language, is_in


def language(prompts: list[str], completions: list[str], *, code: str = "en") -> list[float]:
    """1.0 if langdetect (the extra `eval`) guesses the language with this code (such as de or zh-cn), else 0.0.

    A completion without letters gets 0.

    Raises:
        ValueError: langdetect does not know the code.
    """
    check_language(code)
    return [float(any(map(str.isalpha, completion)) and is_in(completion, code)) for completion in completions]
