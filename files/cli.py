"""The flags that every script has, and the hardware that they ask for."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernels.dispatch
from files.disk import UserError


class Flags(argparse.ArgumentParser):
    """Plain argparse: defaults shown in the help, no abbreviations, errors in one line."""

    def __init__(self, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def add_device(self) -> None:
        there = "cuda, cuda:1, mps or cpu; by default the fastest that is there"
        self.add_argument("--device", help=there)

    def add_dtype(self) -> None:
        products = "of matrix products; auto is bfloat16 where the hardware multiplies it natively"
        choices = ("auto", "float32", "bfloat16", "float16")
        self.add_argument("--dtype", choices=choices, default="auto", help=products)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        given = sys.argv[1:] if argv is None else argv
        for text in given:  # a path in another encoding can be opened, but neither printed nor saved
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                self.error(f"{text!a}: not UTF-8 text")
        return super().parse_args(given)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}\n")


Parser = Flags


def number(kind: type, low: float, high: float | None = None) -> Callable[[str], int | float]:
    """The type of a flag that takes a number from low to high, by default as far as arrays can count."""
    high = {int: 2**31 - 1, float: sys.float_info.max}[kind] if high is None else high

    def convert(text: str) -> int | float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: it must be at least {low:g} and at most {high:g}")
        return value

    # argparse names it where kind(text) fails
    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


def flags_to_json(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as the run's folder carries them, in JSON's types."""
    return json.loads(json.dumps(vars(args), default=str))


def choose_hardware(device_name: str | None, dtype_name: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of its matrix products; None and "auto" look for the fastest that is there.

    bfloat16 is chosen only where the hardware multiplies it natively: elsewhere it is the slower of the two.
    Raises UserError where the one or the other, or what CLOZE_KERNELS asks for, is not to be had.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = device_name or next(name for name, is_there in found.items() if is_there)
    there = ", ".join(name for name, is_there in found.items() if is_there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; there is {there}") from None
    if not found.get(device.type) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(f"--device {name}: not on this machine; there is {there}")
    try:
        kernels.dispatch.check_kernel_choice(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if dtype_name != "auto":
        return device, getattr(torch, dtype_name)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    return device, torch.bfloat16 if native else torch.float32


def run_script(main: Callable[[], dict[str, Any]], stopped: str = "stopped") -> dict[str, Any]:
    """What `main` returns. A user's mistake ends the process with 2 and a line on stderr; Ctrl-C and SIGTERM
    with 130 and 143, and the line `stopped`, which may say how to go on."""

    def stop(number: int, _: Any) -> None:
        print(stopped, file=sys.stderr)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
