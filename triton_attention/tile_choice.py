"""Which tile a kernel runs with: the table's (tuned.py), the caller's, or one that a search forces on all."""

import contextlib
import functools

import torch
import triton

from triton_attention import tuned
from triton_attention.device import INTERPRETED, TRITON, allows_tf32, architecture
from triton_attention.replay import off

ONE_PASS = 16384  # keys of a row that fit the registers of a program; half as many in float64
TUNED = (None, None)  # as (block_m, block_n): those of the table


def places_of(arch):
    """Whose rows of the table serve a GPU, the last of them first."""
    return ["any", arch, *(f"{arch}, triton {x}.{y}" for x, y in ((3, 8), (3, 9)) if TRITON >= (x, y))]


@functools.lru_cache
def _tuned(op, arch, bits, head_dim, causal):
    """The table's row for the smallest head dim that holds ours, the widest one past the table's end: of several, one
    for this GPU before one for any, and before it one for this GPU from some Triton on. An op named "op, variant" takes
    the row of "op" where there is none of the variant, and "op, variant, more" first that of "op, variant".
    """
    parts, found = op.split(", "), []
    names = [", ".join(parts[:i]) for i in range(1, len(parts) + 1)]
    places = places_of(arch)
    for i, ((name, where, row_bits, dim, row_causal), tile) in enumerate(tuned.TILES.items()):
        if name in names and where in places and row_bits == bits and row_causal in (causal, None):
            fit = -dim if dim >= head_dim else dim - (1 << 30)
            found.append((fit, places.index(where), names.index(name), i, tile))
    if not found:
        raise KeyError(f"no tile for {op}, {bits} bits")
    return max(found)[-1]


_forced = []


def is_forced():
    return bool(_forced)


@contextlib.contextmanager
def forcing(tile):
    """Inside, every kernel of this process that asks the table gets `tile` instead, in all threads, as a gradient is
    computed in another one: for scripts that search for a better tile."""
    _forced.append(tile)
    try:
        with off():
            yield
    finally:
        _forced.pop()


def tile_for(op, dtype, head_dim, causal, device, block_m=None, block_n=None) -> tuned.Tile:
    """The tuned tile of a kernel on a device, or the caller's where block_m or block_n is given."""
    if _forced:
        return _forced[-1]
    if INTERPRETED:
        tile = tuned.INTERPRETED._replace(BLOCK_D=16) if op in tuned.INTERPRETED_SLICED else tuned.INTERPRETED
    else:
        tile = _tuned(op, architecture(device), dtype.itemsize * 8, head_dim, bool(causal))
    if block_m is None and block_n is None:
        return tile
    block_m, block_n = block_m or tile.BLOCK_M, block_n or tile.BLOCK_N
    num_warps = 8 if block_m * block_n > 1 << 13 else 4
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=2)


def compile_options(tile, device):
    """What a tile says to the compiler, for launch."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.registers and not INTERPRETED and architecture(device).startswith("sm_"):
        options["maxnreg"] = tile.registers
    return options


def dot_precision(dtype, device):
    """How a kernel multiplies float32: in TF32 if torch.set_float32_matmul_precision() allowed it, else in full.

    In full, on NVIDIA GPUs, is a sum of six products of bfloat16, three of which make up a float32. (Three products of
    TF32 lose two bits, which is past the error that the tests allow.)
    """
    if dtype != torch.float32 or INTERPRETED or not architecture(device).startswith("sm_"):
        return "ieee"
    return "tf32" if allows_tf32() else "bf16x6"


def row_tile(scores, causal, block_m=None, block_n=None):
    """BLOCK_M rows x BLOCK_N keys, and the warps that hold them: 1024 elements each, 512 where all are visible. Half of
    a causal tile is not read, so it has twice as many."""
    N, wide = scores.shape[3], scores.element_size() // 8  # 1 for float64
    whole_row = N <= (block_n or ONE_PASS >> wide)
    block_n = int(triton.next_power_of_2(N)) if whole_row else block_n or 4096 >> wide  # int: also of a SymInt
    block_m = block_m or max(1, (1 << 16 if INTERPRETED else 1 << 12 if causal else 1 << 11) // block_n)
    num_warps = min(max(block_m * block_n // (1024 if causal else 512), 4), 16)
    return {"WHOLE_ROW": whole_row, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}
