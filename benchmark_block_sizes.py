"""Which tile is the fastest, BLOCK_M x BLOCK_N of one kernel?

    python3 benchmark_block_sizes.py --kernel scores [--full] [--save] [--autotune]      40 s on an H100

Every legal tile is checked and timed; --full crosses them with warps, pipeline stages and registers a thread. The best
few are then timed once more, and --save writes the winner into triton_attention/tuned.py for this GPU: that is how a
new GPU is tuned. --autotune asks triton.autotune for its choice of the same tiles. A tile that does not fit is listed
with its needs. Tiles are those of the plain kernel; where a call without one runs a kernel made for this GPU, its row
says so.
"""

import functools
import itertools

from benchmarks import harness, providers, results, tuning
from benchmarks.harness import Case, Comparison, wanted
from benchmarks.tuning import DEFAULT, FINAL, KERNELS

SWEEP = [16, 32, 64, 128, 256]
QUICK = [32, 64, 128]
INTERPRETED = [32, 64]
WARPS, STAGES, REGISTERS = (4, 8), (2, 3, 4), (128, 168, 255)
FINALISTS = 4  # so many of the best are timed once more
SCRIPT = "benchmark_block_sizes"


# ---- tiles


def chosen_tile(kernel, shape):
    """The tile that a call without block sizes takes."""
    import torch

    B, H, S, D, dtype, causal = shape
    dtype = getattr(torch, dtype)
    if kernel.op is None:
        from triton_attention import tuned
        from triton_attention.tile_choice import row_tile

        tile = row_tile(torch.empty(1, 1, S, S, dtype=dtype, device="meta"), causal)
        return tuned.Tile(tile["BLOCK_M"], tile["BLOCK_N"], 0, tile["num_warps"], 1)
    from triton_attention.device import DEVICE
    from triton_attention.tile_choice import tile_for

    return tile_for(kernel.op, dtype, D, causal, DEVICE)


def tiles(kernel, shape, sizes, full):
    """The tiles to try, the chosen one first; where its sizes are not among `sizes`, they join them."""
    import torch

    from triton_attention.device import DEVICE
    from triton_attention.tile_choice import tile_for

    chosen = chosen_tile(kernel, shape)
    found = [chosen]
    for m in sorted({*sizes, chosen.BLOCK_M}):
        for n in sorted({*sizes, chosen.BLOCK_N}):
            if kernel.op is None:
                found += [chosen._replace(BLOCK_M=m, BLOCK_N=n, num_warps=0)] if (m, n) != chosen[:2] else []
                continue
            tile = tile_for(kernel.op, getattr(torch, shape[4]), shape[3], shape[5], DEVICE, m, n)
            registers = REGISTERS if tile.registers else [None]
            if full:
                options = itertools.product(WARPS, STAGES, registers)
                found += [tile._replace(num_warps=w, num_stages=s, registers=r) for w, s, r in options]
            else:
                found.append(tile)
    return list(dict.fromkeys(found))


def name_of(tile):
    """64x128 w4 s2, with r128 where registers are limited; a softmax tile has its warps from its size."""
    options = f" w{tile.num_warps} s{tile.num_stages}" if tile.BLOCK_D else ""
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}{options}" + (f" r{tile.registers}" if tile.registers else "")


def limited(tile):
    """A tile has at most MAX_TILE elements, as check_blocks has it."""
    from triton_attention.device import MAX_TILE

    elements = tile.BLOCK_M * tile.BLOCK_N
    if elements > MAX_TILE:
        raise ValueError(f"the tile does not fit: it needs {elements} registers, there are {MAX_TILE}")


def with_tile(kernel, stage, tile):
    """A call of the stage's kernel with this tile, or with none."""
    from triton_attention.tile_choice import forcing

    def call():
        limited(tile)
        if kernel.op is None:
            return stage.call(block_m=tile.BLOCK_M, block_n=tile.BLOCK_N)
        with forcing(tile):
            return stage.call()

    return call if tile else stage.call


# ---- the sweep


@functools.lru_cache(maxsize=1)
def stage_of(kernel, shape, seed):
    """The inputs, shared by all tiles, and the reference, computed once."""
    stage = providers.STAGES[kernel.stage](*shape, seed)
    stage.reference = functools.cache(stage.reference)
    return stage


