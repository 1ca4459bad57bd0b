"""How fast are the three stages and the layer, next to what PyTorch offers for the same computation?

    python3 benchmark_attention.py [--quick] [--mode fwd]      about two minutes on an H200, half a minute without a GPU

Each stage against PyTorch's matmul or softmax; the three together against PyTorch's three and SDPA; their backward
against autograd's; the layer against nn.MultiheadAttention. Without a GPU: small shapes, interpreted, errors only.
"""

import functools
import math

import benchmarking

# dtype, sequence length, head dim, causal
SWEEP = [
    ("bfloat16", 4096, 64, False),
    ("bfloat16", 4096, 64, True),
    ("bfloat16", 4096, 128, False),
    ("bfloat16", 2048, 64, False),
    ("float16", 4096, 64, False),
    ("float32", 4096, 64, False),
]
LAYERS = [("bfloat16", 8, 2048), ("bfloat16", 8, 512)]  # dtype, batch, sequence length; E 1024, H 16


def sweep(args, interpreted):
    """The cases: the options' where given, else the script's own; a small one of each kind without a GPU."""
    if interpreted:
        return [("bfloat16", 128, 64, False), ("float32", 128, 64, True)], [("float32", 2, 64)]
    cases, layers = SWEEP, LAYERS
    if args.quick:
        cases, layers = SWEEP[:2], LAYERS[:1]
    if args.dtype or args.seq_lens or args.head_dim:
        options = (args.dtype or ["bfloat16"], args.seq_lens or [4096], args.head_dim or [64], [False, True])
        cases = [(t, s, d, c) for t in options[0] for s in options[1] for d in options[2] for c in options[3]]
    return cases, layers


def comparisons(args, interpreted):
    """Functions that build one Comparison each, so that one at a time is in memory."""
    cases, layers = sweep(args, interpreted)
    B, H = (1, 2) if interpreted else (args.batch, args.heads)
    for dtype, S, D, causal in cases:
        if args.mode != "bwd":
            for stage in (scores, softmax, values, staged):
                yield lambda stage=stage, c=(B, H, S, D, dtype, causal): stage(*c, args.seed)
        if args.mode != "fwd":
            yield lambda c=(B, H, S, D, dtype, causal): staged_backward(*c, args.seed)
    if args.mode != "bwd":
        for dtype, batch, S in layers:
            for need_weights in (True, False):
                yield lambda c=(dtype, batch, S, need_weights): layer(*c, args.seed, 128 if interpreted else 1024)


def inputs(seed, B, H, S, D, dtype, number, grad=False):
    import torch

    from triton_attention_launch import DEVICE

    torch.manual_seed(seed)
    dtype = getattr(torch, dtype)
    return [torch.randn(B, H, S, D, device=DEVICE, dtype=dtype, requires_grad=grad) for _ in range(number)]


def label(B, H, S, D, dtype, causal):
    return f"{dtype} B{B} H{H} S{S} D{D}{' causal' if causal else ''}"


def last_head(result):
    """What is checked against float64: the last head of the last batch."""
    return tuple(t[-1:, -1:] for t in result) if isinstance(result, tuple) else result[-1:, -1:]


@functools.lru_cache(maxsize=1)
def future(S, device):
    """The causal mask that PyTorch's own three ops need, made once, outside the timing."""
    import torch

    return torch.ones(S, S, dtype=torch.bool, device=device).triu(1)


def hide_future(s, causal):
    return s.masked_fill(future(s.shape[-1], s.device), -math.inf) if causal else s


def scores(B, H, S, D, dtype, causal, seed):
    from triton_attention_scores import attention_scores

    (q, k), scale = inputs(seed, B, H, S, D, dtype, 2), D**-0.5
    size = q.element_size()
    return benchmarking.Comparison(
        "scores QK^T", label(B, H, S, D, dtype, causal),
        {
            "triton": lambda: attention_scores(q, k, is_causal=causal),
            "torch": lambda: hide_future((q * scale) @ k.mT, causal),
        },
        lambda: hide_future(last_head(q).double() @ last_head(k).double().mT * scale, causal), last_head,
        bytes=size * B * H * (S * S + 2 * S * D), flops=2 * B * H * S * S * D / (2 if causal else 1),
    )


def softmax(B, H, S, D, dtype, causal, seed):
    from triton_attention_softmax import attention_softmax

    (s,) = inputs(seed, B, H, S, S, dtype, 1)
    return benchmarking.Comparison(
        "softmax", label(B, H, S, D, dtype, causal),
        {
            "triton": lambda: attention_softmax(s, is_causal=causal),
            "torch": lambda: hide_future(s, causal).softmax(-1),
        },
        lambda: hide_future(last_head(s).double(), causal).softmax(-1), last_head,
        bytes=s.element_size() * B * H * S * S * (1.5 if causal else 2), flops=5 * B * H * S * S,
    )


