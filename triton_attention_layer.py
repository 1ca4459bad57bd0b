"""The three stages wired into attention, and attention into a drop-in for torch.nn.MultiheadAttention.

    query --in_proj--> q --+
    key   --in_proj--> k --+-- scores --> softmax --+--> weights
    value --in_proj--> v ---------------------------+--> values --out_proj--> output

No kernel here. Heads are views: a projection's [B, M, H * D] is read as [B, H, M, D] through its strides.
"""

import functools
import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias

from triton_attention.checks import (
    autocast, check_dropout, check_flag, check_heads, check_mask, check_scale, check_shape, check_tensors,
)
from triton_attention.device import DEVICE, INTERPRETED
from triton_attention.mean_weights import mean_weights_op
from triton_attention.operators import asks_gradient, differentiate, inside_transform, must_dispatch, replayable
from triton_attention.softmax_mean import softmax_mean_op
from triton_attention.tile_choice import ONE_PASS, TUNED
from triton_attention_backward import Staged
from triton_attention_fused import MAX_HEAD_DIM, attend_under_two_masks, attention_fused, fused_op
from triton_attention_scores import dot_products, scores_op
from triton_attention_softmax import softmax_dropout
from triton_attention_values import product, values_op

KERNELS_RUN_ON = ("cpu", "cuda", "xpu", "meta") if INTERPRETED else ("cuda", "xpu")


