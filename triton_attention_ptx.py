"""What the Hopper kernels tell the compilers in PTX, as no Gluon says it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def inline(ASM: gl.constexpr, x):
    """An instruction with a number in and a number out, which is neither left out nor moved past others."""
    return gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque(x):
    """x, which LLVM cannot see through: what depends on it is computed in its place, not kept in registers before."""
    return inline("mov.b32 $0, $1;", x)


@gluon.jit
def uniform(x):
    """x, of which ptxas learns that all lanes have the same."""
    return inline("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", x)
