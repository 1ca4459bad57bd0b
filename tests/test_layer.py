"""TritonMultiheadAttention against torch.nn.MultiheadAttention: options, state, refusals, and PyTorch's own layers."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode

import triton_attention_layer
from tests.reference import (
    BF16, DEVICE, F16, F32, F64, GPU, INF, NAN, T, assert_close, double, randn, torch_scores, torch_softmax,
    torch_visible,
)
from triton_attention.mean_weights import mean_weights_op
from triton_attention_fused import fused_op
from triton_attention_layer import TritonMultiheadAttention


def pair(*args, ours=None, **kwargs):
    """Our layer and torch's with the same parameters, randomised biases included."""
    kwargs = {"device": DEVICE, **kwargs}
    mine, theirs = TritonMultiheadAttention(*args, **kwargs, **(ours or {})), nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def layer_call(rng, E, H, kdim, vdim, batch_first, dtype):
    """A random call: (query, key, value, keyword arguments)."""
    B, L, S = (int(torch.randint(1, high, (), generator=rng)) for high in (4, 24, 24))
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=rng))]  # noqa: E731
    batched, kind = pick(True, True, False), pick("self", "shared", "separate")
    if kdim != E or vdim != E:
        kind = "separate"
    S = L if kind == "self" else S
    def sequence(n, d):
        shape = (n, d) if not batched else (B, n, d) if batch_first else (n, B, d)
        return torch.randn(shape, generator=rng, dtype=F32).to(DEVICE, dtype)
    query = sequence(L, E)
    key = query if kind == "self" else sequence(S, kdim)
    value = key if kind != "separate" else sequence(S, vdim)
    kwargs = {"need_weights": pick(True, False), "average_attn_weights": pick(True, False)}
    rows = (B if batched else 1) * H
    mask_shape = pick(None, (L, S), (rows, L, S))
    def mask(shape):
        keep = torch.rand(shape, generator=rng) < 0.7
        keep[..., 0] = True  # torch gives NaN for rows without a key; ours are tested elsewhere
        if pick(True, False):
            return (~keep).to(DEVICE)
        return torch.randn(shape, generator=rng).masked_fill(~keep, -INF).to(DEVICE, dtype)
    if mask_shape is not None:
        kwargs["attn_mask"] = mask(mask_shape)
        kwargs["is_causal"] = kwargs["need_weights"] and pick(True, False)
    if pick(True, False):
        kwargs["key_padding_mask"] = mask((B, S) if batched else (S,))
    return query, key, value, kwargs


DRAWS = 4  # of the parameters: the largest error of a single call of few tokens is chance


@pytest.mark.parametrize("seed", range(40))
def test_layer_against_torch(seed):
    """A random configuration and call: outputs, weights, gradients of inputs and parameters."""
    dtypes, ours, lower = zip(*(layer_errors(seed) for _ in range(DRAWS)), strict=True)
    ours, lower = torch.stack(ours).max(), torch.stack(lower).max()  # of tensors: Python's max passes over NaN
    allowed = 2 * lower + (32 if dtypes[0] == F64 else 1) * torch.finfo(dtypes[0]).eps
    assert ours <= allowed, f"{ours:.2e}, allowed {allowed:.2e}"


