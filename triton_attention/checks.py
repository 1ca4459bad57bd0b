"""Argument checks of the public functions: each message names the argument, what it must be, and what it is.

    check_tensors, check_shape, check_heads     the operands       check_scale, check_dropout, check_flag     numbers
    check_mask, check_window                    who sees whom      check_softcap, check_sinks, check_blocks   the rest

A check returns its argument in the one form that the operators take; autocast() comes before all of them.
"""

import functools
import numbers
import sys

import numpy
import torch
from torch.nn.attention.bias import CausalBias, CausalVariant

from triton_attention.device import INTERPRETED, MAX_TILE, gone

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(**tensors):
    """Every tensor is 4-D, of one float dtype, on one device that the kernels run on."""
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided or t.is_nested:
            raise TypeError(f"{name} must be a dense strided tensor, got a nested or sparse one ({t.layout})")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}, got {t.dtype}")
        if t.dim() != 4:
            raise ValueError(f"{name} must be 4-D, [batch, heads, rows, columns], got shape {tuple(t.shape)}")
        if t.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {t.device}")
    if not INTERPRETED and first.device.type == "cpu":
        if gone():
            raise ValueError(
                "the kernels were chosen for a GPU when they were imported, and no GPU is visible now: set "
                "CUDA_VISIBLE_DEVICES before the import, or TRITON_INTERPRET=1 to have them interpreted on the CPU"
            )
        raise ValueError(
            f"{first_name} is on the CPU, but this process compiles its kernels for a GPU: move the tensors there, "
            "or run them interpreted, in a process started with TRITON_INTERPRET=1"
        )


def check_shape(name, t, layout, **sizes):
    """The dimensions of `t`, named by `layout` ("B Hk N D"), have the given sizes; unnamed ones are free."""
    for i, n in enumerate(layout.split()):
        if n in sizes and sizes[n] != t.shape[i]:
            expected = ", ".join(str(sizes.get(n, n)) for n in layout.split())
            raise ValueError(f"{name} must be [{', '.join(layout.split())}] = [{expected}], got {tuple(t.shape)}")


def check_heads(name, kv_heads, heads, enable_gqa=True):
    """Grouped-query attention: each of the kv_heads serves heads / kv_heads query heads."""
    if kv_heads == heads:
        return
    if not enable_gqa:
        raise ValueError(f"{name} has {kv_heads} heads, the queries have {heads}: pass enable_gqa=True to share them")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{name} must have a number of heads that divides the {heads} query heads, got {kv_heads}")


def check_scale(scale, head_dim):
    """The factor on Q K^T, 1 / sqrt(D) by default (1 for D = 0, where it multiplies nothing)."""
    if scale is None:
        return head_dim**-0.5 if head_dim != 0 else 1.0
    if isinstance(scale, (torch.SymInt, torch.SymFloat)):
        return scale * 1.0
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError("scale must be a number that float can hold, got a larger one") from None


def _whole(number):
    """An int of whatever whole number was passed, a SymInt as it is; None for another type, bool among them."""
    if isinstance(number, (int, torch.SymInt)):
        return None if isinstance(number, bool) else number
    return int(number) if isinstance(number, numbers.Integral) else None


def check_window(window_size, diagonal, M, N):
    """(left, right): query m sees the keys m + left ... m + right, None: no bound on that side.

    `diagonal` is the causal bound, or None. The window is flash-attn's: (how many keys to the left, to the right) of
    the query's own place, where the last query is at the last key; -1: all of them.
    """
    if window_size is None:
        return None, diagonal
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right) or None, got {window_size!r}")
    left, right = (_whole(size) for size in window_size)
    if left is None or right is None:
        raise TypeError(f"window_size must be a pair of ints, got {window_size!r}")
    if left < -1 or right < -1:
        raise ValueError(f"window_size must have sizes from 0, or -1 for no bound, got {tuple(window_size)}")
    left = None if left == -1 else max(N - M - left, -M)
    right = None if right == -1 else min(N - M + right, N)
    return left, right if diagonal is None else diagonal if right is None else min(right, diagonal)


