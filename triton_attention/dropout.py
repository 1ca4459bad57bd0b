"""Dropout of the weights: each is set to zero with probability p, the others are divided by 1 - p.

    P  .31 .07 .42 .20   --Philox(seed; n, m, h, b)-->   .31/(1-p)  0  .42/(1-p)  .20/(1-p)

Nothing is stored to go back: the operation is linear and diagonal, so its gradient is the same operation on the
gradient, and an element's fate is a function of (seed, b, h, m, n) that can be drawn again, whatever the tiles.
Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014.
"""

import torch

from triton_attention.device import INTERPRETED
import triton
import triton.language as tl
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from triton_attention.launch import launch, strided
from triton_attention.operators import Function, define_op, differentiate, like_first
from triton_attention.tiles import (
    DropoutMask, head, keep_mask, load_scores, split_program, store_tile, visible_end,
)


@triton.jit
def _dropout_kernel(
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    o_ptr, stride_ob, stride_oh, stride_om, stride_on,
    seed_ptr, dropout_p, factor, H, M, N, diagonal,
    CAUSAL: tl.constexpr, FILLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    col_tiles = tl.cdiv(N, BLOCK_N)
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M) * col_tiles, H)
    start_m, start_n, last_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N, N
    if not FILLED:
        last_n = visible_end(start_m, N, diagonal, BLOCK_M)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    p_head = head(p_ptr, (stride_pb, stride_ph, stride_pm, stride_pn), (M, N), off_b, off_h)
    o_head = head(o_ptr, (stride_ob, stride_oh, stride_om, stride_on), (M, N), off_b, off_h)
    if start_n < last_n:
        p = load_scores(*p_head, offs_m, offs_n, diagonal, 0.0, CAUSAL)
        dropout = DropoutMask(dropout_p, factor, tl.load(seed_ptr), off_b, off_h)
        p = tl.where(keep_mask(dropout, offs_m, start_n, BLOCK_N), p * factor, 0.0)
        store_tile(*o_head, offs_m, offs_n, p)


@define_op("dropout", fake=like_first)
def dropout_op(
    probs: torch.Tensor, seed: torch.Tensor, dropout_p: float, diagonal: int | None = None, filled: bool = True
) -> torch.Tensor:
    """probs with each element dropped with probability dropout_p, the others divided by 1 - dropout_p. The future, keys
    n > m + diagonal, is not read, and 0, or in tiles unwritten if not filled."""
    (B, H, M, N), out = probs.shape, probs.new_empty(probs.shape)
    if out.numel() == 0:
        return out
    factor = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if probs.dtype == torch.float64:  # a kernel's scalar arguments are float32
        probs, factor = probs * factor, 1.0
    block_m, block_n = (128, 128) if INTERPRETED else (16, 128)
    launch(
        _dropout_kernel, B * H * triton.cdiv(M, block_m) * triton.cdiv(N, block_n),
        *strided(probs, out), seed, dropout_p, factor, H, M, N, diagonal or 0,
        CAUSAL=diagonal is not None, FILLED=filled or diagonal is None, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )
    return out


class Dropout(Function):
    """Linear and diagonal: its gradient is the same dropout of the gradient."""

    op = dropout_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, seed, ctx.dropout_p, ctx.diagonal, ctx.filled = inputs
        Dropout.save(ctx, seed)

    @staticmethod
    def backward(ctx, do):
        return differentiate(Dropout, do, *ctx.saved_tensors, ctx.dropout_p, ctx.diagonal, True), *(None,) * 4

    @staticmethod
    def tangent(ctx, dprobs, *_):
        return differentiate(Dropout, dprobs, *ctx.saved_tensors, ctx.dropout_p, ctx.diagonal, ctx.filled)

    @staticmethod
    def vmap(info, in_dims, probs, seed, *options):
        each = []
        for i in range(info.batch_size):  # not folded: an element's fate depends on its place in the batch
            p, s = (t if dim is None else t.select(dim, i) for t, dim in zip((probs, seed), in_dims, strict=False))
            each.append(differentiate(Dropout, p, s, *options))
        return torch.stack(each), 0


@torch.library.custom_op("triton_attention::seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def seed_op(like: torch.Tensor, number: int = 0) -> torch.Tensor:
    """A seed [1] from torch's generator of the device of `like`; the number tells calls in one graph apart."""
    return torch.randint(1 << 62, (1,), device=like.device)


@seed_op.register_fake
def _(like, number=0):
    return like.new_empty(1, dtype=torch.int64)


@seed_op.register_vmap
def _(info, in_dims, like, number=0):
    if info.randomness == "error":
        raise RuntimeError("dropout under vmap draws random numbers: pass randomness='same' or 'different' to vmap")
    one = like.select(in_dims[0], 0)
    if info.randomness == "same":
        return seed_op(one), None
    return torch.stack([seed_op(one) for _ in range(info.batch_size)]), 0


@seed_op.register_torch_dispatch(ProxyTorchDispatchMode)
def _(mode, op, types, args=(), kwargs=None):
    """In the graphs of torch.compile no two draws are one, and no draw is made twice: a seed is saved, also within a
    checkpoint. Only a small memory budget saves nothing but inputs; then the draw is marked, so that PyTorch makes it
    again from the generator's state before. (On a GPU that state is a copy, which manual_seed does not reach.)"""
    meta, number = torch.fx.traceback.get_current_meta(), sum(node.target is op for node in mode.tracer.graph.nodes)
    before = meta.get("recompute")
    if torch._functorch.config.activation_memory_budget < 1:
        meta["recompute"] = before or CheckpointPolicy.PREFER_RECOMPUTE
    elif before:
        meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return mode.__torch_dispatch__(op, types, (args[0], number), {})
    finally:
        if before:
            meta["recompute"] = before
        else:
            meta.pop("recompute", None)


def draw_seed(like):
    """A seed [1] from torch's generator of the device of `like`."""
    if torch.compiler.is_compiling():
        return seed_op(like)
    return torch.randint(1 << 62, (1,), device=like.device)


def dropout(probs, dropout_p, diagonal=None, filled=True):
    """probs [B, H, M, N] after dropout, 0 < dropout_p <= 1, by a seed from torch's generator; see dropout_op."""
    return differentiate(Dropout, probs, draw_seed(probs), dropout_p, diagonal, filled)
