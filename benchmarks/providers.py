"""Who computes attention: the kernels here, PyTorch's ways and FlashAttention, each a Provider of the same call.

STAGES are the kernels that take a tile, next to PyTorch's operation; ATTENTION are the ways to the whole of it, forward
and backward. A new one is a line in either. Nothing heavy is imported before it is asked for.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import Comparison

CHUNK = 1024  # queries at a time in the reference, so that its memory grows with S and not with S^2


# ---- shapes, counts, inputs


def label(B, H, S, D, dtype, causal, kv_heads=None):
    shared = f"/{kv_heads}" if kv_heads and kv_heads != H else ""
    return f"{dtype} B{B} H{H}{shared} S{S} D{D}{' causal' if causal else ''}"


def about(B, H, S, D, dtype, causal):
    return {"B": B, "H": H, "S": S, "D": D, "dtype": dtype, "causal": causal}


def visible_pairs(S, causal, block_m=1, block_n=1):
    """Elements of the tiles of S x S that hold a visible pair: what a kernel with this tile has to compute."""
    if not causal:
        return S * S
    pairs = 0
    for start_m in range(0, S, block_m):
        end_m = min(start_m + block_m, S)
        pairs += (end_m - start_m) * min(-(-end_m // block_n) * block_n, S)
    return pairs


def inputs(seed, shape, dtype, number, grad=False):
    import torch

    from triton_attention.device import DEVICE

    torch.manual_seed(seed)
    dtype = getattr(torch, dtype)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=grad) for _ in range(number)]


def free_bytes():
    """What can still be allocated on the GPU, PyTorch's own reserve included; no limit without one."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


# ---- PyTorch's own operations, the yardstick


@functools.lru_cache(maxsize=1)
def future(S, device):
    """The causal mask that PyTorch's three operations need, made once, outside the timing."""
    import torch

    return torch.ones(S, S, dtype=torch.bool, device=device).triu(1)


def hide_future(s, causal, first_m=None):
    """-inf where a query would see a later key; the rows of s begin with query first_m of the sequence."""
    if not causal:
        return s
    if first_m is None:
        return s.masked_fill(future(s.shape[-1], s.device), -math.inf)
    import torch

    m, n = (torch.arange(size, device=s.device) for size in s.shape[-2:])
    return s.masked_fill(n[None, :] > first_m + m[:, None], -math.inf)


def torch_three(q, k, v, causal, first_m=None):
    return hide_future((q * q.shape[-1] ** -0.5) @ k.mT, causal, first_m).softmax(-1) @ v


def last_head(result, queries=1):
    """What is checked: the last head of keys of the last batch, with its heads of queries: in Q, O or (dq, dk, dv)."""
    if isinstance(result, tuple):
        return result[0][-1:, -queries:], *(t[-1:, -1:] for t in result[1:])
    return result[-1:, -queries:]


def last_rows(result):
    """What is checked of an S x S result: the last rows of the last head, whose queries see every key."""
    return result[-1:, -1:, -4 * CHUNK :]


def visible_rows(result, fill=0.0):
    """last_rows with the future filled, where a kernel has not written it."""
    rows = last_rows(result)
    future = rows.isnan().new_ones(rows.shape[2:]).triu(1 + result.shape[2] - rows.shape[2])
    return rows.masked_fill(future, fill)


def reference(q, k, v, causal, g=None):
    """O by PyTorch's three operations, or with g the gradients (dq, dk, dv); of one head of keys, or as many as Q's."""
    import torch

    wide = torch.promote_types(q.dtype, torch.float32)
    out, dk, dv = [], 0, 0
    for first_m in range(0, q.shape[2], CHUNK):
        rows = slice(first_m, first_m + CHUNK)
        leaves = [t.detach().requires_grad_(g is not None) for t in (q[:, :, rows], k, v)]
        o = torch_three(*leaves, causal, first_m)
        if g is None:
            out.append(o)
            continue
        dq, dk_part, dv_part = torch.autograd.grad(o, leaves, g[:, :, rows])
        out.append(dq)
        dk, dv = dk + dk_part.to(wide), dv + dv_part.to(wide)
    out = torch.cat(out, 2)
    return out if g is None else (out, dk.to(q.dtype), dv.to(q.dtype))


# ---- the stages


@dataclass
class Stage:
    """A kernel that takes a tile: call(block_m=..., block_n=...) runs it, computed(block_m, block_n) are its flops."""

    call: Callable
    torch: Callable
    reference: Callable
    pick: Callable
    bytes: float
    computed: Callable

    def comparison(self):
        makes = {"triton": lambda: self.call, "torch": lambda: self.torch}
        return Comparison(makes, self.reference, self.pick, self.bytes, self.computed(1, 1))


