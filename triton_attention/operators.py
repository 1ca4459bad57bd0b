"""Operators: what PyTorch knows of a launcher, and which calls of it PyTorch has to see.

    public function      check_* (checks.py) -> differentiate(Function, ...)
    Function.forward     the operator (define_op), opaque to torch.compile
    operator body        tile_for (tile_choice.py) -> launch(kernel, grid, ...) (launch.py)
"""

import functools
import importlib

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch._library.autograd import Info, make_autograd_impl
from torch._library.custom_ops import get_library_allowing_overwrite
from torch.utils.flop_counter import flop_registry, register_flop_formula

from triton_attention.device import DEVICE, INTERPRETED, architecture
from triton_attention.replay import recording, stand_in
from triton_attention.tile_choice import is_forced

# keys of tensors and threads for which the dispatcher would do no more than call the launcher: autograd is in the
# Functions, autocast in autocast()
_PLAIN = {"CPU", "CUDA", "XPU", "ADInplaceOrView", "BackendSelect"} | {
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


def in_forward_mode():
    """Whether a forward-mode derivative may be asked for (torch.autograd.forward_ad, torch.func.jvp)."""
    return torch.autograd.forward_ad._current_level >= 0


def must_dispatch(args):
    """Whether torch.compile, a mode, a transform or a tensor of another kind has to see the operator."""
    if torch.compiler.is_compiling() or in_forward_mode():
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


def _without_bfloat16(launcher, wide, like):
    """The interpreter computes on the raw bits of bfloat16: upcast before, round in torch after."""

    @functools.wraps(launcher)
    def run(*given):
        args = given
        asked = [a for a in args if isinstance(a, torch.dtype)]
        dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor)]
        if torch.bfloat16 not in asked + dtypes:
            return launcher(*args)
        dtype = (asked + dtypes)[0]
        args = [_widened(a) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        out = launcher(*(torch.float32 if a is torch.bfloat16 else a for a in args))
        if not isinstance(out, tuple):
            return out.to(dtype)
        models = [given[like[i]] if i in like else None for i in range(len(out))]
        wanted = [dtype if model is None else model.dtype for model in models]
        return tuple(o if i in wide else o.to(wanted[i]) for i, o in enumerate(out))

    return run


def hopper_kernels(name, device):
    """The module of kernels for Hopper if the device is one and this Triton has what they are made of, else None."""
    if INTERPRETED or architecture(device) != "sm_90" or is_forced():
        return None
    return _import(f"triton_attention.hopper.{name}")


@functools.lru_cache
def _import(module):
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError):  # Gluon is experimental: without it, the plain kernels run
        return None


def _count_flops(packet, flops):
    """Have torch.utils.flop_counter.FlopCounterMode count an operator: flops(*shapes of its arguments)."""
    flop_registry.pop(packet, None)  # as a module may be loaded again
    register_flop_formula(packet)(lambda *shapes, out_shape=None, **_: flops(*shapes))


def matmul_flops(rows, N, width):
    """The operations of products of [B, H, M] rows with N others, `width` wide together, as torch counts attention:
    none is left out for a causal bound."""
    B, H, M = rows[:3]
    return 2 * B * H * M * N * width


def define_op(name, fake, wide=(), like=None, hopper=None, flops=None):
    """Decorator: make `triton_attention::name` of a launcher; `fake` gives its output without running it, `wide` are
    the numbers of the outputs that are float32 whatever the inputs are, `like` says {output: input} of one that has the
    dtype of another input than the first, `hopper` is the module in triton_attention/
    hopper/ that serves the operator on such a GPU, unless its refuses(*args) says why not. flops(*shapes) is what
    FlopCounterMode counts, for an operator that multiplies matrices.

    Here a call is decided on, once. What PyTorch has to see goes to the dispatcher, and from there to the launcher. A
    plain eager call goes past 35 us of dispatching to the kernels for this GPU or to the launcher, and soon past those
    too (replay.py).

    To torch.compile an operator is opaque, and decides in compiled code as an eager call does. Inductor has no way into
    Gluon; and the kernels that it can look into it compiles anew, with what it knows of them: without a limit to
    registers, and with products that read memory which is not theirs. It is defined as torch.library.custom_op defines
    one, but for what that does in each call, which is half of the host's time for a short one: a call without a
    gradient goes from the dispatcher to the launcher, not through it once more.
    """

    def decorate(launcher):
        if INTERPRETED:
            launcher = _without_bfloat16(launcher, wide, like or {})

        @functools.wraps(launcher)
        def chosen(*args):
            kernels = hopper_kernels(hopper, args[0].device)
            if kernels is None or kernels.refuses(*args) is not None:
                return launcher(*args)
            return kernels.run(*args)

        if hopper is None or INTERPRETED:
            chosen = launcher

        @functools.wraps(launcher)
        def repeated(*args):
            replay = stand_in(chosen, args, {})
            return chosen(*args) if replay is None else replay()

        @functools.wraps(launcher)
        def dispatched(*args):
            return launcher(*args) if must_dispatch(args) else repeated(*args)  # what jvp has to see, still does

        library = get_library_allowing_overwrite("triton_attention", name)  # as a module may be loaded again
        schema = torch.library.infer_schema(launcher, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"triton_attention::{name}", fake, lib=library)
        packet = getattr(torch.ops.triton_attention, name)
        if flops is not None:
            _count_flops(packet, flops)
        overload = packet.default  # which Dynamo knows wherever it comes from
        derivative = Info(None, None)
        differentiable = make_autograd_impl(overload, derivative)

        @torch.compiler.disable
        def above_autograd(keyset, *args):
            if must_dispatch(args) or asks_gradient(args):
                return differentiable(keyset, *args)
            return repeated(*args)

        library.impl(name, above_autograd, "Autograd", with_keyset=True)
        library.impl(name, torch.compiler.disable(dispatched), "CompositeExplicitAutograd")

        @functools.wraps(launcher)
        def call(*args):
            return overload(*args) if must_dispatch(args) else repeated(*args)

        call.overload, call.derivative = overload, derivative
        return call

    return decorate


