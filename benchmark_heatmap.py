"""How does the time of each kernel depend on its tile? Draws heatmap.png, BLOCK_M x BLOCK_N.

    python3 benchmark_heatmap.py [--plot]      two minutes on an H100

Measures what results/<gpu>/benchmark_block_sizes.json lacks, as benchmark_block_sizes.py does, and draws it: the tile
of the tuned table outlined, hatched what does not fit, crossed what is wrong. Tiles are those of the plain kernels; a
title says where a call runs another one, made for the GPU. Only times of a GPU are drawn.
"""

import benchmark_block_sizes
from benchmarks import harness, results, tuning

SWEEP = list(tuning.KERNELS)


def rows(args, watch):
    """The Cases of every kernel's tiles."""
    for name in SWEEP:
        yield from benchmark_block_sizes.rows(name, args, watch is None)


def main():
    args = harness.parser(__doc__.split("\n")[0]).parse_args()
    args.full, args.resume, wrong = False, True, False
    if not args.plot:
        watch = harness.stopwatch(args, load=0.1)
        if watch:
            benchmark_block_sizes.compile_missing(SWEEP, args)
        found = harness.run(benchmark_block_sizes.SCRIPT, rows(args, watch), args, watch)
        wrong = any(row.note == "WRONG" for row in found)
        for name in SWEEP if watch else ():
            benchmark_block_sizes.mark_chosen(name, args)
    if args.plot or watch:
        from benchmarks import figures

        gpu = results.shown(benchmark_block_sizes.SCRIPT) if args.plot else None  # else the one at hand
        path = results.path_of(args, benchmark_block_sizes.SCRIPT, gpu)
        if not figures.redraw_heatmap(path, results.HERE / "heatmap.png"):
            raise SystemExit(f"nothing to draw: {path} has no times")
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
