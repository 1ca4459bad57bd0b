"""Make Triton's interpreter as strict as a GPU, and quicker: import it, for tests, before the first kernel runs.

What a GPU leaves undefined the interpreter makes look right: here lanes loaded outside their mask are NaN instead of 0,
programs run in reverse order, and a grid or a dot that a GPU refuses is refused.

On a CPU without AVX-512, K Q^T is another number for numpy than Q K^T, so that the P of a backward pass is not that of
its forward pass. Here either is the same product, one way round.

What makes it slow is that every call of a device function replaces the members of triton.language again, one by one,
a millisecond each time. Once a module has been through that, it is skipped: the launch itself does it.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_builder = interpreter.InterpreterBuilder
_load, _set_index, _set_grid, _dot = (
    _builder.create_masked_load, _builder.set_grid_idx, _builder.set_grid_dim, _builder.create_dot
)


def _masked_load(self, ptrs, mask, other, *rest):
    if other is None and ptrs.data.size > 1 and not mask.data.all():  # a scalar's other=0 arrives as None
        element = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        undefined = np.nan if np.issubdtype(dtype, np.floating) else True if dtype == np.bool_ else np.iinfo(dtype).max
        other = interpreter.TensorHandle(np.full_like(ptrs.data, undefined, dtype=dtype), element)
    return _load(self, ptrs, mask, other, *rest)


def _set_reversed_index(self, x, y, z):
    width, height, depth = self.grid_dim
    _set_index(self, width - 1 - x, height - 1 - y, depth - 1 - z)


def _set_limited_grid(self, x, y, z):
    assert x < 2**31 and y <= 65535 and z <= 65535, f"a GPU has no grid of {(x, y, z)}"
    _set_grid(self, x, y, z)


def _min_dot_size(a, b):
    bits = a.scalar.primitive_bitwidth
    return 1, 1, 256 // bits if bits < 32 else 8


def _checked_dot(self, a, b, d, *rest):
    assert tl.bfloat16 not in (a.dtype, b.dtype), "the interpreter multiplies the raw bits of bfloat16: upcast first"
    if a.data.ndim != 2 or a.data[0].tobytes() <= b.data[:, 0].tobytes():
        return _dot(self, a, b, d, *rest)
    turned = [interpreter.TensorHandle(np.ascontiguousarray(t.data.T), t.dtype.scalar) for t in (b, a, d)]
    return interpreter.TensorHandle(np.ascontiguousarray(_dot(self, *turned, *rest).data.T), d.dtype.scalar)


_patched = set()


def _call_patched(self, *args, **kwargs):
    module = self.fn.__module__
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_patched
_builder.create_masked_load = _masked_load
_builder.set_grid_idx = _set_reversed_index
_builder.set_grid_dim = _set_limited_grid
_builder.create_dot = _checked_dot
interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _min_dot_size
