"""Counts the steps of a run that are skipped, and says when a run should end."""

import math
from typing import Any

import numpy as np


class StepMonitor:
    """Counts skipped steps, and reports spikes of the loss.

    A step whose loss or gradient norm is not finite is skipped (`optim.update_weights`); after
    several in a row the run should end. A GradScaler may halve its 2**16 at 16 skipped steps before
    the gradients fit.

    A spike is a loss more than 6 standard deviations above the mean of the recent losses, which
    the noise of batches does not reach, and more than 0.1 above it, for losses that hardly vary.
    """

    N_RECENT = 100
    MIN_RECENT = 20

    def __init__(self, has_scaler: bool = False):
        self.patience = 5 + 16 * has_scaler
        self.recent_losses: list[float] = []
        self.n_spikes = 0
        self.n_skipped = 0
        self.n_skipped_in_a_row = 0

    @property
    def gave_up(self) -> bool:
        return self.n_skipped_in_a_row >= self.patience

    def check(self, loss: float, grad_norm: float) -> str:
        """Count a step; return a message about it, empty for a normal one."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.n_skipped += 1
            self.n_skipped_in_a_row += 1
            return f"loss {loss}, gradient norm {grad_norm}: skipped"

        self.n_skipped_in_a_row = 0
        recent = self.recent_losses
        self.recent_losses = [*recent[1 - self.N_RECENT :], loss]
        if len(recent) < self.MIN_RECENT:
            return ""
        mean = float(np.mean(recent))
        if loss <= mean + max(6 * float(np.std(recent)), 0.1):
            return ""
        self.n_spikes += 1
        return f"loss spike: {loss:.3f}, after a mean of {mean:.3f} in the steps before"

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.gave_up:  # a run that is resumed behind these steps has its patience again
            self.n_skipped_in_a_row = 0
