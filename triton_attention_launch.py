"""What the host does around a kernel: operators, launches, tiles.

    public function      check_* (triton_attention_checks.py) -> differentiate(Function, ...)
    Function.forward     the operator (define_op): opaque to the interpreter, transparent to torch.compile
    operator body        tile_for -> launch(kernel, grid, ...)
"""

import contextlib
import functools
import importlib
import os
import threading

import numpy
import torch
from torch._functorch.utils import unwrap_dead_wrappers

from triton_attention_device import DEVICE, INTERPRETED, TRITON, allows_tf32, architecture  # before triton
from triton.runtime.errors import OutOfResources

import triton_attention_tuned as tuned
from triton_attention_replay import note, off, recording, replayed

# ---- operators


# keys of tensors and threads for which the dispatcher would do no more than call the launcher: autograd is in the
# Functions, autocast in autocast(), and the bit Negative is resolved
_PLAIN = {"CPU", "CUDA", "XPU", "ADInplaceOrView", "BackendSelect", "Negative"} | {
    key + backend for key in ("Autograd", "Autocast") for backend in ("CPU", "CUDA", "XPU")
}
_WATCHED = {"Python", "PythonTLSSnapshot"}  # those of a thread whose launcher is being recorded
_NO_TENSORS = {type(None), bool, int, float, str, torch.dtype}
_kinds = {}  # keys as a number -> "plain", "watched" or "other"
_keys_of, _keys_of_thread = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set