def scores(B, H, S, D, dtype, causal, seed, filled=True):
    """filled False: causal as inside attention_staged, where nobody reads the future and it is not written."""
    from triton_attention_scores import attention_scores, scores_op

    (q, k), scale = inputs(seed, (B, H, S, D), dtype, 2), D**-0.5
    q_rows = last_rows(q)

    def call(block_m=None, block_n=None):
        if not filled:
            return scores_op(q, k, scale, 0, None, block_m, block_n)
        return attention_scores(q, k, is_causal=causal, block_m=block_m, block_n=block_n)

    return Stage(
        call,
        lambda: hide_future((q * scale) @ k.mT, causal),
        lambda t: hide_future((q_rows.to(t) * scale) @ last_head(k).to(t).mT, causal, S - q_rows.shape[2]),
        last_rows if filled else functools.partial(visible_rows, fill=-math.inf),
        q.element_size() * B * H * (visible_pairs(S, not filled) + 2 * S * D),
        lambda m, n: 2 * B * H * D * visible_pairs(S, causal, m, n),
    )


def softmax(B, H, S, D, dtype, causal, seed, filled=True):
    """filled as in scores."""
    from triton_attention_softmax import attention_softmax, softmax_op

    (s,) = inputs(seed, (B, H, S, S), dtype, 1)
    s_rows = last_rows(s)

    def call(block_m=None, block_n=None):
        if not filled or block_m is not None and block_m < 16:  # the op's own choice; the function asks for 16 or more
            return softmax_op(s, None, 0 if causal else None, block_m, block_n, filled)
        return attention_softmax(s, is_causal=causal, block_m=block_m, block_n=block_n)

    return Stage(
        call,
        lambda: hide_future(s, causal).softmax(-1),
        lambda t: hide_future(s_rows.to(t), causal, S - s_rows.shape[2]).softmax(-1),
        last_rows if filled else visible_rows,
        s.element_size() * B * H * (visible_pairs(S, not filled) + visible_pairs(S, causal)),
        lambda m, n: 5 * B * H * visible_pairs(S, causal, m, n),
    )


def values(B, H, S, D, dtype, causal, seed):
    from triton_attention_values import attention_values

    (p,), (v,) = inputs(seed, (B, H, S, S), dtype, 1), inputs(seed + 1, (B, H, S, D), dtype, 1)
    p = hide_future(p, causal).softmax(-1)
    return Stage(
        lambda **tile: attention_values(p, v, is_causal=causal, **tile),
        lambda: p @ v,
        lambda t: last_rows(p).to(t) @ last_head(v).to(t),
        last_rows,
        p.element_size() * B * H * (visible_pairs(S, causal) + 2 * S * D),
        lambda m, n: 2 * B * H * D * visible_pairs(S, causal, m, n),
    )


def whole(module, function):
    """A stage that is all of attention: a function with the signature of scaled_dot_product_attention and a tile."""

    def stage(B, H, S, D, dtype, causal, seed):
        attention = getattr(importlib.import_module(module), function)
        q, k, v = inputs(seed, (B, H, S, D), dtype, 3)
        return Stage(
            lambda **tile: attention(q, k, v, is_causal=causal, **tile),
            lambda: torch_three(q, k, v, causal),
            lambda t: reference(*(last_head(x).to(t) for x in (q, k, v)), causal),
            last_head,
            q.element_size() * B * H * 4 * S * D,
            lambda m, n: 4 * B * H * D * visible_pairs(S, causal, m, n),
        )

    return stage


STAGES = {
    "scores": scores, "softmax": softmax, "values": values, "fused": whole("triton_attention_fused", "attention_fused"),
}


# ---- the whole of attention


@dataclass
class Provider:
    """A way to compute attention: prepare(q, k, v, causal) returns a call without arguments for O.

    matrices is how many S x S matrices a head it holds at once at least, forward and backward: 0 for the fused ones.
    """

    prepare: Callable
    matrices: tuple[int, int] = (0, 0)
    modes: tuple[str, ...] = ("fwd", "bwd")
    compiles: bool = False  # by torch.compile, for seconds a shape


def shares_keys(q, k):
    return k.shape[1] < q.shape[1]


def ours(module, function, **options):
    """Prepare a function of this repository; of a tuple, O comes first."""

    def prepare(q, k, v, causal):
        attention = getattr(importlib.import_module(module), function)

        def call():
            out = attention(q, k, v, is_causal=causal, enable_gqa=shares_keys(q, k), **options)
            return out[0] if isinstance(out, tuple) else out

        return call

    return prepare


def three_functions(q, k, v, causal):
    from triton_attention_scores import attention_scores
    from triton_attention_softmax import attention_softmax
    from triton_attention_values import attention_values

    def call():
        p = attention_softmax(attention_scores(q, k, is_causal=causal), is_causal=causal)
        return attention_values(p, v, is_causal=causal)

    return call


