"""Run the Hopper kernels' source on an emulated GPU (emulate_gluon.py): every kind of edge, and planted bugs.

    python3 -m tests.emulate_hopper      a minute; says how each planted bug shows
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    argparse.ArgumentParser("python3 -m tests.emulate_hopper", description=__doc__.split("\n")[0]).parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # for the kernels before and after

import torch  # noqa: E402

from tests.emulate_gluon import Barrier, Descriptor, Pointer, here, load, together  # noqa: E402
from tests.reference import torch_fused  # noqa: E402
from triton_attention.hopper import backward as kernels, forward as forward_kernels  # noqa: E402
from triton_attention.logits import LOG2E  # noqa: E402

HOPPER = Path(forward_kernels.__file__).parent
FORWARD, BACKWARD = HOPPER / "forward.py", HOPPER / "backward.py"
SHARED = [HOPPER / f"{name}.py" for name in ("mask", "nan_repair", "softmax")]


def forward(
    q, k, v, scale, left=None, right=None, block_m=128, block_d=64, stages=2, programs=2, section=2, source=None
):
    """(O, lse, its log) of the kernel; q [B, H, M, D], k and v [B, Hk, N, D], D up to block_d, scale > 0."""
    kernel = load("".join(path.read_text() for path in SHARED) + (source or FORWARD.read_text()))
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    row_tiles, block_n, q_stages = -(-M // block_m), *((64, 1) if block_d == 256 else (128, 2))
    o, lse = torch.full_like(q, torch.nan), torch.full((B * H * M,), torch.nan)
    counter, items = torch.zeros(1, dtype=torch.int32), B * H * row_tiles
    log = torch.full((4 * (items + programs),), 1 << 30, dtype=torch.int32)
    arguments = (
        Descriptor(q, 64, block_d), Descriptor(k, block_n, block_d), Descriptor(v, block_n, block_d),
        Descriptor(o, 64, block_d),
        Pointer(lse), Pointer(counter), Pointer(log), scale * LOG2E.value,
        items, row_tiles, B * H, section, H, H // Hk, M, N, left or 0, right or 0,
        left is not None, right is not None, forward_kernels.edges(left, right),
        block_m == block_n and forward_kernels.half(left, right, M, N),
        block_m, block_n, block_d, stages, q_stages, 0, 0,
    )
    here.size, here.first = programs, 128
    together([(number, kernel._forward_kernel, arguments) for number in range(programs)])
    assert counter == 0, "the counter is not left as it was found"
    return o, lse.view(B, H, M), log.view(-1, 4)


def backward(
    q, k, v, do, dlse, scale, left=None, right=None, block_m=128, section=1, dq_stages=1, stages=2, programs=3,
    source=None,
):
    """(O, lse, dQ, dK, dV), the first two by PyTorch; block_m 128: D up to 64, 64: up to 128."""
    kernel = load(source or BACKWARD.read_text())
    (B, H, M), (Hk, N), wide = q.shape[:3], k.shape[1:3], 8192 // block_m
    o, lse = exact(q, *(t.where(t.abs() < 1e30, 0.0) for t in (k, v)), scale, left, right)
    stats, tickets = kernels.prepare(do, dlse, o, lse, torch.empty(B, H, M, 4), block_m)
    sums = torch.full((64 * len(tickets), 128), torch.nan)
    dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
    tiles, outer = -(-N // 128), N if left is None and right is None else right
    counter = torch.zeros(1, dtype=torch.int32)
    arguments = (
        Descriptor(q, block_m, wide), Descriptor(k, 128, wide), Descriptor(v, 128, wide), Descriptor(do, block_m, wide),
        Descriptor(stats, 1, 2 * block_m), Descriptor(sums, 64, 128), Descriptor(dk, 128, wide),
        Descriptor(dv, 128, wide), Pointer(tickets), Pointer(counter), scale * LOG2E.value,
        tiles, B * Hk, section, Hk, H // Hk, -(-M // block_m), N, left or 0, outer or 0,
        left is not None, outer is not None, block_m, wide, stages, dq_stages, 0,
    )
    here.size, here.first = programs, 256
    together([(number, kernel._backward_kernel, arguments) for number in range(programs)])
    assert counter == 0, "the counter is not left as it was found"
    kernels.finish(sums, dq, N, scale, left, right, block_m)
    return o, lse, dq, dk, dv


def exact(q, k, v, scale, left=None, right=None):
    """(O, lse) by PyTorch."""
    M, N = q.shape[2], k.shape[2]
    sees = torch.ones(M, N).tril(N if right is None else right).triu(-M if left is None else left) > 0
    return torch_fused(q, k, v, sees, scale=scale)


def check(source=None, back=False, keys=420, hidden=None, infinite=False, **options):
    """Whether an emulated kernel is right on a case with every kind of edge; raises what it raises. hidden: what stands
    in keys and values that no query sees; infinite: the last keys, which come first, score -inf."""
    torch.manual_seed(0)
    D = 72 if back and options.get("block_m") == 64 else 40
    q, k, v = (torch.randn(1, *shape, D, requires_grad=back) for shape in ((4, 300), (2, keys), (2, keys)))
    bounds = {name: options.get(name) for name in ("left", "right")}
    if infinite:
        q[..., 0], k[:, :, 200:, 0] = q[..., 0].abs() + 0.5, -torch.inf
    expected = exact(q, k, v, 0.2, **bounds)
    if hidden is not None:
        n, (left, right) = torch.arange(keys), bounds.values()
        unseen = (n < (left or 0)) | (n > (keys if right is None else 299 + right))
        hide = lambda t: t.detach().masked_fill(unseen[:, None], hidden)  # noqa: E731
    else:
        hide = torch.Tensor.detach
    if not back:
        *results, log = forward(q, hide(k), hide(v), 0.2, source=source, **options)
        banded, programs = any(bound is not None for bound in bounds.values()), options.get("programs", 2)
        needless = banded and not infinite and (log[-programs:, 0] > 0).any()  # 0 * inf in rows past the last query
        assert not needless, "a needless repair"
    else:
        do, dlse = torch.randn(1, 4, 300, D), torch.randn(1, 4, 300).masked_fill(expected[1] == -torch.inf, 0.0)
        poisoned = dlse.masked_fill(expected[1] == -torch.inf, torch.nan)  # which must not matter
        results = backward(q.detach(), hide(k), hide(v), do, poisoned, 0.2, source=source, **options)
        lse = expected[1].masked_fill(expected[1] == -torch.inf, 0.0)
        expected += torch.autograd.grad((expected[0], lse), (q, k, v), (do, dlse))
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results, expected, strict=True))


CASES = [
    {}, {"right": 0}, {"right": 0, "block_m": 192}, {"right": 100}, {"right": -70, "stages": 3},
    {"left": -60, "right": 10, "block_m": 192}, {"left": 30}, {"right": -200, "stages": 3},
    {"block_m": 192, "programs": 1}, {"left": 90, "right": 20}, {"block_d": 256}, {"block_d": 256, "right": 0},
    {"left": 125}, {"right": 64}, {"right": -64, "block_m": 192}, {"right": -128}, {"right": 128, "block_m": 192},
    {"right": 128, "keys": 500}, {"right": 256, "keys": 500}, {"right": 0, "hidden": 2e38}, {"infinite": True},
    {"infinite": True, "right": 0}, {"infinite": True, "block_m": 192}, {"infinite": True, "left": -60, "right": 10},
    {"back": True}, {"back": True, "right": 0}, {"back": True, "right": 100, "stages": 3, "dq_stages": 2},
    {"back": True, "left": -60, "right": 10, "block_m": 64}, {"back": True, "left": 30},
    {"back": True, "right": -200, "section": 2}, {"back": True, "block_m": 64},
    {"back": True, "left": 90, "right": 20, "block_m": 64, "stages": 3, "programs": 8},
    {"back": True, "right": 0, "hidden": 2e38}, {"back": True, "left": 30, "right": 80, "block_m": 64, "hidden": -2e38},
    {"back": True, "right": -70, "hidden": torch.inf}, {"back": True, "left": 200, "hidden": torch.nan},
]
_BACK = {"back": True, "block_m": 64, "right": 300}
_BANDED, _FULL = {"left": -60, "right": 10, "block_m": 192}, {"programs": 1}
_SHORT = {"right": -200, "stages": 3, "programs": 1}  # a tile of keys for each of queries
BUGS = {  # name: (what is there, what a tired author writes, a case that shows it)
    "K released before it was read": (
        "s = warpgroup_mma_wait(1, [s_token])\n            _release(count, K_FREE, STAGES, WARPGROUPS)",
        "_release(count, K_FREE, STAGES, WARPGROUPS)\n            s = warpgroup_mma_wait(1, [s_token])", _FULL,
    ),
    "V released while P V is in flight": (
        "acc = warpgroup_mma_wait(0, [o_token])\n            _release(count - 2, V_FREE, STAGES, WARPGROUPS)",
        "_release(count - 2, V_FREE, STAGES, WARPGROUPS)\n            acc = warpgroup_mma_wait(0, [o_token])", _FULL,
    ),
    "V not waited for": ("            _await(v_full, count - 1, STAGES)\n", "", _FULL),
    "K not waited for": ("_await(k_full, count, STAGES, step < own_last - own_first)", "pass", _FULL),
    "tiles that none sees not released": (
        "            count = _skip(last - own_last, count, k_full, v_full, STAGES, WARPGROUPS)\n", "", _BANDED,
    ),
    "O overwritten while it is stored": ("        tma.store_wait(0)  # the tile before has left o_buf\n", "", _FULL),
    "the next Q loaded too early": (
        "mbarrier.wait(q_empty.index(place * WARPGROUPS + w), (turn // Q_STAGES & 1) ^ 1)", "pass", _SHORT,
    ),
    "the phase of every second Q": ("turn // Q_STAGES & 1)\n    return", "turn & 1)\n    return", _FULL),
    "no end announced": ("mbarrier.arrive(q_full.index(slot), count=1)", "pass", _FULL),
    "K and V overwritten": ("    meet_at(FREE + slot, 128 * WARPGROUPS + 32)\n", "", _FULL),
    "V free from the start, but not said so": ("        _release(slot, V_FREE, STAGES, WARPGROUPS)\n", "", _FULL),
    "the last V kept": (
        "        _release(count - 1, V_FREE, STAGES, WARPGROUPS)\n        if BANDED", "        if BANDED", _FULL,
    ),
    "Q loaded over O that is still to leave": (
        "            tma.store_wait(0)\n            mbarrier.arrive(q_empty", "            mbarrier.arrive(q_empty",
        {"block_d": 256, "programs": 1},
    ),
    "the counter not left as it was": ("gl.store(counter_ptr, 0,", "gl.store(counter_ptr, 1,", _BANDED),
    "a number that only one lane has": ("            taken = uniform(taken)\n", "", _BANDED),
    "rows that have seen nothing not told apart": (
        "[ROWS], LOWEST, gl.float32", '[ROWS], float("-inf"), gl.float32', {"left": 125},
    ),
    "keys that come first and score -inf": (
        "[ROWS], LOWEST, gl.float32", '[ROWS], float("-inf"), gl.float32', {"infinite": True},
    ),
    "half a tile for all warpgroups": ("if HALF and WARPGROUP == 0:", "if HALF:", {"right": 0}),
    "halves of the weights exchanged": (
        "joined(p_0, exponentials(s_1, m_i, scale))", "joined(exponentials(s_1, m_i, scale), p_0)", {"right": 0},
    ),
    "the next tile read before O has left": (
        "EARLY: gl.constexpr = BANDED and Q_STAGES == 2", "EARLY: gl.constexpr = BANDED", {"block_d": 256, "right": 0},
    ),
    "last queries first forgotten": ("by = uniform(gl.where(up, -BLOCK_M, BLOCK_M))", "by = BLOCK_M", _BACK),
    "Q released while dK is in flight": (
        "dk, dv = warpgroup_mma_wait(0, [dk_token, dv_token])\n            arrive_at(FREE + slot, THREADS)",
        "arrive_at(FREE + slot, THREADS)\n            dk, dv = warpgroup_mma_wait(0, [dk_token, dv_token])",
        _BACK,
    ),
    "dO not waited for": ("            mbarrier.wait(do_full.index(slot), total // STAGES & 1)\n", "", _BACK),
    "the next Q not waited for": ("step + 1 < steps)\n", "False)\n", _BACK),
    "Q overwritten": ("meet_at(FREE + slot, THREADS)", "pass", _BACK),
    "dQ overwritten while it is added": (
        "mbarrier.wait(dq_empty.index(slot), (total // DQ_STAGES & 1) ^ 1)", "pass", {**_BACK, "programs": 8},
    ),
    "dQ added before it is there": ("meet_at(DQ_FULL + slot, THREADS)", "pass", _BACK),
    "dQ added out of turn": ("mbarrier.wait(come.index(total % 2), total // 2 & 1)", "pass", {**_BACK, "programs": 8}),
    "turns counted from the wrong end": ("gl.where(up, tile_n, last - tile_n)", "last - tile_n", _BACK),
    "the turn not passed on": ("publish(tickets_ptr + tile, before + 1)", "pass", _BACK),
    "K loaded over dK that is still to leave": (
        "v_buf)\n    store_async(dk_desc, [off_b, off_hk, start_n, 0], k_buf)\n    tma.store_wait(0)",
        "v_buf)\n    store_async(dk_desc, [off_b, off_hk, start_n, 0], k_buf)", _BACK,
    ),
    "no end told": ("    _announce(-1, told, turn)\n", "", _BACK),
    "the counter of the backward not left as it was": ("gl.store(counter_ptr, 0,", "gl.store(counter_ptr, 1,", _BACK),
    "huge keys that no query sees": (
        "buf.store(clamp(buf.load(layout)))", "x = buf.load(layout); buf.store(gl.where(gl.abs(x) < 3e38, x, 0.0))",
        {**_BACK, "right": 0, "hidden": 2e38},
    ),
    "dK stored before it is there": ("mbarrier.wait(finished, turn & 1)", "pass", _BACK),
}


def notices(bug):
    """How the emulation shows a planted bug: None if it does not."""
    right, wrong, case = BUGS[bug]
    path = BACKWARD if case.get("back") else FORWARD
    source = path.read_text()
    if source.count(right) != 1:
        raise ValueError(f"{path.name} has changed: plant this bug anew: {bug}")
    usual = Barrier.patience, Descriptor.delays
    Barrier.patience, Descriptor.delays = 1.0, (0, 1e-3, 5e-2)
    try:
        return None if check(source.replace(right, wrong), **case) else "a wrong result"
    except AssertionError as error:
        return str(error)
    finally:
        Barrier.patience, Descriptor.delays = usual


if __name__ == "__main__":
    failures = 0
    for case in CASES:
        good = check(**case)
        failures += not good
        print(f"{case}: {'right' if good else 'WRONG'}", flush=True)
    for bug in BUGS:
        found = notices(bug)
        failures += found is None
        print(f"{bug}: {found or 'NOT NOTICED'}", flush=True)
    sys.exit(failures > 0)
