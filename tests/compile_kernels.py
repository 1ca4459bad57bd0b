"""Compile every kernel at its default tiles for GPUs that are not here, and check what the compiler made of it.

    python3 -m tests.compile_kernels [--targets sm_90 gfx942 ...] [--quick]

Each launcher runs as usual, but its launches end after the compiler (Triton carries ptxas and LLVM for all targets).
A row is a kernel: registers a thread, instructions that spill them to memory, shared memory. Spills and products that
wait for one another (but not in unaligned rows, with dropout, or with masks so short that the host takes longer), more
shared memory than the GPU has, and a product that reads by a stray descriptor or is laid out for another dtype are an
error (exit 1). Minutes on two cores the first time; Triton caches the results. --quick, for the tests, builds every
kernel for every GPU, but leaves out float64, wide float32, some kinds of mask and most builds for unaligned rows.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from triton_attention import mask_map, tiles  # noqa: E402
from triton_attention.dropout import dropout_op  # noqa: E402
from triton_attention.fused_backward import fused_backward_op  # noqa: E402
from triton_attention.fused_bias import bias_gradient  # noqa: E402
from triton_attention.mean_weights import mean_weights_op  # noqa: E402
from triton_attention.row_stats import row_stats  # noqa: E402
from triton_attention.softmax_backward import mask_gradient_op, softmax_backward_op  # noqa: E402
from triton_attention.softmax_mean import softmax_mean_op  # noqa: E402
from triton_attention_backward import dscores_op  # noqa: E402
from triton_attention_fused import fused_op  # noqa: E402
from triton_attention_scores import scores_op  # noqa: E402
from triton_attention_softmax import softmax_op  # noqa: E402
from triton_attention_values import values_op  # noqa: E402

# shared memory a program may take, KiB: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability" (maximum per thread block); AMD CDNA3 ISA, LDS
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
PARTS = {  # kernels that a launcher runs besides or instead of one that bears its name
    "_nonzero_kernel": ", NaN repair", "_merge_kernel": ", merge", "_dq_kernel": ", dQ", "_dkdv_kernel": ", dK dV",
    "_split_kernel": ", parts", "_preprocess_kernel": ", before", "_postprocess_kernel": ", after",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class OfflineDriver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(str(self.target.arch)) % 10**6

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(name):
    """Inside, launches compile for the GPU `name` and end there; yields the list of (kernel name, compiled kernel)."""
    target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    built, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        built.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(OfflineDriver(target))
    try:
        yield built
    finally:
        JITFunction.run = run


def cuobjdump(cubin, option):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(kernel):
    """(registers a thread, loads and stores that spill), from the machine code."""
    if "cubin" in kernel.asm:
        resources = cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
        registers, stack = (int(re.search(rf"{field}:(\d+)", resources).group(1)) for field in ("REG", "STACK"))
        code = cuobjdump(kernel.asm["cubin"], "--dump-sass") if stack else ""
        return registers, len(re.findall(r"\b(?:STL|LDL)\b", code))
    text = kernel.asm["amdgcn"]
    return tuple(int(re.search(rf"\.{f}:\s*(\d+)", text).group(1)) for f in ("vgpr_count", "vgpr_spill_count"))


OWN_BARRIERS = r"\bbar(?:rier)?\.(?:cta\.)?(?:sync|arrive|red)\S*\s+(?:[89]|1[0-5])\b"  # of the Hopper kernels


def innermost_loops(kernel):
    """Of a Hopper kernel's machine code, the instructions of each loop that has a few branches at most, and is not the
    repair of NaN."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", cuobjdump(kernel.asm["cubin"], "--dump-sass"))
    code = [(int(address, 16), text) for address, text in found]
    for end, text in code:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        loop = [t for at, t in code if int(back.group(1), 16) <= at <= end] if back else []
        if sum("BRA" in t for t in loop) < 8 and not any("UTMALDG" in t for t in loop):
            yield loop


def spills_where_it_counts(kernel):
    """Loads and stores that spill within the innermost loops of a Hopper kernel that multiply. (What a thread computes
    once from its number, ptxas may keep in memory while a tile is worked on: a few loads for each tile of queries.)"""
    loops = (loop for loop in innermost_loops(kernel) if any("HGMMA" in t for t in loop))
    return sum(bool(re.search(r"\b(?:STL|LDL)\b", t)) for loop in loops for t in loop)


