"""Is fused attention as fast as the fastest kernels there are: those of cuDNN, FlashAttention-3 and FlashAttention-4?

    python3 benchmark_peers.py [--quick] [--mode fwd]      three minutes on an H200
    python3 benchmark_peers.py --features                  with the masks that models have
    python3 benchmark_peers.py --features --plain          on a Hopper GPU, the kernels that every other GPU runs

The work is the same in every case, B S = 16384 tokens in H D = 2048 channels, but for a few others at the end: heads
that share keys, a wide head dim, short calls in which the host is a part of the time. Everybody is checked, then runs
for half a second, as a chip's clock moves with its heat, then is timed in three passes. The table has the medians over
passes and the ratio of ours to the best of the others, with the least and the greatest of a pass's ratios. Backward,
FlashAttention-4 adds dQ up in a fixed order, as ours does. The two FlashAttentions are measured where installed:

    pip install --no-deps fa3_fwd && pip install flash-attn-4
"""

import functools
import math

from benchmarks import features, harness, providers
from benchmarks.harness import Case
from benchmarks.results import (
    CHANNELS, PASSES_OF, PEER_HEAD_DIMS, PEERS, SAME, TOKENS, compare, gpus, load, mean,
)

SEQ_LENS = (512, 2048, 8192, 16384)
OTHERS = [(2, 32, 8, 8192, 128), (8, 8, 8, 2048, 256), (2, 8, 8, 8192, 256), (1, 8, 8, 1024, 64), (1, 8, 8, 1024, 128)]


def parser():
    p = harness.parser(__doc__.split("\n")[0], batch=None, heads=None, plot="show the comparison")
    p.epilog = f"Without --batch and --heads, B S = {TOKENS} and H D = {CHANNELS}."
    p.add_argument("--kv-heads", type=int, help="heads of keys and values, where they are fewer than those of queries")
    p.add_argument("--passes", type=int, default=harness.PASSES, help="how many times each is timed; once with --quick")
    p.add_argument("--features", action="store_true", help="what models call instead: masks, a bias, torch.compile")
    p.add_argument("--plain", action="store_true", help="on Hopper too the kernels that every other GPU runs")
    return p


def checked(parser):
    """The options; ends with the parser's message where they make no sense."""
    args = parser.parse_args()
    for name in ("batch", "heads", "kv_heads", "passes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    for _, H, kv_heads, _, D in cells(args, False) if args.kv_heads else ():
        if H % kv_heads:
            parser.error(f"--kv-heads {kv_heads} does not divide {H}, the heads of D {D}: pass --heads")
    return args


def cells(args, interpreted):
    """[(B, H, heads of keys, S, D)]."""
    if interpreted:
        return [(1, 4, 2, 64, 64)]
    head_dims, seq_lens = (PEER_HEAD_DIMS[:1], SEQ_LENS[1:3]) if args.quick else (PEER_HEAD_DIMS, SEQ_LENS)
    found = []
    for D in args.head_dim or head_dims:
        for S in args.seq_lens or seq_lens:
            H = args.heads or max(1, CHANNELS // D)
            found.append((args.batch or max(1, TOKENS // S), H, args.kv_heads or H, S, D))
    asked = args.quick or args.seq_lens or args.head_dim or args.batch or args.heads or args.kv_heads
    return found if asked else found + OTHERS


def rows(args, interpreted):
    """The Cases: forward, then backward."""
    for mode in ("fwd", "bwd") if args.mode == "both" else (args.mode,):
        for B, H, kv_heads, S, D in cells(args, interpreted):
            same = (B * S, H * D, kv_heads) == (TOKENS, CHANNELS, H) and D in PEER_HEAD_DIMS
            for causal in (False, True) if args.causal is None else (args.causal,):
                for dtype in args.dtype or ["bfloat16"]:
                    shape = (B, H, S, D, dtype, causal)
                    build = functools.partial(providers.attention, mode, *shape, args.seed, kv_heads)
                    about = {**providers.about(*shape), "mode": mode, "same": same}
                    yield Case(PASSES_OF[mode], providers.label(*shape, kv_heads), list(PEERS[mode]), build, about)


def show(results):
    """The comparison, a line for each case."""
    for mode, name in PASSES_OF.items():
        lines = compare(results, mode)
        if not lines:
            continue
        print(f"\n{name}, TFLOP/s: medians over passes; ours to the best of the others [least, greatest of a pass]")
        print(f"{'case':36}" + "".join(f"{peer:>19}" for peer in PEERS[mode]) + f"{'ratio':>9}")
        for case, medians, ratio, _ in lines:
            numbers = "".join(f"{medians.get(peer, math.nan):19.0f}" for peer in PEERS[mode]).replace("nan", "  -")
            print(f"{case:36}{numbers}" + ("" if not ratio else "{:9.3f} [{:.2f}, {:.2f}]".format(*ratio)))
        if mean(lines):
            print(f"geometric mean of the ratios {SAME}: {mean(lines):.3f}")


def show_features(results):
    """What models call, a line for each; ms, as the work differs."""
    for mode, name in {**PASSES_OF, "train": "training"}.items():
        ms = {(row.case, row.provider): row.ms for row in results if row.about["mode"] == mode}
        peers = list(dict.fromkeys(row.provider for row in results if row.about["mode"] == mode))
        if lines := compare(results, mode):
            print(f"\n{name}, ms; the best of the others to ours [least, greatest of a pass]")
            print(f"{'call':50}" + "".join(f"{peer:>15}" for peer in peers) + f"{'ratio':>9}")
        for case, medians, ratio, _ in lines:
            numbers = "".join(f"{ms[case, peer]:15.3f}" if peer in medians else f"{'-':>15}" for peer in peers)
            print(f"{case:50}{numbers}" + ("" if not ratio else "{:9.2f} [{:.2f}, {:.2f}]".format(*ratio)))


def main():
    args = checked(parser())
    script, table = ("benchmark_features", show_features) if args.features else ("benchmark_peers", show)
    if args.plain:
        script += "_plain"
    if args.plot:
        for folder in gpus(args.out):
            if loaded := load(folder / f"{script}.json"):
                print(f"\n{loaded[0]['gpu']}, torch {loaded[0]['torch']}, commit {loaded[0]['commit']}")
                table(loaded[1])
        return
    watch = harness.stopwatch(args)
    if watch:
        watch.rep, watch.passes = 15, 1 if args.quick else args.passes
    if args.plain:
        from triton_attention import operators

        operators.hopper_kernels = lambda name, device: None
    cases = (features.rows if args.features else rows)(args, watch is None)
    results = harness.run(script, cases, args, watch)
    table(results)
    raise SystemExit(any(row.note == "WRONG" for row in results))


if __name__ == "__main__":
    main()
