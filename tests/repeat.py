"""The same call again and again: outputs and gradients have to be the same bits, beside every kind of mask.

    python3 -m tests.repeat             200 runs of each
    compute-sanitizer --tool memcheck python3 -m tests.repeat --runs 1

A kernel that adds up in an order of its own, or reads what another has not yet written, gives other bits now and then;
more often beside other processes on the same GPU. On a Hopper GPU each call runs with its kernels and without.
"""

import argparse
import sys


def options():
    p = argparse.ArgumentParser(
        "python3 -m tests.repeat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", type=int, default=200, help="of each call (default: 200)")
    p.add_argument("--only", metavar="WORDS", default="", help="calls whose name has these words")
    return p


if __name__ == "__main__":
    options().parse_args()  # --help and mistakes need no PyTorch, which takes seconds

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.reference import DEVICE, INF, INTERPRETED, hopper_kernels  # noqa: E402
from triton_attention.device import architecture, describe_device  # noqa: E402
from triton_attention_fused import attend_under_two_masks, attention_fused  # noqa: E402


def hiding(mask):
    """A bool mask as numbers to add."""
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=DEVICE).masked_fill(~mask, -INF)


def calls(B, H, S, D):
    """{name: (function, its inputs)}; the gradients of all floating inputs that ask for one are computed too."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, h, S, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for h in (H, H // 2, H // 2)
    )
    n = torch.arange(S, device=DEVICE)
    lengths = torch.tensor([S - S // 4 * (b % 4) - 7 for b in range(B)], device=DEVICE)
    keys, causal = n < lengths[:, None], n[:, None] >= n
    padding = keys[:, None, None]
    bias = torch.randn(1, H, S, S, device=DEVICE, dtype=torch.bfloat16)
    learned = bias.clone().requires_grad_()
    fused = lambda mask, **options: lambda: attention_fused(q, k, v, mask, enable_gqa=True, **options)  # noqa: E731
    both = lambda mask, keys: lambda: attend_under_two_masks(q, k, v, mask, keys, 0.0)  # noqa: E731
    return {
        "no mask": (fused(None), (q, k, v)),
        "causal": (fused(None, is_causal=True), (q, k, v)),
        "padding": (fused(padding), (q, k, v)),
        "padding and causal": (fused(padding, is_causal=True), (q, k, v)),
        "bias that learns": (fused(learned), (q, k, v, learned)),
        "two masks": (both(causal[None, None], keys), (q, k, v)),
        "two floating masks": (both(bias, hiding(keys)), (q, k, v)),
    }


def bits(function, inputs):
    out = function()
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


def differing(function, inputs, runs, label):
    """How many runs differ from the first in any bit."""
    first, wrong = bits(function, inputs), 0
    for _ in tqdm(range(1, runs), desc=label, leave=False, disable=None):
        wrong += not all(torch.equal(a, b) for a, b in zip(first, bits(function, inputs), strict=True))
    return wrong


def main():
    args = options().parse_args()
    if args.runs < 1:
        options().error("--runs must be 1 or more")
    print(describe_device())
    shape, dims = ((2, 2, 48), (16,)) if INTERPRETED else ((4, 8, 1000), (128, 64))
    hopper = DEVICE.type == "cuda" and not INTERPRETED and architecture(DEVICE) == "sm_90"
    total = 0
    for D in dims:
        for name, (function, inputs) in calls(*shape, D).items():
            if args.only not in name:
                continue
            for choice in ("never", "always") if hopper else ("never",):
                with hopper_kernels(choice):
                    wrong = differing(function, inputs, args.runs, name)
                total += wrong
                kernels = {"never": "plain", "always": "Hopper's"}[choice]
                print(f"D{D} {name:20} {kernels:9} {args.runs - wrong} of {args.runs} are equal", flush=True)
    return total > 0


if __name__ == "__main__":
    sys.exit(main())
