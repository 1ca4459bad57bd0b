"""How do time and memory of attention grow with the sequence, and where does the S x S matrix stop fitting?

    python3 benchmark_seq_lengths.py [--quick] [--mode fwd] [--causal]      two minutes on an H100

Every provider over S = 128 ... 32768 at constant batch and heads. A provider that stores S x S ends where the GPU's
memory does: that point has a row with the reason. The exponent is the slope of log(time) over log(S) at the end.
"""

import functools
import math
import statistics

from benchmarks import harness, providers
from benchmarks.harness import Case
from benchmarks.results import curves

SWEEP = [128, 512, 2048, 8192, 32768]
QUICK = [512, 2048, 8192]
INTERPRETED = [32, 64, 128]
NAMES = {"fwd": "attention", "bwd": "attention backward"}
TAIL = 3  # points that the exponent is fitted to


def rows(args, interpreted):
    """The Cases: every length, forward and backward."""
    lengths = args.seq_lens or (INTERPRETED if interpreted else QUICK if args.quick else SWEEP)
    B, H = (1, 2) if interpreted else (args.batch, args.heads)
    for D in args.head_dim or [64]:
        for dtype in args.dtype or ["bfloat16"]:
            for mode in ("fwd", "bwd") if args.mode == "both" else (args.mode,):
                for S in lengths:
                    shape = (B, H, S, D, dtype, bool(args.causal))
                    build = functools.partial(providers.attention, mode, *shape, args.seed)
                    label, about = providers.label(*shape), providers.about(*shape)
                    yield Case(NAMES[mode], label, providers.providers(mode, args), build, about)


def exponent(points):
    """Slope of log(ms) over log(S) through the last points [(S, ms)], None of fewer than two."""
    tail = [(math.log(S), math.log(ms)) for S, ms in sorted(points)[-TAIL:]]
    return statistics.linear_regression(*zip(*tail, strict=True)).slope if len(tail) > 1 else None


def show_exponents(rows):
    """For every curve, how it grows and how it ends."""
    for (name, case), lines in curves(rows).items():
        print(f"\n{name}, {case}: time grows with S to the power of")
        for provider, line in lines.items():
            points = [(row.about["S"], row.ms) for row in line if row.ms]
            slope = exponent(points)
            if slope is None:
                continue
            end = next((row for row in line if not row.ms and row.about["S"] > points[-1][0]), None)
            ends = f"; ends before S {end.about['S']}: {end.note}" if end else ""
            tail = [S for S, _ in points[-TAIL:]]
            print(f"  {provider:15} {slope:.2f} (S {tail[0]} ... {tail[-1]}){ends}")


def main():
    args = harness.parser(__doc__.split("\n")[0]).parse_args()
    results = []
    if not args.plot:
        watch = harness.stopwatch(args)
        results = harness.run("benchmark_seq_lengths", rows(args, watch is None), args, watch)
        show_exponents(results)
    if args.plot or watch:
        from benchmarks import figures

        figures.redraw(args.out, "benchmark_seq_lengths")
    raise SystemExit(any(row.note == "WRONG" for row in results))


if __name__ == "__main__":
    main()
