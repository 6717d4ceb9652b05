"""What shows a run while it trains: metrics.jsonl, curve.png, and TensorBoard's event files."""

import argparse
import shutil
from collections.abc import Callable
from typing import Any

from analysis import plots
from files import run_folder
from files.disk import UserError
from files.machine import Ranks

Points = list[dict[str, Any]]


def require_tensorboard() -> None:
    """Raise UserError where --tensorboard cannot work, before anything is computed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from None


def make_recorder(
    args: argparse.Namespace, points: Points, ranks: Ranks
) -> Callable[[Points], None]:
    """A function that adds new points to `points` and, on the first rank, to the files of the run.

    The event files are written anew from `points`, those of the checkpoint that a run continues
    from, because an interrupted run leaves later points in them.
    """
    writer = None
    if args.tensorboard and ranks.is_first:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(args.out / "tensorboard", ignore_errors=True)
        # a TensorBoard that is open forgets the points that it has read
        writer = SummaryWriter(args.out / "tensorboard", purge_step=0)

    def write_events(new_points: Points) -> None:
        for point in new_points if writer else []:
            for name in point.keys() - {"step"}:
                writer.add_scalar(name, point[name], point["step"])

    def record(new_points: Points) -> None:
        points.extend(new_points)
        if not new_points or not ranks.is_first:
            return
        run_folder.append_metrics(args.out, new_points)
        write_events(new_points)
        if any("validation_loss" in point for point in new_points):
            plots.loss_curve(points, args.out / "curve.png")
            if writer:
                writer.flush()

    write_events(points)
    return record
