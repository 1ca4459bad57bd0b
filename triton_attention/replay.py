"""The third call like another is a replay: the same launches, with new addresses.

    first call    seen: nothing is kept but its key     a launcher in Python picks a tile, counts programs, reads a
    second call   recorded: which kernels it launched,  dozen strides, and Triton looks at each argument again: for a
                  and where each argument came from     short sequence that takes longer than the GPU needs
    later calls   memory for the results, an address
                  for each pointer, the launches        what is left of the host's work: a tenth

The key of a call has everything that its launches depend on: shapes, strides, dtypes, the alignment of addresses, which
arguments are one tensor, the options, the stream. Only a launcher that does nothing but view its arguments, take empty
memory and launch can be replayed. A TorchDispatchMode watches the second call: one that computes anything by PyTorch is
refused, and runs in full each time. So is every call that torch.compile, vmap or another mode has to see, or a CUDA
graph records.
"""

import contextlib
import functools
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triton_attention.device import allows_tf32, is_counter, is_current, stream_of

_MOST = 4096  # keys; then all are forgotten
_records = {}  # key -> None: seen once; False: not to be replayed; else a Recording
_off = []  # one entry for each off() that is entered
_this_thread = threading.local()  # .recorder: what watches
_EMPTY = {
    torch.ops.aten.new_empty.default, torch.ops.aten.empty_strided.default, torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty_strided.default,
}


class _Recorder(TorchDispatchMode):
    """Watches a launcher at work."""

    def __init__(self):
        super().__init__()
        self.fresh, self.launches, self.computes, self.moves = [], [], False, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.fresh.append(out)
        elif not func.is_view:
            self.computes = True
        else:
            views = out if isinstance(out, (list, tuple)) else (out,)
            self.moves |= any(view.data_ptr() != args[0].data_ptr() for view in views)
        return out


class Recording:
    """What a launcher did. `taken` is the memory that it took: (size, stride, dtype) of a tensor that it returned, or
    where the rest is in `scratch` bytes, taken at once; `returned` says which are its results, with the number past the
    last for None; `launches` are (compiled kernel on its grid, arguments, [(argument, which address, bytes from
    there)]). Among the arguments, a descriptor stands for those of other memory."""

    def __init__(self, taken, scratch, returned, launches):
        self.taken, self.scratch, self.returned, self.launches = taken, scratch, returned, launches

    def replay(self, addresses, device):
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device) if self.scratch else None
        start = scratch.data_ptr() if self.scratch else 0
        tensors = []
        for what in self.taken:
            if isinstance(what, int):
                tensors.append(None)
                addresses.append(start + what)
            else:
                size, stride, dtype = what
                t = torch.empty_strided(size, stride, dtype=dtype, device=device)
                tensors.append(t)
                addresses.append(t.data_ptr())
        tensors.append(None)
        for run, args, pointers in self.launches:
            args = args.copy()
            for i, which, offset in pointers:
                address = addresses[which] + offset
                args[i] = address if args[i] is None else _moved(args[i], address)
            run(*args)
        return tensors[self.returned] if isinstance(self.returned, int) else tuple([tensors[i] for i in self.returned])


class _Memory:
    """All that Triton's launcher asks of the tensor under a descriptor: where it is."""

    __slots__ = ("address",)

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


def _moved(descriptor, address):
    """A descriptor of the same tiles of other memory; by hand, as copy.copy takes four times as long."""
    moved = descriptor.__class__.__new__(descriptor.__class__)
    moved.__dict__.update(descriptor.__dict__, base=_Memory(address))
    return moved


def recording():
    """Whether the mode on top of PyTorch's stack is ours: a launcher is being watched."""
    return getattr(_this_thread, "recorder", None) is not None


def note(kernel, compiled, programs, args, constants):
    """To be called after a launch: `compiled` is what kernel[(programs,)](*args, **constants) returned."""
    if recording():
        constants = [constants[name] for name in kernel.arg_names[len(args):]]
        _this_thread.recorder.launches.append((compiled[(programs, 1, 1)], [*args, *constants]))


@contextlib.contextmanager
def off():
    """Inside, every call runs in full, in all threads, as a gradient is computed in another one: for scripts that
    change what a key does not have."""
    _off.append(None)
    try:
        yield
    finally:
        _off.pop()


