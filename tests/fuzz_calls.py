"""A call at random: draw() says what it is, build() gives its tensors, ours() makes it, reference() is PyTorch's.

What is left out stands in possible(), with its reason: what float64 itself gives NaN for, and what no dtype computes
well enough for its error to say anything.
"""

import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.reference import (
    BF16, DEVICE, F16, F32, F64, INF, INTERPRETED, NAN, LAYOUTS as PLAIN_LAYOUTS, randn, torch_fused, torch_logsumexp,
    torch_scores, torch_softmax, torch_staged, torch_values, torch_visible,
)
from triton_attention_fused import MAX_HEAD_DIM, attention_fused, merge_attention
from triton_attention_layer import TritonMultiheadAttention, attention_staged
from triton_attention_scores import attention_scores
from triton_attention_softmax import attention_softmax
from triton_attention_values import attention_values

# ---- what is drawn: tables, in which a choice that stands twice comes twice as often

TAKES = {  # kind: its inputs; its options
    "scores": ("q k", "causal scale block same"),
    "softmax": ("scores mask", "causal bias mask dropout block"),
    "values": ("probs v", "causal block"),
    "staged": ("q k v mask", "causal bias mask dropout scale same need_weights"),
    "fused": ("q k v mask sinks", "causal bias mask dropout scale same window softcap sinks lse block"),
    "merge": ("q k v mask", "mask scale softcap same"),
    "layer": ("q k v mask parameters", "mask dropout same biased weights padding"),
}
OPTIONS = {  # the first is what a kind has that does not take the option
    "causal": (False, False, True),
    "bias": (None, None, None, "upper left", "lower right"),  # a CausalBias
    "mask": (None, None, "bool", "float", "float", "float32"),
    "dropout": (0.0,) * 8 + (0.2, 0.5, 0.9, 1.0),
    "scale": (None, None, None, 1.0, 0.0, -0.7, 1e-4, 30.0),
    "same": (None, None, None, "k v", "q k v"),  # one tensor in several places
    "window": ((-1, -1),) * 4 + ((3, 0), (-1, 5), (7, -1), (20, 11), (0, 0), (0, 40), (300, 2)),
    "softcap": (0.0,) * 4 + (0.5, 30.0, 1e-3, 1e-40, 1e300),
    "sinks": (None, None, None, "normal", "large", "one -inf"),
    "lse": (False, True, True),
    "block": (None,) * 5 + (16, 32, 64),
    "biased": (True, True, False),
    "weights": (None, "averaged", "of heads"),
    "need_weights": (True, True, False),
    "padding": (None, None, "bool", "float"),  # a second mask, beside one that is not of keys
}
MASK_SHAPES = ("BHMN", "11MN", "11MN", "B11N", "111N", "1HM1", "1111", "MN", "N", "HMN")
MASK_LAYOUTS = ("plain", "columns", "every other", "sliced", "bnhd")
FORBIDS = ("random", "random", "rows", "keys", "first keys", "batch", "nothing", "all")
FILLS = (-INF, -INF, -1e9, "finfo.min")
LAYOUTS = (*PLAIN_LAYOUTS, "sliced", "sliced", "packed")
SIZES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2), (1, 3, 1), (2, 2, 1), (1, 4, 2), (3, 3, 3), (2, 6, 2))  # B, H, Hk
WIDTHS = (1, 3, 8, 16, 16, 24, 31, 32, 40, 64, 64, 72, 96, 128, 128, 160, 200, 256)
VALUES = ("normal",) * 6 + ("large", "equal keys", "one-hot", "zeros", "infinite keys")
MODES = {"once": 60, "three calls": 14, "no_grad": 8, "inference": 4, "autocast": 6, "compiled": 2}  # and how often


class Call(SimpleNamespace):
    def __str__(self):
        same = {name: choices[0] for name, choices in OPTIONS.items()}
        said = {k: v for k, v in vars(self).items() if k not in ("kind", "seed") and v not in (same.get(k), None)}
        return " ".join([self.kind, *(f"{k}={v!r}" for k, v in said.items())]).replace("torch.", "")


