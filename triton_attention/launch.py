"""Run a kernel, interpreted or compiled, with a word for a tile that does not fit."""

import contextlib
import os
import threading

import numpy
import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

from triton_attention.device import INTERPRETED
from triton.runtime.errors import OutOfResources

from triton_attention.replay import note


def empty_heads(like, *shape, dtype=None):
    """An empty [B, H, M, D] in the memory order of `like`: where that is [B, M, H, D], as projections leave them,
    they become columns again without a copy. The stride of a dimension of size 1 says nothing: a traced program may
    have another one there than the tensors that it runs on. A size that it does not know may be any."""
    B, H, M, D = shape
    rows_outside = (
        guard_or_true(like.shape[1] > 1) and guard_or_true(like.shape[2] > 1)
        and guard_or_false(like.stride(1) < like.stride(2))
    )
    strides = (M * H * D, D, H * D, 1) if rows_outside else (H * M * D, M * D, D, 1)
    return like.new_empty_strided(shape, strides, dtype=dtype)


def mask_arguments(mask, shape):
    """(strides of a 4-D mask or None, read as `shape`; what a kernel has to know of it)."""
    has_mask = mask is not None and mask.dtype == torch.bool
    strides = (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
    return strides, {"HAS_MASK": has_mask, "HAS_BIAS": mask is not None and not has_mask}


_interpreting = threading.RLock()  # Triton's interpreter replaces what triton.language has, for the whole process
if hasattr(os, "register_at_fork"):  # a child has only the thread that forked: no other may be in a kernel then
    os.register_at_fork(
        before=_interpreting.acquire, after_in_parent=_interpreting.release, after_in_child=_interpreting.release
    )


def strided(*tensors, dims=4):
    """Tensors [B, H, M, D], or of other dims, as a kernel takes them: each with its strides; None has zeros."""
    return [x for t in tensors for x in ((None, *(0,) * dims) if t is None else (t, *t.stride()))]


def launch(kernel, programs, *args, device=None, **constants):
    """Run `programs` instances of a kernel on `device`, that of the first argument by default."""
    if INTERPRETED:
        with _interpreting, numpy.errstate(all="ignore"):  # numpy warns of inf - inf, a GPU does not
            return kernel[(programs,)](*args, **constants)
    device = device or args[0].device
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    try:
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            note(kernel, kernel[(programs,)](*args, **constants), programs, args, constants)
    except OutOfResources as error:
        tile = " x ".join(str(constants[c]) for c in ("BLOCK_M", "BLOCK_N") if c in constants)
        raise ValueError(
            f"the tile {tile} (block_m x block_n) does not fit this GPU: it needs {error.required} of {error.name}, "
            f"there are {error.limit}; pass a smaller block_m or block_n"
        ) from error
