"""P = softmax(S + mask) by rows: scores become weights that are positive and sum to 1.

    row m   s_0 s_1 ... s_m | s_m+1 ...      m_i = max s            the maximum is subtracted first, so that
            visible         | -inf           l_i = sum e^(s - m_i)  e never overflows; masked keys are -inf
                            |  0  0  0       p   = e^(s - m_i) / l_i

A row of up to ONE_PASS keys stays in registers: read once, written once, which is the floor. Longer rows are walked
twice in tiles; the first walk rescales l_i whenever m_i grows (Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018). A row that sees no key gives zeros. The gradient dS = P * (dP - rowsum(P * dP)) is built alike.
"""

import torch

from triton_attention_device import DEVICE, INTERPRETED  # before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention_checks import check_blocks, check_dropout, check_mask, check_tensors
from triton_attention_dropout import dropout
from triton_attention_launch import (
    Function, define_op, differentiate, fold, launch, replayable, unfold,
)
from triton_attention_tiles import head_ptr, inverse_sum, load_tile, load_visible, split_program, store_tile, visible

ONE_PASS = 16384  # keys of a row that fit the registers of a program; half as many in float64


@triton.jit
def _load_scores(ptr, strides, M, N, offs_m, offs_n, diagonal, other, CAUSAL: tl.constexpr):
    """Tile of S, P or dP, `other` where it lies outside or no query may see it."""
    if not CAUSAL:
        return load_tile(ptr, strides, (M, N), offs_m, offs_n, other)
    tile = load_visible(ptr, strides, (M, N), offs_m, offs_n, diagonal, other)
    return tl.where(visible(offs_m, offs_n, diagonal), tile, other)


