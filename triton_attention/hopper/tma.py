"""What the Hopper kernels share of the tensor memory accelerator (TMA), which copies whole tiles, asynchronously.

The host describes a [B, H, M, D] tensor and the tile that moves at once; a kernel gives its coordinates. Outside of the
tensor a load gives zeros and a store does nothing.
"""

import torch

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.9 renamed these two
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_async = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


add_async = getattr(tma, "async_atomic_add", None)
if add_async is None:  # Triton 3.6 has the instruction, but no name for it
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin

    @builtin
    def add_async(tensor_desc, coord, src, _semantic=None):
        """Add a tile in shared memory to one in memory."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


def addressable(t):
    """Whether TMA can address a tensor: rows of whole 16 bytes, at addresses that are multiples of 16."""
    steps = [stride for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True) if size > 1]
    return (
        t.stride(3) == 1 and t.data_ptr() % 16 == 0
        and all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in steps)
    )


def tile_descriptor(t, rows, columns):
    """The descriptor by which TMA moves tiles of `rows` x `columns` of a [B, H, M, D] tensor."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[t.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], dtype)
    strides = [stride if size > 1 else 8 for size, stride in zip(t.shape, t.stride(), strict=True)]
    strides[3] = 1
    return TensorDescriptor(t, list(t.shape), strides, [1, 1, rows, columns], layout)


def row_descriptor(t, rows):
    """The descriptor by which TMA moves `rows` whole rows of a contiguous [rows, columns] tensor of float32."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [rows, t.shape[1]], layout)