def like_first(x, *others):
    """The fake of an operator whose result is like its first argument."""
    return x.new_empty(x.shape)


class Function(torch.autograd.Function):
    """A torch.autograd.Function for differentiate. An `op` is its forward, unless it has one of its own that takes the
    same arguments, and gets its derivative: in a program of torch.export or torch.jit.trace it stands alone. A
    `tangent` is its jvp, in a class beside it: torch.compile refuses a Function that has one."""

    op = None

    def __init_subclass__(cls):
        @torch.compiler.allow_in_graph
        def node(*args):
            return cls.apply(*args)

        cls.node = staticmethod(lambda *args: node(*args))
        cls.dual = cls
        if "tangent" in vars(cls):
            cls.dual = type(cls)(cls.__name__, (cls,), {"jvp": staticmethod(cls.tangent)})
        if "op" in vars(cls):
            if "forward" not in vars(cls):
                cls.forward = staticmethod(cls.op)
            cls.op.derivative._backward_fn, cls.op.derivative._setup_context_fn = cls.backward, cls.setup_context

    @staticmethod
    def save(ctx, *tensors):
        """Keep tensors for backward, and for jvp where a forward-mode derivative is asked for: what is kept for it
        lives as long as the graph."""
        ctx.save_for_backward(*tensors)
        if in_forward_mode():
            ctx.save_for_forward(*tensors)

    @classmethod
    def vmap(cls, info, in_dims, *args):
        """For a Function whose tensors and results have the batch in front; another one has a rule of its own."""
        out = differentiate(cls, *fold(info, in_dims, *args))
        if isinstance(out, torch.Tensor):
            return unfold(info, out), 0
        return tuple(unfold(info, o) for o in out), (0,) * len(out)


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
        replay = stand_in(function, args, kwargs)
        return function(*args, **kwargs) if replay is None else replay()

    return call


@torch._dynamo.assume_constant_result
def _is_exporting():
    return torch.compiler.is_exporting()  # which torch.compile of torch 2.11 takes for True


@torch._dynamo.assume_constant_result
def inside_transform():
    return torch._C._functorch.peek_interpreter_stack() is not None


def differentiate(function, *args):
    """`function.apply(*args)`, or its forward alone where no gradient can be asked for (saves 15 us)."""
    if _is_exporting() and not inside_transform():
        return function.forward(*args)  # the operators have derivatives; what apply leaves in the graph has none
    if torch.compiler.is_dynamo_compiling():
        if inside_transform():  # of torch.func, of which torch.compile's own way with Functions loses gradients
            return function.node(*args)
        # torch.compile takes no tensor twice: self-attention on a plain x would be refused
        again = [any(a is b for b in args[:i]) and isinstance(a, torch.Tensor) for i, a in enumerate(args)]
        return function.apply(*(a.view_as(a) if twice else a for a, twice in zip(args, again, strict=True)))
    if torch._C._get_tracing_state() is not None:
        return function.forward(*args)  # torch.jit.trace too, and could not run what apply leaves
    if torch._C._functorch.peek_interpreter_stack() is not None or in_forward_mode():
        return function.dual.apply(*args)
    args = unwrap_dead_wrappers(args)  # what torch.func.vjp saved, after it has returned
    if asks_gradient(args):
        # past Function.apply itself, which asks inspect for the signature of forward: 50 us
        return super(torch.autograd.Function, function).apply(*args)
    return function.forward(*args)


def fold(info, in_dims, *args):
    """For a vmap rule: move the mapped dimension of each tensor into its batch, [B, ...] -> [V * B, ...].

    The first tensor has the full batch; the others may have 1 there (masks). What is no tensor stays.
    """
    moved = [
        a if not isinstance(a, torch.Tensor) else a.unsqueeze(0) if dim is None else a.movedim(dim, 0)
        for a, dim in zip(args, in_dims, strict=False)
    ]
    size = (info.batch_size, moved[0].shape[1])
    return [a.expand(*size, *a.shape[2:]).flatten(0, 1) if isinstance(a, torch.Tensor) else a for a in moved]


def unfold(info, out):
    """Inverse of fold for an output: [V * B, ...] -> [V, B, ...]."""
    return out.unflatten(0, (info.batch_size, -1))
