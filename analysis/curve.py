"""What shows a run while it trains: metrics.jsonl, curve.png, and TensorBoard's event files."""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def recording(
    args: argparse.Namespace, points: Points, ranks: Ranks
) -> Iterator[Callable[[Points], None]]:
    """Yield a function that adds new points to `points` and, on the first rank, to the run's files.

    Args:
        points: Of the checkpoint that the run continues from, which metrics.jsonl already has. The
            event files are written anew: an interrupted run left later points in them.
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
        if not ranks.is_first:
            return
        run_folder.append_metrics(args.out, new_points)
        write_events(new_points)
        if any("validation_loss" in point for point in new_points):
            plots.loss_curve(points, args.out / "curve.png")

    write_events(points)
    try:
        yield record
    finally:
        if writer:
            writer.close()