def layer_errors(seed):
    """(dtype, our largest relative error, torch's) over all results of the seed's call with new parameters."""
    rng = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=rng))]  # noqa: E731
    E, H = pick((8, 1), (12, 3), (32, 4), (40, 5))
    dtype, batch_first = pick(F32, F32, F64), pick(True, False)
    kdim, vdim = pick((None, None), (None, None), (E, 7), (6, 10))
    options = {"bias": pick(True, False), "add_bias_kv": pick(True, False), "add_zero_attn": pick(True, False)}
    mine, theirs = pair(E, H, kdim=kdim, vdim=vdim, batch_first=batch_first, dtype=dtype, **options)
    query, key, value, kwargs = layer_call(rng, E, H, kdim or E, vdim or E, batch_first, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates masks of two types
        query.requires_grad_()
        outs = [layer(query, key, value, **kwargs) for layer in (mine, theirs)]
        exact_layer = copy.deepcopy(theirs).double()
        double_kwargs = {k: double(v) for k, v in kwargs.items()}
        tensors = {id(t): double(t) for t in (query, key, value)}
        exact = exact_layer(*(tensors[id(t)] for t in (query, key, value)), **double_kwargs)
    assert (outs[0][1] is None) == (outs[1][1] is None) == (not kwargs["need_weights"])
    cotangent = torch.randn(exact[0].shape, dtype=F64, device=DEVICE)
    right = [*exact[:1 + kwargs["need_weights"]], *torch.autograd.grad(
        (exact[0] * cotangent).sum(), [tensors[id(query)], *exact_layer.parameters()]
    )]
    results = [
        [*o[: 1 + kwargs["need_weights"]],
         *torch.autograd.grad((o[0] * cotangent.to(dtype)).sum(), [query, *layer.parameters()])]
        for o, layer in zip(outs, (mine, theirs), strict=True)
    ]

    def worst(results):
        assert [r.shape for r in results] == [e.shape for e in right]
        pairs = zip(results, right, strict=True)
        return torch.stack([(r.double() - e).abs().max() / e.abs().max().clamp(min=1e-3) for r, e in pairs]).max()

    return dtype, worst(results[0]), worst(results[1])


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_layer_in_half_precision(dtype):
    mine, theirs = pair(32, 4, batch_first=True, dtype=dtype)
    x = torch.randn(2, 30, 32, device=DEVICE, dtype=dtype)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double())
    for ours, lower, right in zip(mine(x, x, x), theirs(x, x, x), exact, strict=True):
        assert_close(ours, lower, right)


MEANS = [  # B, H, Hk, M, N, D, causal bound, scale, layout of q and k
    (2, 4, 4, 37, 53, 24, None, None, "bnhd"), (1, 6, 2, 130, 67, 31, None, 0.5, "columns"),
    (1, 3, 1, 33, 150, 160, None, -0.1, "guarded"), (1, 2, 2, 20, 20, 200, 3, None, "plain"),
    (1, 4, 2, 140, 260, 16, 0, None, "every other"), (1, 2, 1, 9, 30, 8, -4, 0.0, "expanded"),
    (1, 3, 3, 130, 20, 64, -200, None, "sliced"), (1, 4, 2, 1, 70, 72, None, None, "plain"),
    (0, 2, 2, 3, 4, 8, None, None, "plain"), (1, 2, 2, 0, 4, 8, 0, None, "plain"), (1, 2, 1, 3, 0, 8, 0, None, "plain"),
    (1, 0, 0, 3, 4, 8, None, None, "plain"), (1, 2, 2, 5, 6, 0, None, None, "plain"),
]


