"""Run the Hopper kernel's source on the CPU: its protocol of barriers and rings, as slowly as the hardware may be.

    python3 emulate_hopper.py      half a minute; also plants bugs, and says how each shows

Gluon has no interpreter. Here the functions of triton_attention_hopper.py run as plain Python on torch tensors, each
partition a thread. What the hardware does in its own time happens at the worst: a copy by TMA lands after a random
delay, and its place holds NaN until then; a wgmma reads its operands when it is waited for, not when it is issued; a
store leaves shared memory when it is waited for. So a buffer that is released too early, or read too soon, is a wrong
result, an arrival too many an error, and a wait that nobody ends a deadlock that is reported.
"""

import ast
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from testing import torch_fused

SOURCE = Path(__file__).parent / "triton_attention_hopper.py"


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have landed."""

    patience = 60.0  # seconds that a wait may take: then it is a deadlock

    def __init__(self):
        self.changed = threading.Condition()
        self.phase, self.bytes, self.broken = 0, 0, False

    def init(self, count):
        self.count = self.pending = count

    def update(self, arrivals=0, expected=0):
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected
            self.broken |= self.pending < 0
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
            self.changed.notify_all()

    def wait(self, parity):
        with self.changed:
            done = self.changed.wait_for(lambda: self.broken or self.phase & 1 != parity, self.patience)
            if self.broken:
                raise AssertionError("an arrival too many")
            if not done:
                raise AssertionError(f"deadlock: {threading.current_thread().name} waits for a barrier")


class Barriers:
    def __init__(self, count):
        self.each = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.each[i]


class Shared:
    """Shared memory: views of one tensor."""

    def __init__(self, data):
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, i):
        return Shared(self.data[i])

    def reshape(self, shape):
        return Shared(self.data.view(shape))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)


class Descriptor:
    """What TMA moves: blocks of rows of a [B, H, M, D] tensor; outside of it zeros."""

    def __init__(self, tensor, rows, columns):
        self.tensor, self.block, self.dtype, self.layout = tensor, (rows, columns), tensor.dtype, None
        self.block_type = SimpleNamespace(nbytes=rows * columns * tensor.element_size())

    def part(self, at):
        b, h, start, _ = at
        return self.tensor[b, h, start : start + self.block[0]]

    def load(self, at, barrier, place):
        place.data.fill_(torch.nan)

        def land():
            time.sleep(random.choice((0, 0, 1e-3, 1e-2)))
            part = self.part(at)
            place.data.zero_()
            place.data.view(self.block)[: part.shape[0], : part.shape[1]] = part
            barrier.update(expected=-self.block_type.nbytes)

        threading.Thread(target=land, daemon=True).start()


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Product:
    """A wgmma in flight."""

    def __init__(self, a, b, acc, use_acc):
        self.operands = a, b, acc if use_acc else torch.zeros_like(acc)

    def value(self):
        a, b, acc = (x.data if isinstance(x, Shared) else x for x in self.operands)
        return acc + a.float() @ b.float()


class Program(threading.local):
    """Who a thread is, and its stores in flight."""

    number, size, stores = 0, 1, ()


here = Program()
lock = threading.Lock()


def store_wait(pending):
    for desc, at, place in here.stores:
        part = desc.part(at)
        part.copy_(place.data.view(desc.block)[: part.shape[0], : part.shape[1]])
    here.stores = ()


def store_async(desc, at, place):
    here.stores += ((desc, at, place),)


def store(ptr, value, mask=None):
    offsets = torch.as_tensor(ptr.offset)
    value = torch.as_tensor(value, dtype=ptr.data.dtype).expand(offsets.shape)
    if mask is not None:
        offsets, value = offsets[mask], value[mask]
    ptr.data[offsets] = value


def atomic_add(ptr, value, sem):
    with lock:
        ptr.data[ptr.offset] += value
        return int(ptr.data[ptr.offset]) - value


def together(jobs):
    """Run (program number, function, arguments) each in a thread of its own; raise the first error."""
    errors, size = [], here.size

    def work(number, function, args):
        here.number, here.size, here.stores = number, size, ()
        try:
            function(*args)
        except Exception as error:  # noqa: BLE001  it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=job, name=f"{job[1].__name__} {i}") for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def warp_specialize(partitions, warps, registers):
    together([(here.number, function, args) for function, args in partitions])


def allocate(dtype, shape, layout):
    return Barriers(shape[0]) if layout == "barrier" else Shared(torch.full(shape, torch.nan).to(dtype))


def either(torch_function, function):
    return lambda a, b: torch_function(a, b) if isinstance(a, torch.Tensor) else function(a, b)


nothing = lambda *args, **kwargs: None  # noqa: E731  layouts
LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x, to_tensor=lambda x: x, static_range=range, float32=torch.float32, int32=torch.int32,
    int64=torch.int64, program_id=lambda axis: here.number, num_programs=lambda axis: here.size,
    minimum=min, maximum=either(torch.maximum, max), zeros=lambda shape, dtype, layout: torch.zeros(shape),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    arange=lambda start, end, layout: torch.arange(start, end), expand_dims=lambda x, axis: x.unsqueeze(axis),
    where=lambda c, a, b: torch.where(c, a, b), max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2, log=torch.log, convert_layout=lambda x, layout: x, store=store, atomic_add=atomic_add,
    warp_specialize=warp_specialize, allocate_shared_memory=allocate, NVMMADistributedLayout=nothing,
    DotOperandLayout=nothing, SliceLayout=nothing, BlockedLayout=nothing, SwizzledSharedLayout=nothing,
)
NAMES = {
    "gl": LANGUAGE, "fence_async_shared": nothing, "store_async": store_async, "_inline": lambda asm, x: int(x),
    "tma": SimpleNamespace(store_wait=store_wait),
    "load_async": lambda desc, at, barrier, place: desc.load(at, barrier, place),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=lambda bar, count: bar.init(count),
        expect=lambda bar, nbytes: bar.update(arrivals=1, expected=nbytes),
        arrive=lambda bar, count: bar.update(arrivals=count),
        wait=lambda bar, parity, pred=True: bar.wait(parity) if pred else None,
    ),
    "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc, use_acc),
    "warpgroup_mma_wait": lambda pending, products: products[0].value(),
    "_to": lambda x, dtype: x.to(dtype) if isinstance(x, torch.Tensor) else x,
}


class Casts(ast.NodeTransformer):
    """x.to(dtype) becomes _to(x, dtype): a Python integer has no such method."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(ast.Name("_to", ast.Load()), [node.func.value, *node.args], [])
        return node