def values(B, H, S, D, dtype, causal, seed):
    from triton_attention_values import attention_values

    (s,), (v,) = inputs(seed, B, H, S, S, dtype, 1), inputs(seed, B, H, S, D, dtype, 1)
    p, size = hide_future(s, causal).softmax(-1), s.element_size()
    del s
    return benchmarking.Comparison(
        "values PV", label(B, H, S, D, dtype, causal),
        {"triton": lambda: attention_values(p, v, is_causal=causal), "torch": lambda: p @ v},
        lambda: last_head(p).double() @ last_head(v).double(), last_head,
        bytes=size * B * H * (S * S / (2 if causal else 1) + 2 * S * D),
        flops=2 * B * H * S * S * D / (2 if causal else 1),
    )


def torch_three(q, k, v, causal):
    p = hide_future((q * q.shape[-1] ** -0.5) @ k.mT, causal).softmax(-1)
    return p @ v


def staged(B, H, S, D, dtype, causal, seed):
    import torch.nn.functional as F

    from triton_attention_layer import attention_staged

    q, k, v = inputs(seed, B, H, S, D, dtype, 3)
    passes = 2.5 if causal else 4  # over S: write, read, write, read; causal halves all but the writing of P
    return benchmarking.Comparison(
        "three stages", label(B, H, S, D, dtype, causal),
        {
            "triton": lambda: attention_staged(q, k, v, is_causal=causal)[0],
            "torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            "torch": lambda: torch_three(q, k, v, causal),
        },
        lambda: torch_three(*(last_head(t).double() for t in (q, k, v)), causal), last_head,
        bytes=q.element_size() * B * H * (passes * S * S + 6 * S * D),
        flops=4 * B * H * S * S * D / (2 if causal else 1),
    )


def staged_backward(B, H, S, D, dtype, causal, seed):
    import torch
    import torch.nn.functional as F

    from triton_attention_layer import attention_staged
    from triton_attention_scores import attention_scores
    from triton_attention_softmax import attention_softmax
    from triton_attention_values import attention_values

    q, k, v = inputs(seed, B, H, S, D, dtype, 3, grad=True)
    g = torch.randn_like(q)

    def three_functions(q, k, v, causal):
        p = attention_softmax(attention_scores(q, k, is_causal=causal), is_causal=causal)
        return attention_values(p, v, is_causal=causal)

    def backward(forward):
        out = forward(q, k, v, causal)
        return lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

    def exact():
        heads = [last_head(t).detach().double().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(torch_three(*heads, causal), heads, last_head(g).double())

    passes = 2.5 if causal else 5  # over P and dS: read P for dV; read P, write dS; read dS for dQ; read dS for dK
    return benchmarking.Comparison(
        "backward", label(B, H, S, D, dtype, causal),
        {
            "triton": backward(lambda q, k, v, c: attention_staged(q, k, v, is_causal=c)[0]),
            "triton, apart": backward(three_functions),
            "torch SDPA": backward(lambda q, k, v, c: F.scaled_dot_product_attention(q, k, v, is_causal=c)),
            "torch": backward(torch_three),
        },
        exact, last_head,
        bytes=q.element_size() * B * H * (passes * S * S + 8 * S * D),
        flops=8 * B * H * S * S * D / (2 if causal else 1),
    )


def layer(dtype, batch, S, need_weights, seed, E):
    import copy

    import torch
    from torch import nn

    from triton_attention_launch import DEVICE
    from triton_attention_layer import TritonMultiheadAttention

    torch.manual_seed(seed)
    H, size = 16, getattr(torch, dtype).itemsize
    theirs = nn.MultiheadAttention(E, H, batch_first=True, device=DEVICE, dtype=getattr(torch, dtype)).eval()
    ours = TritonMultiheadAttention(E, H, batch_first=True, device=DEVICE, dtype=getattr(torch, dtype)).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, S, E, device=DEVICE, dtype=getattr(torch, dtype))

    def call(module):
        def run():
            with torch.no_grad():
                out, weights = module(x, x, x, need_weights=need_weights)
                return (out, weights) if need_weights else out

        return run

    exact_layer = copy.deepcopy(theirs).double()
    pick = lambda r: tuple(t[-1:] for t in r) if need_weights else r[-1:]  # noqa: E731

    def exact():
        with torch.no_grad():
            one = x[-1:].double()
            out, weights = exact_layer(one, one, one, need_weights=need_weights)
            return (out, weights) if need_weights else out

    matrix = 4 * batch * H * S * S + batch * S * S if need_weights else 0
    return benchmarking.Comparison(
        f"layer, weights {'on' if need_weights else 'off'}", f"{dtype} B{batch} S{S} E{E} H{H}",
        {"triton": call(ours), "torch": call(theirs)}, exact, pick,
        bytes=size * (matrix + 10 * batch * S * E + 4 * E * E), flops=batch * S * (8 * E * E + 4 * S * E),
    )


def main():
    parser = benchmarking.parser(__doc__.split("\n")[0])
    args = parser.parse_args()
    from triton_attention_launch import INTERPRETED

    rows = benchmarking.run("benchmark_attention", comparisons(args, INTERPRETED), args, INTERPRETED)
    three = {row.case: row.ms for row in rows if (row.name, row.provider) == ("three stages", "triton") and row.ms}
    for case, ms in three.items():
        if f"{case} causal" in three:
            print(f"three stages, {case}: causal is {ms / three[f'{case} causal']:.2f} times as fast as full")
    raise SystemExit(any(row.note == "WRONG" for row in rows))


if __name__ == "__main__":
    main()
