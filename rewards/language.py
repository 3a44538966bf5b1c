"""reward=language: 1 where a completion is written in the wanted language."""

from evals.benchmarks.ifeval import is_in


def language(prompts: list[str], completions: list[str], *, code: str = "en") -> list[float]:
    """1.0 where langdetect (the extra `eval`) guesses the language with this ISO 639-1 code, else 0.0.

    A completion without letters is in no language and gets 0.
    """
    return [float(any(map(str.isalpha, completion)) and is_in(completion, code)) for completion in completions]
