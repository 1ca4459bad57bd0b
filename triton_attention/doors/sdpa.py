"""activate(): every F.scaled_dot_product_attention of the process runs these kernels, where they take the call.

    F.scaled_dot_product_attention      chooses one of PyTorch's operators, as ever
      aten::_scaled_dot_product_flash_attention      no mask, 16 bits                   \
      aten::_scaled_dot_product_efficient_attention  masks and float32                   } and the backward of each:
      aten::_scaled_dot_product_cudnn_attention      last choice, while active         /  overridden here
      aten::_scaled_dot_product_attention_math       what none of them takes: stays PyTorch's

The door is PyTorch's own registry (torch.nn.attention.register_flash_attention_impl). With it comes whatever calls that
function: nn.MultiheadAttention, timm, diffusers, Hugging Face's "sdpa"; eager, or in a graph of torch.compile, which
holds the operators by their names. Each override keeps the kernel that it covers, and passes on what ours refuse. On
Hopper and newer GPUs PyTorch would choose cuDNN first, and make -65504 of what a bool mask hides, which is not hidden:
while active, the others come before it.

A backward pass runs the kernels of the same house as its forward pass. Which one that was, says the number that PyTorch
keeps beside the seed of dropout, and needs for its own kernels alone (see _mark).
"""

import contextlib
import warnings

