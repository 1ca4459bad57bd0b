"""What the Hopper kernels need of PTX that Gluon does not offer."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of all warps of a partition; Triton 3.7 renamed it


@gluon.jit
def inline_asm(ASM: gl.constexpr, x):
    """A volatile instruction with one operand and one result."""
    return gl.inline_asm_elementwise(ASM, "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def opaque(x):
    """x, of which LLVM knows nothing: what depends on it is computed here, not earlier and then kept in registers."""
    return inline_asm("mov.b32 $0, $1;", x)


@gluon.jit
def uniform(x):
    """x of the first lane, for all: to ptxas a warp-uniform value."""
    return inline_asm("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", x)


@gluon.jit
def ctaid():
    """program_id(0), read here: LLVM would read it at the start, and keep it in a register."""
    return inline_asm("mov.u32 $0, %ctaid.x;", 0)


@gluon.jit
def store_wait_complete():
    """Wait until the TMA stores of this warp are in memory, not only read from shared memory (tma.store_wait)."""
    inline_asm("cp.async.bulk.wait_group 0; mov.b32 $0, 0;", 0)


@gluon.jit
def computed_together(x):
    """x, two elements a thread, of which ptxas computes both before it uses the first: max(x_0, min(x_1, -inf))."""
    ASM: gl.constexpr = "{ .reg .f32 t; min.f32 t, $3, 0fFF800000; max.f32 $0, $2, t; mov.b32 $1, $3; }"
    return gl.inline_asm_elementwise(ASM, "=&f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def clamp(x):
    """x, 16 bits an element, no larger than the largest float16, or 2^100 in bfloat16; the least of these for NaN."""
    KIND: gl.constexpr = "bf16x2" if x.dtype == gl.bfloat16 else "f16x2"
    LARGE: gl.constexpr = "7180" if x.dtype == gl.bfloat16 else "7BFF"
    LEAST: gl.constexpr = "F180" if x.dtype == gl.bfloat16 else "FBFF"
    ASM: gl.constexpr = (
        f"{{ .reg .b32 t, u; mov.b32 t, 0x{LEAST}{LEAST}; max.{KIND} u, $1, t; mov.b32 t, 0x{LARGE}{LARGE}; "
        f"min.{KIND} $0, u, t; }}"
    )
    return gl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)


@gluon.jit
def atomic_increment(ptr):
    """Add 1 to an integer in memory: its old value in the first lane, 0 in the others; see uniform. A warp waits for it
    where it uses it."""
    ASM: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; mov.u32 $0, 0; "
        "@p atom.relaxed.gpu.global.add.u32 $0, [$1], 1; }"
    )
    return gl.inline_asm_elementwise(ASM, "=&r,l", [ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def semaphore_wait(ptr, value):
    """Spin until a semaphore in memory is at `value`; acquires what was written before it was released."""
    gl.inline_asm_elementwise(
        "{\n\t.reg .pred p;\n\t.reg .b32 r;\n\tSPIN:\n\tld.acquire.gpu.global.b32 r, [$1];\n\t"
        "setp.ne.s32 p, r, $2;\n\t@p bra SPIN;\n\tfence.proxy.async.global;\n\tmov.b32 $0, r;\n\t}",
        "=r,l,r", [ptr.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def semaphore_release(ptr, value, PENDING: gl.constexpr):
    """Set a semaphore to `value` once the TMA stores of this warp, but for the last PENDING, are in memory, which it
    releases."""
    ASM: gl.constexpr = (
        f"cp.async.bulk.wait_group {PENDING};\n\tbar.warp.sync 0xffffffff;\n\t"
        "st.release.gpu.global.b32 [$1], $2;\n\tmov.b32 $0, 0;"
    )
    gl.inline_asm_elementwise(ASM, "=r,l,r", [ptr.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_barrier_arrive(number, THREADS: gl.constexpr):
    """Arrive with this warp at a named barrier of THREADS threads, without waiting."""
    ASM: gl.constexpr = f"bar.arrive $1, {THREADS}; mov.b32 $0, 0;"
    inline_asm(ASM, number)


@gluon.jit
def named_barrier_sync(number, THREADS: gl.constexpr):
    """Arrive at a named barrier, and wait until all THREADS threads have."""
    ASM: gl.constexpr = f"bar.sync $1, {THREADS}; mov.b32 $0, 0;"
    inline_asm(ASM, number)


@gluon.constexpr_function
def _rescale_asm(n):
    """(PTX, constraints) for n elements of x and of alpha, of which the first four have those of both rows."""
    changed = " ".join(f"setp.neu.or.f32 p, ${2 * n + i}, 0f3F800000, p;" for i in range(1, 4))
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    asm = (
        f"{{ .reg .pred p; setp.neu.f32 p, ${2 * n}, 0f3F800000; {changed} vote.sync.any.pred p, p, 0xffffffff; "
        f"@!p bra KEEP; {multiply} KEEP: }}"
    )
    return asm, ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescale(x, alpha):
    """x * alpha, an accumulator and a factor for each row; a warp whose factors are all 1 branches around it."""
    PACK: gl.constexpr = x.shape[0] * x.shape[1] // 128
    ASM: gl.constexpr = _rescale_asm(PACK)
    alpha, _ = gl.broadcast(alpha, x)
    return gl.inline_asm_elementwise(ASM[0], ASM[1], [x, alpha], dtype=gl.float32, is_pure=True, pack=PACK)


@gluon.constexpr_function
def _mark_nan_asm(n, kind):
    """(PTX, constraints) for n elements in pairs: products, whose sum is NaN where one of them is."""
    outs, pairs = n // 4, n // 2
    x = [f"${outs + i}" for i in range(pairs)]
    products = [f"{{0}}, {a}, {b}, {{0}};" for a, b in zip(x[2::2], x[3::2], strict=True)]
    sums = " ".join(f"fma.rn.{kind} " + product.format("ut"[i % 2]) for i, product in enumerate(products))
    first = outs + pairs
    asm = (
        f"{{ .reg .pred p, q; .reg .b32 t, u; mov.b32 t, {x[0]}; mov.b32 u, {x[1]}; {sums} setp.nan.{kind} p|q, t, u; "
        f"or.pred p, p, q; mov.b32 t, 1; @p st.global.b32 [${first}], t; @p st.global.b32 [${first + n}], t; }}"
    )
    return asm, ",".join(["=r"] * outs + ["r"] * pairs + ["l"] * 2 * n)


@gluon.jit
def mark_nan(x, ptr, other_ptr):
    """Store 1 at two addresses if x, 16 bits an element, has NaN (or inf, now and then)."""
    PACK: gl.constexpr = x.shape[0] * x.shape[1] // 128
    ASM: gl.constexpr = _mark_nan_asm(PACK, "bf16x2" if x.dtype == gl.bfloat16 else "f16x2")
    ptr, _ = gl.broadcast(ptr.to(gl.int64), x)
    other_ptr, _ = gl.broadcast(other_ptr.to(gl.int64), x)
    gl.inline_asm_elementwise(ASM[0], ASM[1], [x, ptr, other_ptr], dtype=gl.int8, is_pure=False, pack=PACK)