@replayable
def attention_staged(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention in three stages, with the weights: P = softmax(scale * Q K^T + mask), O = P V.

    Args:
        q: queries [B, H, M, D], float16, bfloat16, float32 or float64, any strides.
        k, v: keys [B, Hk, N, D] and values [B, Hk, N, Dv] of the same dtype.
        attn_mask: bool (True: may attend) or floating (added), broadcasting to [B, H, M, N]; or a CausalBias.
        dropout_p: probability with which a weight is dropped; the others are divided by 1 - dropout_p.
        is_causal: query m sees the keys n <= m only; may be combined with attn_mask, then both hold.
        scale: factor on Q K^T, 1 / sqrt(D) if None.
        enable_gqa: allow Hk < H, a divisor of H; head h reads the keys and values of head h // (H / Hk).
        need_weights: return P. Without it nobody reads P's zeros above a causal diagonal, and they are not written.

    Returns:
        (O [B, H, M, Dv], P [B, H, M, N] after dropout, or None), both in q's dtype (under autocast, its dtype) and both
        differentiable, also twice. A query that may attend to nothing gives zeros.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a value or a device.
    """
    q, k, v, mask, diagonal, scale, dropout_p = _checked(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    check_flag("need_weights", need_weights)
    need_weights = bool(need_weights)
    if dropout_p > 0.0:
        scores = dot_products(q, k, scale=scale, diagonal=diagonal)
        probs = softmax_dropout(scores, mask, diagonal, dropout_p, filled=need_weights)
        return product(probs, v, diagonal=diagonal), probs if need_weights else None
    tensors = (q, k, v, mask)
    wide = q.dtype.itemsize == 2 and (asks_gradient(tensors) or torch.is_grad_enabled() and must_dispatch(tensors))
    out_dtype, filled = torch.float32 if wide else q.dtype, need_weights
    out, probs = differentiate(Staged, q, k, v, mask, diagonal, scale, out_dtype, filled)
    return out.to(q.dtype), probs if need_weights else None


def _checked(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The arguments of attention_staged as the operators take them: (q, k, v, mask, diagonal, scale, dropout_p)."""
    q, k, v = autocast(q, k, v)
    check_tensors(q=q, k=k, v=v)
    (B, H, M, D), (Hk, N) = q.shape, k.shape[1:3]
    check_shape("k", k, "B Hk N D", B=B, D=D)
    check_shape("v", v, "B Hk N Dv", B=B, Hk=Hk, N=N)
    check_flag("enable_gqa", enable_gqa)
    check_heads("k", Hk, H, enable_gqa)
    mask, diagonal = check_mask(attn_mask, is_causal, (B, H, M, N), q.device)
    return q, k, v, mask, diagonal, check_scale(scale, D), check_dropout(dropout_p)


def _attend_and_average(q, k, v, mask, dropout_p):
    """attention_staged with the mean of the weights over the heads, [B, M, N]."""
    if not torch.is_grad_enabled() and dropout_p == 0.0:  # asked first: a program that trains has no bound on its keys
        if _fused_is_fast(q, mask) or k.shape[2] <= ONE_PASS // 2:
            return _infer_with_mean(q, k, v, mask)
    return _average(*attention_staged(q, k, v, mask, dropout_p, enable_gqa=True))


def _fused_is_fast(q, mask):
    """Not beside a mask, and not in wide heads of float32, which do not come in parts."""
    return mask is None and q.shape[3] * q.element_size() <= 2 * MAX_HEAD_DIM


def _average(out, probs):  # one line, as jit.trace compares the lines of two recordings
    return out, probs.mean(dim=1)


@replayable
def _infer_with_mean(q, k, v, attn_mask):
    """_attend_and_average without a gradient. The mean comes from the fused kernel's lse, and nothing of a head is
    stored; where the fused kernel is slow, from the registers that hold rows of P."""
    if must_dispatch((q, k, v)):  # what makes the mean has no derivative and no rule for vmap
        return _average(*attention_staged(q, k, v, attn_mask, enable_gqa=True))
    q, k, v, mask, diagonal, scale, _ = _checked(q, k, v, attn_mask, 0.0, False, None, True)
    if _fused_is_fast(q, mask):
        sinks, seed, softcap, dropout_p, left = None, None, 0.0, 0.0, None
        out, lse, stats = fused_op(q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, diagonal, *TUNED)
        return out, mean_weights_op(q, k, lse, stats, scale, diagonal)
    fill, heads, transposed, factor = None, q.shape[1], False, 1.0
    probs, mean = softmax_mean_op(scores_op(q, k, scale, diagonal, fill, *TUNED), mask, diagonal)
    return values_op(probs, v, diagonal, heads, transposed, factor, v.dtype, *TUNED), mean


def _attend_by_torch(q, k, v, mask, dropout_p, average=False):
    """attention_staged on a device without kernels (model.cpu() in a process with a GPU), by operations of torch, in
    float32 for 16 bits."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # which would have products in 16 bits
        with torch.autocast(q.device.type, enabled=False):
            return _attend_by_torch(q, k, v, mask, dropout_p, average)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(wide).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (q, k, v))
    scale = q.shape[3] ** -0.5
    if mask is None:
        scores = q * scale @ k.mT
    else:  # NaN and inf in a key must not reach, as 0 * NaN, the gradients of the queries that do not see it
        hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
        scores, right = q * scale @ k.nan_to_num(0.0, 0.0, 0.0).mT, q.detach() * scale @ k.mT
        scores = torch.where(right.isfinite(), scores, right)
        scores = scores if mask.dtype == torch.bool else scores + mask.to(wide)
        scores = scores.masked_fill(hidden, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    probs = F.dropout(scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0), dropout_p)
    if mask is None:
        out = probs @ v
    else:  # those in a value reach the queries that do see it
        seen, out = (probs != 0.0).to(wide), probs @ v.nan_to_num(0.0, 0.0, 0.0)
        up, down = (seen @ bad.to(wide) > 0.0 for bad in (~(v < math.inf), ~(v > -math.inf)))
        out = out + torch.where(up, math.inf, 0.0) - torch.where(down, math.inf, 0.0)
    return out.to(dtype), (probs.mean(dim=1) if average else probs).to(dtype)


def _keep_off_the_native_path(module, args):
    """A forward-pre-hook that does nothing: nn.TransformerEncoderLayer in eval reads the parameters of a self_attn
    without hooks and never calls it."""


class TritonMultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on Triton kernels: same constructor, forward, parameters and state_dict.

    One more keyword: num_kv_heads (default num_heads, which it divides) makes it grouped-query attention, with
    num_kv_heads * head_dim rows for k and for v in the projection weights.

    Where the parent contradicts itself, both values of need_weights give one answer: a query whose keys are all
    masked gets zero weights (not NaN), and attn_mask decides what is_causal only hints at.

    Raises:
        ValueError: dropout outside [0, 1], or num_kv_heads that does not divide num_heads; and as the parent does.
        TypeError: dropout is not a number.
    """

    num_kv_heads = None  # the class of an existing nn.MultiheadAttention may be set to this one

    def __init__(
        self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False,
        kdim=None, vdim=None, batch_first=False, device=None, dtype=None, *, num_kv_heads=None,
    ) -> None:
        try:
            dropout = float(dropout)
        except (TypeError, ValueError):
            raise TypeError(f"dropout must be a number, got {type(dropout).__name__}") from None
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        whole = isinstance(self.num_kv_heads, numbers.Integral) or num_kv_heads is None
        if not whole or self.num_kv_heads <= 0 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must be an int that divides num_heads = {num_heads}, got {num_kv_heads}")
        if self.num_kv_heads != num_heads:
            self._drop_kv_rows()
            self._reset_parameters()
        self.register_forward_pre_hook(_keep_off_the_native_path)

    def _drop_kv_rows(self):
        """Shrink the parent's parameters to num_kv_heads heads of k and v."""
        E, kv = self.embed_dim, self.num_kv_heads * self.head_dim
        rows = {"in_proj_weight": E + 2 * kv, "in_proj_bias": E + 2 * kv, "k_proj_weight": kv, "v_proj_weight": kv}
        for name, size in rows.items():
            if (parameter := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[:size].clone()))
        for name in ("bias_k", "bias_v"):
            if (parameter := getattr(self, name)) is not None:
                setattr(self, name, nn.Parameter(parameter.detach()[..., :kv].clone()))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as torch.nn.MultiheadAttention.forward does.

        Args:
            query: [L, E], or [L, B, E], or [B, L, E] with batch_first; a NestedTensor of [L_i, E] with batch_first.
            key, value: the same with S and kdim, vdim.
            key_padding_mask: [B, S] ([S] unbatched), bool (True: ignore this key) or floating (added).
            need_weights: return the weights too.
            attn_mask: [L, S] or [B * num_heads, L, S], bool (True: may not attend) or floating (added).
            average_attn_weights: average the weights over the heads.
            is_causal: a hint that attn_mask is causal; attn_mask is needed, and is what holds.

        Returns:
            (output, shaped like query; weights [B, L, S], or [B, num_heads, L, S] if not averaged, or None).
            In training the weights are those after dropout.

        Raises:
            AssertionError, RuntimeError: where the parent raises them. TypeError: not a tensor.
        """
        args = (query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        for proxy in (a for a in args if isinstance(a, torch.fx.Proxy)):
            # torch.fx.symbolic_trace of a model: a node that calls this layer, as for the layers of torch.nn
            if path := proxy.tracer.path_of_module(self):
                return proxy.tracer.create_proxy("call_module", path, args, {})
        _check_types(query=query, key=key, value=value, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        self._check(query, key, value, attn_mask, is_causal)
        if not batched:
            query, key, value = _together(lambda t: t.unsqueeze(0), query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _together(lambda t: t.transpose(0, 1), query, key, value)

        q, k, v = self._project(query, key, value)
        B, L, S, D = *q.shape[:2], k.shape[1], self.head_dim
        fused = not need_weights and D <= MAX_HEAD_DIM and q.device.type in KERNELS_RUN_ON
        masks = self._masks(attn_mask, key_padding_mask, B, L, S, q.dtype)
        _check_mask_dtype(masks, query)
        key_mask = None
        if fused and len(masks) == 2 and self._stay_two(*masks):
            mask, key_mask = masks[0], masks[1].view(B, S)
        else:
            mask = _combined(masks)
            k, v, mask = self._append_keys(k, v, mask)

        q, k, v = (t.view(*t.shape[:2], t.shape[2] // D, D).transpose(1, 2) for t in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        if key_mask is not None:
            out, weights = attend_under_two_masks(q, k, v, mask, key_mask, dropout_p), None
        elif fused:
            out, weights = attention_fused(q, k, v, mask, dropout_p, enable_gqa=True), None
        elif q.device.type not in KERNELS_RUN_ON:
            out, weights = _attend_by_torch(q, k, v, mask, dropout_p, average=average_attn_weights)
        elif need_weights and average_attn_weights:
            out, weights = _attend_and_average(q, k, v, mask, dropout_p)
        else:
            out, weights = attention_staged(q, k, v, mask, dropout_p, enable_gqa=True, need_weights=need_weights)
        out = out.transpose(1, 2).flatten(2)
        if batched and not self.batch_first:
            out = out.transpose(0, 1)
        out = self.out_proj(out)
        if not batched:
            out, weights = out.squeeze(0), weights.squeeze(0) if need_weights else None
        return out, weights if need_weights else None

    def __prepare_scriptable__(self):
        raise NotImplementedError(
            "TritonMultiheadAttention cannot be compiled by torch.jit.script, which does not know Triton's kernels: "
            "use torch.jit.trace, torch.export or torch.compile"
        )

    def _check(self, query, key, value, attn_mask, is_causal):
        """What the parent refuses beyond the number of dimensions, in its order."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint: pass the mask, "
                "nn.Transformer.generate_square_subsequent_mask(length) for a causal one"
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {tuple(key.shape)} does not match value shape {tuple(value.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {tuple(key.shape[:-1])} do not match value's {tuple(value.shape[:-1])}"
            )
        for name, t, dim in (("key", key, self.kdim), ("value", value, self.vdim)):
            if t.shape[-1] != dim:
                error = RuntimeError if self._qkv_same_embed_dim else AssertionError
                raise error(f"{name} must have {dim} features in its last dimension, got {tuple(t.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
            raise RuntimeError(
                f"query has a batch of {query.shape[batch_dim]}, key and value of {key.shape[batch_dim]} "
                f"(dimension {batch_dim}, batch_first={self.batch_first})"
            )
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.device != weight.device:
                raise RuntimeError(f"{name} is on {t.device}, the parameters are on {weight.device}")
            if not t.is_floating_point():
                raise RuntimeError(f"{name} must have a floating dtype, got {t.dtype}")
            if t.dtype != weight.dtype and not torch.is_autocast_enabled(t.device.type):
                raise RuntimeError(f"{name} must have the dtype of the parameters, {weight.dtype}, got {t.dtype}")

    def _project(self, query, key, value):
        """(q [B, L, H * D], k and v [B, S, Hk * D]), with one product for the inputs that are one tensor."""
        E, kv = self.embed_dim, (self.num_kv_heads or self.num_heads) * self.head_dim
        bias, weight = self.in_proj_bias, self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        if bias is not None:
            bias = bias.to(weight.dtype)  # some products take two dtypes, by their strides
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.split([E, kv, kv])
            return [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True)]
        if query is key and key is value:
            return F.linear(query, weight, bias).split([E, kv, kv], dim=-1)
        b_q, b_kv = (None, None) if bias is None else bias.split([E, 2 * kv])
        w_q, w_kv = weight.split([E, 2 * kv])
        q = F.linear(query, w_q, b_q)
        if key is value:
            return q, *F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        b_k, b_v = (None, None) if bias is None else b_kv.chunk(2)
        return q, *(F.linear(t, w, b) for t, w, b in zip((key, value), w_kv.chunk(2), (b_k, b_v), strict=True))

    def _masks(self, attn_mask, key_padding_mask, B, L, S, dtype):
        """The masks that there are, 4-D with sizes 1 kept: all bool (True: may attend) or all floating."""
        masks = []
        if attn_mask is not None:
            expected = (L, S) if attn_mask.dim() == 2 else (B * self.num_heads, L, S)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, "
                    f"but should be {expected}."
                )
            masks.append(attn_mask.view(B, self.num_heads, L, S) if attn_mask.dim() == 3 else attn_mask[None, None])
        if key_padding_mask is not None:
            if key_padding_mask.shape != (B, S):
                raise AssertionError(
                    f"Expected key_padding_mask of shape {(B, S)} (batch, keys), got {tuple(key_padding_mask.shape)}"
                )
            masks.append(key_padding_mask[:, None, None, :])
        if all(mask.dtype == torch.bool for mask in masks):
            return [~mask for mask in masks]
        return [
            torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else mask
            for mask in masks
        ]

    def _stay_two(self, mask, padding):
        """Whether a mask and one of keys beside it need not be combined, which is B times the memory of the first."""
        appends = self.bias_k is not None or self.add_zero_attn
        return not (appends or padding.requires_grad or inside_transform()) and mask.shape[2] > 1

    def _append_keys(self, k, v, mask):
        """add_bias_kv and add_zero_attn: one more key each, which every query may attend to."""
        extra = []
        if self.bias_k is not None:
            extra.append((self.bias_k.to(k.dtype), self.bias_v.to(v.dtype)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, k.shape[2]), v.new_zeros(1, 1, v.shape[2])))
        if not extra:
            return k, v, mask
        k = torch.cat([k, *(bias_k.expand(k.shape[0], 1, -1) for bias_k, _ in extra)], dim=1)
        v = torch.cat([v, *(bias_v.expand(v.shape[0], 1, -1) for _, bias_v in extra)], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, len(extra)), value=mask.dtype == torch.bool)
        return k, v, mask

    def _forward_nested(self, query, key, value, key_padding_mask, need_weights, attn_mask, average, is_causal):
        """Sequences of unequal length, as nn.TransformerEncoder packs them: pad, attend, pack."""
        if not (query.is_nested and key.is_nested and value.is_nested and self.batch_first):
            raise AssertionError(
                "MultiheadAttention takes NestedTensor input for all of query, key and value, with batch_first=True"
            )
        if key_padding_mask is not None:
            raise AssertionError("a NestedTensor has no padding: pass key_padding_mask=None")
        if query.size(0) == key.size(0) == value.size(0) == 0:
            shape = (0, 0, 0) if average else (0, self.num_heads, 0, 0)
            return query.clone(), torch.zeros(shape, dtype=query.dtype, device=query.device) if need_weights else None
        nested, lengths = query, [len(t) for t in query.unbind()]
        key_lengths = torch.tensor([len(t) for t in key.unbind()], device=key.device)
        query, key, value = _together(_pad, query, key, value)
        padding = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
        out, weights = self.forward(query, key, value, padding, need_weights, attn_mask, average, is_causal)
        parts = [o[:n] for o, n in zip(out, lengths, strict=True)]
        if nested.layout == torch.jagged:  # with the offsets of query, so that the two can be added
            return torch.nested.nested_tensor_from_jagged(torch.cat(parts), nested.offsets()), weights
        return torch.nested.as_nested_tensor(parts, layout=nested.layout), weights


