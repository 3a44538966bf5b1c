"""reward=language: 1 if a completion is in the required language."""

from evals.benchmarks.ifeval import is_in


def language(prompts: list[str], completions: list[str], *, code: str = "en") -> list[float]:
    """1.0 if langdetect (the extra `eval`) guesses the language with this ISO 639-1 code, else 0.0.

    A completion without letters gets 0.
    """
    return [float(any(map(str.isalpha, completion)) and is_in(completion, code)) for completion in completions]
