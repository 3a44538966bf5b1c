"""The rollout of the next step, drawn by a server while this step's is learned (engine.ahead=1).

The policy that draws it is as old as the step that is being learned, so from the second step on every rollout is one
step off-policy: `policy/staleness` says so, and `correct_for_sampler` weighs it.
"""

from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch

from data.loader import Loader
from model.heads import Policy
from rollouts.trajectory import Trajectory


class Ahead:
    """The rollouts of an engine, one for each step. With `enabled` the next step's is drawn during this step."""

    def __init__(self, engine, enabled: bool):
        self.engine, self.enabled = engine, enabled
        self.pending: Future[Trajectory] | None = None  # of the step to come

    def next(self, policy: Policy, prompts: Loader, samples_per_prompt: int, *, step: int, is_last: bool) -> Trajectory:
        """The rollout of this step; where one is drawn ahead, the next is begun by the policy as it is now.

        Which prompts and which seeds a step has does not depend on when it is drawn.
        """
        rollout = self.pending.result() if self.pending else None
        with self.engine.ready(policy):
            if rollout is None:
                rollout = self.engine.rollout(policy, next(prompts), step=step, samples_per_prompt=samples_per_prompt)
            self.pending = None
            if self.enabled and not is_last:
                self.pending = begin(self.draw, policy, next(prompts), samples_per_prompt, step)
        return rollout

    def draw(self, policy: Policy, prompts: list[dict], samples_per_prompt: int, step: int) -> Trajectory:
        """The rollout of the step after `step`, drawn by the policy of `step`."""
        with torch.no_grad():
            rollout = self.engine.rollout(policy, prompts, step=step + 1, samples_per_prompt=samples_per_prompt)
        rollout.step = step
        return rollout

    def wait(self) -> None:
        """Until nothing is being drawn. What went wrong is raised by the step that wants the rollout."""
        if self.pending is not None:
            self.pending.exception()

    def state_dict(self) -> dict[str, Any]:
        """The rollout under way, when it has come: its policy is gone when the run goes on."""
        pending = self.pending and self.pending.result().state_dict()
        return {"pending": pending, "world_size": self.engine.run.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["pending"] is None:
            return
        if state["world_size"] != self.engine.run.world_size:
            raise ValueError(
                f"the checkpoint holds a rollout that {state['world_size']} ranks drew ahead, and this run has "
                f"{self.engine.run.world_size}; go on with as many"
            )
        self.pending = Future()
        self.pending.set_result(Trajectory.from_state(state["pending"], self.engine.run.device))


def begin(call, *args) -> Future:
    """The call's result to come, from a thread that ends with the process."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future
