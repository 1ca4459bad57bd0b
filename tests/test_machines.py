"""What depends on the machine: imports without a GPU, compiling for GPUs that are not here, what only a GPU shows."""

import contextlib
import functools
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests import emulate_hopper
from tests.reference import (
    BF16, DEVICE, F16, F32, GPU, HERE, INF, INTERPRETED, NAN, T, assert_close, compare, fused, randn, run_python,
    torch_fused, torch_scores, torch_staged, torch_values,
)
from triton_attention import device, replay
from triton_attention.hopper import backward, forward
from triton_attention.operators import hopper_kernels
from triton_attention_fused import attention_fused
from triton_attention_layer import TritonMultiheadAttention, attention_staged
from triton_attention_scores import attention_scores
from triton_attention_softmax import attention_softmax
from triton_attention_values import attention_values


@pytest.mark.skipif(not INTERPRETED, reason="about machines without a GPU")
@pytest.mark.parametrize("first", ["import triton.language", "import torch._inductor.config, torch._dynamo", "pass"])
def test_interpreter_whatever_was_imported_first(first):
    code = f"{first}\nimport torch\nfrom triton_attention_softmax import attention_softmax\n"
    code += "print(attention_softmax(torch.zeros(1, 1, 2, 4))[0, 0, 0])"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env, timeout=300)
    assert "0.2500, 0.2500" in run.stdout, run.stderr


IMPORT = """
import ctypes, importlib, os, torch, traceback
(gpus, cuda, driver), groups = {machine}, {groups}
def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched")
class Driver:
    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = driver
        return 0
load = ctypes.CDLL
ctypes.CDLL = lambda name, *args, **kwargs: Driver() if name == "libcuda.so.1" else load(name, *args, **kwargs)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, touched)
torch.cuda._lazy_init = torch.cuda.is_available = touched
torch.cuda.device_count = lambda: gpus
torch.version.cuda = cuda
os.environ.pop("TRITON_INTERPRET", None)
for group in groups:
    if os.fork() == 0:
        try:
            for name in group:
                members = vars(importlib.import_module(name)).values()
                import triton
                compiles = any(type(value) is triton.runtime.jit.JITFunction for value in members)
                print(name, triton.knobs.runtime.interpret, compiles, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.wait()
"""
PACKAGE = [".".join(p.relative_to(HERE).with_suffix("").parts) for p in (HERE / "triton_attention").rglob("[!_]*.py")]
MODULES = sorted([path.stem for path in HERE.glob("triton_attention_*.py")] + PACKAGE)
TILES = [["triton_attention.tiles"]]


@pytest.mark.parametrize("machine,interprets,groups", [  # (GPUs, CUDA of this PyTorch, CUDA of the driver); who is
    ((0, None, 0), True, [[name] for name in MODULES if "tuned" not in name]), ((1, None, 0), False, [MODULES]),
    ((1, "13.0", 12080), True, TILES), ((1, "13.1", 13000), False, TILES),  # imported in one process
], ids=["no GPU", "GPU", "old driver", "driver"])
def test_each_module_chooses_the_mode_and_leaves_cuda_alone(machine, interprets, groups):
    """Whichever is imported first; a driver that is too old for this PyTorch is no GPU."""
    run = run_python(IMPORT.format(machine=machine, groups=groups))
    found = {name: answer for name, *answer in map(str.split, run.stdout.splitlines())}
    assert list(found) == sum(groups, []), run.stderr
    for name, (interpreted, compiles) in found.items():
        assert interpreted == str(interprets) and not (interprets and compiles == "True"), name
    assert interprets or found["triton_attention.tiles"][1] == "True"


def test_a_gpu_that_is_gone():
    code = "import torch\ntorch.version.cuda, torch.cuda.device_count = None, lambda: 1\n"
    code += "import os\nos.environ.pop('TRITON_INTERPRET', None)\n"
    code += "from triton_attention_scores import attention_scores\n"
    code += "torch.cuda.device_count = lambda: 0\nx = torch.zeros(1, 1, 2, 4)\nattention_scores(x, x)"
    errors = run_python(code).stderr
    assert "ValueError: the kernels were chosen for a GPU when they were imported, and no GPU is visible now" in errors


@GPU
def test_gpu_is_left_alone_by_imports():
    """Afterwards a forked process may use CUDA, and sees the GPUs that CUDA_VISIBLE_DEVICES then names."""
    code = f"""
import importlib, os, sys, traceback, torch
for name in {MODULES}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
from triton_attention_fused import attention_fused
visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
for choice in (visible, visible.split(",")[-1], ""):
    if os.fork() == 0:
        try:
            os.environ["CUDA_VISIBLE_DEVICES"] = choice
            assert torch.cuda.device_count() == len(choice.split(",")) * bool(choice)
            x = torch.zeros(1, 1, 20, 16, device="cuda" if choice else "cpu")
            print(attention_fused(x, x, x).sum().item(), torch._C._cuda_getDeviceCount(), flush=True)
        except ValueError as error:
            print(error, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.wait()
"""
    run = run_python(code)
    lines, number = run.stdout.splitlines(), torch.cuda.device_count()
    assert lines[:2] == [f"0.0 {number}", "0.0 1"] and "no GPU is visible now" in lines[2], run.stdout + run.stderr


