"""What models call: attention with the masks that real models have, each call with every peer that can do it.

A Feature says which pairs are visible and which bias they have, once for everybody: as a tensor for ours and SDPA, as
a function of the place for FlexAttention, and for the reference a block of queries at a time. What a peer prepares
once for a model (FlexAttention's block mask, torch.compile, without a search for tiles) is not timed; ours has nothing
to prepare.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import providers
from benchmarks.harness import Case, Comparison

SHARES = (1.0, 0.73, 0.61, 0.27)  # of a batch's keys that are not padding
BACKENDS = {"SDPA cudnn": "CUDNN_ATTENTION", "SDPA efficient": "EFFICIENT_ATTENTION", "SDPA flash": "FLASH_ATTENTION"}
OURS, STOCK = "triton fused", "torch layer"
PEERS = (OURS, "flex", *BACKENDS)


@dataclass
class Feature:
    """visible(b, m, n, about) says of tensors of places whether query m of batch b sees key n, where it is not None;
    tensor(about) is the attn_mask of it that ours and SDPA get, but for is_causal."""

    visible: Callable | None = None
    tensor: Callable | None = None
    is_causal: bool = False
    biased: bool = False  # by a bias [1, H, M, N]
    learned: bool = False  # which gets a gradient
    compiled: str | None = None  # everybody under torch.compile, in this mode
    queries: Callable | None = None  # how many of so many keys; then forward only
    group: int = 1  # heads of queries that share one of keys
    batches: int = 1  # times as many


def causal(b, m, n, about):
    return n <= m


def padding(b, m, n, about):
    return n < about["lengths"][b]


def padded_future(b, m, n, about):
    return (n < about["lengths"][b]) & (n <= m)


def left_padding(b, m, n, about):
    return n >= about["S"] - about["lengths"][b]


def padded_prompt(b, m, n, about):
    return (n <= m) & ((n >= about["M"] - about["lengths"][b] * about["M"] // about["S"]) | (n == m))


def documents(b, m, n, about):
    return m // about["document"] == n // about["document"]


def scattered(b, m, n, about):
    return about["scattered"][m, n] > 0


def places(about):
    import torch

    return torch.arange(about["S"], device=about["lengths"].device)


def square(visible):
    """A bool [M, N]."""
    return lambda about: visible(0, places(about)[:, None], places(about), about)


def additive(visible):
    """The same of 0 and -inf, as PyTorch's encoder layers make it."""

    def tensor(about):
        hidden = ~square(visible)(about)
        return hidden.new_zeros(hidden.shape, dtype=about["dtype"]).masked_fill(hidden, -math.inf)

    return tensor


def per_batch(visible, rows):
    """A bool [B, 1, 1 or M, N]."""
    import torch

    def tensor(about):
        b = torch.arange(len(about["lengths"]), device=about["lengths"].device)[:, None, None, None]
        m = places(about)[: about["M"], None] if rows else 0
        return visible(b, m, places(about), about)

    return tensor


FEATURES = {
    "no mask": lambda: Feature(),
    "causal": lambda: Feature(causal, is_causal=True),
    "causal, compiled": lambda: Feature(causal, is_causal=True, compiled="default"),
    "causal, as a tensor": lambda: Feature(causal, square(causal)),
    "causal, of 0 and -inf": lambda: Feature(causal, additive(causal)),
    "padding": lambda: Feature(padding, per_batch(padding, rows=False)),
    "padding and is_causal": lambda: Feature(padded_future, per_batch(padding, rows=False), is_causal=True),
    "padding and causal in one": lambda: Feature(padded_future, per_batch(padded_future, rows=True)),
    "documents": lambda: Feature(documents, square(documents)),
    "half of all pairs": lambda: Feature(scattered, square(scattered)),
    "bias": lambda: Feature(biased=True),
    "bias that learns": lambda: Feature(biased=True, learned=True),
    "decoding, left padding": lambda: decoding(),
    "decoding, left padding, compiled": lambda: decoding("default"),
    "decoding, left padding, CUDA graphs": lambda: decoding("reduce-overhead"),
    "prompt in a static cache": lambda: Feature(
        padded_prompt, per_batch(padded_prompt, rows=True), queries=lambda S: S // 4, group=4
    ),
}


def decoding(compiled=None):
    """One query each, as `generate` of a padded batch calls it."""
    mask = per_batch(left_padding, rows=False)
    return Feature(left_padding, mask, compiled=compiled, queries=lambda S: 1, group=4, batches=8)


LAYERS = {  # nn.TransformerEncoderLayer in training: {name: what its forward gets}
    "encoder layer": lambda about: {},
    "encoder layer, causal": lambda about: {"src_mask": ~square(causal)(about), "is_causal": True},
    "encoder layer, padding": lambda about: {"src_key_padding_mask": ~per_batch(padding, rows=False)(about)[:, 0, 0]},
    "encoder layer, causal and padding": lambda about: {
        "src_mask": ~square(causal)(about), "src_key_padding_mask": ~per_batch(padding, rows=False)(about)[:, 0, 0],
    },
}