def sdpa(backend):
    """Prepare PyTorch's scaled_dot_product_attention, held to one backend."""

    def prepare(q, k, v, causal):
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call():
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shares_keys(q, k))

        return call

    return prepare


def flex(q, k, v, causal):
    import torch
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise NotImplementedError("compiled for a GPU only")
    torch._dynamo.reset()  # past eight shapes dynamo gives up and runs it uncompiled
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over
    S = q.shape[2]
    mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, S, S, device=q.device) if causal else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=shares_keys(q, k))


def flash(module, **options):
    """Prepare flash_attn_func of a FlashAttention package: [B, S, H, D] in and out."""

    def prepare(q, k, v, causal):
        attention = importlib.import_module(module).flash_attn_func
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

        def call():
            out = attention(q, k, v, causal=causal, **options)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return prepare


ATTENTION = {
    "triton fused": Provider(ours("triton_attention_fused", "attention_fused")),
    "triton staged": Provider(ours("triton_attention_layer", "attention_staged"), (2, 3)),
    "triton staged, O": Provider(
        ours("triton_attention_layer", "attention_staged", need_weights=False), (2, 3), modes=("fwd",)
    ),
    "triton apart": Provider(three_functions, (2, 3), modes=("bwd",)),
    "SDPA cudnn": Provider(sdpa("CUDNN_ATTENTION")),
    "SDPA flash": Provider(sdpa("FLASH_ATTENTION")),
    "SDPA efficient": Provider(sdpa("EFFICIENT_ATTENTION")),
    "SDPA math": Provider(sdpa("MATH"), (2, 3)),
    "flex": Provider(flex, compiles=True),
    "fa2": Provider(flash("flash_attn")),
    "fa3": Provider(flash("fa3_fwd_interface"), modes=("fwd",)),
    "fa4": Provider(flash("flash_attn.cute")),
    "fa4 deterministic": Provider(flash("flash_attn.cute", deterministic=True), modes=("bwd",)),
    "torch": Provider(lambda q, k, v, causal: lambda: torch_three(q, k, v, causal), (2, 3)),
}


def providers(mode, args):
    """Names of the providers of a mode, "fwd" or "bwd"; --quick leaves out what compiles for seconds."""
    return [name for name, p in ATTENTION.items() if mode in p.modes and not (args.quick and p.compiles)]


def attention(mode, B, H, S, D, dtype, causal, seed, kv_heads=None):
    """The Comparison of all of ATTENTION: forward, or backward (dq, dk, dv); kv_heads: of keys and values, if fewer."""
    import torch

    bwd, kv_heads = mode == "bwd", kv_heads or H
    (q,) = inputs(seed, (B, H, S, D), dtype, 1, grad=bwd)
    k, v = inputs(seed + 1, (B, kv_heads, S, D), dtype, 2, grad=bwd)
    pick = functools.partial(last_head, queries=H // kv_heads)
    g = torch.randn_like(q) if bwd else None
    size, pairs = q.element_size(), B * H * visible_pairs(S, causal)

    def make(provider):
        need = provider.matrices[bwd] * size * B * H * S * S
        if need > free_bytes():
            raise MemoryError(f"needs {need / 2**30:.0f} GiB, {free_bytes() / 2**30:.0f} are free")
        call = provider.prepare(q, k, v, causal)
        if not bwd:
            return call
        out = call()
        return lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

    def check(dtype):
        heads = (pick(q.detach()), last_head(k.detach()), last_head(v.detach()))
        return reference(*(t.to(dtype) for t in heads), causal, pick(g).to(dtype) if bwd else None)

    # over S x S: forward writes S, reads S, writes P, reads P; backward reads P for dV, reads P and writes dS, reads dS
    # for dQ and for dK; of a causal row, P is written whole where it is returned
    linear = size * B * (2 * H + 2 * kv_heads) * S * D * (2 if bwd else 1)  # q k v o and their gradients, once each
    storing = {name: provider for name, provider in ATTENTION.items() if provider.matrices[0]}
    own = {}
    for name in storing:
        passes = 5 * pairs if bwd else 3 * pairs + (B * H * S * S if name != "triton staged, O" else pairs)
        moved = linear + size * (passes + (0 if bwd else 2 * B * H * S * D))
        own[name] = moved, (8 if bwd else 4) * pairs * D
    together = sum(provider.matrices[bwd] for provider in storing.values()) * size * B * H * S * S
    return Comparison(
        {name: functools.partial(make, provider) for name, provider in ATTENTION.items()},
        check, pick, linear, (10 if bwd else 4) * pairs * D,
        own=own, alone=tuple(storing) if together > free_bytes() else (),
    )
