"""The map of a mask: lists name every tile that a query sees, and call plain only those that need no mask."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import triton_attention_fused
from tests.reference import BF16, DEVICE, F32, INF, NAN, compare, randn, torch_fused
import triton
import triton.language as tl

from triton_attention import mask_map, tuned
from triton_attention.launch import launch
from triton_attention.logits import Band, Options, trimmed
from triton_attention.mask_map import bits_of, map_of, orders_of, units_of
from triton_attention.tiles import Matrix
from triton_attention_fused import attention_fused

B, H, M, N = 2, 4, 100, 150
LENGTHS = torch.tensor([70, 150], device=DEVICE)
MASKS = {
    "sparse": lambda: torch.rand(B, H, M, N, device=DEVICE) < 0.02,
    "causal": lambda: torch.ones(M, N, dtype=torch.bool, device=DEVICE).tril().expand(B, H, M, N),
    "padding": lambda: (torch.arange(N, device=DEVICE) < LENGTHS[:, None])[:, None, None].expand(B, H, M, N),
    "documents": lambda: (
        torch.arange(M, device=DEVICE)[:, None] // 40 == torch.arange(N, device=DEVICE) // 60
    ).expand(B, H, M, N),
    "0 and -inf": lambda: torch.zeros(M, N, device=DEVICE).masked_fill(
        torch.ones(M, N, device=DEVICE).triu(20) > 0, -INF
    ).expand(B, H, M, N),
    "queries": lambda: (torch.arange(M, device=DEVICE)[:, None] % 64 < 32).expand(B, H, M, N),
    "queries, 0 and -inf": lambda: torch.zeros(2, 1, M, 1, device=DEVICE).masked_fill(
        torch.arange(M, device=DEVICE)[:, None] >= LENGTHS[:, None, None, None] - 30, -INF
    ).expand(B, H, M, N),
    "bias": lambda: torch.randn(1, H, M, N, device=DEVICE, dtype=BF16).expand(B, H, M, N),
}


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setattr(mask_map, "LISTS_FROM", 0)


def listed_tiles(arguments, b, h, row, part=0):
    """(plain tiles, partial tiles) of a row of tiles."""
    lists, counts, stride_b, stride_h, stride_row, capacity = arguments
    at = b * stride_b + h * stride_h + row * stride_row + part
    tiles = lists[at * capacity : (at + 1) * capacity].tolist()
    plains, partials = counts[2 * at : 2 * at + 2].tolist()
    assert plains + partials <= capacity
    return tiles[:plains], tiles[capacity - partials :][::-1]


def lists_of(mask, *args, **options):
    return map_of(mask, units_of(mask), *args, **options)


@pytest.mark.parametrize("transposed,group", [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("name", MASKS)
def test_lists(name, transposed, group):
    torch.manual_seed(0)
    mask = MASKS[name]()
    sees, free = (mask, mask) if mask.dtype == torch.bool else (mask != -INF, mask == 0)
    for (left, right), (rows, columns) in itertools.product(
        ((None, None), (-20, 30)), ((32, 64), (128, 16))
    ):
        tile = SimpleNamespace(BLOCK_M=rows, BLOCK_N=columns, narrow=None)
        arguments, _ = lists_of(mask, tile, M, N, left, right, transposed=transposed, group=group)
        band = torch.ones(M, N, device=DEVICE).tril(N if right is None else right)
        band = band.triu(-M if left is None else left) > 0
        for b, h, m, n in itertools.product(range(B), range(H // group), range(-(-M // rows)), range(-(-N // columns))):
            row, tile = (n, m) if transposed else (m, n)
            plain, partial = listed_tiles(arguments, b, h, row)
            heads = slice(h * group, (h + 1) * group)
            at = slice(m * rows, (m + 1) * rows), slice(n * columns, (n + 1) * columns)
            seen = (sees[b, heads] & band)[(slice(None), *at)].any()
            assert not seen or (tile in plain) != (tile in partial)
            if tile in plain:
                assert (free[b, heads] & band)[(slice(None), *at)].all()
                assert (m + 1) * rows <= M if transposed else (n + 1) * columns <= N  # whose loads are not checked
            assert seen or tile not in plain
            if not seen and rows * columns >= 32 * 32:
                near = (sees[b, heads] & band)[:, at[0], at[1].start // 32 * 32 : -(-at[1].stop // 32) * 32].any()
                assert tile not in partial or near or left is not None or right is not None


def test_lists_of_parts_of_the_keys():
    mask = MASKS["padding"]()
    tile = SimpleNamespace(BLOCK_M=16, BLOCK_N=16, narrow=None)
    arguments, _ = lists_of(mask, tile, M, N, None, None, chunk=64)
    found = [[listed_tiles(arguments, b, 0, 0, part) for part in range(3)] for b in range(B)]
    assert found[0] == [([0, 1, 2, 3], []), ([], [4, 5]), ([], [])]  # a unit is two tiles
    assert found[1] == [([0, 1, 2, 3], []), ([4, 5, 6, 7], []), ([], [8, 9])]


SHAPES = [
    (B, H, 70, 300), (1, H, 1, 300), (B, 1, 70, 1), (1, 1, 300, 70), (B, 1, 1, 130), (B, 1, 1, 256), (B, 1, 130, 33),
    (1, 1, 70, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", (0.02, 0.5, 1.0))
def test_bits(shape, share):
    """A bit for each pair, in words of keys and in words of queries; and the units, as in a pass of their own."""
    torch.manual_seed(0)
    mask = torch.rand(shape, device=DEVICE) < share
    mask[..., :64, :64] = True
    if share == 0.5:
        mask = mask.mT.contiguous().mT  # as triu().transpose() makes one
    m_size, n_size = 70 if shape[2] == 1 else shape[2], 130 if shape[3] == 1 else shape[3]
    mask = mask.expand(B, H, m_size, n_size)
    m, n = torch.arange(m_size, device=DEVICE)[:, None], torch.arange(n_size, device=DEVICE)
    for transposed in (False, True):
        units, words, (step_b, step_h, step_m, step_n) = bits_of(mask, transposed=transposed)
        row, word, bit = (n, m // 32, m % 32) if transposed else (m, n // 32, n % 32)
        places = (word * step_m + row * step_n) if transposed else (row * step_m + word * step_n)
        for b, h in itertools.product(range(B), range(H)):
            words_of_head = words.flatten()[b * step_b + h * step_h + places]
            assert torch.equal((words_of_head >> bit) & 1 > 0, mask[b, h])
        sizes = [1 if size == 1 else None for size in shape]
        assert torch.equal(units[:, :, : sizes[2], : sizes[3]], units_of(mask))


@pytest.mark.parametrize("floating", (False, True))
@pytest.mark.parametrize("N", (96, 61))
def test_units_and_bits_of_two_masks(N, floating):
    """A mask of all queries and one of keys, also as a transposed or expanded one, have the units and bits of both."""
    torch.manual_seed(0)
    mask = (torch.rand(N, 70, device=DEVICE) < 0.6).mT[None, None]
    for keys in ((torch.rand(N, B, device=DEVICE) < 0.6).mT, (torch.arange(N, device=DEVICE) < 40)[None].expand(B, N)):
        both = (mask & keys[:, None, None]).expand(B, H, 70, N)
        if floating:
            additive = [torch.zeros(m.shape, device=DEVICE).masked_fill(~m, float("-inf")) for m in (mask, keys)]
            assert torch.equal(units_of(additive[0].expand(B, H, 70, N), additive[1]), units_of(both)[:, :1])
            continue
        assert torch.equal(units_of(mask.expand(B, H, 70, N), keys), units_of(both)[:, :1])
        for transposed in (False, True):
            units, words, steps = bits_of(mask.expand(B, H, 70, N), keys, transposed=transposed)
            expected, words_of_both, _ = bits_of(both.contiguous(), transposed=transposed)
            assert torch.equal(units, expected[:, :1]) and steps[1] == 0
            written = 3 if transposed else 4  # words of 70 queries, and of all keys
            assert torch.equal(words[:, :, :written, :N], words_of_both[:, :1, :written, :N])


@pytest.mark.parametrize("heads", (1, H))
@pytest.mark.parametrize("left,right", ((None, None), (None, 0), (-60, 10)))
def test_orders(heads, left, right):
    """Of each visible tile, how many tiles of keys come before and after it, in the lists of the same tiles."""
    m, n = torch.arange(300, device=DEVICE)[:, None], torch.arange(420, device=DEVICE)
    kinds = [n // 50 == m // 50, (n >= 256) & (m < 128), n <= m, (n == 7) & (m > 5)]
    mask = torch.stack(kinds[:heads])[None].expand(B, H, 300, 420)
    tile, units = SimpleNamespace(BLOCK_M=64, BLOCK_N=128, narrow=None), units_of(mask)
    orders, totals, steps = orders_of(units, tile, 300, 420, left, right, 2)
    arguments, _ = map_of(mask, units, tile, 300, 420, left, right, transposed=True, ordered=True, group=2)
    for h in range(min(heads, H // 2)):
        lists = [listed_tiles(arguments, 0, h, row)[0] for row in range(4)]
        assert all(entries == sorted(entries) for entries in lists)
        for i in range(5):
            seen = [row for row in range(4) if i in [entry // 2 for entry in lists[row]]]
            assert totals.flatten()[h * steps[1] + i] == len(seen)
            for before, row in enumerate(seen):
                assert orders[0, h, row, i] == before + (len(seen) - 1 - before) * 65536


def test_masks_are_read_once():
    """Dimensions of size 1 stay 1, also where a caller has expanded them; a list serves all who share it."""
    tile = SimpleNamespace(BLOCK_M=32, BLOCK_N=32, narrow=None)
    (lists, counts, *strides, capacity), about = lists_of(MASKS["padding"](), tile, M, N, None, None)
    assert counts.numel() == 2 * B and lists.numel() == B * capacity and strides == [1, 0, 0] and about["ONE_ROW"]
    (lists, counts, *strides, capacity), _ = lists_of(MASKS["padding"](), tile, M, N, None, 0)
    assert counts.numel() == 2 * B * 4 and strides == [4, 0, 1]
    (lists, counts, *strides, capacity), _ = lists_of(MASKS["causal"](), tile, M, N, None, None)
    assert counts.numel() == 2 * 4 and strides == [0, 0, 1]


@triton.jit(do_not_specialize=["first", "last"])
def _trim_kernel(
    out_ptr, mask_ptr, stride_m, stride_n, keys_ptr, M, N, first, last,
    IS_BOOL: tl.constexpr, ONE_ROW: tl.constexpr, HAS_KEYS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        16, 16, 1, False, False, IS_BOOL, not IS_BOOL, 0.0, True, False, False, False, True, "ieee",
        BLOCK_M, BLOCK_N, 16, 16, ONE_ROW, False, False, BLOCK_N, HAS_KEYS,
    )
    band = Band(0, 0, Matrix(mask_ptr, (stride_m, stride_n), (M, N)), (keys_ptr, N, 1, tl.program_id(0)))
    first, last = trimmed(first, last, tl.arange(0, BLOCK_M), band, OPTIONS)
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, last)


@pytest.mark.parametrize("floating", (False, True))
@pytest.mark.parametrize("rows", (1, 5))
@pytest.mark.parametrize(
    "spans", ([(0, 2500)], [(700, 701)], [(310, 400), (1500, 2490)], [(0, 200), (2499, 2500)], []), ids=str
)
def test_few_queries_visit_what_a_mask_leaves(spans, rows, floating):
    """From the tile of the first key that one of them sees to the last such key, of a part of the keys."""
    N, block = 2500, 32
    mask, keys = (torch.zeros(r, N, dtype=torch.bool, device=DEVICE) for r in (rows, 1))
    for i, (start, end) in enumerate(spans):
        mask[(rows - 1) * (i % 2), start:end] = True
    keys[0, 17:2450] = True
    for (first, last), two in itertools.product(((0, N), (320, 1984), (640, 768)), (False, True)):
        sees = mask.any(0) & (keys[0] if two else True)
        places = sees[first:last].nonzero().flatten().tolist()
        given = [torch.zeros(t.shape, device=DEVICE).masked_fill(~t, -INF) if floating else t for t in (mask, keys)]
        out = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        launch(
            _trim_kernel, 1, out, given[0], N, 1, given[1], rows, N, first, last,
            IS_BOOL=not floating, ONE_ROW=rows == 1, HAS_KEYS=two, BLOCK_M=16, BLOCK_N=block,
        )
        start, end = out.tolist()
        if not places:
            assert start == end
        else:
            assert (start, end) == (first + places[0] // block * block, first + places[-1] + 1)


@pytest.mark.parametrize("floating", (False, True))
def test_few_queries_of_much_memory_have_lists(floating, monkeypatch):
    """One part of all keys, of which a mask leaves some at either end."""
    torch.manual_seed(0)
    q, k, v = randn(2, 4, 1, 16, dtype=F32), randn(2, 2, 300, 16, dtype=F32), randn(2, 2, 300, 16, dtype=F32)
    n = torch.arange(300, device=DEVICE)
    mask = ((n < 4) | (n > 270))[None, None, None]
    mask = torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -INF) if floating else mask
    monkeypatch.setattr(triton_attention_fused, "HEAVY", 0)
    monkeypatch.setattr(triton_attention_fused, "count_splits", lambda *args: 1)
    seen = []
    lists_for = triton_attention_fused.map_of
    monkeypatch.setattr(triton_attention_fused, "map_of", lambda mask, units, *args, **options: (
        seen.append(units is not None), lists_for(mask, units, *args, **options))[1])
    ours = lambda q, k, v: attention_fused(q, k, v, mask.to(q.dtype) if floating else mask, enable_gqa=True)  # noqa: E731
    compare(ours, lambda q, k, v: torch_fused(q, k, v, mask.to(q.dtype) if floating else mask)[0], q, k, v)
    assert seen[0]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (20, 5)}], ids=str)
@pytest.mark.parametrize("name", ["causal", "padding", "documents", "0 and -inf"])
def test_hidden_tiles_are_not_read(name, options):
    """Forward and backward beside NaN in keys and values that no query sees, in small tiles."""
    torch.manual_seed(0)
    mask = MASKS[name]()[:, :2, 20:60, 30:90]
    q, k, v = (randn(B, h, n, 16, dtype=F32) for h, n in ((2, 40), (1, 60), (1, 60)))
    m, n = torch.arange(40, device=DEVICE)[:, None], torch.arange(60, device=DEVICE)
    left, right = (20 - 20, 20 + 5) if "window_size" in options else (-60, 0 if options else 60)
    sees = (n >= m + left) & (n <= m + right) & (mask if mask.dtype == torch.bool else mask != -INF)
    hidden = ~sees.any(1, keepdim=True).any(2)
    poisoned = [t.detach().masked_fill(hidden[..., None], NAN).requires_grad_() for t in (k, v)]
    allowed = sees if mask.dtype == torch.bool else mask.masked_fill(~sees, -INF)

    def theirs(q, k, v):
        return torch_fused(q, k, v, allowed)[0]

    expected = torch.autograd.grad(theirs(q, k, v).sum(), (q, k, v))
    out = attention_fused(q, *poisoned, mask, enable_gqa=True, block_m=16, block_n=16, **options)
    grads = torch.autograd.grad(out.sum(), (q, *poisoned))
    assert torch.allclose(out, theirs(q, k, v), atol=1e-5)
    for ours, exact in zip(grads, expected, strict=True):
        assert torch.allclose(ours, exact, atol=1e-4)


@pytest.mark.parametrize("name,listed", [*((name, True) for name in MASKS), ("documents", False), ("bias", False)])
def test_against_pytorch(name, listed, monkeypatch):
    if not listed:
        monkeypatch.setattr(mask_map, "LISTS_FROM", 1 << 60)
    torch.manual_seed(0)
    q, k, v = (randn(B, H, n, 24, dtype=BF16) for n in (M, N, N))
    ours = lambda q, k, v, mask: attention_fused(q, k, v, mask, block_m=32, block_n=16)  # noqa: E731
    compare(ours, lambda q, k, v, mask: torch_fused(q, k, v, mask)[0], q, k, v, MASKS[name]())


def test_partial_tiles_are_no_wider_than_the_callers(monkeypatch):
    """A tuned row may ask for narrow partial tiles; with block_n below that, keys would count twice."""
    monkeypatch.setattr(tuned, "INTERPRETED", tuned.INTERPRETED._replace(narrow=32))
    q, k, v = (randn(B, H, n, 24, dtype=F32) for n in (M, N, N))
    ours = lambda q, k, v, mask: attention_fused(q, k, v, mask, block_m=32, block_n=16)  # noqa: E731
    compare(ours, lambda q, k, v, mask: torch_fused(q, k, v, mask)[0], q, k, v, MASKS["documents"]())


def test_a_transposed_mask_of_more_than_2_31_elements_apart():
    if DEVICE.type != "cpu":
        pytest.skip("an address space of its own")
    n, apart = 48, 1 << 26
    mask = torch.ones(1, dtype=torch.bool).expand(64, n).clone()
    far = torch.empty((n - 1) * apart + 64, dtype=torch.bool).as_strided((64, n), (1, apart))  # pages come when touched
    mask[::3, 5:] = False
    far.copy_(mask)
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, n, 16)
    assert torch.allclose(attention_fused(q, k, k, far), attention_fused(q, k, k, mask), atol=1e-6)
