"""What all scripts share: flags, the choice of hardware, and how a script ends."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernels.dispatch
from files.disk import UserError, explain

# What asks a process to end; Windows need not have both.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name)]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, except one that says nothing: None, and False of an on/off flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, no abbreviated flags, and errors of one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_device(self) -> None:
        devices = "cuda, cuda:1, mps or cpu; by default the fastest that is available"
        self.add_argument("--device", help=devices)

    def add_dtype(self) -> None:
        choices = ("auto", "float32", "bfloat16", "float16")
        about = "of matrix multiplications; auto: bfloat16 where the hardware supports it natively"
        self.add_argument("--dtype", choices=choices, default="auto", help=about)

    def add_run(self, out: str) -> None:
        """The flags of a run that trains."""
        add = self.add_argument
        add("--out", type=Path, default=Path(out), help="folder of the run")
        add("--resume", action="store_true", help="continue after the last checkpoint in --out")
        add("--seed", type=number(int, 0), default=0, help="of everything that is random")
        clip = "maximum gradient norm; 0: no clipping"
        add("--clip", type=number(float, 0), default=1.0, help=clip)
        self.add_device()
        self.add_dtype()

    def add_examples(self, tasks: tuple[str, ...]) -> None:
        """The flags that say where labelled examples come from, and what they are."""
        add = self.add_argument
        add("--data", choices=("mr", "imdb"), default="mr", help="built-in sentences or reviews")
        files = "your labels: .csv, .tsv, .jsonl, .parquet or hf:OWNER/NAME[:CONFIG][:SPLIT]"
        add("--train", type=Path, metavar="FILE", help=files)
        test = "default: the hub's test or validation split, or the last fifth of each class"
        add("--test", type=Path, metavar="FILE", help=test)
        for column in ("text", "pair", "label"):
            add(f"--{column}-column", help="guessed by default; a pair is a second text")
        tagged = "; tokens needs a file of tagged words" if "tokens" in tasks else ""
        add("--task", choices=tasks, help=f"guessed by default{tagged}")

    def check_examples(self, args: argparse.Namespace) -> None:
        """End the process if flags of `add_examples` do not go together."""
        columns = (args.text_column, args.pair_column, args.label_column)
        if args.train is None and any((args.test, *columns, args.task)):
            self.error("--test, the columns and --task belong to --train FILE")
        if args.task == "tokens" and any(columns):
            self.error("--task tokens takes no columns")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse the command line; a mistake in it ends the process with exit code 2."""
        argv = sys.argv[1:] if argv is None else argv
        for text in argv:
            # Python can open a path in another encoding, but neither print it nor save it as JSON.
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                self.error(f"{text!a}: not UTF-8 text")
        return super().parse_args(argv)

    def error(self, message: str) -> None:
        """End the process with exit code 2 and one line."""
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}\n")


def number(
    kind: type, low: float, high: float | None = None, multiple_of: int = 1
) -> Callable[[str], int | float]:
    """The argparse `type` of an int or a float from `low` to `high`, by default the largest."""
    if high is None:
        high = 2**31 - 1 if kind is int else sys.float_info.max

    def convert(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            rule = f"it must be at least {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: {rule}")
        if kind is int and value % multiple_of:
            raise argparse.ArgumentTypeError(f"{text}: it must be a multiple of {multiple_of}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's messages
    return convert


def under_torchrun() -> bool:
    """Whether all variables are set that torchrun sets; a cluster may set some of them itself."""
    return all(map(os.environ.get, TORCHRUN))


def flags_to_json(args: argparse.Namespace) -> dict[str, Any]:
    """The flags in JSON's types, as they are saved with a run."""
    return json.loads(json.dumps(vars(args), default=Path.as_posix))


def flags_to_argv(flags: dict[str, Any]) -> list[str]:
    """The command line of these flags, without those that are not set: None, False or []."""
    argv = []
    for name, value in flags.items():
        if value is None or value is False or value == []:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        if value is not True:
            argv += map(str, value) if isinstance(value, list) else [str(value)]
    return argv


def choose_hardware(device_name: str | None, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """Choose the device and the dtype of its matrix multiplications.

    Args:
        device_name: None is the fastest; "cuda" under torchrun is the GPU of LOCAL_RANK.
        dtype_name: "auto" is bfloat16 where the hardware multiplies it natively, else float32.

    Raises:
        UserError: there is no such device, or the kernels of CLOZE_KERNELS do not run on it.
    """
    available = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    # a driver that is too old shows its GPUs, too
    if n_gpus := torch.cuda.is_available() and torch.cuda.device_count():
        available = ["cuda", *(f"cuda:{i}" for i in range(n_gpus)), *available]
    name = device_name or available[0]
    if name == "cuda" and under_torchrun():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in available:
        raise UserError(f"--device {name}: not on this machine; available: {', '.join(available)}")
    device = torch.device(name)
    try:
        kernels.dispatch.check_kernel_choice(device)
    except ValueError as error:
        raise UserError(str(error)) from None

    if device.index is not None:
        torch.cuda.set_device(device)  # Triton launches its kernels on the current one
    if dtype_name != "auto":
        return device, getattr(torch, dtype_name)
    return device, torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        # Intel's CPUs (with avx512_fp16) multiply float32 faster where AMX is missing or hidden
        has_fast_avx = capabilities.get("avx512_bf16") and not capabilities.get("avx512_fp16")
        return bool(capabilities.get("amx_bf16") or has_fast_avx)
    return False


def prepare_streams() -> None:
    """Print UTF-8, whatever the terminal's encoding, and nothing where a stream is closed."""
    for name in ("stdin", "stdout", "stderr"):  # of the descriptors 0, 1 and 2, the lowest first
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # half of a surrogate pair is escaped
        if hasattr(stream, "reconfigure"):  # unlike that of IDLE
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def restart_in_utf8() -> None:
    """Start Python again in its UTF-8 mode where the locale has another encoding.

    Only there are the texts and paths of the command line read as the UTF-8 that they are.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        environment = os.environ | {"PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def run_script(main: Callable[[], dict[str, Any]], stopped: str = "stopped") -> dict[str, Any]:
    """Run a script's `main`, and return what it returns.

    A UserError, or what the operating system refuses, ends the process with one line and exit code
    2. Ctrl-C and SIGTERM end it with the line `stopped` and 130 or 143.
    """

    def stop(signal_number: int, _: Any) -> None:
        print(stopped, file=sys.stderr)
        sys.exit(128 + signal_number)

    restart_in_utf8()
    prepare_streams()
    os.environ["MPLBACKEND"] = "agg"  # figures are files, whatever a notebook's shell has set
    for name in STOP_SIGNALS:
        signal.signal(name, stop)
    try:
        return main()
    except BrokenPipeError:  # the reader of our output, perhaps `head`, has ended
        os._exit(141)  # as a program that SIGPIPE kills; flushing at exit would fail again
    except (UserError, OSError) as error:
        message = explain(error) if isinstance(error, OSError) else error
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