def about_masks(B, S, dtype, M=None):
    """What masks are made of: the lengths of a batch's sequences and of its documents, half of all pairs drawn."""
    import torch

    from triton_attention.device import DEVICE

    lengths = torch.tensor([max(1, int(S * SHARES[b % len(SHARES)])) for b in range(B)], device=DEVICE)
    drawn = torch.rand(S, S, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) > 0.5
    scattered = drawn.to(torch.uint8)
    about = {"S": S, "M": M or S, "dtype": getattr(torch, dtype), "lengths": lengths}
    return about | {"document": S // 6 + 1, "scattered": scattered}


def visible_pairs(feature, B, about):
    """How many pairs of a head are visible, over all batches."""
    if feature.visible is None:
        return B * about["S"] ** 2
    n, step = places(about), providers.CHUNK
    m = n[: about["M"], None]
    return sum(
        int((feature.visible(b, rows, n, about) & (rows >= 0)).sum()) for b in range(B) for rows in m.split(step)
    )


# ---- attention


def ours(q, k, v, mask, feature):
    from triton_attention_fused import attention_fused

    gqa = feature.group > 1
    return lambda: attention_fused(q, k, v, attn_mask=mask, is_causal=feature.is_causal, enable_gqa=gqa)


def sdpa(backend, q, k, v, mask, feature):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    hint, gqa = feature.is_causal and mask is None, feature.group > 1
    if gqa and backend == "EFFICIENT_ATTENTION":  # which has none: the keys of a group for each of its heads
        k, v, gqa = k.repeat_interleave(feature.group, 1), v.repeat_interleave(feature.group, 1), False
    if feature.is_causal and mask is not None:  # which SDPA refuses beside a mask: made once, outside the timing
        n = mask.new_ones(q.shape[2], k.shape[2]).tril() > 0
        mask = mask & n

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=hint, enable_gqa=gqa)

    return call


def flex(q, k, v, mask, feature, about):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise NotImplementedError("compiled for a GPU only")
    block_mask, score_mod = None, None
    if feature.visible is not None:
        B = q.shape[0] if feature.visible in (padding, padded_future, left_padding, padded_prompt) else None
        mask_mod = lambda b, h, m, n: feature.visible(b, m, n, about)  # noqa: E731
        block_mask = create_block_mask(mask_mod, B, None, q.shape[2], k.shape[2], device=q.device)
    if feature.biased:
        score_mod = lambda s, b, h, m, n: s + mask[0, h, m, n]  # noqa: E731
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=feature.group > 1)


def exact(q, k, v, bias, g, feature, about):
    """O of some heads, or with g the gradients (dq, dk, dv, and dbias if it learns)."""
    import torch

    wide, out, sums, dbias = torch.promote_types(q.dtype, torch.float32), [], [0, 0], []
    b, n = torch.arange(q.shape[0], device=q.device)[:, None, None, None], places(about)
    m = n[: q.shape[2], None]
    for first in range(0, q.shape[2], providers.CHUNK):
        rows = slice(first, first + providers.CHUNK)
        leaves = [q[:, :, rows], k, v] + ([bias[:, :, rows]] if feature.learned else [])
        leaves = [t.detach().requires_grad_(g is not None) for t in leaves]
        s = (leaves[0] * q.shape[-1] ** -0.5) @ leaves[1].mT
        if feature.biased:
            s = s + (leaves[3] if feature.learned else bias[:, :, rows])
        if feature.visible is not None:
            s = s.masked_fill(~feature.visible(b, m[rows], n, about), -math.inf)
        o = s.softmax(-1) @ leaves[2]
        if g is None:
            out.append(o)
            continue
        dq, *grads = torch.autograd.grad(o, leaves, g[:, :, rows])
        out.append(dq)
        sums = [total + grad.to(wide) for total, grad in zip(sums, grads, strict=False)]
        dbias += grads[2:]
    out = torch.cat(out, 2)
    if g is None:
        return out
    return (out, *(total.to(q.dtype) for total in sums), *([torch.cat(dbias, 2)] if dbias else []))


