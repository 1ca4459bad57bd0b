"""How fast are the three stages, all of attention and the layer, next to everybody else's for the same computation?

    python3 benchmark_attention.py [--quick] [--mode fwd]      three and a half minutes on an H100, one without a GPU

Each stage against PyTorch's matmul or softmax; attention, forward and backward, against PyTorch's three operations,
SDPA's backends, FlexAttention and FlashAttention; the layer against nn.MultiheadAttention. Causal stages are timed
twice: whole, and "visible", as attention_staged runs them, which does not write what the next stage does not read.
"triton staged, O" does not return the weights.
"""

import functools

from benchmarks import harness, providers
from benchmarks.harness import Case

# dtype, sequence length, head dim, causal
SWEEP = [
    ("bfloat16", 4096, 64, False),
    ("bfloat16", 4096, 64, True),
    ("bfloat16", 4096, 128, False),
    ("bfloat16", 4096, 128, True),
    ("bfloat16", 2048, 64, False),
    ("bfloat16", 2048, 64, True),
    ("bfloat16", 2048, 128, False),
    ("float16", 4096, 64, False),
    ("float32", 4096, 64, False),
]
LAYERS = [("bfloat16", batch, S) for batch, S in ((4, 2048), (8, 2048), (8, 512))]  # E 1024, H 16
NAMES = {"scores": "scores QK^T", "softmax": "softmax", "values": "values PV"}
UNFILLED = {"scores": "scores, visible", "softmax": "softmax, visible"}
ATTENTION = {"fwd": "attention", "bwd": "attention backward"}


def sweep(args, interpreted):
    """The cases: the options' where given, else the script's own; a small one of each kind without a GPU."""
    if interpreted:
        return [("bfloat16", 128, 64, False), ("float32", 128, 64, True)], [("float32", 2, 64)]
    cases, layers = SWEEP, LAYERS
    if args.quick:
        cases, layers = SWEEP[:2], LAYERS[:1]
    if args.dtype or args.seq_lens or args.head_dim or args.causal is not None:
        causal = [False, True] if args.causal is None else [args.causal]
        options = (args.dtype or ["bfloat16"], args.seq_lens or [4096], args.head_dim or [64], causal)
        cases = [(t, s, d, c) for t in options[0] for s in options[1] for d in options[2] for c in options[3]]
    return cases, layers


def rows(args, interpreted):
    """The Cases, of which one at a time will be in memory."""
    cases, layers = sweep(args, interpreted)
    B, H = (1, 2) if interpreted else (args.batch, args.heads)
    modes = ("fwd", "bwd") if args.mode == "both" else (args.mode,)
    for dtype, S, D, causal in cases:
        shape = (B, H, S, D, dtype, causal)
        label, about = providers.label(*shape), providers.about(*shape)
        for stage, name in NAMES.items() if "fwd" in modes else ():
            build = functools.partial(build_stage, stage, *shape, args.seed)
            yield Case(name, label, ["triton", "torch"], build, about)
        for stage, name in UNFILLED.items() if "fwd" in modes and causal else ():  # as inside attention_staged
            build = functools.partial(build_stage, stage, *shape, args.seed, filled=False)
            yield Case(name, label, ["triton", "torch"], build, about)
        for mode in modes:
            build = functools.partial(providers.attention, mode, *shape, args.seed)
            yield Case(ATTENTION[mode], label, providers.providers(mode, args), build, about)
    for dtype, batch, S in layers if "fwd" in modes else ():
        E = 128 if interpreted else 1024
        for weights in (True, False):
            build = functools.partial(layer, dtype, batch, S, weights, args.seed, E)
            name = f"layer, weights {'on' if weights else 'off'}"
            yield Case(name, f"{dtype} B{batch} S{S} E{E} H16", ["triton", "torch"], build, {"S": S, "dtype": dtype})


def build_stage(stage, *case, **options):
    return providers.STAGES[stage](*case, **options).comparison()


def layer(dtype, batch, S, need_weights, seed, E):
    """TritonMultiheadAttention against nn.MultiheadAttention, in eval."""
    import copy

    import torch
    from torch import nn

    from triton_attention.device import DEVICE
    from triton_attention_layer import TritonMultiheadAttention

    (x,), H, dtype = providers.inputs(seed, (batch, S, E), dtype, 1), 16, getattr(torch, dtype)
    theirs = nn.MultiheadAttention(E, H, batch_first=True, device=DEVICE, dtype=dtype).eval()
    ours = TritonMultiheadAttention(E, H, batch_first=True, device=DEVICE, dtype=dtype).eval()
    ours.load_state_dict(theirs.state_dict())

    def call(module, x):
        def run():
            with torch.no_grad():
                out, weights = module(x, x, x, need_weights=need_weights)
                return (out, weights) if need_weights else out

        return run

    def last_batch(result):
        return tuple(t[-1:] for t in result) if need_weights else result[-1:]

    # projections and attention that stores no matrix of a head; their mean: Q and K once more, and their product
    elements, flops = 10 * batch * S * E + 4 * E * E, batch * S * (8 * E * E + 4 * S * E)
    own = {}
    if need_weights:  # torch writes S, reads S, writes P, reads P
        own["torch"] = dtype.itemsize * (elements + (4 * H + 1) * batch * S * S), flops
        elements, flops = elements + batch * S * (2 * E + S), flops + 2 * batch * S * S * E
    return harness.Comparison(
        {"triton": lambda: call(ours, x), "torch": lambda: call(theirs, x)},
        lambda t: call(copy.deepcopy(theirs).to(t), x[-1:].to(t))(), last_batch,
        bytes=dtype.itemsize * elements, flops=flops, own=own,
    )


def show_host_times(watch):
    """How long the host is busy with a call, where the GPU has next to nothing to do."""
    import torch

    from triton_attention import replay
    from triton_attention_fused import attention_fused
    from triton_attention_layer import attention_staged

    calls = {}
    for weights in (True, False):
        makes = layer("bfloat16", 1, 64, weights, 0, 256).makes
        calls |= {f"layer, weights {'on' if weights else 'off'}: {name}": makes[name]() for name in ("triton", "torch")}
    q, k, v = qkv = providers.inputs(0, (1, 4, 64, 64), "bfloat16", 3, grad=True)
    detached = [t.detach() for t in qkv]
    for name, attention in {
        "triton fused": attention_fused, "triton staged": lambda q, k, v: attention_staged(q, k, v)[0],
        "SDPA": torch.nn.functional.scaled_dot_product_attention,
    }.items():
        out = attention(q, k, v)
        calls[f"attention: {name}"] = functools.partial(attention, *detached)
        calls[f"attention, for a gradient: {name}"] = functools.partial(attention, q, k, v)
        calls[f"backward: {name}"] = functools.partial(torch.autograd.grad, out, qkv, out.detach(), retain_graph=True)
    print("\nthe host's time for a call, us (in full: without replays of launches)")
    for name, call in calls.items():
        with replay.off():
            full = f" (in full {watch.host(call):.0f})" if "triton" in name else ""
        print(f"  {name:44} {watch.host(call):6.0f}{full}")
    torch.cuda.synchronize()


def main():
    args = harness.parser(__doc__.split("\n")[0]).parse_args()
    results = []
    if not args.plot:
        watch = harness.stopwatch(args)
        results = harness.run("benchmark_attention", rows(args, watch is None), args, watch)
        if watch and not args.providers:
            show_host_times(watch)
    if args.plot or watch:
        from benchmarks import figures

        figures.redraw(args.out, "benchmark_attention")
    raise SystemExit(any(row.note == "WRONG" for row in results))


if __name__ == "__main__":
    main()