def softmax_overlaps(kernel):
    """Whether in the innermost loops of a Hopper kernel the exponentials overlap a product in flight: almost half of
    them in the forward pass, which waits for it in their middle, three quarters in the backward pass. (ptxas may move
    the wait up: right results, a third slower. Not where three warpgroups of 128 registers fill the gaps of each other,
    nor where head dims of 256 have few exponentials.)"""
    shares = []
    for loop in innermost_loops(kernel):
        overlapped, in_flight = [], False
        for t in loop:
            if "HGMMA" in t or "DEPBAR.LE gsb0, 0x0" in t:
                in_flight = "HGMMA" in t
            elif "MUFU.EX2" in t:
                overlapped.append(in_flight)
        shares += [sum(overlapped) / len(overlapped)] if overlapped else []
    return bool(shares) and min(shares) >= (0.75 if kernel.metadata.name == "_backward_kernel" else 0.45)


def synchronizes(kernel, one_buffer):
    """Whether a barrier of all consumer warps in the Hopper backward stands between dS, once it is fenced, and dQ,
    which reads what all of them stored (Triton's); before the next dS, if it has the same buffer, and before dK and dV
    overwrite K and V (the kernel's)."""
    steps = {"stmatrix": "S", "fence.proxy.async.shared": "F", "sync": "B", "wgmma.mma_async": "W"}
    step = r"\b(stmatrix|fence\.proxy\.async\.shared|wgmma\.mma_async)|\bbar(?:rier)?\.(?:cta\.)?(sync)\s+0"
    blocks = re.split(r"^\$L\w+:", kernel.asm["ptx"], flags=re.M)  # from a label to the next
    orders = ["".join(steps[a or b] for a, b in re.findall(step, block)) for block in blocks]
    last = [order for order in orders if re.search("S+F", order)]
    stored = "BS+W+FB+W" if one_buffer else "SW+FB+W"
    return any(re.search(stored, order) for order in orders) and all(re.search("BS+F", order) for order in last)


def halves(operand, known):
    """(lower, upper) 32 bits of an operand of machine code, None for what is not a known constant."""
    if number := re.fullmatch(r"(-?)(0x[0-9a-f]+)", operand):
        value = int(number[2], 16) * (-1 if number[1] else 1)
        return value % 2**32, (value >> 32) % 2**32
    if operand in ("RZ", "URZ", "SRZ"):
        return 0, 0
    register = re.fullmatch(r"(-?)(U?R|L)(\d+)(?:\.reuse)?", operand)
    if not register:
        return None, None
    low, high = (known.get((register[2], int(register[3]) + i)) for i in (0, 1))
    if register[1]:
        value = -(high << 32 | low) if None not in (low, high) else None
        return (None, None) if value is None else (value % 2**32, (value >> 32) % 2**32)
    return low, high


def step(text, known):
    """The constants in registers and spilled words (L0, L1, ...) behind an instruction, from those before it; carries
    are taken to be 0."""
    words = re.sub(r"^@!?U?P\w+ ", "", text).split(" ", 1)
    operands = [t.strip() for t in words[1].split(",")] if len(words) > 1 else []
    operands = [t for t in operands if not re.fullmatch(r"!?U?P[T\d]", t)]
    target = re.fullmatch(r"(U?R|L)(\d+)", operands[0]) if operands else None
    if not target or words[0].startswith("BAR"):
        return known
    swap = re.match(r"ULOP3\.LUT UR(\d+), (?:UR\1, UR\d+|UR(\d+), UR\1), URZ, 0x3c", text)
    if swap:  # a ^= b, b ^= a, a ^= b: both have moved behind the second
        a, b = (("UR", int(n or swap[1])) for n in swap.groups())
        return {{a: b, b: a}.get(register, register): value for register, value in known.items()}
    op, inputs, number = words[0], [halves(t, known) for t in operands[1:]], int(target[2])
    name = op.split(".")[0]
    moves = name in ("MOV", "UMOV", "R2UR", "CS2R", "STL", "LDL") or name == "IMAD" and operands[1:3] == ["RZ", "RZ"]
    adds = name in ("UIADD3", "IADD3")
    known, wide = dict(known), 4 if re.search("128|LDSM|MMA", op) else 2 if re.search(r"\.64|WIDE|CS2R", op) else 1
    if op.startswith("HGMMA"):
        wide = int(re.search(r"64x(\d+)x", op)[1]) // 2
    for i in range(wide):
        terms = [x[i] for x in (inputs[-1:] if moves else inputs)] if i < 2 and (moves or adds) else [None]
        known[target[1], number + i] = None if None in terms else sum(terms) % 2**32
    return {register: value for register, value in known.items() if value is not None}


