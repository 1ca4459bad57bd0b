"""What the benchmark scripts share: the options, the ceilings, checks before timing, fair timing, the run.

A script asks one question. It yields Cases; run() builds one at a time into a Comparison, checks what every provider
(who computes it) returns, times the right ones one after the other, and writes results/<gpu>/<script>.json after every
point: an interruption, an exhausted memory or a kernel that does not fit loses nothing. A wrong result is never timed.
"""

import argparse
import functools
import math
import re
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import COLUMNS, HERE, Results, Row, machine, path_of, show

DTYPES = ("bfloat16", "float16", "float32")
PASSES = 3  # times that a provider is timed, on a chip that its own load has warmed
LOAD = 0.5  # s of that load: beside others, who is measured after a hot one reads up to a sixth slow
WHOLE = 4  # so many times as far off as on a part PyTorch may be on the whole, where it runs other kernels


@dataclass
class Comparison:
    """One computation by several providers, in memory.

    A provider's `make` prepares (imports, compiles, runs the forward of a backward) and returns the call to be timed,
    which returns a tensor or a tuple of them. `pick` takes that result to the part which is checked, and
    reference(dtype) is that part by PyTorch's own operations. bytes must move and flops must be done at least by who
    stores nothing in between; `own` has (bytes, flops) of the providers that do it another way. Those in `alone` leave
    the others no memory.
    """

    makes: dict[str, Callable]
    reference: Callable
    pick: Callable
    bytes: float
    flops: float
    own: dict[str, tuple[float, float]] = field(default_factory=dict)
    alone: tuple[str, ...] = ()


@dataclass
class Case:
    """What is asked, known before anything is allocated; `about` is what figures need to know (S, D, tile, ...)."""

    name: str
    label: str
    providers: list[str]
    build: Callable[[], Comparison]
    about: dict = field(default_factory=dict)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description, batch=4, heads=16, plot="redraw the figures"):
    """The options that the scripts share, and what is a script's own in them; --help needs neither torch nor a GPU."""
    p = argparse.ArgumentParser(description=description, formatter_class=_Help)
    p.add_argument("--mode", choices=("fwd", "bwd", "both"), default="both", help="forward, backward, or both")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="dtypes instead of the script's own")
    p.add_argument("--batch", type=int, default=batch, help="batch size B")
    p.add_argument("--heads", type=int, default=heads, help="heads H")
    p.add_argument("--head-dim", type=int, nargs="+", help="head dims D instead of the script's own")
    p.add_argument("--seq-lens", type=int, nargs="+", help="sequence lengths S instead of the script's own")
    p.add_argument("--causal", action=argparse.BooleanOptionalAction, help="only causal, or only full attention")
    p.add_argument("--providers", nargs="+", help="only providers whose name contains one of these")
    p.add_argument("--quick", action="store_true", help="fewer cases, shorter timing, no torch.compile")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder for <gpu>/<script>.json and figures")
    p.add_argument("--plot", action="store_true", help=f"only {plot} from the JSON, without a GPU")
    p.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    p.add_argument("--resume", action="store_true", help="skip the points that the JSON of this GPU already has")
    return p


def wanted(provider, args):
    return not args.providers or any(part in provider for part in args.providers)


# ---- timing


