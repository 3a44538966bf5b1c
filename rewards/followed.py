"""reward=followed: reward=ifeval for answers that say something of their own. The gold measure of recipe=smollm2.

IFEval's check alone is easy to satisfy without an answer: "Do not use commas." has no comma.
"""

from rewards.ifeval import ifeval

MIN_WORDS = 6
MOST_COPIED = 0.5  # of an answer's runs of three words: those that stand in the prompt, or stood before in the answer


def followed(prompts: list[str], completions: list[str], instruction_id_list: list, kwargs: list) -> list[float | None]:
    """1.0 if every instruction is followed by an answer, else 0.0. None if the record has no instructions.

    An answer has at least MIN_WORDS words, and at most MOST_COPIED of its runs of three words are copied.
    """
    scores = ifeval(prompts, completions, instruction_id_list, kwargs)
    return [
        score and float(is_answer(prompt, completion))
        for prompt, completion, score in zip(prompts, completions, scores, strict=True)
    ]


def is_answer(prompt: str, completion: str) -> bool:
    """Whether a completion is long enough and mostly made of new runs of words, in any case and punctuation."""
    in_prompt, runs = set(runs_of_words(prompt)), runs_of_words(completion)
    copied = sum(run in in_prompt or run in runs[:i] for i, run in enumerate(runs))
    return len(runs) >= MIN_WORDS - 2 and copied <= MOST_COPIED * len(runs)


def runs_of_words(text: str) -> list[tuple[str, ...]]:
    """The runs of three words of a text, without case and punctuation."""
    words = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return list(zip(words, words[1:], words[2:], strict=False))