def stray(kernel):
    """How many wgmma read shared memory by a descriptor whose upper half, the layout, is no constant: made from a
    register that holds something else."""
    dump = cuobjdump(kernel.asm["cubin"], "--dump-sass")
    dump = re.sub(r"\[R1(?:\+0x([0-9a-f]+))?\]", lambda m: f"L{int(m[1] or '0', 16) // 4}", dump)  # spilled words
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) *;", dump)
    code, places = [text for _, text in found], {int(address, 16): i for i, (address, _) in enumerate(found)}
    before, work = {0: {}}, [0]
    while work:
        i = work.pop()
        text, after = code[i], step(code[i], before[i])
        if text.startswith("@"):
            after = dict(after.items() & before[i].items())
        jumps = [places[int(t, 16)] for t in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)]
        ends = re.match(r"EXIT|RET|BRA 0x", text)
        for j in jumps + [i + 1] * (not ends and i + 1 < len(code)):
            met = after if j not in before else dict(after.items() & before[j].items())
            if before.get(j) != met:
                before[j] = met
                work.append(j)
    count = 0
    for i, known in before.items():
        if match := re.search(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]", code[i]):
            uppers = (3,) if match[1] else (1, 3)  # the left operand is in registers, or has a descriptor too
            count += any(known.get(("UR", int(match[2]) + n)) is None for n in uppers)
    return count


def waits_for_each(kernel):
    """Whether ptxas lets every wgmma end before the next begins."""
    dump = cuobjdump(kernel.asm["cubin"], "--dump-sass")
    return len(re.findall(r"WARPGROUP\.DEPBAR", dump)) >= len(re.findall("HGMMA", dump)) > 8


def unused_barriers(kernel):
    """How many mbarriers no partition uses. Triton gives their memory to other buffers, and an mbarrier that is
    overwritten is undefined: when another process takes the GPU, 8 bytes of what lies there change."""
    before, specialized, after = kernel.asm["ttgir"].partition("ttg.warp_specialize")
    barriers = re.findall(r"(%\w+) = ttg\.local_alloc .*xi64", before)
    return sum(not re.search(re.escape(name) + r"\b", after) for name in barriers) if specialized else 0


