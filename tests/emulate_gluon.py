"""A slow Hopper GPU in Python, on which the source of a Gluon kernel runs: for its barriers and pipelines.

Gluon has no interpreter. Here a kernel's functions run as plain Python on torch tensors, each partition a thread. What
the hardware does asynchronously happens at the worst time: a copy by TMA lands after a random delay, and until then its
buffer holds NaN; a wgmma needs its operands from when it is issued to when it is waited for; a store leaves shared
memory when that is waited for, and reaches memory when a semaphore is released. A buffer that is released too early, or
read too soon, is a wrong result or a changed operand, an arrival too many an error, and a wait without end a deadlock
that is reported. Rounding, layouts, speed, and warps of a partition that drift apart are not emulated.
"""

import ast
import random
import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch

from triton_attention.logits import LN2, LOG2E


class Barrier:
    """An mbarrier or, without bytes, a named barrier: a phase ends when all have arrived and all bytes have landed."""

    timeout = 60.0  # seconds that a wait may take: then it is a deadlock

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
            done = self.changed.wait_for(lambda: self.broken or self.phase & 1 != parity, self.timeout)
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

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)


class Descriptor:
    """What TMA moves: blocks of a [..., M, D] tensor; outside of it zeros."""

    delays = 0, 0, 1e-3, 1e-2  # seconds that a load takes

    def __init__(self, tensor, rows, columns):
        self.tensor, self.block, self.dtype, self.layout = tensor, (rows, columns), tensor.dtype, None
        self.block_type = SimpleNamespace(nbytes=rows * columns * tensor.element_size(), shape=(1, 1, rows, columns))

    def part(self, at):
        *head, row, column = at
        return self.tensor[tuple(head)][row : row + self.block[0], column : column + self.block[1]]

    def load(self, at, barrier, buf):
        buf.data.fill_(torch.nan)

        def land():
            time.sleep(random.choice(self.delays))
            part = self.part(at)
            buf.data.zero_()
            buf.data.view(self.block)[: part.shape[0], : part.shape[1]] = part
            barrier.update(expected=-self.block_type.nbytes)

        threading.Thread(target=land, daemon=True).start()


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)


class Product:
    """A wgmma in flight: it may read its operands when it is issued, when it is waited for, or in between."""

    def __init__(self, a, b, acc, use_acc):
        self.operands = a, b, acc if use_acc else torch.zeros_like(acc)
        self.issued = [x.data.clone() for x in self.operands if isinstance(x, Shared)]

    def value(self):
        shared = [x.data for x in self.operands if isinstance(x, Shared)]
        if not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(shared, self.issued, strict=True)):
            raise AssertionError("an operand of a wgmma in flight changed")
        a, b, acc = (x.data if isinstance(x, Shared) else x for x in self.operands)
        acc = acc.value() if isinstance(acc, Product) else acc
        return acc + a.float() @ b.float()


class Program(threading.local):
    """What belongs to a thread: its program's number, the number of programs, threads of the GPU in the first partition
    and in this one, named barriers, TMA stores that read shared memory, and those that do not any more."""

    number, size, first, threads, named, reading, writing = 0, 1, 128, 0, None, (), ()


current = Program()
changed = threading.Condition()  # of what is in memory


def store_wait(pending):
    """All stores but the last `pending` have left shared memory; they reach memory later."""
    left = current.reading[: len(current.reading) - pending]
    current.writing += tuple((desc, at, buf.data.clone(), adds) for desc, at, buf, adds in left)
    current.reading = current.reading[len(left) :]


def store_async(desc, at, buf):
    current.reading += ((desc, at, buf, False),)


def add_async(desc, at, buf):
    current.reading += ((desc, at, buf, True),)


def store_wait_complete(pending=0):
    store_wait(0)
    left = current.writing[: len(current.writing) - pending]
    with changed:
        for desc, at, data, adds in left:
            part = desc.part(at)
            data = data.view(desc.block)[: part.shape[0], : part.shape[1]]
            part.copy_(part + data if adds else data)
    current.writing = current.writing[len(left) :]


