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


@gluon.jit
def both_first(x):
    """x, two elements a thread, of which ptxas computes both before it uses the first: max(x_0, min(x_1, -inf))."""
    ASM: gl.constexpr = "{ .reg .f32 t; min.f32 t, $3, 0fFF800000; max.f32 $0, $2, t; mov.b32 $1, $3; }"
    return gl.inline_asm_elementwise(ASM, "=&f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def arrive_at(barrier, THREADS: gl.constexpr):
    """Say at a named barrier of the hardware, which THREADS threads use, that this warp has come, and go on."""
    ASM: gl.constexpr = f"bar.arrive $1, {THREADS}; mov.b32 $0, 0;"
    inline(ASM, barrier)


@gluon.jit
def meet_at(barrier, THREADS: gl.constexpr):
    """Wait at a named barrier until all of THREADS threads have come."""
    ASM: gl.constexpr = f"bar.sync $1, {THREADS}; mov.b32 $0, 0;"
    inline(ASM, barrier)