def wide_operands(kernel):
    """How many products have an operand that is laid out for a dtype narrower than its own; see hide_loads."""
    products = re.findall(r"(?:tt\.dot|warp_group_dot) .*", kernel.asm.get("ttgir", ""))
    operands = [re.findall(r"x(?:bf|f)(\d+), #ttg\.dot_op<{[^}]*kWidth = (\d+)}>", line) for line in products]
    return sum(any(int(width) > max(1, 32 // int(bits)) for bits, width in found) for found in operands)


def dropout_launches(dtype, D, quick):
    """Few and many queries with a mask and dropout: P and dS come from 8 bits, or 32 where they are float64."""
    name, wide = f"{str(dtype).removeprefix('torch.')} D{D}", torch.promote_types(dtype, torch.float32)
    seed, scalars = torch.zeros(1, dtype=torch.int64), (0.1, 0.0, 0.5, None, None)
    for kind, M in (("few", 8), ("many", 256))[: 1 if quick else 2]:
        q, k = torch.zeros(8, 128, M, D, dtype=dtype), torch.zeros(8, 32, 256, D, dtype=dtype)
        mask = torch.zeros(8, 128, M, 256, dtype=torch.float32 if dtype == torch.float64 else torch.bool)
        yield f"fused {name} {kind}, mask, dropout", fused_op, (q, k, k, mask, None, seed, *scalars, None, None)
        saved = torch.zeros(8, 128, M, dtype=wide), torch.zeros(8, 128, M, 2, dtype=wide)
        arguments = (q, None, q, k, k, mask, None, seed, q, *saved, *scalars)
        yield f"fused backward {name} {kind}, mask, dropout", fused_backward_op, arguments


def fused_launches(dtype, D, quick):
    """The fused kernels: causal with grouped heads, whose code has that of full attention in it, and with a bias."""
    name = f"{str(dtype).removeprefix('torch.')} D{D}"
    q = torch.zeros(1, dtype=dtype).expand(8, 128, 256, D)  # enough programs that the keys are not split
    lse = torch.zeros(8, 128, 256, dtype=torch.promote_types(dtype, torch.float32))
    stats, bias = lse.new_zeros(8, 128, 256, 2), q[:, :, :, :1].expand(8, 128, 256, 256)
    q = q.contiguous()
    k, keys, scalars = q[:, ::4].contiguous(), q[:1, :8].repeat(1, 1, 64, 1), (0.1, 0.0, 0.0)
    if not quick or (dtype, D) == (torch.bfloat16, 128):
        one, seen = q[:1, :8, :1], torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool)
        for kind, mask in (("one query", None), ("one query, padding", seen)):
            yield f"fused {name}, {kind}", fused_op, (one, keys, keys, mask, None, None, *scalars, *(None,) * 4)
    allowed = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    padding = allowed[:, :, :1].expand(1, 1, 256, 256)
    kinds = (
        (None, None, 0, "causal"), (allowed, None, None, "mask"), (bias, None, None, "bias"),
        (padding, None, 0, "padding, causal"), (allowed, torch.ones(8, 256, dtype=torch.bool), None, "two masks"),
        (bias, q[:, 0, :, 0].contiguous(), None, "two biases"),
    )
    for mask, key_mask, right, kind in kinds[: 6 if not quick else 1 if dtype == torch.float32 else 2 + (D == 64)]:
        arguments = (q, k, k, mask, None, None, *scalars, None, right, None, None, key_mask)
        yield f"fused {name} {kind}", fused_op, arguments
        arguments = (q, None, q, k, k, mask, None, None, q, lse, stats, *scalars, None, right, key_mask)
        yield f"fused backward {name} {kind}", fused_backward_op, arguments
    if not quick:
        for label, rows, keys in (("few, mask", 8, 256), ("short mask", 256, 128)):  # without lists
            some, seen, mask = q[:, :, :rows].contiguous(), k[:, :, :keys].contiguous(), allowed[:, :, :rows, :keys]
            yield f"fused {name} {label}", fused_op, (some, seen, seen, mask, None, None, *scalars, *(None,) * 4)
            saved = lse[:, :, :rows].contiguous(), stats[:, :, :rows].contiguous()
            arguments = (some, None, some, seen, seen, mask, None, None, some, *saved, *scalars, None, None)
            yield f"fused backward {name} {label}", fused_backward_op, arguments
    if dtype == torch.float32:  # few queries: not in parts
        few, saved = q[:, :, :8], (lse[:, :, :8], stats[:, :, :8])
        arguments = (few, None, few, k, k, None, None, None, few, *saved, *scalars, None, 0)
        yield f"fused backward {name} few", fused_backward_op, arguments
    if quick and dtype != torch.float32:
        return
    dbias, record = bias.new_empty(1, 1, 256, 256), lse.new_zeros(8, 128, 256, 4)
    arguments = (dbias, q, q, k, k, bias, None, None, record, *scalars, None, None)
    yield f"fused bias gradient {name}", bias_gradient, arguments


def mean_weights_launches(dtype, D, quick):
    """The mean over heads in tiles for much and for little work, causal, and float32 that is not in parts."""
    name, wide = f"{str(dtype).removeprefix('torch.')} D{D}", torch.promote_types(dtype, torch.float32)
    for kind, M, diagonal in (("", 1024, None), (" causal", 1024, 0), (" few", 8, None))[: 1 if quick else 3]:
        q, lse = torch.zeros(1, 2, M, D, dtype=dtype), torch.zeros(1, 2, M, dtype=wide)
        stats = lse.new_zeros(1, 2, M, 0 if dtype.itemsize == 2 else 2)
        yield f"mean weights {name}{kind}", mean_weights_op, (q, q, lse, stats, 0.1, diagonal)


def row_stats_launches(dtype, D, quick):
    """The maxima and sums of rows from lse, beside a bias and causal, and of float32 without."""
    name, wide = f"{str(dtype).removeprefix('torch.')} D{D}", torch.promote_types(dtype, torch.float32)
    q, lse = torch.zeros(1, 2, 1024, D, dtype=dtype), torch.zeros(1, 2, 1024, dtype=wide)
    bias = torch.zeros(1, 1, 1, 1024, dtype=dtype).expand(1, 2, 1024, 1024)
    yield f"row stats {name} bias", row_stats, (q, q, bias, lse, 0.1, None, None)
    if not quick:
        yield f"row stats {name} bias, causal", row_stats, (q, q, bias, lse, 0.1, None, 0)
        if dtype.itemsize > 2:
            yield f"row stats {name}", row_stats, (q, q, None, lse, 0.1, None, None)


def unaligned(arguments):
    """The same arguments in rows that begin an element past 16 bytes and keep no alignment."""

    def moved(t):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            return t
        sizes = [size if stride else 1 for size, stride in zip(t.shape, t.stride(), strict=True)]
        return t.new_zeros(*sizes[:3], sizes[3] + 3)[..., 1 : sizes[3] + 1].expand(t.shape)

    return tuple(moved(a) for a in arguments)


def narrow_launches():
    """Values narrower than keys, in unaligned rows: the tiles of both take the same place, in other layouts."""
    out = []
    for D, Dv in ((64, 32), (32, 16), (128, 16)):
        q, v = (torch.zeros(1, dtype=torch.bfloat16).expand(8, 128, 256, d) for d in (D, Dv))
        q, v = q.contiguous(), v.contiguous()
        arguments = (q, q, v, None, None, None, 0.1, 0.0, 0.0, None, 0, None, None)
        out.append((f"fused bfloat16 D{D} Dv{Dv} causal, unaligned rows", fused_op, unaligned(arguments)))
        lse = torch.zeros(8, 128, 256)
        arguments = (v, None, q, q, v, None, None, None, v, lse, lse.new_zeros(8, 128, 256, 0), 0.1, 0.0, 0.0, None, 0)
        label = f"fused backward bfloat16 D{D} Dv{Dv} causal, unaligned rows"
        out.append((label, fused_backward_op, unaligned(arguments)))
    return out


def launches(architecture, quick=False):
    """Every launcher with the arguments that choose another build: (label, launcher, arguments). float16 is built as
    bfloat16 is; only for sm_90 do causal and full attention have tiles of their own."""
    if architecture == "sm_90":
        from triton_attention.hopper import backward, forward, scores, values

        values.processors = lambda device: 132
        for kernels in (forward, backward, scores, values):
            kernels.MIN_WORK = math.inf  # what is launched below by the names of all GPUs is the plain kernels
        none, scalars = (None,) * 3, (0.125, 0.0, 0.0)
        for D in (64, 128, 256)[: 3 if forward.MAX_HEAD_DIM == 256 else 2]:
            q = torch.zeros(1, 2, 256, D, dtype=torch.bfloat16)
            for kind, diagonal, fill in (("", None, None), (" causal", 0, 0.0), (" causal, unfilled", 0, None)):
                yield f"scores on Hopper bfloat16 D{D}{kind}", scores.run, (q, q, 0.125, diagonal, fill, None, None)
            if D <= 128:
                for dtype, diagonal in itertools.product((torch.bfloat16, torch.float32), (None, 0)):
                    x, p = q.to(dtype), torch.zeros(1, 2, 256, 256, dtype=dtype)
                    label = f"on Hopper {str(dtype)[6:]} D{D}{'' if diagonal is None else ' causal'}"
                    if dtype == torch.float32:
                        yield f"scores {label}", scores.run, (x, x, 0.125, diagonal, diagonal, None, None)
                    if D <= values.MAX_HEAD_DIM[8 * dtype.itemsize]:
                        yield f"values {label}", values.run, (p, x, diagonal, 2, False, 1.0, dtype, None, None)
            kinds = (("full", None, None), ("causal", None, 0), ("window", -64, 0))[: 2 if quick else 3]
            for kind, left, right in (*kinds, *(() if quick else (("causal, unaligned", None, 10),))):
                arguments = (q, q, q, *none, *scalars, left, right, None, None)
                yield f"fused on Hopper bfloat16 D{D} {kind}", forward.run, arguments
            if D <= 128:
                for kind, right in (("mask", None), ("mask, causal", 0))[: 1 if quick else 2]:
                    for rows in (q, q.repeat(1, 6, 16, 1))[: 2 if D == 64 else 1]:
                        S = rows.shape[2]  # all queries alike if there are many
                        mask = torch.ones(1, 1, S if rows is q else 1, S, dtype=torch.bool).expand(*rows.shape[:3], S)
                        arguments = (rows, rows, rows, mask, None, None, *scalars, None, right, None, None)
                        label = f"fused on Hopper bfloat16 D{D} {kind}{'' if rows is q else ', long'}"
                        yield label, forward.run, arguments
                        lse = torch.zeros(rows.shape[:3])
                        arguments = (rows, None, rows, rows, rows, mask, None, None, rows, lse, None, *scalars)
                        label = label.replace("fused", "fused backward")
                        yield label, backward.run, (*arguments, None, right)
                bias = q[:, :, :, :1].expand(1, 2, 256, 256).contiguous()
                for kind, right in (("bias", None), ("bias, two", None), ("bias, causal", 0))[: 2 if quick else 3]:
                    key_mask = q[:, 0, :, 0].contiguous() if kind == "bias, two" and D <= forward.MAX_TWO else None
                    arguments = (q, q, q, bias, None, None, *scalars, None, right, None, None, key_mask)
                    yield f"fused on Hopper bfloat16 D{D} {kind}", forward.run, arguments
                    saved = torch.zeros(1, 2, 256), torch.zeros(1, 2, 256, 2)
                    arguments = (q, None, q, q, q, bias, None, None, q, *saved, *scalars, None, right, key_mask)
                    yield f"fused backward on Hopper bfloat16 D{D} {kind}", backward.run, arguments
                    if kind == "bias":
                        label = f"fused backward on Hopper bfloat16 D{D} bias, learned"
                        yield label, backward.run, (*arguments, list(bias.shape))
            if D <= 128 and not quick:
                few, label = q[:, :, :128], f"fused on Hopper bfloat16 D{D} causal, few keys"
                yield label, forward.run, (q, few, few, *none, *scalars, None, 0, None, None)
            if D == 64:
                long = q.repeat(1, 6, 16, 1)
                for kind, right in (("full", None), ("causal", 0), ("causal, unaligned", 10))[: 2 if quick else 3]:
                    arguments = (long, long, long, *none, *scalars, None, right, None, None)
                    yield f"fused on Hopper bfloat16 D{D} {kind}, long", forward.run, arguments
            for kind, left, right in kinds if D <= 128 else ():
                arguments = (q, None, q, q, q, *none, q, torch.zeros(1, 2, 256), None, *scalars, left, right)
                yield f"fused backward on Hopper bfloat16 D{D} {kind}", backward.run, arguments
    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float64, 64)):
        name = str(dtype).removeprefix("torch.")
        q, s = torch.zeros(1, 2, 256, D, dtype=dtype), torch.zeros(1, 2, 256, 256, dtype=dtype)
        causal = (0,) if quick and architecture != "sm_90" else (None, 0)
        for diagonal in causal if dtype == torch.bfloat16 else (None,):
            label = f"{name} D{D}{'' if diagonal is None else ' causal'}"
            if diagonal is not None:
                yield f"scores {label}, unfilled", scores_op, (q, q, 0.125, diagonal, None, None, None)
            yield f"scores {label}", scores_op, (q, q, 0.125, diagonal, diagonal, None, None)
            yield f"values {label}", values_op, (s, q, diagonal, 2, False, 1.0, dtype, None, None)
            yield f"values^T {label}", values_op, (s, q, diagonal, 2, True, 1.0, dtype, None, None)
            if dtype == torch.bfloat16:
                yield f"dscores {label}", dscores_op, (q, q.float(), q, s, diagonal)
    for dtype, D in (
        (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64), (torch.float32, 128),
        (torch.float64, 64),
    )[: 4 if quick else 6]:
        yield from fused_launches(dtype, D, quick)
        yield from mean_weights_launches(dtype, D, quick)
        yield from row_stats_launches(dtype, D, quick)
        if D == 64:
            yield from dropout_launches(dtype, D, quick)
    softmax = ((torch.bfloat16, (4096, 32768)), (torch.float32, (16384,)), (torch.float64, (8192,)))
    for dtype, lengths in softmax[: 1 if quick else 3]:
        name = str(dtype).removeprefix("torch.")
        for N in lengths:
            s, bias = torch.zeros(1, 1, 16, N, dtype=dtype), torch.zeros(1, 1, 1, N, dtype=dtype)
            yield f"softmax {name} N{N} causal + bias", softmax_op, (s, bias, 0, None, None)
            yield f"softmax {name} N{N} causal, unfilled", softmax_op, (s, None, 0, None, None, False)
            yield f"softmax backward {name} N{N}", softmax_backward_op, (s, s, None)
            yield f"softmax backward {name} N{N} causal", softmax_backward_op, (s, s, 0, False)
            if N <= 8192:
                yield f"softmax mean {name} N{N}", softmax_mean_op, (s, None, None)
        yield f"mask gradient {name}", mask_gradient_op, (s, [1, 1, 1, N], dtype)
        for diagonal in (None, 0):
            label = f"dropout {name}{'' if diagonal is None else ' causal'}"
            yield label, dropout_op, (s, torch.zeros(1, dtype=torch.int64), 0.1, diagonal, diagonal is None)