def test_each_device_has_its_own_architecture():
    """What is launched on one of two GPUs does not depend on the other, or on which is the current one."""
    code = """
import importlib, types, torch
from triton_attention import device, operators
gpus, launched, number, empty = [], [], 0, torch.empty
class On(torch.Tensor):
    device = property(lambda self: torch.device("cuda", number))
def touched(*args):
    raise AssertionError("the current GPU was asked")
torch.cuda.current_device = touched
torch.empty = lambda *args, device=None, **kwargs: empty(*args, **kwargs)
torch.cuda.get_device_capability = lambda number: gpus[number]
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(multi_processor_count=10 * gpus[number][0])
names = ("_scores", "_values", "_backward", "_fused", ".fused_backward", ".fused_bias", ".merge", ".float32",
         ".nan_repair", ".mean_weights")
modules = [importlib.import_module(f"triton_attention{name}") for name in names]
for module in modules:
    module.launch = lambda kernel, programs, *args, device=None, **constants: launched.append(
        (kernel.fn.__name__, programs, {key: str(value) for key, value in constants.items()}))
scores, values, backward, fused, fused_backward, *_, mean_weights = modules
def launches(of, *capabilities):
    global number
    number, gpus[:] = of, capabilities
    launched.clear()
    device._architecture.cache_clear()
    device._processors.cache_clear()
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.empty(1, 2, 256, 128, dtype=dtype).as_subclass(On)
        s, lse = q.new_empty(1, 2, 256, 256), q.new_empty(1, 2, 256, dtype=torch.float32)
        stats, scalars = lse.new_empty(1, 2, 256, 2), (0.1, 0.0, 0.0)
        few = q[:, :, :20], q.repeat(1, 1, 16, 1), q.repeat(1, 1, 16, 1)
        for op, *arguments in (
            (scores.scores_op, q, q, 0.1, 0, None, None, None),
            (values.values_op, s, q, 0, 2, False, 1.0, dtype, None, None),
            (backward.dscores_op, q.half(), q.float(), q.half(), s.half(), 0),
            (fused.fused_op, *few, None, None, None, *scalars, None, None, None, None),
            (fused_backward.fused_backward_op, q, None, q, q, q, s, None, None, q, lse, stats, *scalars, None, 0, None,
             s.shape),
            (mean_weights.mean_weights_op, q, q, lse, stats, 0.1, None),
        ):
            op.__wrapped__(*arguments)
    hopper = operators.hopper_kernels("forward", q.device)
    return launched.copy(), hopper is not None
old, new = (8, 0), (9, 0)
first, second = launches(0, new, old), launches(1, new, old)
assert first == launches(0, new, new) and second == launches(1, old, old)
assert (first[1], second[1]) == (True, False)
print(*[launched[0] for launched in first[0] if launched not in second[0]])
"""
    run = run_python(code, TRITON_INTERPRET="0")
    names = ("scores", "values", "dscores", "fwd", "dq", "dkdv", "dbias", "mean_weights")
    expected = {f"_{name}_kernel" for name in names}
    assert set(run.stdout.split()) >= expected, run.stdout + run.stderr


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_threads_of_the_interpreter():
    s = torch.randn(4, 1, 2, 8, 40)
    expected = [attention_softmax(one) for one in s]
    with ThreadPoolExecutor(4) as threads:
        for ours, one in zip(threads.map(attention_softmax, s.repeat(5, 1, 1, 1, 1)), expected * 5, strict=True):
            assert torch.equal(ours, one)


@pytest.mark.skipif(not INTERPRETED, reason="on a machine without a GPU")
def test_cpu_tensors_in_a_compiling_process_are_refused():
    code = "import torch\nfrom triton_attention_scores import attention_scores\nx = torch.zeros(1, 1, 2, 4)\n"
    code += "attention_scores(x, x)"
    run = run_python(code, TRITON_INTERPRET="0")
    assert "ValueError: q is on the CPU" in run.stderr and "TRITON_INTERPRET=1" in run.stderr


@pytest.mark.parametrize("setting,tf32", [
    ("backends.cuda.matmul.fp32_precision = 'tf32'", True), ("backends.fp32_precision = 'tf32'", True),
    ("backends.mkldnn.matmul.fp32_precision = 'bf16'", False), ("set_float32_matmul_precision('high')", True),
    ("set_float32_matmul_precision('highest')", False), ("backends.cuda.matmul.fp32_precision = 'ieee'", False),
])
def test_float32_precision_by_either_interface(setting, tf32):
    """torch.get_float32_matmul_precision() raises an error after some of them."""
    code = f"import torch\ntorch.{setting}\nfrom triton_attention.device import DEVICE, allows_tf32\n"
    code += "from triton_attention_scores import attention_scores\n"
    code += "q = torch.ones(1, 1, 2, 4, device=DEVICE)\n"
    code += "print(allows_tf32(), attention_scores(q, q)[0, 0, 0, 0].item())"
    run = run_python(code)
    assert run.stdout.split() == [str(tf32), "2.0"], run.stderr


