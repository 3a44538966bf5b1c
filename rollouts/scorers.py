"""Scorers of completions for `make_data.py method=preferences`: a reward model, or a reward function."""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from generation.clients import Conversation
from generation.preferences import Scorer
from rollouts.reward_functions import call_reward, gather_columns, prompt_text
from rollouts.reward_process import RewardProcess


def reward_model_scorer(path: str, *, precision: str, batch_size: int) -> Scorer:
    """Scores by a reward model of ours."""
    from data.chat import encode_completion
    from data.tokenizer import load_tokenizer
    from model.reading import in_batches, read_reward_model
    from runtime.devices import own_device

    tokenizer, model = load_tokenizer(path), read_reward_model(path, precision=precision)
    window = model.config.max_length
    encode = partial(encode_completion, max_length=window, max_prompt_length=window // 2)
    settings = {"pad_id": tokenizer.pad_id, "batch_size": batch_size, "device": own_device()}

    def score(answered: Sequence[tuple[Conversation, str]]) -> list[float]:
        rows = [encode(messages, completion, tokenizer) for messages, completion in answered]
        return in_batches(model.score, rows, **settings).tolist() if rows else []

    return score


def reward_function_scorer(
    spec: str,
    *,
    seconds: float,
    names: Collection[str] = (),
    columns: Callable[[Conversation], dict] = lambda messages: {},
) -> Scorer:
    """Scores by a reward function: a ready one (docs/rewards.md), or a known gold reward.

    Args:
        columns: fields of each prompt's record that the function may read. names: of all of them.
    Raises:
        ValueError: the function needs a field that no record has.
    """
    function = RewardProcess(spec, seconds=seconds, key="method.reward_fn")
    function.check_columns(names)

    def score(answered: Sequence[tuple[Conversation, str]]) -> list[float]:
        prompts = [prompt_text({"messages": messages}) for messages, _ in answered]
        given = gather_columns([{"messages": messages, "columns": columns(messages)} for messages, _ in answered])
        return call_reward(function, prompts, [completion for _, completion in answered], given)

    return score
