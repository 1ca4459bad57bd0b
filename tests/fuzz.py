"""Calls that nobody thought of: every function and the layer, drawn at random, against PyTorch in float64.

    python3 -m tests.fuzz                        a minute; the seed is drawn and printed
    python3 -m tests.fuzz --seed 7 --calls 1     one call again, as the line of a wrong one says

Call i is drawn from seed + i alone: function, sizes, dtype, layouts, masks, options, values, mode. It is right if
    outputs and gradients    are as close to float64 as tests/reference.py asks, in the shape and dtype that is theirs;
    a second run             gives the same bits;
    the inputs               keep theirs, with all of the memory around them;
    hidden keys and values   may hold NaN, inf or huge numbers: nothing changes, their own gradients are zero.
A wrong call prints a line that repeats it, and the next one is drawn; the exit code is 1 if there was one.
"""

import argparse
import collections
import contextlib
import functools
import random
import sys
import time
import warnings

KINDS = {"fused": 9, "staged": 4, "softmax": 3, "scores": 2, "values": 2, "merge": 2, "layer": 3}  # and how often


def options():
    p = argparse.ArgumentParser(
        "python3 -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, help="stop after so many (default: 1, or with --calls no limit)")
    p.add_argument("--calls", type=int, help="stop after so many calls")
    p.add_argument("--seed", type=int, help="of the first call (default: drawn)")
    p.add_argument("--only", choices=KINDS, metavar="KIND", help=f"pass over other calls: {', '.join(KINDS)}")
    p.add_argument("--eager", action="store_true", help="without torch.compile, which may not know a newer Triton")
    p.add_argument("--hopper", choices=("auto", "always", "never"), default="auto", help="when Hopper's kernels run")
    return p


if __name__ == "__main__":
    options().parse_args()  # --help and mistakes need no PyTorch, which takes seconds

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.fuzz_calls import build, draw, fill_of, layer_of, ours, poison, reference  # noqa: E402
from tests.reference import DEVICE, F32, F64, INF, INTERPRETED, errors as errors_of, hopper_kernels, randn  # noqa: E402
from triton_attention.device import describe_device  # noqa: E402
from triton_attention_layer import attention_staged  # noqa: E402

if INTERPRETED:
    from tests import strict_interpreter  # noqa: F401


OUT_OF_RANGE, TOO_LARGE = "out of the range of its dtype", "with a tile that does not fit"


def results_of(function, c, inputs, cotangents, context):
    """Outputs and gradients by name; the cotangents are for those outputs that have one."""
    with context:
        torch.manual_seed(c.seed)  # of dropout
        outs = function(**inputs)
    results = {f"output {i}": out for i, out in enumerate(outs)}
    wanted = {name: t for name, t in inputs.items() if t.requires_grad}
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outs, cotangents, strict=True) if g is not None and o.requires_grad]
    if wanted:
        grads = [torch.zeros_like(t) for t in wanted.values()]
        if pairs:
            outs, grads = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outs, wanted.values(), grads, materialize_grads=True)
        results |= {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return results


def context_of(c):
    if "autocast" in vars(c):
        return torch.autocast(DEVICE.type, c.autocast)
    return {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(c.mode, contextlib.nullcontext)()


def dtype_of(c, output):
    if c.kind in ("fused", "merge") and output == 1:  # lse
        return F64 if c.dtype == F64 else F32
    return c.dtype if c.kind == "softmax" else vars(c).get("autocast", c.dtype)


def cotangents_of(c, outs):
    """A gradient for each output, in its layout and dtype, or None."""
    layouts = c.cotangents if len(outs) > 1 or c.cotangents[0] else c.cotangents[::-1]
    for i, (out, layout) in enumerate(zip(outs, layouts, strict=False)):
        shape = out.shape if out.dim() == 4 else (out.shape[0], 1, *out.shape[1:])
        if layout == "one number" and c.kind != "softmax":  # as sum() leaves it; in a softmax it comes to nothing
            yield torch.randn((), dtype=dtype_of(c, i), device=DEVICE).expand(out.shape)
        else:
            layout = "expanded" if layout == "one number" else layout
            yield layout and randn(*shape, dtype=dtype_of(c, i), layout=layout, grad=False).view_as(out)


def copies(inputs, dtype=None):
    """The inputs in memory of their own, the floating ones in another dtype."""
    return {
        name: t.detach().to(dtype if t.is_floating_point() else None, copy=True).requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }


@torch.no_grad()
def adapt_mask(c, exact, lower):
    """For the references: beside a huge number a score vanishes in float32, so it must in float64; torch's mask is of
    the scores' dtype, where a finite number is not to become -inf."""
    if c.mask in ("float", "float32"):
        exact["mask"].masked_fill_((exact["mask"] < -1e6) & exact["mask"].isfinite(), -1e300)
        t, dtype = lower["mask"], dtype_of(c, 0)
        if t.dtype != dtype:
            lowest = max(torch.finfo(dtype).min for dtype in (dtype, F32))
            lower["mask"] = t.where(t == -INF, t.clamp(lowest)).to(dtype).requires_grad_(t.requires_grad)


def memory(t):
    """All bytes of the buffer that t is a part of."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def keep_of(c):
    """Which weights stay, times their factor: those of attention_staged after the same seed, when none is zero."""
    torch.manual_seed(c.seed)
    q, k = (torch.zeros(c.B, c.H, n, 1, device=DEVICE) for n in (c.M, c.N))
    return (attention_staged(q, k, k, None, c.dropout)[1] != 0).double() / max(1 - c.dropout, 1e-9)


def measure(c, seed):
    """{result: (our error, torch's, one rounding step)} with values of the seed; what is plainly wrong raises."""
    call = functools.partial(ours, c, layer_of(c) if c.kind == "layer" else None)
    if c.mode == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager" if INTERPRETED else "inductor")
    inputs = build(c, seed)
    exact_in, lower_in = copies(inputs, F64), copies(inputs)
    adapt_mask(c, exact_in, lower_in)
    lower_in |= copies({name: t for name, t in lower_in.items() if name != "mask"}, dtype_of(c, 0))  # under autocast
    hidden = poison(c, inputs)
    theirs = functools.partial(reference, c, keep_of(c) if c.dropout else None)
    with torch.no_grad():
        cotangents = list(cotangents_of(c, theirs(**exact_in)))
    exact = results_of(theirs, c, exact_in, cotangents, contextlib.nullcontext())
    highest = torch.finfo(vars(c).get("autocast", c.dtype)).max / 2
    if any((t.isfinite() & (t.abs() > highest)).any() for name, t in exact.items() if name != "output 1"):
        return OUT_OF_RANGE
    lower = results_of(theirs, c, lower_in, cotangents, contextlib.nullcontext())
    if any((lower[name].isfinite() < t.isfinite()).any() for name, t in exact.items()):
        # what float16 cannot hold on the way: torch in float32, its results rounded, which allows less
        lower = results_of(theirs, c, copies(lower_in, F32), cotangents, contextlib.nullcontext())
        lower = {name: t.to(c.dtype) for name, t in lower.items()}

    for i in range(2 if c.mode == "three calls" else 0):  # the third is the one that is replayed
        results_of(call, c, build(c, seed + i + 1), cotangents, context_of(c))
    before = {name: memory(t).clone() for name, t in inputs.items()}
    mine = results_of(call, c, inputs, cotangents, context_of(c))
    again = {} if INTERPRETED and c.seed % 4 else results_of(call, c, inputs, cotangents, context_of(c))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert mine.keys() <= exact.keys(), f"results {list(mine)}, expected {list(exact)}"
    for name, t in inputs.items():
        assert torch.equal(memory(t), before[name]), f"{name} was written"
    for i, name in enumerate(name for name in mine if name.startswith("output")):
        assert mine[name].dtype == dtype_of(c, i), f"{name}: {mine[name].dtype}, expected {dtype_of(c, i)}"
    errors = {}
    for name, t in mine.items():
        parts = {name: slice(None)}
        if name == "output 1" and c.kind in ("fused", "merge"):  # lse of rows of a huge mask have a size of their own
            far = (exact[name] < -1e6) & exact[name].isfinite()
            parts = {name: ~far, f"{name} of a huge mask": far}
            if far.any():
                exact[name], lower[name] = (r[name].double().masked_fill(far, fill_of(c)) for r in (exact, lower))
        if name == "gradient of mask" and dtype_of(c, 0).itemsize == 2:  # in float32 too as exact as what it is made of
            t = t.to(dtype_of(c, 0))
        for part, where in parts.items():
            error, torchs, step = errors_of(t[where], lower[name][where], exact[name][where], part)
            denormal = torch.finfo(F32).tiny if "output 1" in part else 0.0  # of lse; a softcap may be as small
            errors[part] = error, torchs, step + denormal
    for name, t in again.items():
        assert torch.equal(t, mine[name]), f"{name}: a second run gives other bits"
    for name, where in hidden.items():
        if (grad := mine.get(f"gradient of {name}")) is not None:
            assert (grad.masked_select(where) == 0).all(), f"gradient of {name}: not zero where it is hidden"
    return errors


DRAWS = 8


def check(c):
    """None, or OUT_OF_RANGE if the right result is; raise an AssertionError that says what is wrong."""
    tables = [measure(c, c.seed)]
    if tables == [OUT_OF_RANGE]:
        return OUT_OF_RANGE
    doubtful = [name for name, (error, torchs, step) in tables[0].items() if not error <= 2 * torchs + step]
    if doubtful:  # the largest error of few numbers is chance, that of as many draws is not
        tables += [measure(c, c.seed + i * 1_000_003) for i in range(1, DRAWS)]
        tables = [table for table in tables if table != OUT_OF_RANGE]
    for name in doubtful:
        rows = [table[name] for table in tables if name in table]
        error, torchs, step = map(max, zip(*rows, strict=True))
        if error > 2 * torchs + step:  # one draw may be larger than the others by far: each in its own rounding steps
            steps, torchs_steps = (max(row[i] / max(row[2], 1e-300) for row in rows) for i in (0, 1))
            assert steps <= 2 * torchs_steps + 1, f"{name}: error {error:.2e}, allowed {2 * torchs + step:.2e}"


def main(argv=None):
    args = options().parse_args(argv)
    seed = random.randrange(10**9) if args.seed is None else args.seed
    minutes = args.minutes or (float("inf") if args.calls else 1.0)
    print(f"{describe_device()}, Hopper's kernels {args.hopper}, seed {seed}", flush=True)
    bar = tqdm(total=args.calls, unit="call", disable=not sys.stderr.isatty(), leave=False)
    counts, wrong, done, begin, said = collections.Counter(), 0, 0, time.monotonic(), time.monotonic()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN: what nobody wrote shows
    warnings.simplefilter("ignore")
    with hopper_kernels(args.hopper), contextlib.suppress(KeyboardInterrupt):
        while time.monotonic() < begin + 60 * minutes and done != args.calls:
            c, seed = draw(seed, KINDS), seed + 1
            if args.only not in (None, c.kind):
                continue
            if args.eager and c.mode == "compiled":
                c.mode = "once"
            try:
                what = check(c)
            except Exception as error:
                what = f"{type(error).__name__}: {error}".split("\n")[0]
                if c.block and "does not fit this GPU" in what:  # as it should say
                    what = TOO_LARGE
            done += 1
            counts.update([c.kind, c.mode] + [what] * (what in (OUT_OF_RANGE, TOO_LARGE)))
            bar.update()
            if what not in (None, OUT_OF_RANGE, TOO_LARGE):
                wrong += 1
                same = " --eager" * args.eager + f" --hopper {args.hopper}" * (args.hopper != "auto")
                tqdm.write(f"python3 -m tests.fuzz --seed {c.seed} --calls 1{same}  # {c}: {what}", file=sys.stdout)
                sys.stdout.flush()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()  # raises what no later call can be told from
            if bar.disable and time.monotonic() > said + 60:
                said = time.monotonic()
                print(f"{done} calls, {wrong} wrong", flush=True)
    bar.close()
    print(f"{done} calls in {time.monotonic() - begin:.0f} s, {wrong} wrong: "
          + ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