def load(source):
    """The kernel's functions and constants, as Python."""
    names = dict(NAMES)
    body = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("gluon" in ast.unparse(d) for d in node.decorator_list):
            node.decorator_list = []
            body += [node] if node.name not in names else []
        elif isinstance(node, ast.Assign) and "gl.constexpr" in ast.unparse(node):
            body.append(node)
    exec(compile(ast.fix_missing_locations(Casts().visit(ast.Module(body, []))), str(SOURCE), "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")})


def forward(q, k, v, scale, left=None, right=None, block_m=128, stages=2, programs=2, section=2, source=None):
    """(O, lse, poisoned) of the kernel; q [B, H, M, D], k and v [B, Hk, N, D], D up to 64, scale > 0."""
    kernel = load(source or SOURCE.read_text())
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    row_tiles = -(-M // block_m)
    o, lse = torch.full_like(q, torch.nan), torch.full((B * H * M,), torch.nan)
    poisoned, counter = torch.full((B * H * row_tiles * (block_m // 64),), -1), torch.zeros(1, dtype=torch.int32)
    arguments = (
        Descriptor(q, 64, 64), Descriptor(k, 128, 64), Descriptor(v, 128, 64), Descriptor(o, 64, 64),
        Pointer(lse), Pointer(poisoned), Pointer(counter), scale * 1.4426950408889634,
        B * H * row_tiles, row_tiles, B * H, section, H, H // Hk, M, N, left or 0, right or 0,
        left is not None, right is not None, block_m, 128, 64, stages, 0, 0,
    )
    here.size = programs
    together([(number, kernel._forward_kernel, arguments) for number in range(programs)])
    return o, lse.view(B, H, M), poisoned


def exact(q, k, v, scale, left=None, right=None):
    """(O, lse) by PyTorch."""
    M, N = q.shape[2], k.shape[2]
    sees = torch.ones(M, N).tril(N if right is None else right).triu(-M if left is None else left) > 0
    return torch_fused(q, k, v, sees, scale=scale)


def check(source=None, **options):
    """Whether the emulated kernel is right on a case with every kind of edge; raises what it raises."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 300, 40), torch.randn(1, 2, 420, 40), torch.randn(1, 2, 420, 40)
    o, lse, _ = forward(q, k, v, 0.2, source=source, **options)
    bounds = {name: options.get(name) for name in ("left", "right")}
    expected = exact(q, k, v, 0.2, **bounds)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip((o, lse), expected, strict=True))


CASES = [
    {}, {"right": 0}, {"right": 100}, {"right": -70, "stages": 3}, {"left": -60, "right": 10, "block_m": 192},
    {"left": 30}, {"right": -200, "stages": 3}, {"block_m": 192, "programs": 1}, {"left": 90, "right": 20},
]
_BANDED, _FULL = {"left": -60, "right": 10, "block_m": 192}, {"programs": 1}
_SHORT = {"right": -200, "stages": 3, "programs": 1}  # a tile of keys for each of queries
BUGS = {  # name: (what is there, what a tired author writes, a case that shows it)
    "K released before it was read": (
        "s = warpgroup_mma_wait(1, [s_token])\n            _release(k_empty, count, STAGES)",
        "_release(k_empty, count, STAGES)\n            s = warpgroup_mma_wait(1, [s_token])", _FULL,
    ),
    "V released while P V is in flight": (
        "            acc = warpgroup_mma_wait(0, [o_token])\n            _release(v_empty, count - 2, STAGES)",
        "            _release(v_empty, count - 2, STAGES)\n            acc = warpgroup_mma_wait(0, [o_token])", _FULL,
    ),
    "V not waited for": ("            _await(v_full, count - 1, STAGES)\n", "", _FULL),
    "K not waited for": ("_await(k_full, count, STAGES, step < own_last - own_first)", "pass", _FULL),
    "tiles that none sees not released": (
        "            count = _skip(last - own_last, count, k_full, k_empty, v_full, v_empty, STAGES)\n", "", _BANDED,
    ),
    "O overwritten while it is stored": ("        tma.store_wait(0)  # the tile before has left o_buf\n", "", _FULL),
    "the next Q loaded too early": (
        "mbarrier.wait(q_empty.index(turn % 2 * WARPGROUPS + w), (turn // 2 & 1) ^ 1)", "pass", _SHORT,
    ),
    "the phase of every second Q": ("turn // 2 & 1)\n    item", "turn & 1)\n    item", _FULL),
    "no end announced": ("mbarrier.arrive(q_full.index(turn % 2 * WARPGROUPS + w), count=1)", "pass", _FULL),
    "the last V kept": (
        "        _release(v_empty, count - 1, STAGES)\n        if BANDED", "        if BANDED", _FULL,
    ),
}


def notices(bug):
    """How the emulation shows a planted bug: None if it does not."""
    right, wrong, case = BUGS[bug]
    source = SOURCE.read_text()
    if source.count(right) != 1:
        raise ValueError(f"{SOURCE.name} has changed: plant this bug anew: {bug}")
    patience, Barrier.patience = Barrier.patience, 3.0
    try:
        return None if check(source.replace(right, wrong), **case) else "a wrong result"
    except AssertionError as error:
        return str(error)
    finally:
        Barrier.patience = patience


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
