"""What several ranks cost: python scaling.py. One process against two on this machine, measured; 8 and 64
GPUs for each preset, derived.

A step of data-parallel training computes its own micro-batches on every rank, sums the gradients of all ranks
(a ring all-reduce sends and receives 2 (n - 1) / n of their bytes: Patarasuk & Yuan 2009) while the backward
pass still runs, and then takes the same optimizer step everywhere.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import checkpoint
from bench import MASKED, ROW_TOKENS, spread
from flags import Flags, number, run_script
from model import PRESETS, Config, MaskedLM, ShapesOnly
from optim import make_optimizers
from text import UserError

# Of an H100 SXM: bfloat16 products a second, and bytes a second in each direction by NVLink, which joins the
# 8 GPUs of a machine, and by its share of the network between machines (400 Gbit a second).
PEAK, NVLINK, NETWORK = 989e12, 450e9, 50e9
REACHED = 0.4  # of the peak, an assumption: no GPU has run this code yet


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Flags("Measure one process against two, and derive 8 and 64 GPUs.")
    add = flags.add_argument
    add("--steps", type=number(int, 2), default=20, help="of each run, the first half of them uncounted")
    add("--rounds", type=number(int, 1), default=3, help="alternations of one process and two")
    add("--out", type=Path, default=Path("runs/scaling"), help="folder of the runs and of scaling.json")
    return flags.parse_args(argv)


def run(n_ranks: int, steps: int, out: Path) -> list[dict[str, float]]:
    """The logged points of a float32 run of train.py, its cores shared out to the ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks)]
    script = str(Path(__file__).with_name("train.py"))
    flags = [f"--steps={steps}", f"--log-every={-(-steps // 2)}", "--accumulate=2", "--dtype=float32"]
    command = [*torchrun, script, *flags, "--device=cpu", "--validate-batches=1", f"--out={out}"]
    threads = str(max(1, torch.get_num_threads() // n_ranks))
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]  # not torchrun's
        raise UserError(said[0] if said else f"train.py with {n_ranks} ranks ended with {done.returncode}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def measure(steps: int, rounds: int, out: Path) -> dict[str, Any]:
    """Tokens a second of two ranks over one's, and by how much their validation losses differ at most."""
    ratios, differences = [], []
    for _ in range(rounds):
        found = {n: run(n, steps, out / str(n)) for n in (1, 2)}
        speeds = {n: [p for p in points if "tokens_per_second" in p][-1] for n, points in found.items()}
        ratios.append(speeds[2]["tokens_per_second"] / speeds[1]["tokens_per_second"])
        one, two = (found[n][-1]["validation_loss"] for n in (1, 2))
        differences.append(abs(two / one - 1))
    return {"two_over_one": spread(ratios), "loss_differs_by": max(differences)}


def costs(preset: str) -> dict[str, float]:
    """FLOPs and bytes of a step of one micro-batch a rank, by the shapes of the weights.

    A product of activations with a weight is 2 FLOPs a number forward and 4 backward; the head is met by
    masked tokens alone; attention's products are 12 L d_model a token and layer, at windows of full length.
    Muon's five iterations on (m, n), m <= n, are 5 (4 m^2 n + 2 m^3), on every rank alike.
    """
    config = Config(**PRESETS[preset])
    with torch.device("meta"), ShapesOnly():
        model = MaskedLM(config)
        muon, _ = make_optimizers(model, (1.0, 1.0, 1.0), 0.0, torch.bfloat16)
    in_blocks = sum(p.numel() for p in model.model.layers.parameters())
    in_head = model.head.dense.weight.numel() + model.decoder.weight.numel()
    a_token = 6 * (in_blocks + MASKED * in_head) + 12 * config.max_len * config.d_model * config.n_layers
    orthogonal = 0
    for group in muon.param_groups:
        for weight in group["params"]:
            rows, columns = weight.shape[0] // group["n_blocks"], weight.shape[1]
            m, n = min(rows, columns), max(rows, columns)
            orthogonal += group["n_blocks"] * 5 * (4 * m * m * n + 2 * m**3)
    n_weights = sum(p.numel() for p in model.parameters())
    return {"weights": n_weights, "flops": a_token * ROW_TOKENS, "muon_flops": orthogonal}


def derive() -> list[dict[str, Any]]:
    """Milliseconds of a micro-batch's products, of Muon and of the sum of gradients, each preset and size."""
    rows = []
    for preset in PRESETS:
        found, rate = costs(preset), PEAK * REACHED
        for n_ranks, bytes_a_second in ((8, NVLINK), (64, NETWORK)):
            sent = 2 * (n_ranks - 1) / n_ranks * 4 * found["weights"]  # gradients are float32
            row = {"preset": preset, "gpus": n_ranks, "weights": found["weights"], "megabytes": sent / 1e6}
            row |= {"compute_ms": 1e3 * found["flops"] / rate, "muon_ms": 1e3 * found["muon_flops"] / rate}
            rows.append(row | {"sum_ms": 1e3 * sent / bytes_a_second})
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure and derive, and return what OUT/scaling.json says."""
    args = parse(argv)
    checkpoint.make_folder(args.out)
    print(
        f"{'preset':8}{'GPUs':>5}{'weights':>13}{'MB sent':>9}{'compute':>9}{'Muon':>9}{'sum':>9}   ms a step"
    )
    rows = derive()
    for row in rows:
        sizes = f"{row['preset']:8}{row['gpus']:5}{row['weights']:13,}{row['megabytes']:9,.0f}"
        print(sizes + "".join(f"{row[key]:9.2f}" for key in ("compute_ms", "muon_ms", "sum_ms")))
    result = {"derived": rows} | measure(args.steps, args.rounds, args.out)
    low, middle, high = result["two_over_one"]
    print(f"two ranks over one: {middle:.2f} times the tokens a second ({low:.2f} to {high:.2f})")
    print(f"their validation losses differ by {result['loss_differs_by']:.1e} of the loss at most")
    checkpoint.write(args.out / "scaling.json", checkpoint.to_json(result))
    return result


if __name__ == "__main__":
    run_script(main)
