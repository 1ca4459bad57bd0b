"""Tuning, around the timing: compiling ahead on every core, triton.autotune, writing the tuned table."""

import contextlib
import importlib
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

DEFAULT = "no tile given"  # the provider of a call that chooses for itself
FINAL = " once more"  # ends the case of the last round


class Kernel(NamedTuple):
    """Where a kernel is: its stage in providers, its module and function, its rows in the tuned table."""

    stage: str
    module: str
    function: str
    op: str | None  # None: its tile follows from the shape, not from the table


KERNELS = {
    "scores": Kernel("scores", "triton_attention_scores", "_scores_kernel", "scores"),
    "softmax": Kernel("softmax", "triton_attention_softmax", "_softmax_kernel", None),
    "values": Kernel("values", "triton_attention_values", "_values_kernel", "values"),
    "fused": Kernel("fused", "triton_attention_fused", "_fwd_kernel", "fused"),
}


@contextlib.contextmanager
def capturing(module):
    """Inside, the launches of a kernel's module end before the GPU; yields the list of (programs, args, constants)."""
    from triton_attention import replay

    module, found = importlib.import_module(module), []
    launch = module.launch
    module.launch = lambda kernel, programs, *args, device=None, **constants: found.append((programs, args, constants))
    try:
        with replay.off():
            yield found
    finally:
        module.launch = launch


def launches(module, call):
    """Whether a call runs the kernel of this module, which tiles are for, and not one made for this GPU."""
    with capturing(module) as found:
        call()
    return bool(found)


def captured(module, call):
    """The first launch of a call: (programs, args, constants)."""
    with capturing(module) as found:
        call()
    return found[0]


def compile_one(module, function, args, constants):
    """In a worker: compile into Triton's disk cache. What fails here fails again where it is timed, with a row."""
    kernel = getattr(importlib.import_module(module), function)
    with contextlib.suppress(Exception):
        kernel.warmup(*args, grid=(1,), **constants)


def compile_ahead(calls):
    """Compile what the calls [(kernel, call)] launch, a process a core; a tensor travels as its dtype."""
    import torch

    jobs = []
    for kernel, call in calls:
        with contextlib.suppress(ValueError):  # a tile that does not fit says so in its row
            _, args, constants = captured(kernel.module, call)
            dtypes = [a.dtype if isinstance(a, torch.Tensor) else a for a in args]
            jobs.append((kernel.module, kernel.function, dtypes, constants))
    if not jobs:
        return
    workers = min(max(1, (os.cpu_count() or 2) - 1), len(jobs))
    print(f"compiling {len(jobs)} tiles on {workers} cores", flush=True)
    context = multiprocessing.get_context("forkserver")  # imports what takes seconds once, for all pools
    context.set_forkserver_preload(["torch", "triton"])
    pool = ProcessPoolExecutor(workers, context)
    try:
        for job in [pool.submit(compile_one, *job) for job in jobs]:
            job.result()
    except BrokenProcessPool:
        print("a worker died: what it did not compile is compiled when it is timed")
    finally:
        pool.shutdown(cancel_futures=True)


def autotune(module, function, calls):
    """triton.autotune among the launches {tile: call}: (its choice, ms, whether its disk cache knew the answer)."""
    import triton

    programs, configs, most = {}, [], (0, None, None)
    for tile, call in calls.items():
        launch = captured(module, call)
        count, _, constants = launch
        programs[tile.BLOCK_M, tile.BLOCK_N] = count
        sizes = {"BLOCK_M": constants["BLOCK_M"], "BLOCK_N": constants["BLOCK_N"]}
        if "WHOLE_ROW" in constants:
            sizes["WHOLE_ROW"] = constants["WHOLE_ROW"]
        stages, registers = constants.get("num_stages", 3), constants.get("maxnreg")
        configs.append(triton.Config(sizes, constants["num_warps"], stages, maxnreg=registers))
        if count > most[0]:  # its scratch buffers are large enough for every tile
            most = launch
    kernel = getattr(importlib.import_module(module), function)
    key = [name for name in ("H", "M", "N", "D", "CAUSAL") if name in kernel.arg_names]
    tuner = triton.autotune(configs, key, cache_results=True)(kernel)
    _, args, constants = most
    fixed = {name: value for name, value in constants.items() if name not in configs[0].all_kwargs()}
    tuner[lambda meta: (programs[meta["BLOCK_M"], meta["BLOCK_N"]],)](*args, **fixed)
    best, ms = min(tuner.configs_timings.items(), key=lambda item: item[1])
    return best, ms[0] if isinstance(ms, (list, tuple)) else ms, not hasattr(tuner, "bench_time")


def save(path, key, tile, comment):
    """Put a row into the tuned table: over the row that serves the key now, else next to its kin.

    key is (kernel, architecture, bits, head dim, causal); a first row serves causal and full attention.
    """
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("TILES = {"))
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("}"))

    def places(*beginning):
        pattern = rf"    \({re.escape(', '.join(map(_literal, beginning)))}[,)]"
        return [i for i in range(start + 1, end) if re.match(pattern, lines[i])]

    *kind, causal = key
    exact, both = places(*key), places(*kind, None)
    if not exact and (not places(*kind) or (both and not causal)):
        key, exact = (*kind, None), both
    span = "" if tile.SPAN == tile._field_defaults["SPAN"] else f", SPAN={tile.SPAN}"
    registers = "" if tile.registers is None else f", registers={tile.registers}"
    numbers = ", ".join(map(str, tile[:5])) + span + registers
    row = f"    ({', '.join(map(_literal, key))}): Tile({numbers}),  # {comment}\n"
    if exact:
        lines[exact[0]] = row
    else:  # of two rows that serve a case the later one holds: behind its kin, before the rows for any GPU
        kin = places(*kind) or places(*kind[:3]) or places(*kind[:2])
        first_any = next((i for i in range(start, end) if ', "any", ' in lines[i]), end)
        lines.insert(kin[-1] + 1 if kin else first_any, row)
    path.write_text("".join(lines))


def _literal(value):
    return f'"{value}"' if isinstance(value, str) else repr(value)