class Stopwatch:
    """Times calls on the GPU, by CUDA events with the L2 cache cleared before each; a test puts a fake in its place."""

    def __init__(self, rep=40, passes=PASSES, load=LOAD):
        self.rep, self.passes, self.load = rep, passes, load

    def warm(self, call):
        """Run a call until the clock is the one that its own heat allows."""
        import torch

        call()  # which may compile
        torch.cuda.synchronize()
        end = time.perf_counter() + self.load
        while time.perf_counter() < end:
            for _ in range(8):
                call()
            torch.cuda.synchronize()

    def time(self, call):
        """(median, 20 %, 80 % quantile) in ms."""
        from triton.testing import do_bench

        return tuple(do_bench(call, warmup=10, rep=self.rep, quantiles=[0.5, 0.2, 0.8]))

    def host(self, call, calls=200):
        """Median over rounds of the us that the host is busy with a call, for one that the GPU has done by then."""
        import torch

        rounds = []
        for _ in range(9):  # the first ones prepare
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - start) / calls * 1e6)
        return statistics.median(rounds[2:])

    def ceilings(self):
        """What this GPU does at most, measured now: copy in GB/s (read + write), bfloat16 matmul in TFLOP/s."""
        import torch

        source = torch.randint(255, (2 << 30,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in "ab")
        times = dict(in_passes({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, self))
        ms = {name: statistics.median(median for median, *_ in passes) for name, passes in times.items()}
        return {
            "copy_gbps": 2 * source.numel() / ms["copy"] / 1e6, "matmul_tflops": 2 * 8192**3 / ms["matmul"] / 1e9,
        }


def stopwatch(args, load=LOAD):
    """The Stopwatch of this machine; None where the kernels are interpreted and times would mean nothing."""
    from triton_attention.device import INTERPRETED

    return None if INTERPRETED else Stopwatch(rep=15, passes=1, load=load / 2) if args.quick else Stopwatch(load=load)


def in_passes(calls, watch):
    """Yield (name, times in ms of each pass, or what went wrong): one after the other has the chip to himself."""
    for name, call in calls.items():
        try:
            watch.warm(call)
            found = [watch.time(call) for _ in range(watch.passes)]
        except Exception as error:
            found = error
        yield name, found


# ---- checking


def reason(error):
    """One line for the table: why there is no result."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return "out of memory" + (f": could not allocate {asked.group(1)}" if asked else "")
    if isinstance(error, MemoryError):
        return f"out of memory: {text}"
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    if few := re.search(r"Insufficient registers \((\d+)\)", text):  # ptxas
        return f"{type(error).__name__}: the tile does not fit: it needs more than {few.group(1)} registers a thread"
    sentence = text.split(". ")[0]
    return f"{type(error).__name__}: {sentence[:160]}"


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def error_of(got, exact):
    """max |got - exact| / max |exact|, the worst of the tensors; inf where NaN or inf are not those of exact."""
    import torch

    worst = 0.0
    for g, e in zip(as_tuple(got), as_tuple(exact), strict=True):
        finite = e.isfinite()
        if g.shape != e.shape or not torch.equal(g.isfinite(), finite):
            return math.inf
        off = (g.double() - e)[finite].abs().max().item() / e[finite].abs().max().item()
        worst = max(worst, off)
    return worst


def allowance(comparison, dtype):
    """(exact result, the error of PyTorch's own operations on the part that is checked, a rounding step)."""
    import torch

    exact = tuple(e.double() for e in as_tuple(comparison.reference(torch.float64)))
    return exact, error_of(comparison.reference(dtype), exact), torch.finfo(dtype).eps


def try_out(make, pick):
    """Prepare a provider and run it twice: (call, what is checked, MiB that the call allocates at its peak).

    The first result is overwritten with NaN before its memory is used again: what the kernel leaves unwritten shows.
    """
    import torch

    cuda = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if cuda else 0
    call = make()
    for tensor in as_tuple(call()):
        tensor.detach().fill_(math.nan)
    del tensor
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    picked = tuple(t.detach().clone() for t in as_tuple(pick(call())))
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
    return call, picked, peak


def assert_alive():
    """After a fault (an illegal address) every call fails: say so once, what was saved is safe."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the GPU gave up ({reason(error)}); what is saved is safe, --resume goes on") from None


# ---- the run


def measure(case, results, limits, watch):
    """Check and time the providers of a case that results lacks; yields each Row when it is final."""
    names = [name for name in case.providers if not results.has(case.name, case.label, name)]
    names.sort(key=lambda name: name != "torch")  # it says what is allowed
    known = [row.error for row in results.rows if row.point == (case.name, case.label, "torch")]
    whole = max(filter(None, known), default=0.0)
    comparison = case.build()
    truth = functools.cache(functools.partial(allowance, comparison))
    alone = [[name] for name in names if name in comparison.alone]
    for group in [[name for name in names if name not in comparison.alone], *alone]:
        calls, rows = {}, {}
        for name in group:
            row = rows[name] = Row(case.name, case.label, name, about=case.about)
            try:
                call, picked, row.peak_mib = try_out(comparison.makes[name], comparison.pick)
                exact, part, step = truth(picked[0].dtype)
                error = error_of(picked, exact)
                whole = error if name == "torch" else whole
                row.allowed = 2 * max(part, min(whole, WHOLE * part)) + step
            except Exception as error:
                row.note = reason(error)
                assert_alive()
            else:
                row.error = error if math.isfinite(error) else None
                row.note = "" if error <= row.allowed else "WRONG"
                if not row.note:
                    calls[name] = call
            call = picked = None
            if row.note or watch is None:
                yield row
        if watch is None:
            continue
        for name, times in in_passes(calls, watch):
            row = rows[name]
            if isinstance(times, Exception):
                row.note = reason(times)
                assert_alive()
            else:
                bytes, flops = comparison.own.get(name, (comparison.bytes, comparison.flops))
                roof = max(bytes / limits["copy_gbps"] / 1e6, flops / limits["matmul_tflops"] / 1e9)
                row.ms, row.ms_20, row.ms_80 = (statistics.median(q) for q in zip(*times, strict=True))
                row.passes = [median for median, *_ in times]
                row.gbps, row.tflops = bytes / row.ms / 1e6, comparison.flops / row.ms / 1e9
                row.of_roofline, row.intensity = roof / row.ms, flops / bytes
            yield row


def run(script, cases, args, watch, keep=None):
    """Check, time, print and save every case; returns the rows of the file. Without a watch nothing is timed or saved.

    keep says which rows of an earlier run stay in the file; none by default, and all of them with --resume.
    """
    import torch
    from tqdm import tqdm

    say = functools.partial(tqdm.write, file=sys.stdout)
    info = machine()
    print(" | ".join(f"{key} {value}" for key, value in info.items() if value))
    if watch is None:
        limits = {}
        print("No GPU: a small case in Triton's interpreter. The errors are real; nothing is timed, saved or drawn.")
    else:
        limits = watch.ceilings()
        copy, matmul = limits["copy_gbps"], limits["matmul_tflops"]
        print(f"ceilings, now: copy {copy:.0f} GB/s, bfloat16 matmul {matmul:.0f} TFLOP/s")
    path = path_of(args, script, info["gpu"])
    load = f"in {watch.passes} passes, each provider after {watch.load} s of its own load" if watch else ""
    info |= {**limits, "timed": load}
    results = Results(path, info, (lambda row: True) if args.resume else keep or (lambda row: False))
    print(f"ms: median, timed {load}; " if load else "", end="")
    print("roofline: share of what the ceilings allow; speed-up: over a case's last provider")
    print("error: max |difference to float64| / max |float64|; allowed: twice PyTorch's in the dtype + a rounding step")
    print(COLUMNS, flush=True)
    rows = []
    try:
        for case in tqdm(list(cases), disable=not sys.stderr.isatty(), leave=False):
            case.providers = [name for name in case.providers if wanted(name, args)]
            if not case.providers or watch and all(results.has(case.name, case.label, name) for name in case.providers):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why SDPA's backends refuse: the row says that they do
                for row in measure(case, results, limits, watch):
                    if watch:
                        results.add(row)
                    rows.append(row)
            of_case = {r.provider: r for r in [*results.rows, *rows] if r.point[:2] == (case.name, case.label)}
            if watch:
                results.settle(case.name, case.label, case.providers)
            for name in case.providers:
                show(of_case[name], of_case.get(case.providers[-1]), say)
            sys.stdout.flush()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        again = shlex.join(sys.argv + ([] if args.resume else ["--resume"]))
        kept = f"{len(results.rows)} points are in {path}; python3 {again} goes on" if watch else "nothing is saved"
        print(f"\ninterrupted: {kept}")
        raise SystemExit(130) from None
    if watch:
        print(f"{len(results.rows)} points in {path}")
    return results.rows if watch else rows
