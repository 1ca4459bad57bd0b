"""What the launchers of the fused kernels share: their arguments, and in which precision they compute."""

import torch
import triton

from triton_attention.device import INTERPRETED, TRITON, architecture
from triton_attention.tile_choice import dot_precision

FEW_QUERIES = 16  # queries, up to which a tile of all of them reads the keys once


def exact(dtype):
    """Whether P and dS must be as exact as float32."""
    return dtype.itemsize >= 4 or (INTERPRETED and dtype == torch.bfloat16)  # which is interpreted as float32


def paired(q, mask):
    """Whether P comes from the maximum and the sum of a row: also where a floating mask makes the maximum large."""
    return exact(q.dtype) or (mask is not None and mask.dtype != torch.bool)


def tiles_of(op, mask, key_mask):
    """The name of an op in the table of tiles beside these masks."""
    return op if mask is None else f"{op}, masked" if key_mask is None else f"{op}, masked, two"


def misplaced(v):
    """Whether the kernels must not multiply by a V of fewer than 64 columns: where its tile is not loaded ahead, it
    lies where K's did, and the ptxas of Triton 3.6 makes its wgmma descriptors of a register that holds something else.
    """
    if INTERPRETED or TRITON >= (3, 8) or architecture(v.device) != "sm_90":
        return False
    if v.stride(3) != 1 or v.shape[3] % 2:  # not the 4 bytes of a copy
        return True
    return any(x % 16 for x in (v.data_ptr(), *v.stride()[:3]))


def fused_arguments(q, v, mask, scale, softcap, dropout_p, left, right):
    """What the launchers share: (q, v, scalars, constants).

    float32 is multiplied in parts that are written out before, where many programs read them, and fit the registers.
    float64 is special: a kernel's scalar arguments are float32, so its scale goes into q and its dropout factor into v.
    """
    keep_factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if q.dtype == torch.float64:
        q, scale = q * scale, 1.0
        v, keep_factor = v * keep_factor, 1.0
    has_mask = mask is not None and mask.dtype == torch.bool
    has_bias = mask is not None and not has_mask
    scaled = exact(q.dtype) or has_bias or softcap > 0.0
    sign = 1 if scaled else (scale > 0) - (scale < 0)
    scalars = (scale * sign if sign else 1.0, dropout_p, keep_factor)
    D, DV = int(q.shape[3]), int(v.shape[3])
    narrowest = 64 if q.element_size() == 2 and misplaced(v) else 16
    constants = {
        "D": D, "DV": DV, "SIGN": sign, "LEFT": left is not None, "RIGHT": right is not None, "HAS_MASK": has_mask,
        "HAS_BIAS": has_bias, "SOFTCAP": softcap, "SCALED": scaled,
        "DROPOUT": dropout_p > 0.0, "PAIRED": paired(q, mask), "EXACT": exact(q.dtype),
        "TCGEN05": not INTERPRETED and q.element_size() == 2 and architecture(q.device) in ("sm_100", "sm_103"),
        "PRECISION": dot_precision(q.dtype, q.device),
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_DV": max(narrowest, triton.next_power_of_2(DV)),
    }
    if constants["PRECISION"] == "bf16x6" and max(D, DV) <= 128 and q.shape[2] > FEW_QUERIES:
        constants["PRECISION"] = "parts"
    return q, v, scalars, constants