def attention(mode, name, B, H, S, D, dtype, seed):
    """The Comparison of a feature: forward, or backward."""
    import torch
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()  # past eight shapes dynamo gives up
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over
    feature, bwd = FEATURES[name](), mode == "bwd"
    M, B = feature.queries(S) if feature.queries else S, B * feature.batches
    q, k, v = providers.inputs(seed, (B, H, S, D), dtype, 3, grad=bwd)
    if feature.queries:
        q, k, v = q[:, :, :M].contiguous(), *(t[:, :: feature.group].contiguous() for t in (k, v))
    about = about_masks(B, S, dtype, M)
    mask = feature.tensor(about) if feature.tensor else None
    if feature.biased:
        (mask,) = providers.inputs(seed + 1, (1, H, S, S), dtype, 1, grad=bwd and feature.learned)
    wanted = (q, k, v, *([mask] if feature.learned else []))
    g = torch.randn_like(q) if bwd else None

    def make(prepare):
        call = prepare(q, k, v, mask, feature)
        if feature.compiled:
            for t in (q, k, v) if mask is None else (q, k, v, mask):
                torch._dynamo.mark_static_address(t)  # as a model's cache is: else a CUDA graph gets a copy each time
            call = torch.compile(call, mode=feature.compiled)
        if not bwd:
            return call
        out = call()
        return lambda: torch.autograd.grad(out, wanted, g, retain_graph=True)

    makes = {OURS: ours, "flex": functools.partial(flex, about=about)}
    makes |= {name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()}
    head = lambda t: t.detach()[:, -1:]  # noqa: E731  of every batch, which a bias may be a sum over
    pick = lambda out: tuple(map(head, out)) if isinstance(out, tuple) else head(out)  # noqa: E731

    def reference(dtype):
        bias = head(mask).to(dtype) if feature.biased else None
        return exact(*(head(t).to(dtype) for t in (q, k, v)), bias, head(g).to(dtype) if bwd else None, feature, about)

    moved = q.element_size() * 2 * (q.numel() + k.numel()) * (2 if bwd else 1)
    if mask is not None:
        moved += mask.numel() * mask.element_size() * (2 if bwd and feature.learned else 1)
    flops = (10 if bwd else 4) * H * visible_pairs(feature, B, about) * D
    return Comparison({name: functools.partial(make, p) for name, p in makes.items()}, reference, pick, moved, flops)


# ---- a layer that has it


def layer(name, B, H, S, E, dtype, seed):
    """The Comparison of a step of training: forward, and the gradients of the input and all parameters."""
    import copy

    import torch

    from triton_attention.device import DEVICE
    from triton_attention_layer import TritonMultiheadAttention

    torch.manual_seed(seed)
    stock = torch.nn.TransformerEncoderLayer(E, H, 4 * E, dropout=0.0, batch_first=True, device=DEVICE)
    about = about_masks(B, S, dtype)
    options = LAYERS[name](about)
    (x,) = providers.inputs(seed, (B, S, E), dtype, 1, grad=True)
    g = torch.randn_like(x)

    def make(provider, dtype=x.dtype, inputs=x, options=options):
        module = copy.deepcopy(stock).to(dtype)
        if provider == OURS:
            attention = TritonMultiheadAttention(E, H, batch_first=True, device=DEVICE, dtype=dtype)
            attention.load_state_dict(module.self_attn.state_dict())
            module.self_attn = attention
        weights = list(module.parameters())

        def step():
            out = module(inputs, **options)
            return (out, *torch.autograd.grad(out, [inputs, *weights], g[-len(inputs) :].to(dtype)))

        return step

    def reference(dtype):
        last = {key: t[-1:] if key == "src_key_padding_mask" else t for key, t in options.items()}
        return make(STOCK, dtype, x[-1:].detach().to(dtype).requires_grad_(), last)()[:2]

    weights = sum(p.numel() for p in stock.parameters())
    pairs = {"encoder layer, causal": causal, "encoder layer, padding": padding}.get(name)
    flops = 6 * B * S * weights + 12 * visible_pairs(Feature(pairs), B, about) * E
    moved = x.element_size() * (3 * weights + 4 * x.numel())
    makes = {provider: functools.partial(make, provider) for provider in (OURS, STOCK)}
    return Comparison(makes, reference, lambda out: tuple(t[-1:] for t in out[:2]), moved, flops)


def rows(args, interpreted):
    """The Cases: each feature forward and backward, then the layers in training."""
    dtype = (args.dtype or ["bfloat16"])[0]
    for mode in ("fwd", "bwd") if args.mode == "both" else (args.mode,):
        for D in args.head_dim or ([16] if interpreted else [128] if args.quick else [128, 64]):
            B, H = args.batch or (2 if interpreted else 4), args.heads or (2 if interpreted else 16)
            for S in args.seq_lens or [64 if interpreted else 4096]:
                for name, feature in FEATURES.items():
                    if mode == "bwd" and feature().queries:
                        continue
                    shape = f"B{B * feature().batches} H{H} S{S} D{D}"
                    build = functools.partial(attention, mode, name, B, H, S, D, dtype, args.seed)
                    about = {"mode": mode, "same": False, "feature": name, "S": S, "D": D}
                    yield Case("forward" if mode == "fwd" else "backward", f"{shape} {name}", list(PEERS), build, about)
    if args.mode == "both":
        B, S, E, H = (2, 32, 64, 4) if interpreted else (8, 2048, 1024, 16)
        for name in LAYERS:
            build = functools.partial(layer, name, B, H, S, E, dtype, args.seed)
            about = {"mode": "train", "same": False, "feature": name, "S": S}
            yield Case("training", f"B{B} H{H} S{S} E{E} {name}", [OURS, STOCK], build, about)