def build(kernel, shape, seed, names):
    """The Comparison of some tiles, {name: tile}."""
    stage = stage_of(kernel, shape, seed)
    makes = {name: functools.partial(with_tile, kernel, stage, tile) for name, tile in names.items()}
    own = {name: (stage.bytes, stage.computed(t.BLOCK_M, t.BLOCK_N)) for name, t in names.items() if t}
    return Comparison(makes, stage.reference, stage.pick, stage.bytes, stage.computed(1, 1), own)


def case(name, kernel, shape, args, names, about, ending=""):
    build_it = functools.partial(build, kernel, shape, args.seed, names)
    return Case(name, providers.label(*shape) + ending, list(names), build_it, about)


def shapes(args, interpreted):
    B, H, S = (1, 2, 128) if interpreted else (args.batch, args.heads, (args.seq_lens or [4096])[0])
    return (B, H, S, (args.head_dim or [64])[0], (args.dtype or ["bfloat16"])[0], bool(args.causal))


def found_tiles(name, args, interpreted):
    """The tiles of a kernel that the options ask for."""
    sizes = INTERPRETED if interpreted else QUICK if args.quick else SWEEP
    return tiles(KERNELS[name], shapes(args, interpreted), sizes, args.full)


def compile_missing(names, args):
    """Compile what will be measured of some kernels, all at once, on every core."""
    known = results.saved_points(args, SCRIPT)

    def calls():
        for name in names:
            kernel, shape = KERNELS[name], shapes(args, False)
            label = providers.label(*shape)
            for tile in found_tiles(name, args, False):
                if wanted(name_of(tile), args) and (name, label, name_of(tile)) not in known:
                    yield kernel, with_tile(kernel, stage_of(kernel, shape, args.seed), tile)

    tuning.compile_ahead(calls())


def rows(name, args, interpreted):
    """A Case a tile, after one for the call without a tile."""
    kernel, shape = KERNELS[name], shapes(args, interpreted)
    found = found_tiles(name, args, interpreted)
    plain = interpreted or tuning.launches(kernel.module, stage_of(kernel, shape, args.seed).call)
    yield case(name, kernel, shape, args, {DEFAULT: None}, providers.about(*shape) | {"kernel": name, "plain": plain})
    for tile in found:
        about = providers.about(*shape) | {"kernel": name, **tile._asdict(), "chosen": tile == found[0]}
        yield case(name, kernel, shape, args, {name_of(tile): tile}, about)


def sweep(name, args, watch):
    """All tiles of a kernel one by one, then the best once more: (rows by tile, the winner's row or None)."""
    kernel, shape = KERNELS[name], shapes(args, watch is None)
    label = providers.label(*shape)
    others = lambda row: row.name != name or row.case.removesuffix(FINAL) != label  # noqa: E731
    if watch:
        compile_missing([name], args)
    found = harness.run(SCRIPT, rows(name, args, watch is None), args, watch, keep=others)
    found = [row for row in found if (row.name, row.case) == (name, label)]
    best = sorted((row for row in found if row.ms and row.provider != DEFAULT), key=lambda row: row.ms)
    if not best:
        return found, None
    some = dict.fromkeys([tile_of(row) for row in best[:FINALISTS]] + [chosen_tile(kernel, shape)])
    about = providers.about(*shape) | {"kernel": name}
    final = case(name, kernel, shape, args, {name_of(tile): tile for tile in some}, about, FINAL)
    print("\nthe best and the chosen one, once more")
    last = harness.run(SCRIPT, [final], args, watch, keep=lambda row: row.point[:2] != (name, final.label))
    last = [row for row in last if (row.name, row.case) == (name, final.label) and row.ms]
    return found, min(last, key=lambda row: row.ms, default=None)


def mark_chosen(name, args, tile=None):
    """In the results file, the tile that is chosen now: by the table, or `tile` where the table has just changed."""
    path, shape = results.path_of(args, SCRIPT), shapes(args, False)
    info, _ = results.load(path)
    kept = results.Results(path, info, keep=lambda row: True)
    for row in kept.rows:
        if row.name == name and row.case == providers.label(*shape) and row.provider != DEFAULT:
            row.about["chosen"] = tile_of(row) == (tile or chosen_tile(KERNELS[name], shape))
    kept.write()