def _kind(keys):
    number = keys.raw_repr()
    kind = _kinds.get(number)
    if kind is None:
        others = set(str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")) - _PLAIN
        kind = _kinds[number] = "plain" if not others else "watched" if others == _WATCHED else "other"
    return kind


def must_dispatch(args):
    """Whether somebody (torch.compile, a mode, a transform, a tensor of another kind) has to see the operator."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return True
    kind = _kind(_keys_of_thread())
    if kind != "plain" and not (kind == "watched" and recording() and torch._C._len_torch_dispatch_stack() == 1):
        return True
    if torch._C._len_torch_function_stack() > 0:  # torch.set_default_device is one that does not care
        modes = torch.overrides._get_current_function_mode_stack()
        if any(type(mode) is not torch.utils._device.DeviceContext for mode in modes):
            return True
    for a in args:
        kind = type(a)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if _kind(_keys_of(a)) != "plain":
                return True
        elif kind not in _NO_TENSORS and isinstance(a, torch.Tensor):
            return True
    return False


def _widened(t):
    """bfloat16 as float32, with the same strides: launchers lay their outputs out by them."""
    once = t[tuple(slice(None) if stride else slice(1) for stride in t.stride())]
    return once.new_empty_strided(once.shape, once.stride(), dtype=torch.float32).copy_(once).expand(t.shape)


def _without_bfloat16(launcher, wide=()):
    """The interpreter computes on the raw bits of bfloat16: upcast before, round in torch after."""

    @functools.wraps(launcher)
    def run(*args):
        asked = [a for a in args if isinstance(a, torch.dtype)]
        dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor)]
        if torch.bfloat16 not in asked + dtypes:
            return launcher(*args)
        dtype = (asked + dtypes)[0]
        args = [_widened(a) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        out = launcher(*(torch.float32 if a is torch.bfloat16 else a for a in args))
        if not isinstance(out, tuple):
            return out.to(dtype)
        return tuple(o if i in wide else o.to(dtype) for i, o in enumerate(out))

    return run


def define_op(name, fake, wide=()):
    """Decorator: make `triton_attention::name` of a launcher; `fake` gives its output without running it, `wide` are
    the numbers of the outputs that are float32 whatever the inputs are.

    Compiled kernels become a `triton_op`, which Inductor looks into; interpreted ones a `custom_op`, which
    nothing may trace into. A plain eager call goes straight to the launcher, past 35 us of dispatching, and on a GPU
    soon past the launcher too (triton_attention_replay.py).
    """

    def decorate(launcher):
        if INTERPRETED:
            launcher = _without_bfloat16(launcher, wide)
            op = torch.library.custom_op(f"triton_attention::{name}", launcher, mutates_args=())
        else:
            op = torch.library.triton_op(f"triton_attention::{name}", launcher, mutates_args=())
        op.register_fake(fake)  # that of triton_op is the launcher, which asks too much of a dynamic length

        @functools.wraps(launcher)
        def eager(*args):
            # what the dispatcher would do: the imaginary part of a conjugate is a view on memory of the opposite sign
            return launcher(*(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args))

        @functools.wraps(launcher)
        def call(*args):
            return op(*args) if must_dispatch(args) else replayed(eager, args, {})

        call.op = op
        return call

    return decorate


class Function(torch.autograd.Function):
    """A torch.autograd.Function for differentiate. If `op` takes the arguments of its forward, it gets its derivative:
    in a program of torch.export or torch.jit.trace it stands alone."""

    op = None

    def __init_subclass__(cls):
        @torch.compiler.allow_in_graph
        def node(*args):
            return cls.apply(*args)

        cls.node = staticmethod(lambda *args: node(*args))
        if cls.op is not None:
            cls.op.op.register_autograd(cls.backward, setup_context=cls.setup_context)


def asks_gradient(args):
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def replayable(function):
    """Decorator of a public function: an eager call without a gradient is replayed as a whole, checks included."""
    if INTERPRETED:
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        everything = (*args, *kwargs.values())
        if must_dispatch(everything) or asks_gradient(everything) or torch.is_autocast_enabled(DEVICE.type):
            return function(*args, **kwargs)
        return replayed(function, args, kwargs)

    return call


@torch._dynamo.assume_constant_result
def _is_exporting():
    return torch.compiler.is_exporting()  # which torch.compile of torch 2.11 takes for True


@torch._dynamo.assume_constant_result
def _inside_transform():
    return torch._C._functorch.peek_interpreter_stack() is not None


def differentiate(function, *args):
    """`function.apply(*args)`, or its forward alone where nobody can ask for a gradient (saves 15 us)."""
    if _is_exporting() and not _inside_transform():
        return function.forward(*args)  # the operators have derivatives; what apply leaves in the graph has none
    if torch.compiler.is_dynamo_compiling():
        if _inside_transform():  # of torch.func, of which torch.compile's own way with Functions loses gradients
            return function.node(*args)
        # torch.compile takes no tensor twice: self-attention on a plain x would be refused
        again = [any(a is b for b in args[:i]) and isinstance(a, torch.Tensor) for i, a in enumerate(args)]
        return function.apply(*(a.view_as(a) if twice else a for a, twice in zip(args, again, strict=True)))
    if torch._C._get_tracing_state() is not None:
        return function.forward(*args)  # torch.jit.trace too, and could not run what apply leaves
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return function.apply(*args)
    args = unwrap_dead_wrappers(args)  # what torch.func.vjp saved, after it has returned
    if asks_gradient(args):
        # past Function.apply itself, which asks inspect for the signature of forward: 50 us
        return super(torch.autograd.Function, function).apply(*args)
    return function.forward(*args)


def empty_heads(like, *shape, dtype=None):
    """An empty [B, H, M, D] in the memory order of `like`: where that is [B, M, H, D], as projections leave them,
    they become columns again without a copy."""
    B, H, M, D = shape
    strides = (M * H * D, D, H * D, 1) if like.stride(1) < like.stride(2) else (H * M * D, M * D, D, 1)
    return like.new_empty_strided(shape, strides, dtype=dtype)


_interpreting = threading.RLock()  # Triton's interpreter replaces what triton.language has, for the whole process
if hasattr(os, "register_at_fork"):  # a child has only the thread that forked: no other may be in a kernel then
    os.register_at_fork(
        before=_interpreting.acquire, after_in_parent=_interpreting.release, after_in_child=_interpreting.release
    )


def launch(kernel, programs, *args, device=None, **constants):
    """Run `programs` instances of a kernel on `device`, that of the first argument by default."""
    if INTERPRETED:
        with _interpreting, numpy.errstate(all="ignore"):  # numpy warns of inf - inf, a GPU does not
            return kernel[(programs,)](*args, **constants)
    if must_dispatch(args[:1]):
        kernel = torch.library.wrap_triton(kernel)
        constants.pop("maxnreg", None)  # Inductor of torch 2.11 does not know it
    device = device or args[0].device
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    try:
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            note(kernel, kernel[(programs,)](*args, **constants), programs, args, constants)
    except OutOfResources as error:
        tile = " x ".join(str(constants[c]) for c in ("BLOCK_M", "BLOCK_N") if c in constants)
        raise ValueError(
            f"the tile {tile} (block_m x block_n) does not fit this GPU: it needs {error.required} of {error.name}, "
            f"there are {error.limit}; pass a smaller block_m or block_n"
        ) from error


def fold(info, in_dims, *tensors):
    """For a vmap rule: move the mapped dimension of each tensor into its batch, [B, ...] -> [V * B, ...].

    The first tensor has the full batch; the others may have 1 there (masks) or be None.
    """
    moved = [
        None if t is None else t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=False)
    ]
    size = (info.batch_size, moved[0].shape[1])
    return [None if t is None else t.expand(*size, *t.shape[2:]).flatten(0, 1) for t in moved]


def unfold(info, out):
    """Inverse of fold for an output: [V * B, ...] -> [V, B, ...]."""
    return out.unflatten(0, (info.batch_size, -1))


# ---- tiles


def hopper(module, device):
    """The module of kernels for Hopper if the device is one and this Triton has what they are made of, else None."""
    if INTERPRETED or architecture(device) != "sm_90" or _forced:
        return None
    return _import(module)


@functools.lru_cache
def _import(module):
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError):  # Gluon is experimental: without it, the plain kernels run
        return None


def places_of(arch):
    """Whose rows of the table serve a GPU, the last of them first."""
    return ["any", arch, *(f"{arch}, triton {x}.{y}" for x, y in ((3, 8), (3, 9)) if TRITON >= (x, y))]


@functools.lru_cache
def _tuned(op, arch, bits, head_dim, causal):
    """The table's row for the smallest head dim that holds ours, the widest one past the table's end: of several, one
    for this GPU before one for any, and before it one for this GPU from some Triton on. An op named "op, variant" takes
    the row of "op" where there is none of the variant.
    """
    names, found = (op, op.split(",")[0]), []
    places = places_of(arch)
    for i, ((name, where, row_bits, dim, row_causal), tile) in enumerate(tuned.TILES.items()):
        if name in names and where in places and row_bits == bits and row_causal in (causal, None):
            fit = -dim if dim >= head_dim else dim - (1 << 30)
            found.append((fit, places.index(where), name == op, i, tile))
    if not found:
        raise KeyError(f"no tile for {op}, {bits} bits")
    return max(found)[-1]


_forced = []


@contextlib.contextmanager
def forcing(tile):
    """Inside, every kernel of this process that asks the table gets `tile` instead, in all threads, as a gradient is
    computed in another one: for scripts that search for a better tile."""
    _forced.append(tile)
    try:
        with off():
            yield
    finally:
        _forced.pop()


def tile_for(op, dtype, head_dim, causal, device, block_m=None, block_n=None) -> tuned.Tile:
    """The tuned tile of a kernel on a device, or the caller's where block_m or block_n is given."""
    if _forced:
        return _forced[-1]
    if INTERPRETED:
        tile = tuned.INTERPRETED._replace(BLOCK_D=16) if op in tuned.INTERPRETED_SLICED else tuned.INTERPRETED
    else:
        tile = _tuned(op, architecture(device), dtype.itemsize * 8, head_dim, bool(causal))
    if block_m is None and block_n is None:
        return tile
    block_m, block_n = block_m or tile.BLOCK_M, block_n or tile.BLOCK_N
    num_warps = 8 if block_m * block_n > 1 << 13 else 4
    return tile._replace(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=2)


def compile_options(tile, device):
    """What a tile says to the compiler, for launch."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.registers and not INTERPRETED and architecture(device).startswith("sm_"):
        options["maxnreg"] = tile.registers
    return options


def dot_precision(dtype, device):
    """How a kernel multiplies float32: in TF32 if torch.set_float32_matmul_precision() allowed it, else in full.

    In full, on NVIDIA GPUs, is a sum of six products of bfloat16, three of which make up a float32. (Three products of
    TF32 lose two bits, which is past the error that the tests allow.)
    """
    if dtype != torch.float32 or INTERPRETED or not architecture(device).startswith("sm_"):
        return "ieee"
    return "tf32" if allows_tf32() else "bf16x6"