@triton.jit
def _logits(
    s_ptr, s_strides, mask_ptr, mask_strides, M, N, offs_m, offs_n, diagonal,
    ACC: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """Tile of S + mask; where the mask forbids a key it is -inf, whatever S holds there."""
    s = _load_scores(s_ptr, s_strides, M, N, offs_m, offs_n, diagonal, float("-inf"), CAUSAL).to(ACC)
    if HAS_MASK:
        s = tl.where(load_tile(mask_ptr, mask_strides, (M, N), offs_m, offs_n, False), s, float("-inf"))
    if HAS_BIAS:
        bias = load_tile(mask_ptr, mask_strides, (M, N), offs_m, offs_n, float("-inf")).to(ACC)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    return s


@triton.jit
def _finite(m):
    """The maximum of a row as something to subtract: 0 where every key is masked, -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _whole_rows(
    s_ptr, s_strides, mask_ptr, mask_strides, p_ptr, p_strides, M, N, offs_m, offs_n, diagonal,
    ACC: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """Softmax of rows that fit a tile: one load, one store. Returns what it stored, unrounded."""
    s = _logits(
        s_ptr, s_strides, mask_ptr, mask_strides, M, N, offs_m, offs_n, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS
    )
    p = tl.exp(s - _finite(tl.max(s, 1))[:, None])
    p *= inverse_sum(tl.sum(p, 1))[:, None]
    store_tile(p_ptr, p_strides, (M, N), offs_m, offs_n, p)
    return p


@triton.jit
def _softmax_kernel(
    s_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an,
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    H, M, N, diagonal,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the end of S is what L2 still holds
    tile, off_b, off_h = split_program(pid, tl.cdiv(M, BLOCK_M), H)
    s_ptr = head_ptr(s_ptr, stride_sb, stride_sh, off_b, off_h)
    p_ptr = head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h)
    if HAS_MASK or HAS_BIAS:
        mask_ptr = head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h)
    s_strides, mask_strides, p_strides = (stride_sm, stride_sn), (stride_am, stride_an), (stride_pm, stride_pn)
    ACC: tl.constexpr = tl.float64 if s_ptr.dtype.element_ty == tl.float64 else tl.float32

    start_m = tile * BLOCK_M
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if WHOLE_ROW:
        _whole_rows(
            s_ptr, s_strides, mask_ptr, mask_strides, p_ptr, p_strides, M, N, offs_m, offs_n, diagonal,
            ACC, CAUSAL, HAS_MASK, HAS_BIAS,
        )
    else:
        end_n = N
        if CAUSAL:
            end_n = tl.minimum(start_m + BLOCK_M + diagonal, N)
        m_i = tl.full([BLOCK_M], float("-inf"), ACC)
        l_i = tl.zeros([BLOCK_M], ACC)
        for start_n in range(0, end_n, BLOCK_N):
            s = _logits(
                s_ptr, s_strides, mask_ptr, mask_strides, M, N, offs_m, start_n + offs_n, diagonal,
                ACC, CAUSAL, HAS_MASK, HAS_BIAS,
            )
            m_new = tl.maximum(m_i, tl.max(s, 1))
            l_i = l_i * tl.exp(m_i - _finite(m_new)) + tl.sum(tl.exp(s - _finite(m_new)[:, None]), 1)
            m_i = m_new
        m_i, l_i = _finite(m_i), inverse_sum(l_i)
        for start_n in range(0, N, BLOCK_N):
            s = _logits(
                s_ptr, s_strides, mask_ptr, mask_strides, M, N, offs_m, start_n + offs_n, diagonal,
                ACC, CAUSAL, HAS_MASK, HAS_BIAS,
            )
            p = tl.exp(s - m_i[:, None]) * l_i[:, None]
            store_tile(p_ptr, p_strides, (M, N), offs_m, start_n + offs_n, p)


@triton.jit
def _softmax_mean_kernel(
    s_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an,
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    mean_ptr, H, M, N, diagonal,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The same rows of all heads, one after the other, and their mean [B, M, N] from the registers that hold them."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, off_b, _ = split_program(pid, tl.cdiv(M, BLOCK_M), 1)
    s_strides, mask_strides, p_strides = (stride_sm, stride_sn), (stride_am, stride_an), (stride_pm, stride_pn)
    ACC: tl.constexpr = tl.float64 if s_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for h in range(0, H):
        off_h = off_b * 0 + h
        s_head = head_ptr(s_ptr, stride_sb, stride_sh, off_b, off_h)
        p_head = head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h)
        mask_head = mask_ptr
        if HAS_MASK or HAS_BIAS:
            mask_head = head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h)
        total += _whole_rows(
            s_head, s_strides, mask_head, mask_strides, p_head, p_strides, M, N, offs_m, offs_n, diagonal,
            ACC, CAUSAL, HAS_MASK, HAS_BIAS,
        )
    mean_ptr += off_b.to(tl.int64) * M * N
    store_tile(mean_ptr, (N, 1), (M, N), offs_m, offs_n, total / H)


@triton.jit
def _gradient(
    p_ptr, p_strides, dp_ptr, dp_strides, M, N, offs_m, offs_n, diagonal, ACC: tl.constexpr, CAUSAL: tl.constexpr
):
    """Tiles of P and dP; dP counts only where P is not zero, so that a masked key cannot bring in its NaN."""
    p = _load_scores(p_ptr, p_strides, M, N, offs_m, offs_n, diagonal, 0.0, CAUSAL).to(ACC)
    dp = _load_scores(dp_ptr, dp_strides, M, N, offs_m, offs_n, diagonal, 0.0, CAUSAL).to(ACC)
    return p, tl.where(p == 0.0, 0.0, dp)


@triton.jit
def _softmax_bwd_kernel(
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    dp_ptr, stride_gb, stride_gh, stride_gm, stride_gn,
    ds_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    H, M, N, diagonal,
    CAUSAL: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), H)
    p_ptr = head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h)
    dp_ptr = head_ptr(dp_ptr, stride_gb, stride_gh, off_b, off_h)
    ds_ptr = head_ptr(ds_ptr, stride_sb, stride_sh, off_b, off_h)
    p_strides, dp_strides, ds_strides = (stride_pm, stride_pn), (stride_gm, stride_gn), (stride_sm, stride_sn)
    ACC: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32

    start_m = tile * BLOCK_M
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if WHOLE_ROW:
        p, dp = _gradient(p_ptr, p_strides, dp_ptr, dp_strides, M, N, offs_m, offs_n, diagonal, ACC, CAUSAL)
        dp -= tl.sum(p * dp, 1)[:, None]
        delta = tl.sum(p * dp, 1)  # what rounding left over: much, where one key has almost all of the weight
        store_tile(ds_ptr, ds_strides, (M, N), offs_m, offs_n, p * (dp - delta[:, None]))
    else:
        end_n = N
        if CAUSAL:
            end_n = tl.minimum(start_m + BLOCK_M + diagonal, N)
        delta = tl.zeros([BLOCK_M], ACC)
        for start_n in range(0, end_n, BLOCK_N):
            offs = start_n + offs_n
            p, dp = _gradient(p_ptr, p_strides, dp_ptr, dp_strides, M, N, offs_m, offs, diagonal, ACC, CAUSAL)
            delta += tl.sum(p * dp, 1)
        for start_n in range(0, N, BLOCK_N):
            offs = start_n + offs_n
            p, dp = _gradient(p_ptr, p_strides, dp_ptr, dp_strides, M, N, offs_m, offs, diagonal, ACC, CAUSAL)
            store_tile(ds_ptr, ds_strides, (M, N), offs_m, offs, p * (dp - delta[:, None]))


@triton.jit
def _mask_grad_kernel(
    ds_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    g_ptr, stride_gb, stride_gh, stride_gm, stride_gn,
    B, H, M, N, GH, GM, GN,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One tile of the mask's gradient [GB, GH, GM, GN]: dS summed over the dimensions where the mask has size 1."""
    col_tiles = tl.cdiv(GN, BLOCK_N)
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(GM, BLOCK_M) * col_tiles, GH)
    start_m, start_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)

    ACC: tl.constexpr = tl.float64 if ds_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for b in range(0, B if SUM_B else 1):
        for h in range(0, H if SUM_H else 1):
            head = head_ptr(ds_ptr, stride_sb, stride_sh, off_b + b, off_h + h)
            for m in range(start_m, M if SUM_M else start_m + 1, BLOCK_M):
                for n in range(start_n, N if SUM_N else start_n + 1, BLOCK_N):
                    acc += load_tile(head, (stride_sm, stride_sn), (M, N), m + offs_m, n + offs_n).to(ACC)
    if SUM_M:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], acc.shape)
    if SUM_N:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], acc.shape)
    g_ptr = head_ptr(g_ptr, stride_gb, stride_gh, off_b, off_h)
    store_tile(g_ptr, (stride_gm, stride_gn), (GM, GN), start_m + offs_m, start_n + offs_n, acc)