def _pad(nested):
    """A NestedTensor of [L_i, E] as [B, L, E]; to_padded_tensor refuses one without a token."""
    return torch.nested.to_padded_tensor(nested, 0.0) if nested.numel() else torch.stack(nested.unbind())


def _check_types(key_padding_mask, attn_mask, **inputs):
    for name, t in inputs.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(mask).__name__}")
        if isinstance(mask, CausalBias):
            raise TypeError(f"{name} must be a tensor of its own values, got a CausalBias: attention_fused takes one")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if mask.device != inputs["query"].device:
            raise RuntimeError(f"{name} is on {mask.device}, query is on {inputs['query'].device}")


def _check_mask_dtype(masks, query):
    dtype = functools.reduce(torch.promote_types, (mask.dtype for mask in masks), torch.bool)
    if dtype not in (torch.bool, torch.float32, query.dtype) and not torch.is_autocast_enabled(query.device.type):
        raise RuntimeError(f"the masks must add up to bool, float32 or {query.dtype} as query, got {dtype}")


def _combined(masks):
    """Masks as one, or None."""
    if len(masks) < 2:
        return masks[0] if masks else None
    return masks[0] & masks[1] if masks[0].dtype == torch.bool else masks[0] + masks[1]


def _together(view, query, key, value):
    """Apply a view to the three, once per tensor, so that what was one tensor stays one."""
    q = view(query)
    k = q if key is query else view(key)
    return q, k, k if value is key else view(value)


if __name__ == "__main__":
    ours, x = TritonMultiheadAttention(48, 3, device=DEVICE), torch.randn(37, 2, 48, device=DEVICE)
    theirs = nn.MultiheadAttention(48, 3, device=DEVICE)
    theirs.load_state_dict(ours.state_dict())
    error = max((a - b).abs().max().item() for a, b in zip(ours(x, x, x), theirs(x, x, x), strict=True))
    print(f"layer {tuple(x.shape)} on {DEVICE}: max |error| {error:.1e}")
