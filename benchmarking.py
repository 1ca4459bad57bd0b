"""What the benchmark scripts share: the machine, the ceilings, fair timing, checks before timing, tables and JSON.

A script asks one question. It yields Comparisons, each with its providers (who computes it) and the exact result; run()
checks every provider, times the right ones in turns, prints a row each and writes results/<gpu>/<script>.json after
every row, so that an interruption loses nothing. A wrong result is shown as wrong and never timed.

    python3 benchmarking.py      write the README's table anew from the committed results
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DTYPES = ("bfloat16", "float16", "float32")
ROUNDS = 3  # turns that every provider takes, in rotated order


@dataclass
class Comparison:
    """One computation, by several providers, of which the last is PyTorch's own and the yardstick.

    providers map a name to a function without arguments that returns a tensor or a tuple of tensors. exact and pick say
    what is checked: pick takes a provider's result to the part that exact, in float64, is the truth of.
    bytes must move and flops must be done at least, whoever computes it.
    """

    name: str
    case: str
    providers: dict[str, Callable]
    exact: Callable
    pick: Callable
    bytes: float
    flops: float


@dataclass
class Row:
    """One provider's result; times in ms (median, 20 % and 80 % quantile), None where it was not timed."""

    name: str
    case: str
    provider: str
    error: float | None = None
    allowed: float | None = None
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    gbps: float | None = None
    of_copy: float | None = None
    tflops: float | None = None
    speedup: float | None = None
    note: str = ""


