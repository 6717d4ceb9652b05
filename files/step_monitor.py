"""Counts the steps of a run that are skipped, and says when a run should end."""

import math
from typing import Any


class StepMonitor:
    """Counts skipped steps.

    A step whose loss or gradient norm is not finite is skipped (`optim.update_weights`); after
    several in a row the run should end. A GradScaler may halve its 2**16 at 16 skipped steps before
    the gradients fit.
    """

    def __init__(self, has_scaler: bool = False):
        self.patience = 5 + 16 * has_scaler
        self.n_skipped = 0
        self.n_skipped_in_a_row = 0

    @property
    def gave_up(self) -> bool:
        return self.n_skipped_in_a_row >= self.patience

    def check(self, loss: float, grad_norm: float) -> str:
        """Count a step; return a message about it, empty for a normal one."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.n_skipped_in_a_row = 0
            return ""
        self.n_skipped += 1
        self.n_skipped_in_a_row += 1
        return f"loss {loss}, gradient norm {grad_norm}: skipped"

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.gave_up:  # a run that is resumed behind these steps has its patience again
            self.n_skipped_in_a_row = 0