def all_launches(name, quick):
    """Those of launches, and unless quick those of the plain kernels in unaligned rows too; one at a time, as together
    their tensors would take 10 GB."""
    for label, launcher, arguments in launches(name, quick):
        yield label, launcher, arguments
        if not quick and "on Hopper" not in label:
            yield f"{label}, unaligned rows", launcher, unaligned(arguments)
    yield from narrow_launches()[: 1 if quick else 6]


def rows(name, quick):
    """The table for one GPU: [(label, registers, spills, shared KiB, problem or "")]."""
    tiles.NVIDIA = tl.constexpr(name.startswith("sm_"))  # so a process compiles for one GPU
    mask_map.LISTS_FROM = 1 << 16  # queries x keys, so that both builds are here: with lists of tiles, and without
    out = []
    for label, launcher, arguments in all_launches(name, quick):
        with compiling_for(name) as built:
            launcher(*arguments)
        for name_of_kernel, kernel in built:
            registers, spills = usage(kernel)
            shared = kernel.metadata.shared / 1024
            slow_anyway = any(part in label for part in ("unaligned rows", "dropout", "few, mask", "short mask"))
            if name_of_kernel in ("_forward_kernel", "_backward_kernel") and spills:
                spills = spills_where_it_counts(kernel)
            problems = [f"{spills} spills"] if spills and not slow_anyway else []
            problems += [f"shared memory over {SHARED_KIB[name]} KiB"] if shared > SHARED_KIB[name] else []
            overlaps = name_of_kernel in ("_forward_kernel", "_backward_kernel") and "D256" not in label
            overlaps &= "bias" not in label  # where it comes from shared memory: some of them only, and fast enough
            if overlaps and registers > 128 and not softmax_overlaps(kernel):
                problems.append("the exponentials do not overlap a product")
            if name_of_kernel in ("_forward_kernel", "_backward_kernel") and re.search(OWN_BARRIERS, kernel.asm["ptx"]):
                problems.append("Triton has taken a named barrier of the kernel's own")
            if name_of_kernel == "_backward_kernel" and not synchronizes(kernel, "D64 bias" in label):
                problems.append("a barrier is missing")
            if "wgmma" in kernel.asm.get("ptx", ""):
                if strays := stray(kernel):
                    problems.append(f"{strays} products read by a descriptor of something else")
                if unused := unused_barriers(kernel):
                    problems.append(f"{unused} mbarriers that are initialized and not used")
                if waits_for_each(kernel) and not slow_anyway:
                    problems.append("ptxas has serialized the products")
            if name.startswith("sm_") and (wide := wide_operands(kernel)):
                problems.append(f"{wide} products laid out for a narrower dtype")
            row = (label + PARTS.get(name_of_kernel, ""), registers, spills, shared, ", ".join(problems))
            out += [row] if row not in out else []
    return out


def main():
    parser = argparse.ArgumentParser("python3 -m tests.compile_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=SHARED_KIB, default=list(SHARED_KIB), help="GPUs")
    parser.add_argument("--quick", action="store_true", help="leave out float64, wide float32 and some kinds of mask")
    args = parser.parse_args()
    targets = args.targets
    print(f"{'GPU':7} {'kernel':46} {'registers':>9} {'spills':>9} {'shared KiB':>10}")
    bad = 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.compile_kernels"])
    with ProcessPoolExecutor(min(2, len(targets)), context, max_tasks_per_child=1) as pool:
        for name, table in zip(targets, pool.map(rows, targets, [args.quick] * len(targets)), strict=True):
            for label, registers, spills, shared, problem in table:
                bad += bool(problem)
                print(f"{name:7} {label:46} {registers:9} {spills:9} {shared:10.1f}  {problem}", flush=True)
    print(f"{bad} of the kernels spill or do not fit" if bad else "no spills, and everything fits")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