@pytest.mark.skipif(not INTERPRETED, reason="once, where CI runs")
def test_every_kernel_compiles_for_every_gpu():
    """No spills, and shared memory within the limit of each GPU; the table is tests/compile_kernels.py's."""
    command = [sys.executable, "-m", "tests.compile_kernels", "--quick"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=900)
    bad = [line for line in run.stdout.splitlines() if not re.search(r"\d +$", line)]  # rows that end with a problem
    assert run.returncode == 0, "\n".join(bad) + run.stderr[-2000:]
    assert all(f"{name} " in run.stdout for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"))


STRAYS = """
import types
from tests import compile_kernels
ways = (
    "UIADD3.X UR7, UR6, -0x7fffffe0, URZ, UP0, !UPT",  # ptxas 12.8 took a register that held something else
    "@P0 UMOV UR7, 0x40000040",
    "UMOV UR7, 0x40000040",
    "UMOV UR8, 0x40000040; ULOP3.LUT UR8, UR8, UR7, URZ, 0x3c, !UPT; ULOP3.LUT UR7, UR8, UR7, URZ, 0x3c, !UPT; "
    "ULOP3.LUT UR8, UR8, UR7, URZ, 0x3c, !UPT",
    "CS2R R2, SRZ; IADD3.X R3, R3, 0x40000040, RZ, P0, !PT; R2UR UR7, R3",
    "MOV R3, 0x40000040; STL.64 [R1+0x8], R2; LDL.LU R5, [R1+0xc]; R2UR UR7, R5",
)
for way in ways:
    code = (way + "; HGMMA.64x32x16.F32.BF16 R24, R28, gdesc[UR4], R24; EXIT").split("; ")
    dump = "\\n".join(f"/*{16 * i:04x}*/ {text} ;" for i, text in enumerate(code))
    compile_kernels.cuobjdump = lambda cubin, option: dump
    print(compile_kernels.stray(types.SimpleNamespace(asm={"cubin": b""})))
"""


@pytest.mark.skipif(not INTERPRETED, reason="once, where CI runs")
def test_descriptors_are_followed_through_swaps_and_spills():
    run = run_python(STRAYS)
    assert run.stdout.split() == ["1", "1", "0", "0", "0", "0"], run.stderr


WIDE = """
import types
from tests import compile_kernels
line = "{} %a, %b, %c : tensor<16x32x{}, #ttg.dot_op<{{opIdx = 0, parent = #mma, kWidth = {}}}>> * tensor<32x64xf64>"
for values in (("dot", "bf16", 2), ("dot", "f16", 4), ("dot", "f64", 1), ("dot", "f64", 2), ("cat", "f32", 2)):
    ttgir = "%2 = tt." + line.format(*values)
    print(compile_kernels.wide_operands(types.SimpleNamespace(asm={"ttgir": ttgir})))
"""


@pytest.mark.skipif(not INTERPRETED, reason="once, where CI runs")
def test_operands_laid_out_for_a_narrower_dtype_are_counted():
    run = run_python(WIDE)
    assert run.stdout.split() == ["0", "1", "0", "1", "0"], run.stderr


DYNAMIC = """
import torch, triton
import triton_attention_layer
from triton_attention import checks
from triton_attention_layer import TritonMultiheadAttention
from tests.compile_kernels import OfflineDriver
checks.INTERPRETED = True  # a CPU's tensors stand for a GPU's: nothing is launched
triton_attention_layer.KERNELS_RUN_ON += ("cpu",)
triton.runtime.driver.set_active(OfflineDriver(triton.backends.compiler.GPUTarget("cuda", 90, 32)))
layer, x = TritonMultiheadAttention(16, 2, batch_first=True), torch.randn(2, 7, 16)
sizes = {"query": {0: torch.export.Dim("b"), 1: torch.export.Dim("l")}}
sizes |= {"key": sizes["query"], "value": sizes["query"], "need_weights": None}
for weights in (True, False):
    program = torch.export.export(layer, (x, x, x), {"need_weights": weights}, dynamic_shapes=sizes)
    print(*(node.target for node in program.graph.nodes if "triton_attention" in str(node.target)))
"""


@pytest.mark.skipif(not INTERPRETED, reason="a process of its own, without a GPU")
def test_export_with_a_dynamic_length_of_compiled_kernels():
    """Their operators' shapes come without a look at the launcher, whose tiles depend on the length."""
    run = run_python(DYNAMIC, TRITON_INTERPRET="0")
    name = "triton_attention.{}.default".format
    expected = [" ".join(map(name, ("scores", "softmax", "values"))), name("fused")]
    assert run.stdout.splitlines() == expected, run.stderr[-3000:]


# ---- what only a GPU shows


@GPU
def test_gpu_refuses_what_does_not_fit():
    big = T(1, 1, 512, 256)
    with pytest.raises(ValueError, match="does not fit"):
        attention_values(T(1, 1, 512, 512), T(1, 1, 512, 256), block_m=512, block_n=512)
    with pytest.raises(ValueError, match="does not fit this GPU: it needs .* shared memory"):
        attention_values(T(1, 1, 512, 512), T(1, 1, 512, 256), block_m=256, block_n=256)
    with pytest.raises(ValueError, match="q is on the CPU"):
        attention_scores(big.cpu(), big.cpu())
    with pytest.raises(ValueError, match="k must be on the device"):
        attention_scores(big, big.cpu())


@GPU
def test_gpu_compiled_calls_run_what_eager_calls_run():
    """Bit for bit: on Hopper its own kernels; for odd rows (cut from 19 columns, every other of 32) none that Inductor
    has compiled anew, one of which read memory that was not its own."""
    q, k = (torch.randn(2, *rows, 19, device=DEVICE, dtype=F16)[..., :16] for rows in ((6, 1), (2, 174)))
    odd = q, k, torch.randn(2, 2, 174, 32, device=DEVICE, dtype=F16)[..., ::2]
    large = tuple(torch.randn(2, 16, 2048, 64, device=DEVICE, dtype=BF16) for _ in "qkv")
    mask = torch.rand(2048, 2048, device=DEVICE) > 0.5
    calls = [(odd, {"window_size": (-1, 5), "enable_gqa": True})]
    calls += [(large, {"is_causal": True}), (large, {"attn_mask": mask})]
    for tensors, options in calls:
        leaves = [t.detach().requires_grad_() for t in tensors]
        run = functools.partial(attention_fused, **options)
        out, again = run(*leaves), torch.compile(run, fullgraph=True)(*leaves)
        assert torch.equal(out, again)
        grads = (torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (out, again))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@GPU
def test_gpu_many_heads_and_large_tensors():
    q = torch.randn(70000, 1, 1, 16, device=DEVICE, dtype=F16)
    assert (attention_scores(q, q)[:, 0, 0, 0] - (q.double() ** 2).sum(-1)[:, 0, 0] / 4).abs().max() < 0.05
    out, probs = attention_staged(q, q, q)
    assert torch.equal(out, q) and (probs == 1).all()
    del probs
    n = 36000  # 2 * n * n > 2^31 elements
    q, k, v = (torch.randn(1, 2, n, 64, device=DEVICE, dtype=BF16) for _ in range(3))
    out, probs = attention_staged(q, k, v)
    rows = slice(n - 8, n)
    exact = torch_staged(q[:, 1:, rows].double(), k[:, 1:].double(), v[:, 1:].double())
    assert (out[:, 1:, rows] - exact[0]).abs().max() < 2e-3 and (probs[:, 1:, rows] - exact[1]).abs().max() < 1e-4


@pytest.mark.skipif(hopper_kernels("scores", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
def test_gpu_scores_hopper(dtype):
    kernels = hopper_kernels("scores", DEVICE)
    shapes = [(1, 1, 1, 1, 8, 8), (2, 4, 2, 300, 328, 64), (1, 6, 2, 65, 1000, 40), (1, 2, 2, 1100, 520, 128)]
    shapes += [(1, 2, 1, 1500, 520, 200)] if dtype != F32 else [(1, 2, 1, 700, 132, 17)]
    for B, H, Hk, M, N, D in shapes:
        q = torch.randn(B, M, H, D, device=DEVICE, dtype=dtype).transpose(1, 2)
        k = torch.randn(B, Hk, N + 1, D + 8, device=DEVICE, dtype=dtype)[:, :, 1:, :D]
        for scale in (0.3, -2.0, 0.0):
            compare(lambda q, k, s=scale: kernels.run(q, k, s, *(None,) * 4), torch_scores, q, k, scale)
        full = kernels.run(q, k, 0.3, *(None,) * 4)
        for diagonal, fill in itertools.product((0, 70, -100, 5000), (-INF, 0.0, None)):
            s, sees = kernels.run(q, k, 0.3, diagonal, fill, None, None), full.new_ones(M, N).tril(diagonal).bool()
            assert torch.equal(s.where(sees, fill or 0.0), full.where(sees, fill or 0.0))
            assert fill is None or (s.masked_select(~sees) == fill).all()
    q, k = (torch.randn(4, 16, 2048, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    assert kernels.refuses(q, k, 1.0, *(None,) * 4) is None
    refused = [(q, k[:, :, :-1])] + ([(q[..., 1:], k[..., 1:]), (q.mT, k.mT)] if dtype != F32 else [])
    for pair in refused:
        assert isinstance(kernels.refuses(*pair, 1.0, *(None,) * 4), str)
    for _ in range(4):  # the third is a replay
        q = torch.randn_like(q)
        s, plain = attention_scores(q, k), attention_scores(q, k, block_m=128)
        assert torch.equal(s, plain) if dtype != F32 else torch.allclose(s, plain, rtol=1e-6, atol=1e-6)
    if dtype == F32:  # as infinity times infinity, and times zero, in PyTorch
        q[0, 0, 5, 3], k[0, 0, 7] = INF, 0.0
        s = attention_scores(q, k)
        assert s[0, 0, 5, 7].isnan() and (s[0, 0, 5, :7].abs() == INF).all() and s[0, 0, 6].isfinite().all()


@pytest.mark.skipif(hopper_kernels("values", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
def test_gpu_values_hopper(dtype):
    kernels = hopper_kernels("values", DEVICE)

    def run(p, v, scale=1.0, diagonal=None):
        return kernels.run(p, v, diagonal, p.shape[1], False, scale, v.dtype, None, None)

    wide = kernels.MAX_HEAD_DIM[8 * dtype.itemsize]
    shapes = [(1, 1, 1, 1, 8, 8), (2, 4, 2, 300, 328, 64), (1, 6, 2, 65, 1000, 40), (2, 20, 4, 1100, 512, wide)]
    for B, H, Hk, M, N, D in shapes:
        p = torch.randn(B, H, M, N + 8, device=DEVICE).softmax(-1).to(dtype)[..., :N]
        v = torch.randn(B, N, Hk, D + 8, device=DEVICE, dtype=dtype)[..., :D].transpose(1, 2)
        compare(run, torch_values, p, v)
        compare(lambda p, v: run(p, v, -0.5), lambda p, v: torch_values(-0.5 * p, v), p, v)
        for diagonal in (0, 70, -100, 5000):
            future = torch.ones(M, N, device=DEVICE).triu(diagonal + 1) > 0
            compare(
                lambda p, v, d=diagonal, future=future: run(p.masked_fill(future, NAN), v, 1.0, d),
                lambda p, v, d=diagonal: torch_values(p.tril(d), v), p, v,
            )
        p[-1, -1, -1, 3:] = 0.0  # 0 * NaN is 0, anything else with a NaN is NaN
        expected = run(p, v)
        v = v.clone()
        v[-1, -1, 5:] = NAN
        out = run(p, v)
        assert torch.allclose(out[-1, -1, -1], expected[-1, -1, -1], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        assert out[-1, -1, :-1].isnan().all() and (H == 1 or not out[0, 0].isnan().any())
    p = torch.rand(4, 16, 2048, 2048, device=DEVICE).to(dtype)
    v = torch.randn(4, 16, 2048, 64, device=DEVICE, dtype=dtype)
    constants = 16, False, 1.0, dtype, None, None
    assert kernels.refuses(p, v, None, *constants) is None
    for pair in ((p.mT, v), (p[..., 1:], v[:, :, 1:]), (p[:1, :1], v[:1, :1])):
        assert isinstance(kernels.refuses(*pair, None, *constants), str)
    for _ in range(4):  # the third is a replay
        v = torch.randn_like(v)
        out, plain = attention_values(p, v), attention_values(p, v, block_m=128)
        assert torch.allclose(out, plain, rtol=1e-2 if dtype != F32 else 1e-5, atol=1e-2 if dtype != F32 else 1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("case", emulate_hopper.CASES, ids=str)
def test_hopper_protocol(case):
    assert emulate_hopper.check(**case)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("bug", emulate_hopper.BUGS)
def test_hopper_protocol_bugs_are_noticed(bug):
    assert emulate_hopper.notices(bug)


def test_hopper_orders_have_16_bits(monkeypatch):
    """Beside a mask the backward kernel refuses more tiles of keys than the order of one can say."""
    monkeypatch.setattr(backward, "processors", lambda device: 132)
    for N, refused in ((1 << 22, False), ((1 << 22) + 128, True)):
        q, k = (torch.empty(1, 1, n, 64, dtype=BF16, device="meta") for n in (256, N))
        mask = torch.empty(1, 1, 1, N, dtype=torch.bool, device="meta")
        why = backward.refuses(q, None, q, k, k, mask, None, None, q, None, None, 0.1, 0.0, 0.0, None, None)
        assert (why == "more tiles of keys than 16 bits count") == refused, why


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernel itself")
def test_hopper_row_that_has_seen_nothing():
    """A query that a floating mask has hidden all keys from so far, and a plain tile in which all score -inf."""
    q, k, v = torch.randn(1, 1, 128, 40).abs(), torch.randn(1, 1, 256, 40), torch.randn(1, 1, 256, 40)
    k[:, :, 128:, 0] = -INF
    bias = torch.zeros(1, 1, 128, 256)
    bias[..., 5, :128] = -INF
    o, lse, _ = emulate_hopper.forward(q, k, v, 0.2, mask=bias)
    expected = torch_fused(q, k, v, bias, scale=0.2)
    assert lse[0, 0, 5] == -INF
    for ours, theirs in zip((o, lse), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_hopper_marks():
    """The lines that the kernels mark are those in which bugs are planted."""
    for path in (emulate_hopper.FORWARD, emulate_hopper.BACKWARD, emulate_hopper.SCORES, emulate_hopper.VALUES):
        planted = {mark for mark, _, case in emulate_hopper.BUGS.values() if emulate_hopper.source_of(case) == path}
        assert sorted(re.findall(r"# mutate: (\S+)$", path.read_text(), re.MULTILINE)) == sorted(planted)


def test_hopper_edges():
    """No mask and half a first tile only where 64 queries, counted one by one, need no more."""
    kernels, seen = forward, set()
    for M, N, right in itertools.product((64, 100, 300, 640), (1, 64, 128, 300, 640), range(-300, 301, 4)):
        if kernels.masks_inner_tiles(None, right):
            continue
        half = kernels.halves_first_tile(None, right, M, N)
        seen.add(half)
        for start in range(0, M, 64):
            last = [min(N - 1, m + right) for m in range(start, start + 64)]  # keys that its queries see
            for size in (64, 128):
                tile = max(last[-1], 0) // size
                assert last[-1] < 0 or all(n >= tile * size for n in last)
            assert not half or start % 128 or last[-1] < tile * 128 + 64
    assert seen == {False, True} and kernels.masks_inner_tiles(0, 0) and not kernels.halves_first_tile(0, 0, 64, 64)


def test_hopper_sections():
    """Not smaller than asked for, not more than twice that, and the last of them is not a small one."""
    for heads, row_tiles in itertools.product((1, 7, 64, 96, 256, 1000), (1, 4, 32, 500)):
        few = min(heads, -(-264 // row_tiles))
        size = forward.section_of(heads, row_tiles, 132)
        assert few <= size <= min(2 * few, heads)
        assert (heads - 1) % size + 1 >= size / 2
    assert forward.section_of(64, 32, 132) == 11  # 9 would leave one head for the end


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize(
    "left,right,block_m,block_d", [(None, 0, 128, 64), (None, 0, 192, 64), (-60, 10, 128, 64), (-60, 0, 128, 256)]
)
def test_hopper_repair(left, right, block_m, block_d):
    """NaN and inf in V where some of a tile's queries do not see it: the tile is computed again, for who does."""
    q, k, v = (torch.randn(1, 2, 200, block_d - 32) for _ in range(3))
    v[:, :, 130], v[0, 1, 70, 3], v[0, 1, 71, 3:5] = NAN, INF, -INF
    o, lse, log = emulate_hopper.forward(q, k, v, 0.2, left, right, block_m, block_d)
    marked = log[:-2, : block_m // 64] > 0  # of the tiles; two programs have an entry too
    assert marked.any() and not marked.all()
    expected, expected_lse = emulate_hopper.exact(q, k, v.nan_to_num(0.0, 0.0, 0.0), 0.2, left, right)
    sees = torch.ones(200, 200).tril(right).triu(left if left is not None else -200) > 0
    for n in (70, 71, 130):  # adds inf, -inf or NaN where it is seen
        row = v[:, :, None, n]
        expected += torch.where(sees[:, n, None] & ~row.isfinite(), row, 0.0)
    assert torch.allclose(o, expected, atol=1e-5, equal_nan=True) and torch.allclose(lse, expected_lse)


@pytest.fixture
def used(monkeypatch):
    """The Hopper kernels of attention that were called, which serve any size here, without replays."""
    calls = []
    for name in ("forward", "backward"):
        kernels = hopper_kernels(name, DEVICE)
        monkeypatch.setattr(kernels, "MIN_WORK", 0)
        monkeypatch.setattr(kernels, "MIN_WAVES", 0)
        run = kernels.run
        monkeypatch.setattr(kernels, "run", lambda *args, name=name, run=run: calls.append(name) or run(*args))
    monkeypatch.setattr(replay, "_records", {})
    programs = itertools.cycle((132, 1, 3))  # with few, each takes several tiles of keys
    monkeypatch.setattr(hopper_kernels("backward", DEVICE), "processors", lambda device: next(programs))
    return calls


@pytest.mark.skipif(hopper_kernels("forward", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "D,Dv,long", [(64, 64, 4096), (64, 64, 0), (128, 128, 4096), (40, 64, 4096), (96, 8, 4096), (256, 160, 4096)]
)
def test_gpu_fused_hopper(D, Dv, long, used, monkeypatch):
    for name in ("LONG", "LONG_WAVES"):
        monkeypatch.setattr(hopper_kernels("forward", DEVICE), name, long)
    everywhere = (-1, -1)
    windows = [(everywhere, False), (everywhere, True), ((100, 0), False), ((-1, 30), False), ((64, -1), True)]
    for i, (M, N) in enumerate([(128, 128), (300, 777), (777, 300), (17, 64), (1500, 1500)]):
        for window, is_causal in windows:
            shapes = ((1, 4, M, D), (1, 2, N, D), (1, 2, N, Dv))
            q, k, v = (randn(*shape, dtype=(F16, BF16)[i % 2], layout=("plain", "bnhd")[i % 2]) for shape in shapes)
            used.clear()
            options = {"window_size": window, "is_causal": is_causal, "scale": (None, -0.2)[i // 2 % 2]}
            compare(lambda *a, o=options: fused(*a, **o), lambda *a, o=options: torch_fused(*a, **o), q, k, v)
            widest = {"forward": hopper_kernels("forward", DEVICE).MAX_HEAD_DIM, "backward": 128}  # as Triton allows
            assert used == [name for name in widest if max(D, Dv) <= widest[name]]
    q, k, v = (torch.randn(1, 2, 700, D, device=DEVICE, dtype=BF16) for D in (D, D, Dv))
    expected = attention_fused(q, k, v, is_causal=True)
    lower = torch_fused(q, k, v, is_causal=True)[0][:, :, :300]
    exact = torch_fused(q.double(), k.double(), v.double(), is_causal=True)[0][:, :, :300]
    for poison in (NAN, INF):  # hidden from the queries before them
        k[:, :, 400], v[:, :, 300] = poison, poison
        for _ in range(4):  # the third is a replay
            out = attention_fused(q, k, v, is_causal=True)
            assert torch.equal(out[:, :, :256], expected[:, :, :256]) and not out[:, :, 300:].isfinite().any()
            assert_close(out[:, :, :300], lower, exact, "queries before")  # some are computed again
    used.clear()
    for scale, mask in ((0.0, None), (0.1, torch.zeros(700, 700, dtype=BF16, device=DEVICE))):
        attention_fused(q, k, v, mask, scale=scale)
    attention_fused(q[:, :, :16], k, v)
    attention_fused(q[..., 1:], k[..., 1:], v)
    assert not used


@pytest.mark.skipif(hopper_kernels("forward", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ("heads", "causal", "keys", "queries"))
@pytest.mark.parametrize("D,biased", ((64, False), (128, False), (256, False), (64, True), (128, True)))
def test_gpu_fused_hopper_masks(D, biased, kind, used):
    """Lists of tiles and bits, or a bias, which learns: with bounds beside them, grouped heads, two batch elements that
    are not alike; bitwise the same each time; and NaN in keys that nobody sees."""
    widest = {"forward": forward.MAX_HEAD_DIM, "backward": 128}
    for i, (M, N) in enumerate([(128, 128), (300, 777), (777, 300), (100, 64), (1500, 1500)]):
        mask, dtype = emulate_hopper.drawn_mask(kind, M, N, biased).to(DEVICE), (F16, BF16)[i % 2]
        mask = torch.cat([mask, mask.roll(30, -1)])
        mask = mask.to(dtype).requires_grad_() if biased else mask
        served = [name for name in widest if D <= widest[name] and not (biased and (N % 8 or kind == "queries"))]
        q, k, v = (
            randn(2, h, n, D, dtype=dtype, layout=("plain", "bnhd")[i % 2])
            for h, n in ((4, M), (2, N), (2, N))
        )
        for options in ({}, {"is_causal": True}, {"window_size": (100, 50)}):
            used.clear()
            both = (functools.partial(function, **options) for function in (fused, torch_fused))
            compare(*both, q, k, v, mask)
            assert used == served
    out, leaves = fused(q, k, v, mask)[0], (q, k, v, mask) if biased else (q, k, v)
    first = torch.autograd.grad(out, leaves, out, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, leaves, out, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if kind == "keys":
        with torch.no_grad():
            k[:, :, 160:], v[:, :, 160:] = NAN, NAN
        poisoned = fused(q, k, v, mask)[0]
        torch.testing.assert_close(poisoned, out, rtol=1e-2, atol=1e-2)
        for a, b in zip(torch.autograd.grad(poisoned, leaves, out.detach()), first, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(hopper_kernels("backward", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("D", (64, 128))
def test_gpu_fused_hopper_beside_another_process(D, is_causal, monkeypatch):
    """The same bits each time, also where another process takes the GPU in between: an mbarrier whose memory was
    another buffer's too was fine until then."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(hopper_kernels(name, DEVICE), "MIN_WORK", 0)
        monkeypatch.setattr(hopper_kernels(name, DEVICE), "MIN_WAVES", 0)
    monkeypatch.setattr(hopper_kernels("backward", DEVICE), "processors", lambda device: 1)  # one program: a long one
    q, k, v = (torch.randn(2, 2, 1500, D, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3))
    busy = "import torch; x = torch.zeros(1 << 20, device='cuda'); print(flush=True)\nwhile True: x.add_(1)"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            first = None
            for _ in range(200):
                out = attention_fused(q, k, v, is_causal=is_causal)
                again = out, *torch.autograd.grad(out, (q, k, v), q.detach())
                first = again if first is None else first
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        finally:
            other.kill()


@pytest.mark.skipif(hopper_kernels("backward", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("D", (64, 128))
def test_gpu_fused_hopper_gradients(D, monkeypatch):
    """Many programs add to a dQ, in order; an expanded gradient, a misaligned one; sinks; NaN in hidden keys."""
    kernels, used = hopper_kernels("backward", DEVICE), []
    run = kernels.run
    monkeypatch.setattr(kernels, "MIN_WAVES", 0)
    monkeypatch.setattr(kernels, "L2", 1 << 23)  # several sections of heads, of which the last is unlike the others
    monkeypatch.setattr(kernels, "run", lambda *args: used.append(args) or run(*args))
    q, k, v = (torch.randn(2, 16, 1500, D, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3))
    do, sinks = torch.randn_like(q), torch.randn(16, device=DEVICE, dtype=BF16)
    for options in ({}, {"is_causal": True}, {"window_size": (200, 100)}):
        compare(lambda *a, o=options: fused(*a, **o), lambda *a, o=options: torch_fused(*a, **o), q, k, v)
        out = attention_fused(q, k, v, **options)
        first = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
        for _ in range(20):
            again = torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one = torch.ones((), device=DEVICE, dtype=BF16)
    sums = (torch.autograd.grad(out, q, x, retain_graph=True)[0] for x in (one.expand_as(q), torch.ones_like(q)))
    assert torch.equal(*sums)
    shifted = torch.empty(do.numel() + 1, device=DEVICE, dtype=BF16)[1:].view(do.shape).copy_(do)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), shifted, retain_graph=True), first, strict=True):
        assert torch.equal(ours, theirs)
    few = [t[:1].detach().requires_grad_() for t in (q, k, v)]
    sinks.requires_grad_()
    compare(lambda *a: fused(*a[:3], sinks=a[3]), lambda *a: torch_fused(*a[:3], sinks=a[3]), *few, sinks)
    clean, = torch.autograd.grad(attention_fused(q, k, v, is_causal=True)[:, :, :800].sum(), q)
    with torch.no_grad():
        k[:, :, 900], v[:, :, 800] = NAN, INF
    hidden, = torch.autograd.grad(attention_fused(q, k, v, is_causal=True)[:, :, :800].sum(), q)
    assert torch.equal(hidden[:, :, :768], clean[:, :, :768]) and used
    torch.testing.assert_close(hidden[:, :, 768:800], clean[:, :, 768:800], rtol=1e-2, atol=2e-3)  # O is computed anew


@pytest.mark.skipif(hopper_kernels("forward", DEVICE) is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("D", (64, 128))
def test_gpu_hopper_infinite_and_huge_keys(D, monkeypatch):
    """Keys that score -inf fill the tiles that come first; keys that no query sees hold huge numbers, inf and NaN."""
    for name in ("forward", "backward"):
        for limit in ("MIN_WORK", "MIN_WAVES"):
            monkeypatch.setattr(hopper_kernels(name, DEVICE), limit, 0)
    q, k, v = (torch.randn(1, 4, n, D, device=DEVICE, dtype=BF16) for n in (700, 900, 900))
    infinite, positive = k.clone(), q.clone()
    infinite[:, :, 300:, 0], positive[..., 0] = -INF, q[..., 0].abs() + 0.5
    for options in ({}, {"is_causal": True}, {"window_size": (400, 0)}):
        out, lse = fused(positive, infinite, v, **options)
        exact = torch_fused(*(t.double() for t in (positive, infinite, v)), **options)
        assert_close(out, torch_fused(positive, infinite, v, **options)[0], exact[0], options)
        assert torch.equal(lse.isfinite(), exact[1].isfinite())
    n = torch.arange(900, device=DEVICE)[:, None]
    for options, unseen in (
        ({"is_causal": True}, n >= 700), ({"window_size": (50, -1)}, n < 150),
        ({"window_size": (60, 0), "is_causal": True}, (n < 140) | (n >= 700)),
    ):
        results = []
        for fill in (0.0, 2e38, -2e38, INF, NAN):
            inputs = [q.clone(), *(t.masked_fill(unseen, fill) for t in (k, v))]
            out = fused(*[t.requires_grad_() for t in inputs], **options)[0]
            results.append((out, *torch.autograd.grad(out.sum(), inputs)))
        for fill, other in zip((2e38, -2e38, INF, NAN), results[1:], strict=True):
            for name, a, b in zip(("O", "dQ", "dK", "dV"), results[0], other, strict=True):
                # not the same bits: O of tiles where some row, if only one past the end, came to NaN is computed anew
                torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2, msg=f"{name} {fill} {options}")


@GPU
@pytest.mark.parametrize("D,Dv", [(95, 8), (63, 4), (72, 12), (95, 24)])
def test_gpu_fused_narrow_values(D, Dv):
    """A compiler had V, narrow and padded, read from the wrong place in the loop over whole tiles of keys."""
    for is_causal in (False, True):
        q, k, v = (randn(1, 2, 300, size, dtype=BF16) for size in (D, D, Dv))
        compare(fused, torch_fused, q, k, v, is_causal=is_causal)


@GPU
def test_gpu_cuda_graph():
    q, k, v = (torch.randn(1, 2, 100, 32, device=DEVICE) for _ in range(3))
    attention_staged(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_staged(q, k, v)
    q.normal_()
    graph.replay()
    assert (out - attention_staged(q, k, v)[0]).abs().max() == 0


def causal_step(q, k, v, do):
    """O, dQ, dK, dV: on Hopper each of the two kernels takes its tiles by a counter."""
    out = attention_fused(q, k, v, is_causal=True)
    return out, *torch.autograd.grad(out, (q, k, v), do)


@GPU
def test_gpu_cuda_graph_of_causal_attention():
    """Each replay of a graph starts its counters anew."""
    q, k, v, do = (torch.randn(4, 16, 2048, 64, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(4))
    causal_step(q, k, v, do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = causal_step(q, k, v, do)
    for _ in range(3):
        q.data.normal_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(outs, causal_step(q, k, v, do), strict=True))


@GPU
def test_gpu_causal_attention_on_two_streams():
    """Each has counters of its own, also when a call is a replay; programs that wait for each other do not deadlock."""
    q, k, v, do = (torch.randn(4, 16, 2048, 64, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(4))
    expected = causal_step(q, k, v, do)
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(causal_step(q, k, v, do))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for step in outs for pair in zip(step, expected, strict=True))


def test_counters_lie_outside_of_any_memory_pool(monkeypatch):
    """torch.cuda.use_mem_pool routes what its thread takes; a counter outlives the pool. One for each stream."""
    stream, takers, zeros = [7], [], torch.zeros
    monkeypatch.setattr(device, "_counters", {})
    monkeypatch.setattr(device, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: takers.append(threading.get_ident()) or zeros(*args, **kw))
    cpu, counter = torch.device("cpu"), device.counter
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(lambda _: counter(cpu).data_ptr(), range(100)))
        assert made == {counter(cpu).data_ptr()} and len(takers) == 1
    assert device.is_counter(*made)
    stream[0] = 8
    assert counter(cpu).data_ptr() not in made and len(takers) == 2 and threading.get_ident() not in takers
    stream[0] = None  # captured in a graph: not kept
    one, other = counter(cpu), counter(cpu)
    assert one.data_ptr() != other.data_ptr()
    assert takers[2:] == [threading.get_ident()] * 2 and len(device._counters) == 2


@GPU
def test_gpu_threads_streams_and_a_memory_pool(monkeypatch):
    """Both passes in two threads at once, each on a stream of its own; the first takes its memory from one pool after
    another, where nothing may be left. From the third call of a thread on they are replays."""
    monkeypatch.setattr(replay, "_records", {})
    monkeypatch.setattr(device, "_counters", {})
    shapes = [(4, 16, n, 64) for n in (2048, 1536)]
    work = [[torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(4)] for shape in shapes]
    with replay.off():
        expected = [[t.detach() for t in causal_step(*batch)] for batch in work]
    device._counters.clear()  # each stream's is made in a pool, or beside one
    torch.cuda.synchronize()
    together, pools = threading.Barrier(2, timeout=300), []

    def steps(thread):
        with torch.cuda.device(work[thread][0].device), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                pool = torch.cuda.MemPool()
                within = torch.cuda.use_mem_pool(pool) if thread == 0 else contextlib.nullcontext()
                with within, torch.autograd.set_multithreading_enabled(False):  # backward in this thread and pool
                    together.wait()
                    outs = [causal_step(*work[thread]) for _ in range(4)]
                right = all(torch.equal(*pair) for step in outs for pair in zip(step, expected[thread], strict=True))
                used = len(pool.snapshot())
                pools.append(pool)
                del outs
                gc.collect()
                blocks = [block for part in pool.snapshot() for block in part["blocks"]]
                kept = [block for block in blocks if block["state"] == "active_allocated"]
                yield right, bool(used), kept

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda thread: list(steps(thread)), range(2)))
    assert results == [[(True, thread == 0, [])] * 3 for thread in range(2)]
    records = replay._records.values()
    assert any(isinstance(record, replay.Recording) for record in records)
    if hopper_kernels("forward", DEVICE):
        assert len(device._counters) == 2


@GPU
def test_gpu_memory_of_averaged_weights():
    """Without a mask nothing of a head is stored; with one the scores, while the probabilities are written."""
    layer = TritonMultiheadAttention(256, 4, batch_first=True, device=DEVICE, dtype=BF16).eval()
    x, probs = torch.randn(4, 2048, 256, device=DEVICE, dtype=BF16), 4 * 4 * 2048 * 2048 * 2
    for padding, most in ((None, 0.5), (torch.zeros(4, 2048, device=DEVICE, dtype=torch.bool), 2.4)):
        with torch.no_grad():
            layer(x, x, x, padding)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(x, x, x, padding)
            peak = torch.cuda.max_memory_allocated() - before
        assert peak < most * probs