def parser(description):
    """The options that the scripts share; --help needs neither torch nor a GPU."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--mode", choices=("fwd", "bwd", "both"), default="both", help="forward, backward, or both")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=None, help="dtypes instead of the script's own")
    p.add_argument("--batch", type=int, default=4, help="batch size B")
    p.add_argument("--heads", type=int, default=16, help="heads H")
    p.add_argument("--head-dim", type=int, nargs="+", default=None, help="head dims D instead of the script's own")
    p.add_argument("--seq-lens", type=int, nargs="+", default=None, help="sequence lengths instead of the script's own")
    p.add_argument("--quick", action="store_true", help="fewer cases and shorter timing")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder for <gpu>/<script>.json")
    p.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    return p


def machine():
    """What was measured on: GPU, driver, versions, commit."""
    import torch
    import triton

    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    commit = os.environ.get("GIT_COMMIT")  # where the files are, but not their history
    if not commit:
        dirty = "+changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
        commit = (output("git", "rev-parse", "--short", "HEAD") or "unknown") + dirty
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (Triton's interpreter)",
        "driver": driver[0] if driver else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
    }


def ceilings():
    """What this GPU does at most, measured now: device copy in GB/s (read + write), bfloat16 matmul in TFLOP/s."""
    import torch

    source = torch.randint(255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    times = time_in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rep=60)
    return {
        "copy_gbps": 2 * source.numel() / times["copy"][0] / 1e6,
        "matmul_tflops": 2 * 8192**3 / times["matmul"][0] / 1e9,
    }


def time_in_turns(functions, rep=40):
    """{name: (median, 20 %, 80 % quantile) in ms} by CUDA events, L2 cleared before each call.

    The chip is warmed to its sustained clock first, and the functions take turns in rotated order: whoever is
    measured first on a cool chip reads up to 10 % fast.
    """
    import torch
    from triton.testing import do_bench

    heater = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    for _ in range(500):
        heater @ heater
    quantiles = {name: [] for name in functions}
    names = list(functions)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            quantiles[name].append(do_bench(functions[name], warmup=10, rep=rep, quantiles=[0.5, 0.2, 0.8]))
    return {name: tuple(statistics.median(q) for q in zip(*turns, strict=True)) for name, turns in quantiles.items()}


def check(comparison):
    """{provider: (error, allowed, note)}: the error against float64 is at most twice PyTorch's plus a rounding step."""
    import torch

    as_tuple = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    exact = [e.double() for e in as_tuple(comparison.exact())]
    errors, verdicts = {}, {}
    for name, provider in reversed(comparison.providers.items()):  # yardstick first
        try:
            picked = list(as_tuple(comparison.pick(provider())))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            verdicts[name] = (None, None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        worst = 0.0
        for got, right in zip(picked, exact, strict=True):
            finite = right.isfinite()
            off = (got.double() - right)[finite].abs().max().item() / right[finite].abs().max().item()
            if not torch.equal(got.isfinite(), finite) or math.isnan(off):
                off = math.inf
            worst = max(worst, off)
        errors[name] = worst
        step = max(torch.finfo(t.dtype).eps for t in picked)
        yardstick = errors.get(list(comparison.providers)[-1], math.inf)
        allowed = 2 * yardstick + step
        verdicts[name] = (worst, allowed, "" if worst <= allowed else "WRONG")
    return verdicts


COLUMNS = (
    f"{'what':18} {'case':34} {'provider':13} {'ms':>8} {'[20 %, 80 %]':>17} {'GB/s':>6} {'of copy':>7} {'TFLOP/s':>8} "
    f"{'speed-up':>8} {'error':>8} {'allowed':>8}"
)


def show(row):
    """Print one row of the table."""
    number = lambda x, form: "-" if x is None else format(x, form)  # noqa: E731
    spread = "-" if row.ms is None else f"[{row.ms_20:.3f}, {row.ms_80:.3f}]"
    share = "-" if row.of_copy is None else f"{100 * row.of_copy:.1f} %"
    print(
        f"{row.name:18} {row.case:34} {row.provider:13} {number(row.ms, '.3f'):>8} {spread:>17} "
        f"{number(row.gbps, '.0f'):>6} {share:>7} {number(row.tflops, '.1f'):>8} {number(row.speedup, '.2f'):>8} "
        f"{number(row.error, '.1e'):>8} {number(row.allowed, '.1e'):>8}  {row.note}",
        flush=True,
    )


def run(script, comparisons, args, interpreted):
    """Check, time, print and save every comparison; returns the rows. Interpreted, nothing is timed or saved."""
    import torch
    from tqdm import tqdm

    info = machine()
    print(" | ".join(f"{key} {value}" for key, value in info.items() if value))
    limits = {} if interpreted else ceilings()
    if interpreted:
        print("No GPU: the kernels run in Triton's interpreter. The errors are real; times would mean nothing.")
    else:
        copy, matmul = limits["copy_gbps"], limits["matmul_tflops"]
        print(f"ceilings, now: copy {copy:.0f} GB/s, bfloat16 matmul {matmul:.0f} TFLOP/s")
    print("ms: median over turns; of copy: bytes that must move once / ms / copy; speed-up: over the last provider")
    print("error: max |difference to float64| / max |float64|; allowed: twice the last provider's plus a rounding step")
    print(COLUMNS, flush=True)
    rows = []
    path = args.out / info["gpu"].replace(" ", "_") / f"{script}.json"
    for comparison in tqdm(list(comparisons), disable=not sys.stderr.isatty(), leave=False):
        comparison = comparison()
        verdicts = check(comparison)
        right = {name: f for name, f in comparison.providers.items() if not verdicts[name][2]}
        times = {} if interpreted else time_in_turns(right, rep=15 if args.quick else 40)
        base = times.get(list(comparison.providers)[-1])
        for name in comparison.providers:
            error, allowed, note = verdicts[name]
            row = Row(comparison.name, comparison.case, name, error, allowed, note=note)
            if name in times:
                row.ms, row.ms_20, row.ms_80 = times[name]
                row.gbps, row.tflops = comparison.bytes / row.ms / 1e6, comparison.flops / row.ms / 1e9
                row.of_copy = row.gbps / limits["copy_gbps"]
                row.speedup = base[0] / row.ms if base else None
            show(row)
            rows.append(row)
        if not interpreted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**info, **limits, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
            torch.cuda.empty_cache()
        del comparison, right
    if not interpreted:
        print(f"written to {path}")
    return rows


def readme():
    """README.md with the table between its markers made from results/NVIDIA_H200/benchmark_attention.json."""
    text = (HERE / "README.md").read_text()
    path = HERE / "results/NVIDIA_H200/benchmark_attention.json"
    if not path.exists():
        return text
    data = json.loads(path.read_text())
    lines = [
        "",
        f"{data['gpu']}, driver {data['driver']}, torch {data['torch']}, triton {data['triton']}, "
        f"commit {data['commit']}; copy {data['copy_gbps']:.0f} GB/s, "
        f"bfloat16 matmul {data['matmul_tflops']:.0f} TFLOP/s.",
        "",
        "| what | case | Triton, ms | of copy | PyTorch, ms | faster | SDPA, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {(r["name"], r["case"], r["provider"]): r for r in data["rows"] if r["ms"]}
    for (name, case, provider), ours in rows.items():
        theirs = rows.get((name, case, "torch"))
        if provider != "triton" or not theirs:
            continue
        sdpa = rows.get((name, case, "torch SDPA"))
        lines.append(
            f"| {name} | {case} | {ours['ms']:.3f} | {100 * ours['of_copy']:.0f} % | {theirs['ms']:.3f} | "
            f"{ours['speedup']:.2f}x | {format(sdpa['ms'], '.3f') if sdpa else ''} |"
        )
    begin, end = "<!-- results -->", "<!-- end of results -->"
    return text[: text.index(begin) + len(begin)] + "\n".join(lines) + "\n\n" + text[text.index(end) :]


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme())