def _row_tile(scores, causal, block_m=None, block_n=None):
    """BLOCK_M rows x BLOCK_N keys, and the warps that hold them: 1024 elements each, 512 where all are visible."""
    N, wide = scores.shape[3], scores.element_size() // 8  # 1 for float64
    whole_row = N <= (block_n or ONE_PASS >> wide)
    block_n = int(triton.next_power_of_2(N)) if whole_row else block_n or 4096 >> wide  # int: also of a SymInt
    block_m = block_m or max(1, (1 << 16 if INTERPRETED else 1 << 11) // block_n)
    num_warps = min(max(block_m * block_n // (1024 if causal else 512), 4), 16)
    return {"WHOLE_ROW": whole_row, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps}


def _like_first(x, *others):
    return x.new_empty(x.shape)


def _softmax_arguments(scores, mask, diagonal, probs):
    """What the two kernels share: (arguments up to the strides of P, constants)."""
    has_mask = mask is not None and mask.dtype == torch.bool
    strides = (0, 0, 0, 0) if mask is None else mask.expand(scores.shape).stride()
    arguments = (scores, *scores.stride(), mask, *strides, probs, *probs.stride())
    has_bias = mask is not None and not has_mask
    return arguments, {"CAUSAL": diagonal is not None, "HAS_MASK": has_mask, "HAS_BIAS": has_bias}


@define_op("softmax", fake=_like_first)
def softmax_op(
    scores: torch.Tensor, mask: torch.Tensor | None, diagonal: int | None, block_m: int | None, block_n: int | None,
) -> torch.Tensor:
    """P like scores [B, H, M, N]; mask is bool (True: may attend) or floating (added), 4-D with sizes 1 or full."""
    (B, H, M, N), probs = scores.shape, scores.new_empty(scores.shape)
    if probs.numel() == 0:
        return probs
    arguments, constants = _softmax_arguments(scores, mask, diagonal, probs)
    tile = _row_tile(scores, diagonal is not None, block_m, block_n)
    programs = B * H * triton.cdiv(M, tile["BLOCK_M"])
    launch(_softmax_kernel, programs, *arguments, H, M, N, diagonal or 0, **constants, **tile)
    return probs


@define_op("softmax_mean", fake=lambda s, mask, diagonal: (s.new_empty(s.shape), s.new_empty(s[:, 0].shape)))
def softmax_mean_op(
    scores: torch.Tensor, mask: torch.Tensor | None, diagonal: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P like scores [B, H, M, N], its mean over the heads [B, M, N]), for N <= ONE_PASS / 2."""
    (B, H, M, N), probs = scores.shape, scores.new_empty(scores.shape)
    mean = scores.new_empty(B, M, N)
    if probs.numel() == 0:
        return probs, mean
    arguments, constants = _softmax_arguments(scores, mask, diagonal, probs)
    tile = _row_tile(scores, diagonal is not None)
    del tile["WHOLE_ROW"]
    programs = B * triton.cdiv(M, tile["BLOCK_M"])
    launch(_softmax_mean_kernel, programs, *arguments, mean, H, M, N, diagonal or 0, **constants, **tile)
    return probs, mean


@define_op("softmax_backward", fake=_like_first)
def softmax_backward_op(probs: torch.Tensor, dp: torch.Tensor, diagonal: int | None) -> torch.Tensor:
    """dS = P * (dP - rowsum(P * dP)), like probs."""
    (B, H, M, N), ds = probs.shape, probs.new_empty(probs.shape)
    if ds.numel() == 0:
        return ds
    tile = _row_tile(probs, False)
    launch(
        _softmax_bwd_kernel, B * H * triton.cdiv(M, tile["BLOCK_M"]),
        probs, *probs.stride(), dp, *dp.stride(), ds, *ds.stride(),
        H, M, N, diagonal or 0, CAUSAL=diagonal is not None, **tile,
    )
    return ds


@define_op("mask_gradient", fake=lambda ds, shape, dtype: ds.new_empty(shape, dtype=dtype))
def mask_gradient_op(ds: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """dS [B, H, M, N] summed to the mask's 4-D shape."""
    (B, H, M, N), grad = ds.shape, ds.new_empty(shape, dtype=dtype)
    if grad.numel() == 0 or ds.numel() == 0:
        return grad.zero_()
    sums = [g == 1 for g in shape]
    launch(
        _mask_grad_kernel, shape[0] * shape[1] * triton.cdiv(shape[2], 16) * triton.cdiv(shape[3], 128),
        ds, *ds.stride(), grad, *grad.stride(), B, H, M, N, *shape[1:],
        SUM_B=sums[0], SUM_H=sums[1], SUM_M=sums[2], SUM_N=sums[3], BLOCK_M=16, BLOCK_N=128, num_warps=4,
    )
    return grad


class Softmax(Function):
    """P of scores and mask; the arguments are those of softmax_op."""

    op = softmax_op

    @staticmethod
    def forward(scores, mask, diagonal, block_m, block_n):
        return softmax_op(scores, mask, diagonal, block_m, block_n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.diagonal, *_ = inputs
        ctx.mask_shape, ctx.mask_dtype = (None, None) if mask is None else (list(mask.shape), mask.dtype)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dp):
        ds = differentiate(SoftmaxBackward, *ctx.saved_tensors, dp, ctx.diagonal)
        dmask = None
        if ctx.needs_input_grad[1]:
            dmask = differentiate(MaskGradient, ds, ctx.mask_shape, ctx.mask_dtype)
        return ds, dmask, None, None, None

    @staticmethod
    def vmap(info, in_dims, scores, mask, *options):
        return unfold(info, differentiate(Softmax, *fold(info, in_dims, scores, mask), *options)), 0


class SoftmaxBackward(Function):
    """dS of P and dP, differentiable itself: linear in dP with the symmetric matrix diag(P) - P P^T."""

    op = softmax_backward_op

    @staticmethod
    def forward(probs, dp, diagonal):
        return softmax_backward_op(probs, dp, diagonal)

    @staticmethod
    def setup_context(ctx, inputs, output):
        probs, dp, ctx.diagonal = inputs
        ctx.save_for_backward(probs, dp)

    @staticmethod
    def backward(ctx, g):
        probs, dp = ctx.saved_tensors
        g_probs, g_dp = None, None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(probs.dtype, torch.float32)
            p, g_wide = probs.to(wide), g.to(wide).masked_fill(probs == 0, 0.0)
            dp_wide = dp.to(wide).masked_fill(probs == 0, 0.0)
            delta, gamma = (p * dp_wide).sum(-1, keepdim=True), (p * g_wide).sum(-1, keepdim=True)
            g_probs = (g_wide * (dp_wide - delta) - gamma * dp_wide).to(probs.dtype)
        if ctx.needs_input_grad[1]:
            g_dp = differentiate(SoftmaxBackward, probs, g, ctx.diagonal)
        return g_probs, g_dp, None

    @staticmethod
    def vmap(info, in_dims, probs, dp, diagonal):
        return unfold(info, differentiate(SoftmaxBackward, *fold(info, in_dims, probs, dp), diagonal)), 0


class MaskGradient(Function):
    """dS summed to the shape of the mask."""

    op = mask_gradient_op

    @staticmethod
    def forward(ds, shape, dtype):
        return mask_gradient_op(ds, shape, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.dtype).expand(ctx.shape), None, None

    @staticmethod
    def vmap(info, in_dims, ds, shape, dtype):
        each = [differentiate(MaskGradient, one, shape, dtype) for one in ds.unbind(in_dims[0])]
        return torch.stack(each), 0


def softmax_dropout(scores, mask, diagonal, dropout_p, block_m=None, block_n=None):
    """attention_softmax behind its checks: mask 4-D or None, query m sees the keys n <= m + diagonal."""
    probs = differentiate(Softmax, scores, mask, diagonal, block_m, block_n)
    return probs if dropout_p == 0.0 else dropout(probs, dropout_p)


@replayable
def attention_softmax(
    scores: torch.Tensor, attn_mask: torch.Tensor | None = None, *, is_causal: bool = False, dropout_p: float = 0.0,
    block_m: int | None = None, block_n: int | None = None,
) -> torch.Tensor:
    """Attention weights, P = softmax(S + mask) over the keys.

    Args:
        scores: [B, H, M, N], float16, bfloat16, float32 or float64, any strides.
        attn_mask: bool (True: may attend) or floating (added to the scores, in float32), of a shape that broadcasts
            to [B, H, M, N]; or a torch.nn.attention.bias.CausalBias. Size-1 dimensions are not expanded in memory.
        is_causal: query m sees the keys n <= m only; may be combined with attn_mask, then both hold.
        dropout_p: probability with which a weight is set to zero; the others are divided by 1 - dropout_p. Drawn from
            torch's generator of the device; depends on (b, h, m, n), never on tile sizes.
        block_m, block_n: rows and keys per step, powers of two from 16; chosen from N if None.

    Returns:
        [B, H, M, N] in the dtype of scores, computed in float32 (float64 for float64). A query that may attend to
        nothing gives zeros, and its gradient is zero; a NaN stays in its row. Differentiable, also twice, also by
        a floating mask.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a device, or a tile that does not fit.
    """
    check_tensors(scores=scores)
    mask, diagonal = check_mask(attn_mask, is_causal, scores.shape, scores.device)
    dropout_p = check_dropout(dropout_p)
    block_m, block_n = check_blocks(block_m=block_m, block_n=block_n)
    return softmax_dropout(scores, mask, diagonal, dropout_p, block_m, block_n)


if __name__ == "__main__":
    s = torch.randn(2, 3, 37, 301, device=DEVICE)
    error = (attention_softmax(s) - s.softmax(-1)).abs().max().item()
    print(f"softmax {tuple(s.shape)} on {DEVICE}: max |error| {error:.1e}")