def semaphore_release(ptr, value, pending):
    store_wait_complete(pending)
    with changed:
        ptr.data[ptr.offset] = value
        changed.notify_all()


def semaphore_wait(ptr, value):
    with changed:
        if not changed.wait_for(lambda: ptr.data[ptr.offset] == value, Barrier.timeout):
            raise AssertionError(f"deadlock: {threading.current_thread().name} waits for a semaphore")


def store(ptr, value, mask=None):
    offsets = torch.as_tensor(ptr.offset)
    value = torch.as_tensor(value, dtype=ptr.data.dtype).expand(offsets.shape)
    if mask is not None:
        offsets, value = offsets[mask], value[mask]
    ptr.data[offsets] = value


def mark_nan(x, ptr, other_ptr):
    if x.isnan().any():
        store(ptr, 1)
        store(other_ptr, 1)


def load_from(ptr, mask=None, other=0):
    """An element, or a tensor of them."""
    at = torch.as_tensor(ptr.offset)
    mask = torch.as_tensor(True if mask is None else mask).expand(at.shape)
    at = torch.where(mask, at, 0)
    if not (0 <= at.min() and at.max() < len(ptr.data)):
        raise AssertionError("a load from outside of a tensor")
    loaded = torch.where(mask, ptr.data[at], other)
    return loaded if isinstance(ptr.offset, torch.Tensor) else loaded.item()


class FirstLane:
    """A number that the other lanes get from uniform()."""

    def __init__(self, number):
        self.number = number

    def refuse(self, other):
        raise AssertionError("a number that only the first lane has")

    __add__ = __radd__ = __lt__ = __eq__ = __floordiv__ = refuse


def atomic_increment(ptr):
    with changed:
        ptr.data[ptr.offset] += 1
        return FirstLane(int(ptr.data[ptr.offset]) - 1)


class NamedBarriers(dict):
    """The named barriers of a program, each initialised by its first use."""

    def __init__(self):
        self.lock = threading.Lock()

    def __missing__(self, at):
        assert 0 <= at[0] < 16, "no such barrier"
        self[at] = Barrier()
        self[at].init(at[1])
        return self[at]

    def arrive(self, at):
        with self.lock:
            barrier = self[at]
        phase = barrier.phase  # which cannot end without this thread
        barrier.update(arrivals=current.threads)
        return barrier, phase


def named_barrier_arrive(number, threads):
    current.named.arrive((number, threads))


def named_barrier_sync(number, threads):
    barrier, phase = current.named.arrive((number, threads))
    barrier.wait(phase & 1)


def run_threads(jobs, named=None):
    """Run (program number, function, arguments[, threads of the GPU]) each in a thread; raise the first error."""
    errors, size, first = [], current.size, current.first

    def run(number, function, args, threads=0):
        current.number, current.size, current.reading, current.writing = number, size, (), ()
        current.first, current.threads, current.named = first, threads, named
        try:
            function(*args)
            store_wait_complete()
        except Exception as error:  # noqa: BLE001  it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=job, name=f"{job[1].__name__} {i}") for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def warp_specialize(partitions, warps, registers):
    threads = [current.first] + [32 * count for count in warps]  # the first partition has the warps of the launch
    jobs = zip(partitions, threads, strict=True)
    run_threads([(current.number, function, args, count) for (function, args), count in jobs], NamedBarriers())


def allocate(dtype, shape, layout):
    if layout == "barrier":
        return Barriers(shape[0]) if len(shape) > 1 else Barrier()
    return Shared(torch.full(shape, torch.nan).to(dtype))


def either(torch_function, function):
    """Of tensors, or a tensor and a number, the operand that is not NaN, as the hardware has it; of integers."""
    def of(a, b):
        return torch_function(a, torch.as_tensor(b, dtype=a.dtype)) if isinstance(a, torch.Tensor) else function(a, b)

    return of


def where(condition, a, b):
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else a if condition else b