def tile_of(row):
    from triton_attention import tuned

    return tuned.Tile(**{key: row.about[key] for key in tuned.Tile._fields})


def table(found):
    """The tiles by time, then those without one."""
    print(f"\n{'tile':>16} {'ms':>8} {'roofline':>9}")
    for row in sorted(found, key=lambda row: (row.ms is None, row.ms or 0)):
        time = f"{row.ms:8.3f} {100 * row.of_roofline:7.1f} %" if row.ms else f"{'-':>8} {'-':>9}"
        mark = "<- chosen  " if row.about.get("chosen") else ""
        mark = mark if row.about.get("plain", True) else "by another kernel, made for this GPU  "
        print(f"{row.provider:>16} {time}  {mark}{row.note}")


# ---- the script


def show_saved(args):
    """--plot: the tables of every GPU again, from the JSON."""
    for folder in results.gpus(args.out):
        info, found = results.load(folder / f"{SCRIPT}.json") or ({}, [])
        for name, label in dict.fromkeys(row.point[:2] for row in found if row.name in args.kernel):
            print(f"\n{info['gpu']}, {name}, {label}")
            table([row for row in found if row.point[:2] == (name, label)])


def save_winner(kernel, shape, winner, tile):
    """--save: the winner's row, for this GPU."""
    import torch

    from triton_attention.device import DEVICE, architecture
    from triton_attention.tile_choice import places_of
    from triton_attention.tuned import TILES

    if kernel.op is None:
        return "the softmax has its tile from the length of a row: nothing to save"
    B, H, S, D, dtype, causal = shape
    there = {row[1] for row in TILES if row[0] == kernel.op}
    arch = architecture(DEVICE)
    place = [p for p in places_of(arch) if p == arch or p in there - {"any"}][-1]
    key = (kernel.op, place, getattr(torch, dtype).itemsize * 8, D, causal)
    gpu = torch.cuda.get_device_name()
    usual = (B, H, S, gpu) == (4, 16, 4096, "NVIDIA H200")
    tuning.save(
        results.HERE / "triton_attention/tuned.py", key, tile,
        f"{winner.ms:.2f}" + ("" if usual else f", B{B} H{H} S{S} on {gpu}"),
    )
    return f"saved: {key}: {name_of(tile)}, {winner.ms:.3f} ms"


def options():
    p = harness.parser(__doc__.split("\n")[0])
    p.add_argument("--kernel", nargs="+", choices=KERNELS, default=["scores"], help="kernels to tune")
    p.add_argument("--full", action="store_true", help="cross the tiles with warps, pipeline stages and registers")
    p.add_argument("--autotune", action="store_true", help="ask triton.autotune too, through its disk cache")
    p.add_argument("--save", action="store_true", help="write the winner into triton_attention/tuned.py")
    return p


def main():
    args = options().parse_args()
    if args.plot:
        raise SystemExit(show_saved(args))
    watch, wrong = harness.stopwatch(args, load=0.1), False
    for name in args.kernel:
        kernel, shape = KERNELS[name], shapes(args, watch is None)
        found, winner = sweep(name, args, watch)
        wrong |= any(row.note == "WRONG" for row in found)
        if watch is None:
            continue
        table(found)
        right = {row.provider: tile_of(row) for row in found if row.ms and row.provider != DEFAULT}
        if winner:
            print(f"\nthe winner: {winner.provider}, {winner.ms:.3f} ms once more")
        if args.autotune and right:
            stage = stage_of(kernel, shape, args.seed)
            calls = {tile: with_tile(kernel, stage, tile) for tile in right.values()}
            best, ms, known = tuning.autotune(kernel.module, kernel.function, calls)
            print(f"triton.autotune: {best}, {ms:.3f} ms{' (from its disk cache)' if known else ''}")
        if args.save and winner:
            print(save_winner(kernel, shape, winner, right[winner.provider]))
            mark_chosen(name, args, right[winner.provider] if kernel.op else None)
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