import torch
from torch.nn.attention import (
    SDPBackend, activate_flash_attention_impl, current_flash_attention_impl, register_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.utils.flop_counter import flop_registry

from triton_attention.checks import DTYPES
from triton_attention.device import DEVICE, INTERPRETED
from triton_attention.fused_backward import fused_backward_op
from triton_attention.fused_common import paired
from triton_attention.row_stats import row_stats
from triton_attention.tile_choice import TUNED
from triton_attention_fused import MAX_HEAD_DIM, fused_op

NAME = "triton_attention"
OURS = 0x5472_6974_6F6E_3437  # the number of a pass that was ours
PLACE = 2  # of that number in its memory, where it must not be read: in a CUDA graph
FLOAT32_HEAD_DIM = 64  # in wider heads of float32, PyTorch's own kernels are faster


def refuses(q, k, v, mask, dropout_p=0.0):
    """Why the kernels do not take a call of F.scaled_dot_product_attention, or None."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    for t in tensors:
        if type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout != torch.strided or t.is_nested:
            return f"a {type(t).__name__}, nested or sparse"
        if t.device != q.device or t.device.type != DEVICE.type:
            return f"tensors on {t.device}"
        if t.dim() != 4:
            return f"a tensor of {t.dim()} dimensions"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
    (B, H, M, D), (Hk, N), Dv = q.shape, k.shape[1:3], v.shape[3]
    if k.shape != (B, Hk, N, D) or v.shape[:3] != (B, Hk, N) or Hk == 0 or H % Hk:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if 0 in (B, H, M, N, D, Dv):
        return "an empty tensor"
    if max(D, Dv) > MAX_HEAD_DIM or q.dtype == torch.float32 and max(D, Dv) > FLOAT32_HEAD_DIM and not INTERPRETED:
        return f"head dims {D} and {Dv} of {q.dtype}"
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in DTYPES:
            return f"a mask of {mask.dtype}"
        if any(m not in (1, s) for m, s in zip(mask.shape, (B, H, M, N), strict=True)):
            return f"a mask of shape {tuple(mask.shape)}"
    return None if 0.0 <= dropout_p <= 1.0 else f"dropout_p = {dropout_p}"


def _attend(q, k, v, mask, dropout_p, right, scale, seed=None):
    """(O, lse); query m sees the keys up to m + right, or all if that is None."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = scale, 0.0, dropout_p, None, right
    return fused_op(q, k, v, mask, None, seed, *options, *TUNED)[:2]


def _gradients(do, q, k, v, mask, o, lse, dropout_p, right, scale, seed=None, needs_dmask=False):
    """(dQ, dK, dV, dmask of the shape of the mask, or None)."""
    (B, H, M, D), N = q.shape, k.shape[2]
    scale = D ** -0.5 if scale is None else scale
    full = None if mask is None else mask.expand(B, H, M, N)
    lse = lse.contiguous()
    stats = row_stats(q, k, full, lse, scale, None, right) if paired(q, mask) else lse.new_empty(B, H, M, 0)
    options = scale, 0.0, dropout_p, None, right
    shape = list(mask.shape) if needs_dmask else None
    *grads, _, dmask = fused_backward_op(do, None, q, k, v, full, None, seed, o, lse, stats, *options, None, shape)
    return *grads, dmask if needs_dmask else None


def _laid_out(t, strides):
    """t with these strides, by a copy if it has others: compiled code relies on those of the operator's fake."""
    if all(a == b or n == 1 for a, b, n in zip(t.stride(), strides, t.shape, strict=True)):
        return t
    return t.new_empty_strided(t.shape, strides).copy_(t)


def _in_order_of(t, like, Dv=None):
    """t laid out as torch.empty_like(like) is, where that has another last dimension too."""
    if t.shape == like.shape:
        return _laid_out(t, torch.empty_like(like, device="meta").stride())
    order, strides, step = sorted(range(4), key=lambda i: -like.stride(i)), [0] * 4, 1
    for i in reversed(order):
        strides[i], step = step, step * t.shape[i]
    return _laid_out(t, strides)


def _rows_outside(t):
    """t laid out [B, M, H, D]."""
    B, H, M, D = t.shape
    return _laid_out(t, (M * H * D, D, H * D, 1))


def _draw(q, dropout_p, shape=(), dtype=torch.int64):
    """(a seed from torch's generator, or memory for one; the mark of a pass that was ours), of the dtype that PyTorch's
    fake of the operator has."""
    seed = torch.randint(1 << 62, shape, device=q.device) if dropout_p > 0.0 else q.new_empty(shape, dtype=torch.int64)
    return seed.view(dtype), _mark(q).view(dtype)


def _mark(q):
    """A number on the host, as PyTorch's own kernels return it there: to be read without waiting for the GPU, also from
    a copy. In a CUDA graph, where that one is on the GPU, its place in memory is the mark."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return q.new_empty(PLACE + 1, dtype=torch.int64)[PLACE]
    return torch.full((), OURS, dtype=torch.int64, device="cpu")


def _was_ours(mark):
    if mark.device.type == "cpu":
        return mark.view(torch.int64).item() == OURS
    return mark.storage_offset() == PLACE


def _seed(drawn, dropout_p):
    return drawn.view(torch.int64).reshape(-1)[:1] if dropout_p > 0.0 else None


def _flash(original, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask or refuses(q, k, v, None, dropout_p):
        return original(q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale)
    drawn, mark = _draw(q, dropout_p) if torch.version.hip else _draw(q, dropout_p, (2,), torch.uint64)
    right = k.shape[2] - q.shape[2] if is_causal else None  # the last query sees the last key
    o, lse = _attend(q, k, v, None, dropout_p, right, scale, _seed(drawn, dropout_p))
    return _in_order_of(o, q), lse, None, None, q.shape[2], k.shape[2], drawn, mark, q.new_empty(0)


def _flash_backward(
    original, do, q, k, v, o, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, drawn, mark, *, scale=None,
):
    if not _was_ours(mark):
        rest = cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, drawn, mark
        return original(do, q, k, v, o, lse, *rest, scale=scale)
    right = k.shape[2] - q.shape[2] if is_causal else None
    *grads, _ = _gradients(do, q, k, v, None, o, lse, dropout_p, right, scale, _seed(drawn, dropout_p))
    return tuple(_in_order_of(g, t) for g, t in zip(grads, (q, k, v), strict=True))


def _efficient(original, q, k, v, mask, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    if refuses(q, k, v, mask, dropout_p):
        return original(q, k, v, mask, compute_log_sumexp, dropout_p, is_causal, scale=scale)
    drawn, mark = _draw(q, dropout_p)
    o, lse = _attend(q, k, v, mask, dropout_p, 0 if is_causal else None, scale, _seed(drawn, dropout_p))
    M = q.shape[2]
    if not compute_log_sumexp:  # also where the mask alone has a gradient
        lse = lse[..., :0].contiguous()
    elif M % 32 and not torch.version.hip:
        lse = torch.nn.functional.pad(lse, (0, -M % 32), value=float("inf"))
    return _rows_outside(o), lse, drawn, mark


def _efficient_backward(
    original, do, q, k, v, mask, o, lse, drawn, mark, dropout_p, grad_input_mask, is_causal=False, *, scale=None,
):
    if not _was_ours(mark):
        rest = drawn, mark, dropout_p, grad_input_mask, is_causal
        return original(do, q, k, v, mask, o, lse, *rest, scale=scale)
    needs_dmask = mask is not None and grad_input_mask[3]
    right, seed = 0 if is_causal else None, _seed(drawn, dropout_p)
    lse = lse[..., : q.shape[2]] if lse.shape[2] else _attend(q, k, v, mask, dropout_p, right, scale, seed)[1]
    *grads, dmask = _gradients(do, q, k, v, mask, o, lse, dropout_p, right, scale, seed, needs_dmask)
    if needs_dmask and dmask.shape[3] % 16:  # rows begin at multiples of 16
        N = dmask.shape[3]
        dmask = torch.nn.functional.pad(dmask, (0, -N % 16))[..., :N]
    return *(_rows_outside(g) for g in grads), dmask


def _cudnn(
    original, q, k, v, mask, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None,
):
    mask = _in_4d(mask)
    if return_debug_mask or refuses(q, k, v, mask, dropout_p):
        rest = compute_log_sumexp, dropout_p, is_causal, return_debug_mask
        return original(q, k, v, mask, *rest, scale=scale)
    drawn, mark = _draw(q, dropout_p)
    o, lse = _attend(q, k, v, mask, dropout_p, 0 if is_causal else None, scale, _seed(drawn, dropout_p))
    return _in_order_of(o, q), lse[..., None], None, None, q.shape[2], k.shape[2], drawn, mark, None


def _cudnn_backward(
    original, do, q, k, v, o, lse, drawn, mark, mask, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *,
    scale=None,
):
    if not _was_ours(mark):
        rest = drawn, mark, mask, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal
        return original(do, q, k, v, o, lse, *rest, scale=scale)
    right, seed, mask = 0 if is_causal else None, _seed(drawn, dropout_p), _in_4d(mask)
    *grads, _ = _gradients(do, q, k, v, mask, o, lse[..., 0], dropout_p, right, scale, seed)
    return tuple(_in_order_of(g, t) for g, t in zip(grads, (q, k, v), strict=True))


def _cpu(original, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    mask = _in_4d(attn_mask)
    if dropout_p > 0.0 or refuses(q, k, v, mask):
        return original(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    o, lse = _attend(q, k, v, mask, 0.0, 0 if is_causal else None, scale)
    return _in_order_of(o, q), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(original, do, q, k, v, o, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    mask = _in_4d(attn_mask)
    if dropout_p > 0.0 or refuses(q, k, v, mask):  # as the forward pass; and lse is the same number in both houses
        return original(do, q, k, v, o, lse, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    *grads, _ = _gradients(do, q, k, v, mask, o, lse, 0.0, 0 if is_causal else None, scale)
    return tuple(_rows_outside(g) for g in grads)


def _in_4d(mask):
    return mask if mask is None or mask.dim() >= 4 else mask.view(*(1,) * (4 - mask.dim()), *mask.shape)


_FORWARD = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_cudnn_attention": _cudnn,
}
_BACKWARD = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
_INTERPRETED = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}


def _override(overrides):
    """A library that holds these overrides of aten operators, until it is dropped."""
    key = DEVICE.type.upper()
    library = torch.library.Library("aten", "IMPL")
    for name, ours in overrides.items():
        covered = torch.library.get_kernel(f"aten::{name}", key)
        library.impl(name, _bound(ours, covered), key, with_keyset=True)
    return library


def _bound(ours, covered):
    def override(keyset, *args, **kwargs):
        return ours(lambda *a, **kw: covered.call_boxed(keyset, *a, **kw), *args, **kwargs)

    return override


class _Handle:
    """What PyTorch's registry keeps while the overrides hold."""

    walks_back = None  # overrides of the backward operators: they stay, for graphs that were built under them
    order = None  # in which PyTorch would have chosen

    def __init__(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            if DEVICE.type == "cpu":
                self.library = _override(_INTERPRETED)
                return
            if _Handle.walks_back is None:
                _Handle.walks_back = _override(_BACKWARD)
            self.library = _override(_FORWARD)
        self.order = torch._C._get_sdp_priority_order()
        last = [SDPBackend.CUDNN_ATTENTION.value, SDPBackend.MATH.value]
        torch._C._set_sdp_priority_order([b for b in self.order if b not in last] + last)

    def remove(self):
        self.library = None
        if self.order is not None:
            torch._C._set_sdp_priority_order(self.order)


register_flash_attention_impl(NAME, register_fn=_Handle)
if DEVICE.type == "cpu":  # PyTorch counts the operations of its operators for GPUs alone
    for name, model in (("", "flash_attention"), ("_backward", "flash_attention_backward")):
        cpu = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
        flop_registry.setdefault(cpu, flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_{model}")])


class _Activation(contextlib.AbstractContextManager):
    """What activate() returns: a context that, at its end, restores what there was before."""

    def __init__(self, before):
        self.before = before

    def __exit__(self, *_):
        _activate(self.before)


def _activate(name):
    if current_flash_attention_impl() == name:
        return
    if name is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(name)


_before = None  # the implementation that was active before ours


def activate():
    """Have every torch.nn.functional.scaled_dot_product_attention of this process run the fused kernels.

        triton_attention.activate()                  # until deactivate()
        with triton_attention.activate(): ...        # or for a while

    Reached are eager calls and those of torch.compile, forward and backward, on CUDA GPUs; in a process without a GPU,
    where the kernels are interpreted, those on the CPU. What the kernels do not take runs as before: head dims above
    256, float32 ones above 64, nested tensors, and what PyTorch computes by its "math" backend. A graph that was built
    while it was active is walked back by the same kernels, whenever that is. Activating twice is as good as once.

    Returns: a context manager whose end restores what was active before the call; it may be ignored.

    Raises: RuntimeError: a device without a door (Intel GPUs).
    """
    global _before
    if DEVICE.type == "xpu" or DEVICE.type == "cpu" and not INTERPRETED:
        raise RuntimeError(f"activate() needs a CUDA GPU, or Triton's interpreter, got {DEVICE.type}")
    before = current_flash_attention_impl()
    if before != NAME:
        _before = before
    _activate(NAME)
    return _Activation(before)


def deactivate():
    """Undo activate(): scaled_dot_product_attention runs what it ran before. Harmless where nothing is active."""
    if current_flash_attention_impl() == NAME:
        _activate(_before)