@pytest.mark.parametrize("case", MEANS, ids=str)
@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64), ids=str)
def test_mean_of_the_weights(dtype, case):
    """The mean over heads from lse, as that of softmax(S); NaN and inf in a query reach all of its row."""
    B, H, Hk, M, N, D, diagonal, scale, layout = case
    scale = max(D, 1) ** -0.5 if scale is None else scale
    for finite in (True, False) if min(M, B * H * D * N) > 2 and layout != "expanded" else (True,):
        q, k = (randn(B, h, n, D, dtype=dtype, layout=layout, grad=False) for h, n in ((H, M), (Hk, N)))
        if not finite:
            q[0, -1, 2, 0], q[0, 0, 1, D - 1], q[0, 0, 0, 0] = NAN, -INF, INF

        def exact(q, k):
            s = torch_scores(q, k, scale)
            s = s if diagonal is None else s.masked_fill(~torch_visible(M, N, diagonal), -INF)
            return torch_softmax(s).mean(1)

        lower, right = (exact(*(t.to(d) for t in (q, k))) for d in (dtype, F64))
        _, lse, stats = fused_op(q, k, k, None, None, None, scale, 0.0, 0.0, None, diagonal, None, None)
        assert_close(mean_weights_op(q, k, lse, stats, scale, diagonal), lower, right)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_layer_averages_weights_without_storing_them(mode, monkeypatch):
    """In inference and without a mask; where there is one, and in heads too wide, P is stored."""
    calls = []
    for name in ("mean_weights_op", "softmax_mean_op"):
        op = getattr(triton_attention_layer, name)
        monkeypatch.setattr(
            triton_attention_layer, name, lambda *args, op=op, name=name: calls.append(name) or op(*args)
        )
    padding = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    padding[1, 5:] = True
    for dtype, E, H, options, call, new in (
        (F16, 40, 5, {}, {}, True), (BF16, 96, 4, {"add_bias_kv": True}, {}, True), (F32, 36, 3, {}, {}, True),
        (F64, 32, 2, {"add_zero_attn": True}, {}, True), (BF16, 512, 2, {}, {}, True),
        (F32, 32, 4, {}, {"key_padding_mask": padding}, False), (BF16, 600, 2, {}, {}, False),
        (F32, 272, 2, {}, {}, False),
    ):
        mine, theirs = pair(E, H, batch_first=True, dtype=dtype, **options)
        query, key = (torch.randn(2, n, E, device=DEVICE, dtype=dtype) / E**0.5 for n in (7, 9))
        with torch.no_grad():
            exact = copy.deepcopy(theirs).double()(query.double(), key.double(), key.double(), **call)
        with mode():
            ours, lower = (layer(query, key, key, **call) for layer in (mine, theirs))
        for result in zip(ours, lower, exact, strict=True):
            assert_close(*result)
        assert calls == ["mean_weights_op" if new else "softmax_mean_op"]
        calls.clear()
    mine = TritonMultiheadAttention(32, 4, batch_first=True, num_kv_heads=2, device=DEVICE).eval()
    query, key = torch.randn(2, 7, 32, device=DEVICE), torch.randn(2, 9, 32, device=DEVICE)
    query[0, 3] = NAN
    with mode():
        out, weights = mine(query, key, key)
        each = mine(query, key, key, average_attn_weights=False)[1]
    assert weights[0, 3].isnan().all() and out[0, 3].isnan().all() and weights.isnan().sum() == 9
    assert torch.allclose(weights, each.mean(1), atol=1e-6, equal_nan=True) and calls == ["mean_weights_op"]