def draw(seed, kinds):
    """The call of a seed, of a kind in {kind: how often}."""
    rng = random.Random(seed)
    pick, weighted = rng.choice, lambda table: rng.choices(list(table), table.values())[0]
    kind = weighted(kinds)
    inputs, takes = (words.split() for words in TAKES[kind])
    c = Call(seed=seed, kind=kind, dtype=pick((F16, F16, BF16, BF16, F32, F32, F32, F64)))
    c.B, c.H, c.Hk = pick(SIZES[:6] if INTERPRETED else SIZES)
    c.M, c.N, c.D, c.Dv = length(rng), length(rng), pick(WIDTHS), pick(WIDTHS)
    if pick((True, False)):
        c.Dv = c.D
    for name, choices in OPTIONS.items():
        setattr(c, name, pick(choices) if name in takes else choices[0])
    c.mode, c.values, c.layouts = weighted(MODES), pick(VALUES), [pick(LAYOUTS) for _ in range(3)]
    c.poison = pick((None,) * 6 + (NAN, INF, -INF, 6e4 if c.dtype == F16 else 2e38))
    share = pick((1.0, 1.0, 0.5, 0.5, 0.2))
    c.wants = [name for name in inputs if rng.random() < share]
    c.cotangents = pick((("plain",) * 2, (pick(LAYOUTS), pick(LAYOUTS)), ("one number", None), (None, "plain")))
    if kind == "merge":
        c.lse = True
    c.mask_shape, c.mask_layout, c.forbids, c.fill = map(pick, (MASK_SHAPES, MASK_LAYOUTS, FORBIDS, FILLS))
    return possible(c)


def length(rng):
    """Of queries or keys."""
    few, many = ((2, 80), (81, 160)) if INTERPRETED else ((2, 300), (301, 1000))
    return rng.choices((1, rng.randint(*few), rng.randint(*many)), (10, 84, 6))[0]


