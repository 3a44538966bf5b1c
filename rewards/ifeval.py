"""reward=ifeval: whether a completion follows the prompt's instructions that a program can verify."""

from evals.benchmarks.ifeval import check_answer


def ifeval(
    prompts: list[str],
    completions: list[str],
    instruction_id_list: list,
    kwargs: list,
    *,
    strict: bool = True,
    partial: bool = False,
) -> list[float | None]:
    """1.0 if every instruction is followed, else 0.0. None if the record has no instructions.

    Args:
        instruction_id_list, kwargs: IFEval's columns (Zhou et al. 2023, arXiv:2311.07911).
        strict: True: the official strict accuracy; False: the loose one.
        partial: True: the reward is the share of instructions that are followed.
    """
    rewards: list[float | None] = []
    for completion, names, given in zip(completions, instruction_id_list, kwargs, strict=True):
        if not names:
            rewards.append(None)
            continue
        hits = check_answer(names, given, completion)[0 if strict else 1]
        rewards.append(sum(hits) / len(hits) if partial else float(all(hits)))
    return rewards