def mma_wait(pending, products):
    values = tuple(product.value() for product in products)
    return values if len(values) > 1 else values[0]


nothing = lambda *args, **kwargs: None  # noqa: E731  layouts
LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x, tensor=torch.Tensor, shared_memory_descriptor=Shared,
    static_assert=nothing, to_tensor=lambda x: x, static_range=range,
    float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
    int8=torch.int8, int32=torch.int32, uint32=torch.int64, int64=torch.int64,
    program_id=lambda axis: current.number, num_programs=lambda axis: current.size,
    cdiv=lambda a, b: -(-a // b), minimum=either(torch.fmin, min), maximum=either(torch.fmax, max), where=where,
    zeros=lambda shape, dtype, layout: torch.zeros(shape), zeros_like=torch.zeros_like,
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    arange=lambda start, end, layout: torch.arange(start, end), expand_dims=lambda x, axis: x.unsqueeze(axis),
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log=torch.log, abs=torch.abs,
    reshape=torch.reshape, permute=torch.permute, broadcast=torch.broadcast_tensors,
    split=lambda x: x.unbind(-1), join=lambda x, y: torch.stack((x, y), -1),
    fma=lambda a, b, c: a * b + c, convert_layout=lambda x, layout: x, load=load_from, store=store,
    warp_specialize=warp_specialize, allocate_shared_memory=allocate,
    NVMMADistributedLayout=nothing, NVMMASharedLayout=nothing, DotOperandLayout=nothing,
    SliceLayout=nothing, BlockedLayout=nothing, SwizzledSharedLayout=nothing,
)
NAMES = {
    "gl": LANGUAGE, "TRITON": (3, 6), "LN2": LN2.value, "LOG2E": LOG2E.value,
    "fence_async_shared": nothing, "store_async": store_async, "add_async": add_async,
    "semaphore_release": semaphore_release, "semaphore_wait": semaphore_wait, "opaque": int,
    "inline_asm": lambda asm, x: int(x), "NamedTuple": NamedTuple, "atomic_increment": atomic_increment,
    "uniform": lambda x: x.number if isinstance(x, FirstLane) else int(x),
    "named_barrier_arrive": named_barrier_arrive, "named_barrier_sync": named_barrier_sync, "barrier": nothing,
    "computed_together": lambda x: x, "clamp": lambda x: x.nan_to_num(-(2.0**100)).clamp(-(2.0**100), 2.0**100),
    "broadcast_rows": lambda x, tile: x.unsqueeze(1),
    "word_places": lambda tile: (
        torch.arange(tile.shape[0])[:, None], torch.arange(tile.shape[1] // 32)[None], torch.arange(32)[None, None]
    ),
    "tma": SimpleNamespace(store_wait=store_wait, tensor_descriptor=Descriptor),
    "store_wait_complete": store_wait_complete, "ctaid": lambda: current.number,
    "rescale": lambda x, alpha: x * alpha, "mark_nan": mark_nan,
    "load_async": lambda desc, at, barrier, buf, pred=True: desc.load(at, barrier, buf) if pred else None,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=lambda bar, count: bar.init(count),
        expect=lambda bar, nbytes, pred=True: bar.update(arrivals=1, expected=nbytes) if pred else None,
        arrive=lambda bar, count: bar.update(arrivals=count),
        wait=lambda bar, parity, pred=True: bar.wait(parity) if pred else None,
    ),
    "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc, use_acc),
    "warpgroup_mma_wait": mma_wait,
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
    """The kernel's functions, types and constants, as Python."""
    names = dict(NAMES)
    body = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("gluon" in ast.unparse(d) for d in node.decorator_list):
            node.decorator_list = []
            body += [node] if node.name not in names else []
        elif isinstance(node, ast.ClassDef) or isinstance(node, ast.Assign) and "gl.constexpr" in ast.unparse(node):
            body.append(node)
    exec(compile(ast.fix_missing_locations(Casts().visit(ast.Module(body, []))), "the kernel", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")})