def possible(c):
    """The call, without what does not go together."""
    if c.kind == "layer":  # heads are slices of a projection; values that overflow there are not attention's
        c.D = c.Dv = min(c.D, 64)
        c.values, c.poison, c.mask_shape = "normal", None, c.mask_shape.replace("1HM1", "BHMN")
    if c.kind == "fused" or c.kind == "merge":
        c.D, c.Dv = min(c.D, MAX_HEAD_DIM), min(c.Dv, MAX_HEAD_DIM)
    elif c.kind != "layer" and c.D == 256:
        c.D = 300
    if c.values in ("equal keys", "infinite keys"):  # not the values too: all of dS cancels out, O is infinite
        c.same = None
    if c.same == "q k v" and (c.values == "large" or c.scale == 30.0 or c.dtype == F64):
        c.same = "k v"  # else each query sees itself alone: what is left of dS is rounding of O
    if c.same:
        c.Dv = c.D
    if c.B * c.M < 16 or c.values == "large":  # a sink's gradient is one number, of few rows; their error is chance
        c.wants = [name for name in c.wants if name != "sinks"]
    if c.same == "q k v":
        c.Hk, c.N, c.poison = c.H, c.M, None
    if c.mask_shape in ("1HM1", "1111"):
        c.wants = [name for name in c.wants if name != "mask"]  # along the keys a constant changes nothing
    if c.bias:
        c.mask = None
    if not c.mask or c.mask_shape in ("B11N", "111N", "N"):
        c.padding = None
    if not c.mask:
        c.mask_shape = c.mask_layout = c.forbids = c.fill = None
    if c.mode == "compiled":
        c.dropout = 0.0  # Inductor draws another seed
    if c.mode == "autocast" and c.dtype != F64:
        c.dtype, c.autocast = F32, random.Random(c.seed).choice((F16, BF16))
    if c.values == "infinite keys":  # the gradient of the queries is 0 * inf
        c.wants, c.scale = [], None
        c.softcap = 30.0 if c.softcap == 1e300 else c.softcap  # -1e300 is -inf in float32
        if c.kind in ("fused", "merge"):  # a whole tile of them
            c.block, c.M = c.block or 16, min(c.M, 16) if INTERPRETED else c.M
    sharp = c.scale == 30.0 and c.kind in ("fused", "staged") or c.values == "large" and c.kind == "fused"
    if sharp and vars(c).get("autocast", c.dtype) in (F16, BF16):
        # one key has almost all of the weight: what is left of dS is the rounding of O, in every fused backward pass;
        # in the stages S itself is rounded, by as much as moves the weight to another key
        c.wants = [name for name in c.wants if name not in ("q", "k", "mask")]
    if c.cotangents[0] == "one number" and c.dtype == F32 and not INTERPRETED:
        # tensor cores round towards zero, which adds up over all of O, in one direction
        c.wants = [name for name in c.wants if name != "sinks"]
    if c.cotangents[0] == "one number" and c.mask and c.fill in (-1e9, "finfo.min"):
        # rows of one large constant are all alike: what rounding leaves of their dS adds up in one direction
        c.wants = [name for name in c.wants if name != "mask"]
    if c.cotangents[0] == "one number" and c.N == 1:
        # every weight is 1: dV adds up one number, which rounds in one direction as often as it is added
        c.cotangents = ("plain", None)
    if 0.0 < c.softcap < 1.0 and c.values == "large":
        c.values = "normal"  # O hangs on the few scores near 0 too, whose error is that of the large ones they sum up
    if 0.0 < c.softcap < 0.1:
        # the gradient hangs on the few scores near 0, whose rounding counts a thousandfold, or is that of O alone
        c.wants = [name for name in c.wants if name not in ("q", "k")]
    if c.kind == "merge":  # its weights are as exact as lse, whose rounding grows with the scores
        c.scale = None if c.scale == 30.0 else c.scale
        c.values = "normal" if c.values in ("large", "one-hot") else c.values
    if c.values == "large" and c.scale is not None:
        c.scale = None  # float16 overflows
    if c.dtype == F64:  # an error in S moves P by as much, and nothing is more exact to tell how large it may be
        c.scale, c.values = c.scale if c.scale in (0.0, 1e-4) else None, "normal"
    if c.mask and c.fill == -1e9:
        if c.dtype == F64:
            c.fill = "finfo.min"
        else:  # scores vanish beside it in float32, if they are below 32
            c.scale, c.values = None, "normal"
    if INTERPRETED:  # a tile of scores takes 3 ms, and as much a key where a NaN has to be avoided
        c.N = min(c.N, 24) if c.poison else c.N
        few = 48 if c.values == "infinite keys" else 16
        if c.block and c.B * c.H * -(-c.M // c.block) * -(-c.N // c.block) > few:
            c.block = None
        c.mode = "once" if c.mode == "three calls" else c.mode
    if c.mode in ("no_grad", "inference"):
        c.wants = []
    return c


# ---- its tensors


def writable(t):
    """The part of an expanded tensor that is in memory."""
    return t[:, :1] if t.dim() == 4 and t.stride(1) == 0 else t


def build(c, seed):
    """The inputs by name, each in its layout."""
    torch.manual_seed(seed)
    make = lambda rows, columns, heads=c.H, i=0: randn(  # noqa: E731
        c.B, heads, rows, columns, dtype=c.dtype, layout=c.layouts[i], grad=False
    )
    if c.kind == "softmax":
        inputs = {"scores": make(c.M, c.N)}
    elif c.kind == "values":
        inputs = {"probs": make(c.M, c.N), "v": make(c.N, c.Dv, c.Hk, 1)}
        writable(inputs["probs"]).copy_(writable(inputs["probs"]).softmax(-1))
    elif c.kind == "layer":
        E = c.H * c.D
        inputs = {"q": randn(c.B, 1, c.M, E, dtype=c.dtype, layout=c.layouts[0], grad=False)[:, 0]}
        inputs |= {n: randn(c.B, 1, c.N, E, dtype=c.dtype, layout=c.layouts[1], grad=False)[:, 0] for n in "kv"}
        inputs |= {name: E**-0.5 * torch.randn_like(p) for name, p in layer_of(c).named_parameters()}
    else:
        inputs = {"q": make(c.M, c.D), "k": make(c.N, c.D, c.Hk, 1), "v": make(c.N, c.Dv, c.Hk, 2)}
        if c.kind == "scores":
            del inputs["v"]
    if c.same:
        inputs = {name: t for name, t in inputs.items() if name not in c.same.split()[1:]}
    choose_values(c, *list(inputs.values())[:2])
    if c.mask:
        inputs["mask"] = mask_of(c)
    if c.sinks:
        inputs["sinks"] = torch.randn(c.H, dtype=c.dtype, device=DEVICE) * (30 if c.sinks == "large" else 1)
        if c.sinks == "one -inf":
            inputs["sinks"][0] = -INF
    for name, t in inputs.items():
        wanted = name in c.wants or "parameters" in c.wants and name not in TAKES[c.kind][0].split()
        t.requires_grad_(wanted and t.is_floating_point())
    if c.kind not in ("scores", "values") and visible(c, inputs.get("mask")).sum(-1).max() < 2:
        for name in {"q", "k", "mask", "scores"} & inputs.keys():  # P is 1 or 0: what is left of dS is rounding alone
            rounded = vars(c).get("autocast", c.dtype).itemsize == 2  # by as much as O is
            if name == "mask" or rounded or not (c.same and c.same.startswith(name)):  # else it is v's gradient too
                inputs[name].requires_grad_(False)
    return inputs


@torch.no_grad()
def choose_values(c, first, second=None):
    """Write the call's kind of values into q and k, or into the scores alone."""
    first, second = writable(first), None if second is None else writable(second)
    if c.kind == "values" or c.values == "normal":
        return
    if c.values == "large":
        first *= 100
    elif c.values == "zeros":
        first.zero_()
    elif c.kind == "softmax" or second is None:
        if c.values == "equal keys":
            first.copy_(first[..., :1].clone())
    elif c.values == "equal keys":
        second.copy_(second[:, :, :1].clone())
    elif c.values == "one-hot":
        for t in (first, second):
            t.copy_(F.one_hot(torch.randint(c.D, t.shape[:-1], device=DEVICE), c.D))
    elif c.values == "infinite keys":  # the first of the keys score -inf, where no mask hides them
        first[..., 0] = -1.0
        second[:, :, : c.N * 3 // 4, 0] = INF


def fill_of(c):
    dtype = F32 if c.mask == "float32" else c.dtype
    return torch.finfo(dtype).min if c.fill == "finfo.min" else torch.tensor(c.fill, dtype=dtype).item()


def mask_of(c):
    sizes = {"B": c.B, "H": c.H, "M": c.M, "N": c.N, "1": 1}
    shape = [sizes[letter] for letter in c.mask_shape]
    b, h, m, n = (1,) * (4 - len(shape)) + tuple(shape)
    keep = torch.ones(b, h, m, n, dtype=torch.bool, device=DEVICE)
    if c.forbids == "random":
        keep = torch.rand(b, h, m, n, device=DEVICE) < 0.7
    elif c.forbids == "rows":
        keep[:, :, torch.rand(m, device=DEVICE) < 0.3] = False
    elif c.forbids == "keys":
        keep[..., torch.rand(n, device=DEVICE) < 0.4] = False
    elif c.forbids == "first keys":
        keep[..., : n * 3 // 4] = False
    elif c.forbids == "batch":
        keep[0] = False
    elif c.forbids == "all":
        keep[:] = False
    dtype = F32 if c.mask == "float32" else c.dtype
    mask = randn(b, h, m, n, dtype=dtype, layout=c.mask_layout, grad=False)
    if c.mask == "bool":
        mask = (mask > 9).copy_(keep)  # in the memory order of the layout
    else:
        writable(mask).masked_fill_(~keep, fill_of(c))
    for _ in range(4 - len(shape)):
        mask = mask[0]
    return mask


def visible(c, mask):
    """[B, H, M, N]: which keys a query sees, by the reference: those with a share of equal scores."""
    zeros = torch.zeros(c.B, c.H, max(c.M, c.N), c.N, device=DEVICE)
    keep = mask if mask is None or mask.dtype == torch.bool else mask != -INF
    if c.padding:
        keep = keep & ~padding_of(c)[:, None, None]
    equal = Call(**{**vars(c), "kind": "fused", "softcap": 0.0})
    v = torch.eye(c.N, device=DEVICE).expand(c.B, c.H, c.N, c.N)
    return reference(equal, None, zeros[:, :, : c.M], zeros[:, :, : c.N], v, keep)[0] > 0


@torch.no_grad()
def poison(c, inputs):
    """Write over what no query sees; return by name where that is."""
    if c.poison is None or c.kind == "layer":
        return {}
    unseen = ~visible(c, inputs.get("mask"))
    hidden = {name: unseen for name in ("scores", "probs") if name in inputs}
    hidden |= {name: unseen.unflatten(1, (c.Hk, -1)).all(3).all(2)[..., None] for name in "kv" if name in inputs}
    for name in list(hidden):
        t = inputs[name]
        if writable(t).shape != t.shape:
            hidden[name] = hidden[name].all(1, keepdim=True)
        writable(t).masked_fill_(hidden[name], c.poison)
    return hidden


# ---- ours and PyTorch's


def everywhere(q, k=None, v=None):
    k = q if k is None else k
    return q, k, k if v is None else v


def ours(c, module=None, **inputs):
    """The call itself: its outputs in a tuple."""
    mask, scale = inputs.pop("mask", None), c.scale
    if c.bias:
        mask = (causal_upper_left if c.bias == "upper left" else causal_lower_right)(c.M, c.N)
    blocks = {"block_m": c.block, "block_n": c.block}
    if c.kind == "scores":
        return (attention_scores(*everywhere(**inputs)[:2], scale=scale, is_causal=c.causal, **blocks),)
    if c.kind == "softmax":
        return (attention_softmax(**inputs, attn_mask=mask, is_causal=c.causal, dropout_p=c.dropout, **blocks),)
    if c.kind == "values":
        return (attention_values(**inputs, is_causal=c.causal, **blocks),)
    if c.kind == "layer":
        return layer(c, module, mask, **inputs)
    sinks = inputs.pop("sinks", None)
    q, k, v = everywhere(**inputs)
    if c.kind == "staged":
        outs = attention_staged(
            q, k, v, mask, c.dropout, c.causal, scale, enable_gqa=True, need_weights=c.need_weights
        )
        return outs if c.need_weights else outs[:1]
    fused = lambda k, v, mask: attention_fused(  # noqa: E731
        q, k, v, mask, c.dropout, c.causal, scale, enable_gqa=True, window_size=c.window, softcap=c.softcap,
        sinks=sinks, return_lse=c.lse, **blocks,
    )
    if c.kind == "merge":
        return merge_attention(*(t for half in halves(c, k, v, mask) for t in fused(*half)))
    out = fused(k, v, mask)
    return out if c.lse else (out,)


def reference(c, keep, q=None, k=None, v=None, mask=None, sinks=None, scores=None, probs=None, **parameters):
    """The same by PyTorch, in the dtype of its inputs; keep is the dropout mask with its factor."""
    if c.kind == "layer":
        return torch_layer(c, keep, *everywhere(q, k, v), mask, **parameters)
    if c.bias:
        mask = torch_visible(c.M, c.N, 0 if c.bias == "upper left" else c.N - c.M)
    if c.kind == "scores":
        return (torch_scores(*everywhere(q, k)[:2], c.scale, c.causal),)
    if c.kind == "softmax":
        p = torch_softmax(scores, mask, c.causal)
        return (p if keep is None else p * keep.to(p.dtype),)
    if c.kind == "values":
        return (torch_values(probs, v, c.causal),)
    q, k, v = everywhere(q, k, v)
    keep = None if keep is None else keep.to(q.dtype)
    if c.kind == "staged":
        return torch_staged(q, k, v, mask, c.causal, c.scale, keep)[: 2 if c.need_weights else 1]
    softcap = c.softcap
    if softcap and q.dtype != F64:  # torch's own has NaN for what float32 has no number for
        softcap = 0.0 if softcap > 1e30 else max(softcap, 1e-30)
    fused = lambda k, v, mask: torch_fused(  # noqa: E731
        q, k, v, mask, c.causal, c.scale, c.window, softcap, sinks, keep
    )
    if c.kind == "fused":
        return fused(k, v, mask)[: 1 + c.lse]
    outs, lses = (torch.stack(parts) for parts in zip(*(fused(*h) for h in halves(c, k, v, mask)), strict=True))
    nothing = (lses == -INF).all(0)
    lses = lses.masked_fill(nothing, 0.0)
    out = (lses.softmax(0)[..., None].to(outs.dtype) * outs).sum(0).masked_fill(nothing[..., None], 0.0)
    return out, torch_logsumexp(lses, 0).masked_fill(nothing, -INF)


def halves(c, k, v, mask):
    """Two sets of keys; without a key in one of them for N = 1."""
    for part in (slice(0, c.N // 3), slice(c.N // 3, None)):
        along_keys = mask is not None and mask.shape[-1] == c.N and c.N > 1
        yield k[:, :, part], v[:, :, part], mask[..., part] if along_keys else mask


def padding_of(c):
    """Which keys a second mask hides, [B, N]: the last, of each batch element some more, and one of every eleven."""
    b, n = torch.arange(c.B, device=DEVICE)[:, None], torch.arange(c.N, device=DEVICE)
    return (n >= (c.N - 13 * b - c.seed % 29).clamp(min=1)) | (n % 11 == 3)


def additive(hidden, dtype):
    return torch.zeros(hidden.shape, dtype=dtype, device=DEVICE).masked_fill(hidden, -INF)


def layer_of(c):
    return TritonMultiheadAttention(
        c.H * c.D, c.H, c.dropout, c.biased, batch_first=True, device=DEVICE, dtype=c.dtype, num_kv_heads=c.Hk
    )


def layer(c, module, mask, q, k=None, v=None, **parameters):
    options = {"need_weights": c.weights is not None, "average_attn_weights": c.weights == "averaged"}
    if mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask
        if c.mask_shape in ("B11N", "111N", "N"):
            options["key_padding_mask"] = mask.reshape(-1, c.N).expand(c.B, c.N)
        elif c.mask_shape in ("MN", "11MN"):
            options["attn_mask"] = mask.reshape(c.M, c.N)
        else:
            options["attn_mask"] = mask.expand(c.B, c.H, c.M, c.N).flatten(0, 1)
    if c.padding:
        hidden = padding_of(c)
        options["key_padding_mask"] = hidden if c.padding == "bool" else additive(hidden, c.dtype)
    out = torch.func.functional_call(module, parameters, everywhere(q, k, v), options)
    return out if c.weights else out[:1]


def torch_layer(c, keep, q, k, v, mask, **parameters):
    """What nn.MultiheadAttention computes, with zeros for rows that see nothing, and key heads that are shared."""
    E, kv = c.H * c.D, c.Hk * c.D
    weights, bias = parameters["in_proj_weight"].split([E, kv, kv]), parameters.get("in_proj_bias")
    biases = (None,) * 3 if bias is None else bias.split([E, kv, kv])
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), weights, biases, strict=True))
    q, k, v = (t.unflatten(2, (-1, c.D)).transpose(1, 2) for t in (q, k, v))
    if c.padding:
        hidden = padding_of(c)[:, None, None]
        mask = mask & ~hidden if mask.dtype == torch.bool else mask + additive(hidden, mask.dtype)
    out, probs = torch_staged(q, k, v, mask, keep=keep)
    out = F.linear(out.transpose(1, 2).flatten(2), parameters["out_proj.weight"], parameters.get("out_proj.bias"))
    return (out, probs.mean(1) if c.weights == "averaged" else probs)[: 2 if c.weights else 1]
