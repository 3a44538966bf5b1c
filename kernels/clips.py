"""The clip ranges of PPO's loss, for its definition and its kernel."""

from typing import NamedTuple


class Clips(NamedTuple):
    """Clip ranges, where None means no clip, and value_coef, the weight of the value loss beside the policy loss."""

    policy: float
    dual: float | None
    value: float | None
    value_coef: float
    policy_high: float | None = None  # for the upper bound; None: as for the lower one