def test_layer_state_dict_both_ways_and_copies():
    for options in ({}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True, "bias": False}):
        mine, theirs = pair(32, 4, **options)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        assert list(mine.state_dict()) == list(theirs.state_dict())
    mine, theirs = pair(32, 4)
    x = torch.randn(5, 2, 32, device=DEVICE)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], mine(x, x, x)[0]) and len(other._forward_pre_hooks) == 1
    theirs.__class__ = TritonMultiheadAttention  # an existing module, converted in place
    assert (theirs(x, x, x)[0] - mine(x, x, x)[0]).abs().max() < 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_transformer_layers_call_it(train):
    """nn.TransformerEncoder and Decoder with our self_attn, in eval also on NestedTensors, give torch's results."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE), 2)
    mine_encoder, mine_decoder = copy.deepcopy(encoder), copy.deepcopy(decoder)
    calls = []
    for stack in (mine_encoder, mine_decoder):
        for layer in stack.layers:
            for name in ("self_attn", "multihead_attn"):
                if hasattr(layer, name):
                    ours = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
                    ours.load_state_dict(getattr(layer, name).state_dict())
                    ours.register_forward_hook(lambda *_: calls.append(1))
                    setattr(layer, name, ours)
    for stack in (encoder, decoder, mine_encoder, mine_decoder):
        stack.train(train)
    x, memory = torch.randn(3, 10, 32, device=DEVICE), torch.randn(3, 7, 32, device=DEVICE)
    padding = torch.zeros(3, 10, dtype=torch.bool, device=DEVICE)
    padding[1, 6:] = padding[2, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(10, device=DEVICE)
    with torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kwargs in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}):
            ours, theirs = mine_encoder(x, **kwargs), encoder(x, **kwargs)
            keep = ~padding if "src_key_padding_mask" in kwargs else slice(None)
            assert (ours[keep] - theirs[keep]).abs().max() < 1e-5
        kwargs = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding[:, :7]}
        assert (mine_decoder(x, memory, **kwargs) - decoder(x, memory, **kwargs)).abs().max() < 1e-5
    assert len(calls) == 3 * 2 + 4


def test_layer_takes_nested_tensors():
    mine, _ = pair(32, 4, batch_first=True)
    parts = [torch.randn(n, 32, device=DEVICE) for n in (5, 2, 7)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout)
        out, _ = mine(x, x, x, need_weights=False)
        assert out.is_nested and out.layout == layout
        for got, part in zip(out.unbind(), parts, strict=True):
            assert (got - mine(part, part, part)[0]).abs().max() < 1e-5


def test_layer_rows_that_see_nothing():
    """torch: NaN with weights, the bias without; ours: the bias in both, and finite gradients."""
    mine, _ = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE, requires_grad=True)
    padding = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    padding[1] = True
    for need_weights in (True, False):
        out, weights = mine(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        assert (out[1] - mine.out_proj.bias).abs().max() == 0 and out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
        assert weights is None or (weights[1] == 0).all()


def test_layer_ignores_garbage_in_padding():
    mine, _ = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    padding = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    padding[:, 4:] = True
    clean = mine(x, x, x, key_padding_mask=padding)[0]
    x[:, 4:] = NAN
    assert (mine(x, x, x, key_padding_mask=padding)[0][:, :4] - clean[:, :4]).abs().max() < 1e-6


def test_layer_mask_wins_over_the_causal_hint():
    mine, theirs = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    mask = torch.rand(6, 6, device=DEVICE) > 0.7
    mask.fill_diagonal_(False)
    exact, _ = theirs(x, x, x, attn_mask=mask, need_weights=True)
    for need_weights in (True, False):
        out, _ = mine(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        assert (out - exact).abs().max() < 1e-5


def test_layer_dropout():
    mine, _ = pair(32, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 16, 32, device=DEVICE)
    torch.manual_seed(1)
    out, weights = mine(x, x, x, average_attn_weights=False)
    torch.manual_seed(1)
    again, _ = mine(x, x, x, average_attn_weights=False)
    assert torch.equal(out, again) and 0.3 < (weights == 0).float().mean() < 0.7
    mine.eval()
    _, weights = mine(x, x, x)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


def test_layer_grouped_query():
    """num_kv_heads: the same as a layer whose k and v rows are repeated for each head of a group."""
    for kwargs in ({}, {"kdim": 10, "vdim": 6}, {"add_bias_kv": True}):
        mine = TritonMultiheadAttention(32, 4, num_kv_heads=2, device=DEVICE, **kwargs)
        full = nn.MultiheadAttention(32, 4, device=DEVICE, **kwargs)
        repeat = lambda w: w.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)  # noqa: E731
        state = {k: v.detach().clone() for k, v in mine.state_dict().items()}
        for name in ("in_proj_weight", "in_proj_bias"):
            if name in state:
                q, k, v = state[name].split([32, 16, 16])
                state[name] = torch.cat([q, repeat(k), repeat(v)])
        for name in ("k_proj_weight", "v_proj_weight"):
            if name in state:
                state[name] = repeat(state[name])
        for name in ("bias_k", "bias_v"):
            if name in state:
                state[name] = repeat(state[name][0, 0])[None, None]
        full.load_state_dict(state)
        query = torch.randn(5, 2, 32, device=DEVICE)
        key = torch.randn(7, 2, kwargs.get("kdim", 32), device=DEVICE)
        value = torch.randn(7, 2, kwargs.get("vdim", 32), device=DEVICE) if kwargs.get("vdim") else key
        for ours, theirs in zip(mine(query, key, value), full(query, key, value), strict=True):
            assert (ours - theirs).abs().max() < 1e-5


def test_layer_autocast():
    mine, theirs = pair(32, 4, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    mask = torch.zeros(6, 6, device=DEVICE)
    with torch.autocast(DEVICE.type, BF16):
        out, weights = mine(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == BF16
    assert (out - theirs(x, x, x)[0]).abs().max() < 0.1


def test_layer_out_proj_is_a_module():
    mine, _ = pair(32, 4)
    seen = []
    mine.out_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(5, 2, 32, device=DEVICE)
    mine(x, x, x)
    assert seen
    mine.out_proj = nn.Sequential(mine.out_proj)  # a wrapper without a weight of its own
    assert mine(x, x, x)[0].shape == x.shape


B3, Q3 = T(5, 2, 8), T(3, 2, 8)
LAYER_REFUSED = [
    ({}, (T(8), T(8), T(8)), {}),
    ({}, (T(1, 5, 2, 8),) * 3, {}),
    ({}, (Q3, T(5, 8), T(5, 8)), {}),
    ({}, (T(3, 8), B3, B3), {}),
    ({}, (T(3, 2, 6), B3, B3), {}),
    ({}, (Q3, T(5, 2, 6), T(5, 2, 6)), {}),
    ({}, (Q3, B3, T(4, 2, 8)), {}),
    ({}, (Q3, T(5, 4, 8), T(5, 4, 8)), {}),
    ({"kdim": 6, "vdim": 7}, (Q3, T(5, 2, 6), T(4, 2, 7)), {}),
    ({"kdim": 6, "vdim": 7}, (Q3, T(5, 2, 8), T(5, 2, 7)), {}),
    ({}, (Q3.long(),) * 3, {}),
    ({}, (Q3.half(),) * 3, {}),
    ({}, (Q3, B3.half(), B3.half()), {}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 4)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(2, 3, 5)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(2, 2, 3, 5)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).long()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).double()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).half()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(5)}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(2, 4).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(3, 5).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(5).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(2, 5).long()}),
    ({}, (Q3, B3, B3), {"is_causal": True}),
    ({}, (T(3, 8), T(5, 8), T(5, 8)), {"attn_mask": T(3, 3, 5)}),
    ({}, (T(3, 8), T(5, 8), T(5, 8)), {"key_padding_mask": T(2, 5).bool()}),
]


@pytest.mark.parametrize("options,args,kwargs", LAYER_REFUSED)
@pytest.mark.parametrize("need_weights", [True, False])
def test_layer_refuses_what_torch_refuses(options, args, kwargs, need_weights):
    mine, theirs = pair(8, 2, **options)
    with pytest.raises((AssertionError, RuntimeError, ValueError)) as torch_error:
        theirs(*args, **kwargs, need_weights=need_weights)
    with pytest.raises(torch_error.type) as our_error:
        mine(*args, **kwargs, need_weights=need_weights)
    assert len(str(our_error.value)) > 20


def test_layer_refuses_bad_options():
    for error, args, kwargs in (
        (AssertionError, (10, 3), {}), (ValueError, (0, 1), {}), (ValueError, (8, 0), {}),
        (ValueError, (8, 2), {"dropout": 1.5}), (ValueError, (8, 2), {"dropout": -0.1}),
        (ValueError, (8, 4), {"num_kv_heads": 3}), (ValueError, (8, 4), {"num_kv_heads": 0}),
        (ValueError, (8, 4), {"num_kv_heads": 4.0}), (TypeError, (8, 2), {"dropout": None}),
        (TypeError, (8, 2), {"dropout": "x"}),
    ):
        with pytest.raises(error):
            TritonMultiheadAttention(*args, **kwargs)
    mine, _ = pair(8, 2)
    for args in (([1.0], Q3, Q3), (Q3, None, None)):
        with pytest.raises(TypeError, match="must be a torch.Tensor"):
            mine(*args)
    with pytest.raises(TypeError, match="attn_mask must be a torch.Tensor"):
        mine(Q3, Q3, Q3, attn_mask=[True])
    with pytest.raises(TypeError, match="got a CausalBias"):
        mine(Q3, Q3, Q3, attn_mask=causal_lower_right(3, 3))
    with pytest.raises(RuntimeError, match="key_padding_mask is on meta"):
        mine(Q3, Q3, Q3, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool, device="meta"))


def test_layer_takes_the_numbers_of_numpy():
    x = torch.randn(3, 2, 8, device=DEVICE)
    layer = TritonMultiheadAttention(np.int64(8), np.int64(2), np.float32(0.5), num_kv_heads=np.int64(1), device=DEVICE)
    assert layer(x, x, x)[0].shape == x.shape


def test_weights_need_a_gradient_where_those_of_torch_do():
    mine, theirs = (layer.requires_grad_(False) for layer in pair(8, 2))
    for which in range(3):
        inputs = [torch.randn(3, 2, 8, device=DEVICE, requires_grad=i == which) for i in range(3)]
        ours, exact = mine(*inputs), theirs(*inputs)
        assert [o.requires_grad for o in ours] == [o.requires_grad for o in exact]
        grads = (torch.autograd.grad(out[0].square().sum(), inputs[which])[0] for out in (ours, exact))
        assert torch.allclose(*grads, atol=1e-5)


def test_layer_empty():
    mine, theirs = pair(8, 2)
    for query, key in ((T(0, 2, 8), B3), (T(3, 0, 8), T(5, 0, 8)), (Q3, T(0, 2, 8)), (T(0, 2, 8), T(0, 2, 8))):
        for ours, exact in zip(mine(query, key, key), theirs(query, key, key), strict=True):
            assert ours.shape == exact.shape and (ours - exact).abs().sum() < 1e-5
    mask = T(4, 0, 5)
    assert mine(T(0, 2, 8), B3, B3, attn_mask=mask)[0].shape == theirs(T(0, 2, 8), B3, B3, attn_mask=mask)[0].shape


def test_layer_mixes_mask_dtypes_as_torch_does():
    mine, theirs = pair(8, 2)
    x, padding = torch.randn(5, 2, 8, device=DEVICE), T(2, 5).bool()
    padding[1, 3:] = True
    half = torch.randn(5, 5, device=DEVICE).half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = (layer(x, x, x, padding, attn_mask=half) for layer in (mine, theirs))
        assert all((ours - exact).abs().max() < 1e-5 for ours, exact in zip(*both, strict=True))


def test_layer_takes_nested_tensors_without_a_token():
    mine, theirs = pair(32, 4, batch_first=True)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE).eval()
    none, empty = torch.nested.nested_tensor([], device=DEVICE), [torch.zeros(0, 32, device=DEVICE)] * 2
    no_batch = torch.nested.nested_tensor_from_jagged(T(0, 32), torch.zeros(1, dtype=torch.long, device=DEVICE))
    every = [torch.nested.nested_tensor(empty, layout=layout) for layout in (torch.strided, torch.jagged)]
    for x, B in ((none, 0), (no_batch, 0), *((x, 2) for x in every)):
        x = x.clone().requires_grad_()
        out, weights = mine(x, x, x)
        assert out.is_nested and (out.layout, out.size(0), out.numel()) == (x.layout, B, 0)
        assert weights.shape == (B, 0, 0)
        assert mine(x, x, x, average_attn_weights=False)[1].shape == (B, 4, 0, 0)
        assert mine(x, x, x, need_weights=False)[1] is None
        if B:
            torch.cat(out.unbind()).sum().backward()
            assert x.grad.is_nested and all((p.grad == 0).all() for p in mine.parameters())
            if DEVICE.type == "cuda":  # where torch's layer norm of nothing is an invalid argument
                continue
            with torch.no_grad():
                exact = encoder(x.detach()) if x.layout == torch.strided else x  # torch's refuses a jagged one
                encoder.self_attn = mine
                out, encoder.self_attn = encoder(x.detach()), theirs
            assert [o.shape for o in out.unbind()] == [e.shape for e in exact.unbind()]


def test_layer_keeps_the_offsets_of_a_jagged_tensor():
    mine, _ = pair(32, 4, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, 32, device=DEVICE) for n in (5, 0, 7)], layout=torch.jagged)
    residual = x + mine(x, x, x, need_weights=False)[0]
    assert [r.shape[0] for r in residual.unbind()] == [5, 0, 7]


@pytest.mark.parametrize("train", [False, True])
def test_transformer_encoder_with_sequences_of_padding(train):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE), 2)
    mine = copy.deepcopy(encoder)
    for layer in mine.layers:
        state = layer.self_attn.state_dict()
        layer.self_attn = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
        layer.self_attn.load_state_dict(state)
    some = torch.zeros(3, 10, dtype=torch.bool, device=DEVICE)
    some[0, 6:] = some[1] = True
    encoder.train(train), mine.train(train)
    for grad, padding in ((False, some), (True, some), (True, some | True)):
        x = torch.randn(3, 10, 32, device=DEVICE, requires_grad=grad)
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out, exact = (stack(x, src_key_padding_mask=padding) for stack in (mine, encoder))
        assert out.shape == exact.shape and ((out - exact)[~padding].abs() < 1e-5).all() and out.isfinite().all()
        assert not grad or torch.autograd.grad(out.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("bias", (F16, BF16, F32, F64), ids=str)
def test_layer_takes_an_in_proj_bias_of_another_dtype(bias):
    for dtype in {F16, F32, F64} - {bias}:
        for options in ({}, {"kdim": 6, "vdim": 6}):
            mine, theirs = pair(32, 4, batch_first=True, dtype=dtype, **options)
            x = torch.randn(2, 5, 32, device=DEVICE, dtype=dtype)
            key = x[..., :6] if options else x
            for layer in (mine, theirs):
                layer.in_proj_bias = nn.Parameter(layer.in_proj_bias.detach().to(bias))
            wide = copy.deepcopy(theirs).double()
            for need_weights in (True, False):
                ours, lower, exact = (
                    layer(t, t[..., :key.shape[2]], t[..., :key.shape[2]], need_weights=need_weights)[0]
                    for layer, t in ((mine, x), (theirs, x), (wide, x.double()))
                )
                assert ours.dtype == lower.dtype == dtype
                assert_close(ours, lower, exact)
            ours.sum().backward()
            assert mine.in_proj_bias.grad.dtype == bias


CPU_CALLS = [  # options of the layer and of the call: "keys" are masked for everybody in a batch, "rows" see nothing
    ({}, {}), ({}, {"need_weights": False}), ({}, {"average_attn_weights": False}),
    ({"ours": {"num_kv_heads": 2}}, {"mask": "rows"}),
    ({"ours": {"num_kv_heads": 2}}, {"mask": "rows", "need_weights": False}),
    ({}, {"mask": "float"}), ({}, {"mask": "float", "padding": True, "need_weights": False}),
    ({}, {"mask": "heads", "padding": True, "average_attn_weights": False}),
    ({"add_bias_kv": True, "add_zero_attn": True}, {"mask": "rows", "padding": True}),
    ({"bias": False, "kdim": 12, "vdim": 10}, {"mask": "float"}), ({"dropout": 1.0}, {}), ({"batch_first": False}, {}),
    ({}, {"unbatched": True, "mask": "rows"}), ({}, {"poison": NAN, "padding": True}),
    ({}, {"poison": INF, "mask": "causal", "need_weights": False}), ({}, {"poison": NAN, "mask": "causal"}),
    ({"dtype": F16}, {"mask": "float"}), ({"dtype": BF16, "ours": {"num_kv_heads": 1}}, {"padding": True}),
]


def cpu_call(options, call):
    """(layer, inputs, keyword arguments) of a row of CPU_CALLS, always of the same numbers."""
    torch.manual_seed(0)
    options = {"batch_first": True, "dtype": F32, **options}
    ours, dtype = options.pop("ours", {}), options["dtype"]
    layer = TritonMultiheadAttention(32, 4, device=DEVICE, **options, **ours)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    call = dict(call)
    L, shape = 9, (9,) if call.pop("unbatched", False) else (2, 9)
    x, key, value = (torch.randn(*shape, d, device=DEVICE, dtype=dtype) for d in (32, layer.kdim, layer.vdim))
    kind, padding, poison = call.pop("mask", None), call.pop("padding", False), call.pop("poison", None)
    mask = torch.rand(L, L, device=DEVICE) < 0.4
    if kind == "float":
        mask = torch.randn(L, L, device=DEVICE, dtype=dtype).masked_fill(mask, -INF).requires_grad_()
    if kind == "heads":
        mask = torch.rand(2 * 4, L, L, device=DEVICE) < 0.4
    if kind == "causal":
        mask = ~torch.ones(L, L, dtype=torch.bool, device=DEVICE).tril()
    if kind == "rows":
        mask[3] = True
    if kind:
        call["attn_mask"] = mask
    if padding:
        call["key_padding_mask"] = torch.zeros(2, L, dtype=torch.bool, device=DEVICE)
        call["key_padding_mask"][0] = call["key_padding_mask"][1, 7:] = True
    if poison is not None:
        key[..., 7:, :] = value[..., 7:, :] = poison
    return layer, [t.requires_grad_() for t in (x, key, value)], call


def results_of(layer, inputs, kwargs):
    out, weights = layer(*inputs, **kwargs)
    wanted = [*inputs, *layer.parameters(), *(m for m in kwargs.values() if torch.is_tensor(m) and m.requires_grad)]
    cotangent = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype)
    total = (out.flatten() * cotangent).sum()
    total = total if weights is None else total + weights.square().sum()
    return [out, *(() if weights is None else (weights,)), *torch.autograd.grad(total, wanted)]


def assert_same(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        step = 64 * torch.finfo(b.dtype).eps * b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        assert torch.allclose(a.to(b.device), b, atol=step, rtol=0, equal_nan=True)


@pytest.mark.parametrize("options,call", CPU_CALLS, ids=str)
def test_layer_by_the_operations_of_torch(options, call, monkeypatch):
    """What a module on the CPU computes in a process with a GPU is what the kernels give, NaN where they give it."""
    kernels = results_of(*cpu_call(options, call))
    monkeypatch.setattr(triton_attention_layer, "KERNELS_RUN_ON", ())
    assert_same(results_of(*cpu_call(options, call)), kernels)


@GPU
@pytest.mark.parametrize("options,call", CPU_CALLS, ids=str)
def test_gpu_layer_survives_cpu(options, call):
    layer, inputs, kwargs = cpu_call(options, call)
    kernels = results_of(layer, inputs, kwargs)
    cpu = lambda t: t.detach().cpu().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t  # noqa: E731
    inputs, kwargs = [cpu(t) for t in inputs], {name: cpu(t) for name, t in kwargs.items()}
    assert_same(results_of(layer.cpu(), inputs, kwargs), kernels)
    assert layer.to(DEVICE)(*(t.detach().to(DEVICE) for t in inputs))[0].device.type == DEVICE.type


def test_layer_by_the_operations_of_torch_in_training_and_compiled(monkeypatch):
    monkeypatch.setattr(triton_attention_layer, "KERNELS_RUN_ON", ())
    layer = TritonMultiheadAttention(32, 4, 0.5, batch_first=True, num_kv_heads=2, device=DEVICE)
    x, padding = torch.randn(2, 16, 32, device=DEVICE), torch.zeros(2, 16, dtype=torch.bool, device=DEVICE)
    padding[0, 9:] = padding[1] = True
    weights = layer(x, x, x, padding, average_attn_weights=False)[1][0, ..., :9]
    assert 0.3 < (weights == 0).float().mean() < 0.7
    for model in (layer.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for ours, exact in zip(compiled(x, x, x, padding), layer(x, x, x, padding), strict=True):
            assert torch.allclose(ours, exact, atol=1e-5) and exact.isfinite().all()
    nested = torch.nested.nested_tensor([torch.randn(n, 32, device=DEVICE) for n in (3, 0)], layout=torch.jagged)
    assert layer(nested, nested, nested)[0].is_nested
    with torch.autocast(DEVICE.type, BF16):
        assert layer(x, x, x)[0].dtype == BF16
    assert layer.to("meta")(*[x.to("meta")] * 3, need_weights=False)[0].is_meta


def test_averaged_weights_of_many_keys():
    """More than rows of P in registers hold: without a mask, and with one."""
    kinds = (TritonMultiheadAttention, nn.MultiheadAttention)
    ours, theirs = (kind(16, 2, batch_first=True, device=DEVICE).eval() for kind in kinds)
    theirs.load_state_dict(ours.state_dict())
    query, keys = T(1, 3, 16), T(1, 8200, 16)
    padding = torch.arange(8200, device=DEVICE)[None] > 8100
    with torch.no_grad():
        for mask in (None, padding):
            for a, b in zip(ours(query, keys, keys, mask), theirs(query, keys, keys, mask), strict=True):
                assert torch.allclose(a, b, atol=1e-6)


class _Largest(TorchDispatchMode):
    """The most elements that a tensor has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("floating", (False, True))
def test_two_masks_are_not_combined(floating):
    """attn_mask beside key_padding_mask: no [B, 1, L, S], forward and backward."""
    B, L = 6, 96
    mine, theirs = pair(16, 2, batch_first=True)
    x = randn(B, L, 16)
    attn = torch.ones(L, L, device=DEVICE).triu(1) > 0
    padding = torch.arange(L, device=DEVICE) >= torch.tensor([96, 70, 50, 33, 20, 1], device=DEVICE)[:, None]
    if floating:
        attn, padding = (torch.zeros(m.shape, device=DEVICE).masked_fill(m, -INF) for m in (attn, padding))
    results = []
    for layer in (mine, theirs):
        with _Largest() as seen:
            out, _ = layer(x, x, x, padding, attn_mask=attn, need_weights=False)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        assert layer is theirs or seen.elements < B * L * L
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)
