"""The tuned tiles, data only: which BLOCK_M x BLOCK_N, warps and pipeline stages a kernel starts from.

A row is (kernel, architecture, bits of the dtype, head dim up to, causal or None for both). "any" serves every GPU
without a row of its own and fits the smallest shared memory (64 KiB). A row of "sm_90, triton 3.9" serves from that
Triton on, and comes first: its ptxas takes more registers, and the other row would spill. The figures are for
[4, 16, 4096, D] bfloat16 or float32 on an NVIDIA H200 (device copy 4250 GB/s), in ms; on an H100 (3020 GB/s) where a
row says so.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """A kernel's launch constants; BLOCK_D is the part of the head dim taken at once."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    SPAN: int = 8  # tiles of keys that one program walks (scores, dscores): hides the load of q, fills the GPU evenly
    # (fused backward hopper: stages of dQ in shared memory)
    registers: int | None = None  # a thread has at most, where that is not left to the compiler
    narrow: int | None = None  # of tiles that are partly masked, columns at a time: there are not registers for more


TILES = {
    ("scores", "sm_90", 16, 64, None): Tile(128, 128, 64, 8, 3, SPAN=16),  # 0.60
    ("scores", "sm_90", 16, 128, None): Tile(128, 64, 128, 8, 3, SPAN=16),  # 0.87
    ("scores hopper", "sm_90", 16, 64, None): Tile(64, 128, 64, 4, 2, SPAN=8, registers=128),  # 0.58
    ("scores hopper, filled", "sm_90", 16, 64, True): Tile(64, 128, 64, 4, 2, SPAN=4, registers=128),  # 0.59
    ("scores hopper", "sm_90", 16, 128, None): Tile(64, 256, 128, 4, 2, SPAN=16, registers=240),  # 0.65
    ("scores hopper, filled", "sm_90", 16, 128, True): Tile(64, 128, 128, 4, 2, SPAN=16, registers=240),  # 0.61
    ("scores hopper", "sm_90", 16, 256, None): Tile(64, 128, 256, 4, 2, SPAN=16, registers=240),
    ("scores hopper", "sm_90", 32, 64, None): Tile(64, 64, 64, 4, 1, SPAN=32, registers=128),  # 1.69
    ("scores hopper, filled", "sm_90", 32, 64, True): Tile(64, 128, 64, 4, 1, SPAN=16, registers=240),  # 1.35
    ("scores hopper", "sm_90", 32, 128, None): Tile(64, 64, 128, 4, 1, SPAN=32, registers=240),  # 2.82
    ("scores", "sm_90", 16, 256, None): Tile(64, 64, 128, 4, 2),
    ("scores", "sm_90", 32, 64, None): Tile(128, 64, 64, 4, 2),  # 2.33
    ("scores", "sm_90", 32, 128, None): Tile(64, 64, 64, 4, 2),  # 4.45
    ("values", "sm_90", 16, 64, False): Tile(128, 128, 64, 8, 2),  # an H100: 0.75, transposed 0.73
    ("values", "sm_90", 16, 64, True): Tile(64, 128, 64, 4, 3),  # 0.31
    ("values, transposed", "sm_90", 16, 64, True): Tile(128, 64, 64, 4, 4),  # 0.31
    ("values", "sm_90", 16, 128, False): Tile(128, 128, 128, 8, 3),  # 0.64 (256 x 64: 0.57, with fewer programs)
    ("values, transposed", "sm_90", 16, 128, False): Tile(256, 32, 128, 8, 6),  # 0.57
    ("values", "sm_90", 16, 128, True): Tile(128, 64, 128, 8, 4),  # 0.38, transposed 0.38
    ("values", "sm_90", 32, 64, None): Tile(128, 32, 64, 4, 3),  # 2.18, transposed 2.27
    ("values hopper", "sm_90", 16, 64, None): Tile(256, 128, 64, 4, 2, registers=240),  # 0.52
    ("values hopper", "sm_90", 16, 64, True): Tile(256, 64, 64, 4, 4, registers=240),  # 0.32: not used
    ("values hopper", "sm_90", 16, 128, None): Tile(256, 64, 128, 4, 3, registers=240),  # 0.56, causal 0.35
    ("values hopper", "sm_90", 32, 64, None): Tile(128, 64, 64, 4, 3, registers=240),  # 1.52, causal 0.94
    ("values hopper", "sm_90", 32, 128, None): Tile(128, 32, 128, 4, 4, registers=240),  # 2.36
    ("values hopper", "sm_90", 32, 128, True): Tile(128, 16, 128, 4, 6, registers=240),
    ("dscores", "sm_90", 16, 64, None): Tile(64, 64, 64, 4, 2),  # 1.34 and 1.38 with SPAN 4 and 16
    ("dscores", "sm_90", 16, 128, None): Tile(64, 64, 128, 4, 2, SPAN=16),  # 1.52
    ("fused", "sm_90", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128),  # 0.66
    ("fused, masked", "sm_90", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128),
    ("fused, masked", "sm_90", 16, 64, True): Tile(128, 64, 64, 8, 3, registers=128, narrow=16),
    ("fused, masked, two", "sm_90", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128, narrow=32),
    ("fused, masked", "sm_90, triton 3.8", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128, narrow=16),
    ("fused, masked, two", "sm_90, triton 3.8", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128, narrow=32),
    ("fused", "sm_90", 16, 128, None): Tile(128, 64, 128, 8, 3, registers=255),  # 1.18
    ("fused", "sm_90", 16, 256, None): Tile(128, 32, 256, 8, 2, registers=255),
    ("fused, masked", "sm_90", 16, 256, None): Tile(128, 32, 256, 8, 2, registers=255, narrow=16),
    ("fused hopper", "sm_90", 16, 64, False): Tile(128, 128, 64, 4, 2, registers=240),
    ("fused hopper", "sm_90", 16, 64, True): Tile(128, 128, 64, 4, 3, registers=240),
    ("fused hopper, long", "sm_90", 16, 64, None): Tile(192, 128, 64, 4, 2, registers=160),
    ("fused hopper, long", "sm_90, triton 3.9", 16, 64, True): Tile(128, 128, 64, 4, 3, registers=240),
    ("fused hopper", "sm_90", 16, 128, None): Tile(128, 128, 128, 4, 2, registers=240),
    ("fused hopper", "sm_90", 16, 256, None): Tile(128, 64, 256, 4, 2, registers=240),
    ("fused hopper, biased", "sm_90", 16, 64, None): Tile(128, 128, 64, 4, 2, registers=240),
    ("fused hopper, biased", "sm_90", 16, 128, None): Tile(128, 128, 128, 4, 2, registers=240),
    ("fused backward hopper", "sm_90", 16, 64, None): Tile(128, 128, 64, 8, 2, SPAN=2, registers=240),
    ("fused backward hopper", "sm_90", 16, 128, None): Tile(64, 128, 128, 8, 3, SPAN=1, registers=240),
    ("fused backward hopper, biased", "sm_90", 16, 64, None): Tile(128, 128, 64, 8, 2, SPAN=1, registers=240),
    ("fused backward hopper, biased", "sm_90", 16, 128, None): Tile(64, 128, 128, 8, 2, SPAN=1, registers=240),
    ("fused dq", "sm_90", 16, 64, None): Tile(128, 64, 64, 8, 3, registers=128),  # 0.68
    ("fused dq", "sm_90", 16, 64, True): Tile(64, 64, 64, 4, 3, registers=168),
    ("fused dq, masked", "sm_90", 16, 64, None): Tile(64, 64, 64, 4, 3, registers=168),
    ("fused dq, masked, two", "sm_90", 16, 64, None): Tile(64, 64, 64, 4, 3, registers=168, narrow=32),
    ("fused dq", "sm_90", 16, 128, None): Tile(128, 64, 128, 8, 3, registers=255),  # 1.34
    ("fused dq, masked", "sm_90", 16, 128, None): Tile(128, 64, 128, 8, 3, registers=255, narrow=32),
    ("fused dq", "sm_90", 16, 256, None): Tile(32, 64, 256, 8, 1, registers=255),
    ("fused dq, masked", "sm_90", 16, 256, None): Tile(32, 64, 256, 8, 1, registers=255, narrow=32),
    ("fused dq", "sm_90, triton 3.8", 16, 256, None): Tile(32, 32, 256, 8, 1, registers=255),
    ("fused, masked", "sm_100", 16, 64, None): Tile(64, 32, 64, 8, 2, registers=255),
    ("fused dq, masked", "sm_100", 16, 256, None): Tile(16, 32, 256, 8, 1, registers=255),
    ("fused dq, masked", "sm_120", 16, 256, None): Tile(16, 32, 256, 8, 1, registers=255),
    ("fused dkdv", "sm_90", 16, 64, None): Tile(64, 64, 64, 4, 3, registers=255),  # 1.06
    ("fused dkdv", "sm_90", 16, 128, None): Tile(32, 64, 128, 4, 3, registers=255),  # 2.09
    ("fused dkdv, masked", "sm_90", 16, 128, None): Tile(32, 128, 128, 8, 3, registers=255),
    ("fused dkdv", "sm_90", 16, 256, None): Tile(32, 32, 256, 8, 1, registers=255),
    ("fused", "sm_90", 32, 64, None): Tile(128, 64, 64, 8, 2, registers=255),  # an H100: 3.88
    ("fused", "sm_90", 32, 128, None): Tile(128, 32, 128, 8, 2, registers=255),
    ("fused dq", "sm_90", 32, 64, None): Tile(128, 32, 64, 8, 2, registers=255),
    ("fused dq", "sm_90", 32, 128, None): Tile(16, 32, 128, 8, 2, registers=255),
    ("fused dq, masked", "sm_90", 32, 128, None): Tile(16, 32, 128, 8, 2, registers=255, narrow=16),
    ("fused dkdv", "sm_90", 32, 64, None): Tile(32, 128, 64, 8, 2, registers=255),
    ("fused dkdv", "sm_90", 32, 128, None): Tile(32, 32, 128, 8, 2, registers=255),
    ("fused dkdv, masked", "sm_90", 32, 128, None): Tile(32, 16, 128, 8, 2, registers=255),
    ("fused dkdv, masked, two", "sm_90", 32, 128, None): Tile(32, 16, 128, 8, 1, registers=255),
    ("fused dkdv, masked, two", "sm_90, triton 3.8", 32, 128, None): Tile(32, 16, 128, 8, 1, registers=255),
    ("fused dq, few", "sm_90", 32, 64, None): Tile(32, 32, 64, 8, 1, registers=255),
    ("fused dq, few", "sm_90", 32, 128, None): Tile(32, 32, 128, 8, 1, registers=255),
    ("fused dq, few", "sm_90, triton 3.9", 32, 64, None): Tile(16, 32, 64, 8, 1, registers=255),
    ("fused dq, few", "sm_90, triton 3.9", 32, 128, None): Tile(16, 32, 128, 8, 1, registers=255),
    ("fused dkdv, few", "sm_90", 32, 64, None): Tile(32, 32, 64, 8, 1, registers=255),
    ("fused dkdv, few", "sm_90", 32, 128, None): Tile(32, 16, 128, 8, 1, registers=255),
    ("fused dkdv, few", "sm_90, triton 3.9", 32, 64, None): Tile(32, 32, 64, 8, 1, registers=255),
    ("fused", "sm_90, triton 3.9", 32, 64, None): Tile(128, 32, 64, 8, 2, registers=255),
    ("fused, masked", "sm_90, triton 3.9", 32, 128, None): Tile(32, 32, 128, 8, 2, registers=255),
    ("fused dq", "sm_90, triton 3.9", 32, 64, None): Tile(128, 16, 64, 8, 2, registers=255),
    ("fused dkdv", "sm_90, triton 3.9", 32, 64, None): Tile(16, 128, 64, 8, 2, registers=255),
    ("fused dkdv", "sm_90, triton 3.8", 32, 128, None): Tile(32, 16, 128, 8, 2, registers=255),
    ("fused dbias", "sm_90", 16, 64, None): Tile(64, 64, 64, 8, 2, registers=255),
    ("fused dbias", "sm_90", 16, 128, None): Tile(64, 64, 128, 8, 2, registers=255),
    ("fused dbias", "sm_90", 32, 128, None): Tile(16, 64, 128, 8, 1, registers=255),
    ("fused", "any", 16, 64, None): Tile(64, 32, 64, 4, 2, registers=255),
    ("fused", "any", 16, 128, None): Tile(64, 32, 128, 4, 2, registers=255),
    ("fused, masked", "any", 16, 128, None): Tile(64, 16, 128, 4, 2, registers=255),
    ("fused", "any", 16, 256, None): Tile(64, 16, 256, 8, 1, registers=255),
    ("fused", "any", 32, 32, None): Tile(32, 32, 32, 8, 1, registers=255),
    ("fused", "any", 32, 64, None): Tile(32, 64, 64, 8, 1, registers=255),
    ("fused", "any", 32, 128, None): Tile(32, 32, 128, 8, 1, registers=255),
    ("fused", "any", 32, 256, None): Tile(32, 16, 256, 8, 1, registers=255),
    ("fused", "any", 64, 64, None): Tile(16, 16, 64, 4, 1, registers=255),
    ("fused few", "sm_90", 16, 64, None): Tile(16, 128, 64, 4, 3, registers=255),
    ("fused few, masked", "sm_90", 16, 64, None): Tile(16, 64, 64, 4, 3, registers=255),
    ("fused few", "sm_90", 16, 128, None): Tile(16, 64, 128, 4, 3, registers=255),
    ("fused few, masked", "sm_90", 16, 128, None): Tile(16, 32, 128, 4, 3, registers=255),
    ("fused few", "any", 16, 128, None): Tile(16, 32, 128, 4, 2, registers=255),
    ("fused few", "any", 16, 256, None): Tile(16, 16, 256, 4, 2, registers=255),
    ("fused few", "any", 32, 128, None): Tile(16, 16, 128, 4, 1, registers=255),
    ("fused few", "any", 32, 256, None): Tile(16, 16, 256, 4, 1, registers=255),
    ("fused few", "any", 64, 64, None): Tile(16, 16, 64, 4, 1, registers=255),
    ("fused dq", "any", 16, 64, None): Tile(64, 32, 64, 8, 1, registers=255),
    ("fused dq", "any", 16, 256, None): Tile(32, 32, 256, 8, 1, registers=255),
    ("fused dq", "any", 32, 32, None): Tile(16, 32, 32, 8, 1, registers=255),
    ("fused dq", "any", 32, 64, None): Tile(32, 32, 64, 8, 2, registers=255),
    ("fused dq", "any", 32, 128, None): Tile(16, 32, 128, 8, 2, registers=255),
    ("fused dq", "any", 32, 256, None): Tile(32, 16, 256, 8, 1, registers=255),
    ("fused dq", "any", 64, 64, None): Tile(16, 16, 64, 8, 1, registers=255),
    ("fused dkdv", "any", 16, 64, None): Tile(32, 64, 64, 8, 1, registers=255),
    ("fused dkdv", "any", 16, 256, None): Tile(32, 32, 256, 8, 1, registers=255),
    ("fused dkdv", "any", 32, 32, None): Tile(16, 32, 32, 8, 1, registers=255),
    ("fused dkdv", "any", 32, 64, None): Tile(16, 32, 64, 8, 1, registers=255),
    ("fused dkdv", "any", 32, 256, None): Tile(16, 16, 256, 8, 1, registers=255),
    ("fused dkdv", "any", 64, 64, None): Tile(16, 16, 64, 8, 1, registers=255),
    ("fused dbias", "any", 16, 256, None): Tile(16, 32, 256, 8, 1, registers=255),
    ("fused dq", "sm_120, triton 3.8", 32, 64, None): Tile(16, 64, 64, 8, 1, registers=255),
    ("fused dq, masked, two", "sm_100, triton 3.8", 32, 64, None): Tile(16, 32, 64, 8, 2, registers=255),
    ("fused dbias", "sm_100, triton 3.8", 32, 64, None): Tile(16, 64, 64, 8, 1, registers=255),
    ("fused dbias", "sm_100, triton 3.8", 32, 128, None): Tile(16, 32, 128, 4, 1, registers=255),
    ("fused dbias", "sm_120, triton 3.8", 32, 128, None): Tile(16, 32, 128, 4, 1, registers=255),
    ("fused dbias", "sm_86", 32, 64, None): Tile(16, 64, 64, 8, 1, registers=255),
    ("fused dbias", "sm_89", 32, 64, None): Tile(16, 64, 64, 8, 1, registers=255),
    ("fused dbias", "any", 32, 64, None): Tile(32, 64, 64, 8, 1, registers=255),
    ("fused dbias", "any", 32, 128, None): Tile(16, 32, 128, 8, 1, registers=255),
    ("fused dbias", "any", 32, 256, None): Tile(32, 16, 256, 8, 1, registers=255),
    ("fused dbias", "any", 64, 64, None): Tile(16, 16, 64, 8, 1, registers=255),
    ("fused", "gfx942", 32, 128, None): Tile(16, 32, 128, 8, 1),
    ("fused dq", "gfx942", 32, 64, None): Tile(16, 32, 64, 8, 1),
    ("fused dq", "gfx942", 32, 128, None): Tile(16, 16, 128, 8, 1),
    ("fused dq", "gfx942", 32, 256, None): Tile(16, 16, 256, 8, 1),
    ("fused dbias", "gfx942", 32, 64, None): Tile(16, 32, 64, 8, 1),
    ("fused dbias", "gfx942", 32, 128, None): Tile(16, 16, 128, 8, 1),
    ("fused dbias", "gfx942", 32, 256, None): Tile(16, 16, 256, 8, 1),
    ("fused dq", "gfx942", 16, 64, None): Tile(64, 32, 64, 8, 1),
    ("fused dq", "gfx942", 16, 256, None): Tile(32, 32, 256, 4, 1),
    ("fused dq, masked", "gfx942", 16, 256, None): Tile(32, 16, 256, 4, 1),
    ("fused dkdv", "gfx942", 16, 64, None): Tile(32, 64, 64, 8, 1),
    ("fused dkdv", "gfx942", 16, 128, None): Tile(32, 32, 128, 4, 1),
    ("fused dkdv", "gfx942", 16, 256, None): Tile(16, 32, 256, 4, 1),
    ("fused dbias", "gfx942", 16, 256, None): Tile(16, 32, 256, 4, 1),
    ("scores", "any", 16, 64, None): Tile(64, 64, 64, 4, 2),
    ("scores", "any", 16, 128, None): Tile(64, 64, 128, 4, 2),
    ("scores", "any", 32, 64, None): Tile(64, 32, 32, 4, 2),
    ("scores", "any", 64, 64, None): Tile(32, 32, 32, 4, 2),
    ("values", "any", 16, 64, None): Tile(128, 32, 64, 8, 2),
    ("values", "any", 32, 64, None): Tile(32, 32, 64, 8, 2),
    ("values", "any", 64, 64, None): Tile(32, 32, 32, 4, 1),
    ("mean weights", "sm_90", 16, 64, None): Tile(128, 128, 64, 8, 3),
    ("mean weights", "sm_90", 16, 128, None): Tile(128, 128, 128, 8, 2),
    ("mean weights", "sm_90", 16, 256, None): Tile(128, 64, 256, 8, 2),
    ("mean weights, few", "sm_90", 16, 64, None): Tile(64, 32, 64, 4, 4),
    ("mean weights, few", "sm_90", 16, 128, None): Tile(64, 32, 128, 4, 3),
    ("mean weights", "sm_90", 32, 64, None): Tile(128, 64, 64, 8, 2),
    ("mean weights", "sm_90", 32, 128, None): Tile(64, 64, 128, 8, 2),
    ("mean weights", "any", 16, 64, None): Tile(64, 64, 64, 4, 2, registers=255),
    ("mean weights", "any", 32, 64, None): Tile(32, 32, 64, 4, 1, registers=255),
    ("mean weights", "any", 32, 128, None): Tile(16, 32, 128, 4, 1, registers=255),
    ("mean weights", "any", 64, 64, None): Tile(32, 32, 32, 4, 1, registers=255),
    ("dscores", "any", 16, 64, None): Tile(64, 64, 64, 4, 2),
    ("dscores", "any", 16, 128, None): Tile(64, 64, 128, 8, 2),
}
# The interpreter pays by the step, not by the element: few large ones. But a sum over the head dim is as exact as
# PyTorch's, which adds up parts, only in slices.
INTERPRETED = Tile(128, 128, 128, 4, 1)
INTERPRETED_SLICED = {"scores", "dscores"}  # with BLOCK_D 16