def check_softcap(softcap, dtype):
    """The bound on the scores, 0 for none: also for one past 2^64 (float64: 2^512), which scores far below it do not
    feel. One whose inverse would overflow makes all scores equal, and so does the smallest that has an inverse."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, (bool, torch.Tensor)) or not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if not 0.0 <= softcap <= sys.float_info.max:
        raise ValueError(f"softcap must be positive and finite, or 0 or None for none, got {softcap}")
    least, most = (2.0**-1022, 2.0**512) if dtype == torch.float64 else (2.0**-126, 2.0**64)
    return 0.0 if softcap == 0.0 or softcap > most else max(float(softcap), least)


def check_sinks(sinks, H, device):
    """None or a floating logit per query head."""
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks must be a torch.Tensor or None, got {type(sinks).__name__}")
    if sinks.dtype not in DTYPES:
        raise TypeError(f"sinks must be float16, bfloat16, float32 or float64, got {sinks.dtype}")
    if sinks.shape != (H,):
        raise ValueError(f"sinks must be [H] = [{H}], got {tuple(sinks.shape)}")
    if sinks.device != device:
        raise ValueError(f"sinks must be on the device of q, {device}, got {sinks.device}")


def check_blocks(**blocks):
    """Tile sizes are powers of two from 16, and a tile has at most MAX_TILE elements."""
    for name, given in blocks.items():
        if given is None:
            continue
        block = blocks[name] = _whole(given)
        if block is None:
            raise TypeError(f"{name} must be an int or None, got {type(given).__name__}")
        if block < 16 or block & (block - 1):
            raise ValueError(f"{name} must be a power of two from 16, got {block}")
    elements = functools.reduce(lambda a, b: a * (b or 16), blocks.values(), 1)
    if elements > MAX_TILE:
        tile = " x ".join(str(block) for block in blocks.values() if block)
        raise ValueError(
            f"the tile {tile} (block_m x block_n) does not fit: it needs {elements} registers, there are {MAX_TILE}; "
            "pass a smaller block_m or block_n"
        )
    return tuple(blocks.values())


def check_dropout(dropout_p):
    """A probability in [0, 1], as a float."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    return float(dropout_p)


def check_flag(name, flag):
    """True or False."""
    if not isinstance(flag, bool) and not isinstance(flag, (numpy.bool_, torch.SymBool)):
        raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")


def check_mask(attn_mask, is_causal, scores_shape, device):
    """Split the masks into (4-D mask or None, diagonal or None): query m sees the keys n <= m + diagonal.

    A CausalBias becomes its diagonal; another mask keeps its size-1 dimensions.
    """
    check_flag("is_causal", is_causal)
    B, H, M, N = scores_shape
    diagonal = 0 if is_causal else None
    if attn_mask is None:
        return None, diagonal
    if isinstance(attn_mask, CausalBias):
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != (M, N):
            got = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
            raise ValueError(f"attn_mask, a CausalBias, must be for (M, N) = {(M, N)}, got {got}")
        shift = N - M if attn_mask.variant == CausalVariant.LOWER_RIGHT else 0
        return None, shift if diagonal is None else min(diagonal, shift)
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, a CausalBias or None, got {type(attn_mask).__name__}")
    if attn_mask.layout != torch.strided or attn_mask.is_nested:
        raise TypeError(f"attn_mask must be a dense strided tensor, got a nested or sparse one ({attn_mask.layout})")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        raise TypeError(f"attn_mask must be bool (True: may attend) or floating (added), got {attn_mask.dtype}")
    if attn_mask.device != device:
        raise ValueError(f"attn_mask must be on the device of the scores, {device}, got {attn_mask.device}")
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    # not "m not in (1, s)", which torch.compile takes for true of a fixed m and an s of any length
    if len(shape) != 4 or any(m != 1 and m != s for m, s in zip(shape, (B, H, M, N), strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to [B, H, M, N] = {[B, H, M, N]}, got {tuple(attn_mask.shape)}"
        )
    return attn_mask.view(shape), diagonal


def autocast(*tensors):
    """The tensors in the dtype of the surrounding autocast context, if there is one (float64 stays)."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