def _key(function, args, names):
    """(key, addresses of the tensors, their device), or None for a call that cannot be replayed."""
    parts, addresses = [function, names, torch.is_grad_enabled()], []
    device, float32 = None, False
    for a in args:
        if isinstance(a, torch.Tensor):
            device = device or a.device
            if a.device != device or a.layout != torch.strided or a.is_nested or a.is_neg():
                return None
            address = a.data_ptr()
            addresses.append(address)
            parts += (a.shape, a.stride(), a.dtype, address & 15)
            float32 |= a.dtype is torch.float32
        elif isinstance(a, (tuple, list)):
            parts += (a.__class__, *map(type, a), *a)
        else:
            parts += (a.__class__, a)  # True == 1 == 1.0, but not for a check
    if device is None or not is_current(device):
        return None
    if float32:
        parts.append(allows_tf32())
    parts += (device.index, stream_of(device))
    if parts[-1] is None:  # a counter may be among the arguments
        return None
    if len(set(addresses)) < len(addresses):
        parts += [addresses.index(address) for address in addresses]
    return tuple(parts), addresses, device


def _record(key, function, args, kwargs):
    """Run a call in full, and keep a Recording of it, or that it has none."""
    recorder = _this_thread.recorder = _Recorder()
    try:
        with recorder:
            out = function(*args, **kwargs)
    finally:
        _this_thread.recorder = None
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    _records[key] = _understand(recorder, tensors, out)
    return out


def _understand(recorder, tensors, out):
    """The Recording of what was watched, or False."""
    known = [*tensors, *recorder.fresh]
    storages = [t.untyped_storage().data_ptr() for t in known]
    places = [(t.data_ptr(), storage) for t, storage in zip(known, storages, strict=True)]
    inputs = set(places[: len(tensors)])
    ambiguous = recorder.moves and len({s for _, s in inputs}) < len(inputs)  # two inputs of one storage, and slices
    if recorder.computes or ambiguous or not recorder.launches:
        return False
    launches = []
    for run, args in recorder.launches:
        pointers = []
        for i, a in enumerate(args):
            base = a if isinstance(a, torch.Tensor) else getattr(a, "base", None)  # of a TensorDescriptor
            if base is not None:
                args[i] = None if base is a else _moved(a, 0)
                address, storage = base.data_ptr(), base.untyped_storage().data_ptr()
                if address == 0 or is_counter(address):  # no elements, or always there
                    args[i] = address
                elif (address, storage) in places:
                    pointers.append((i, places.index((address, storage)), 0))
                elif storage in storages:
                    which = storages.index(storage)
                    pointers.append((i, which, address - places[which][0]))
                else:
                    return False
            elif not (a is None or isinstance(a, (bool, int, float, str, torch.dtype))):
                return False
        launches.append((run, args, pointers))
    fresh = [(tuple(t.shape), t.stride(), t.dtype) for t in recorder.fresh]
    results_at = {(t.data_ptr(), *what): i for i, (t, what) in enumerate(zip(recorder.fresh, fresh, strict=True))}
    results = out if isinstance(out, tuple) else (out,)
    returned = [
        len(fresh) if t is None else results_at.get((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype))
        for t in results
    ]
    if None in returned:
        return False
    taken, scratch = [], 0
    for i, (t, what) in enumerate(zip(recorder.fresh, fresh, strict=True)):
        taken.append(what if i in returned else scratch)
        scratch += 0 if i in returned else -(-t.untyped_storage().nbytes() // 512) * 512  # as the allocator aligns
    return Recording(taken, scratch, returned if isinstance(out, tuple) else returned[0], launches)


def stand_in(function, args, kwargs):
    """What to call, without arguments, instead of function(*args, **kwargs): a replay, or the call that is recorded;
    None where nothing stands in for it."""
    found = None if _off or recording() else _key(function, (*args, *kwargs.values()), tuple(kwargs))
    if found is None:
        return None
    key, addresses, device = found
    try:
        record = _records.get(key, "new")
    except TypeError:  # an argument without a hash
        return None
    if isinstance(record, Recording):
        return functools.partial(record.replay, addresses, device)
    if record is None:
        return functools.partial(_record, key, function, args, kwargs)
    if record == "new":
        if len(_records) >= _MOST:
            _records.clear()
        _records[key] = None
    return None
