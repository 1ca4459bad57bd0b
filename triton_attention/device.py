"""What the kernels run on: a GPU or Triton's interpreter, chosen at import; what a GPU is, and a number in its memory.

Every module that uses Triton imports this one before it, so that whichever comes first chooses. Only counting GPUs
leaves CUDA as it was: the process may still fork, or choose by CUDA_VISIBLE_DEVICES which of them it sees.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import os
import sys
import threading

import torch

_TRUE = ("1", "true", "on", "yes", "y")


def _find():
    """The type of device that PyTorch can use, by NVML or amdsmi: torch.cuda.is_available() would initialise CUDA."""
    found = torch.cuda.device_count() > 0
    if found and torch.version.cuda and sys.platform == "linux":
        # NVML counts what a driver that is too old for PyTorch, or left out of a container, cannot run
        version = ctypes.c_int()
        try:
            found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0
        except OSError:
            found = False
        found &= version.value // 1000 >= int(torch.version.cuda.split(".")[0])
    return "cuda" if found else "xpu" if torch.xpu.is_available() else "cpu"


DEVICE = torch.device(_find())


def _enable_interpreter():
    """Switch TRITON_INTERPRET on where there is no GPU; an explicit 0 or 1 wins."""
    if os.environ.get("TRITON_INTERPRET") is None:
        if DEVICE.type != "cpu":
            return
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ["TRITON_INTERPRET"].lower() not in _TRUE or "triton.language" not in sys.modules:
        return
    # Triton decides at import whether its own helpers (tl.sum, tl.max, ...) are compiled functions; when
    # torch.compile or transformers imported it first, they are, and an interpreted kernel cannot call them
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in list(sys.modules.items()) if name.startswith("triton.language")]
    for module in [*modules, tl.tensor, triton]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


_enable_interpreter()
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one rounding, whatever Triton's default becomes

import triton  # noqa: E402  the interpreter must be on first

INTERPRETED = triton.knobs.runtime.interpret
TRITON = tuple(int(x) for x in triton.__version__.split(".")[:2])
MAX_TILE = 1 << 20 if INTERPRETED else 1 << 16  # elements: Triton's own limit, and the registers of a multiprocessor


def describe_device():
    """One line for scripts: what the kernels run on."""
    if INTERPRETED:
        return f"Triton {triton.__version__} interpreter on the CPU (no GPU: results are real, times mean nothing)"
    return f"Triton {triton.__version__} on {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else DEVICE}"


def gone():
    """Whether the GPU that the kernels were chosen for is no longer to be seen."""
    return DEVICE.type == "cuda" and torch.cuda.device_count() == 0


# ---- one GPU of several


def _number(device):
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache
def _architecture(number):
    if torch.version.hip:
        return torch.cuda.get_device_properties(number).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(number)
    return f"sm_{major}{minor}"


def architecture(device):
    """The tuned table's name for a GPU: "sm_90", "gfx942"."""
    if device.type == "cuda":
        return _architecture(_number(device))
    target = triton.runtime.driver.active.get_current_target()  # of another maker, or only compiled for
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@functools.lru_cache
def _processors(number):
    return torch.cuda.get_device_properties(number).multi_processor_count


def processors(device):
    """The number of its multiprocessors."""
    return _processors(_number(device)) if device.type == "cuda" else 16


def allows_tf32():
    """Whether PyTorch may multiply float32 on a GPU in TF32: what torch.set_float32_matmul_precision() sets too."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_current(device):
    """Whether a launch now goes to this device: it is the current GPU."""
    return device.type == "cuda" and device.index == torch._C._cuda_getDevice()


def stream_of(device):
    """The current stream of a GPU, None while it is captured in a graph."""
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device) if not is_current(device) else contextlib.nullcontext():
        return None if torch.cuda.is_current_stream_capturing() else torch._C._cuda_getCurrentRawStream(device.index)


# ---- counters

_counters = {}  # (device, stream) -> see counter
_one_at_a_time = threading.Lock()


def _zero(device, stream):
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        return torch.zeros(1, dtype=torch.int32, device=device)


def counter(device):
    """A number in memory that is 0, for a kernel that counts in it and leaves it at 0: one for each stream, whose
    kernels run one after the other. A graph that is being captured gets its own, as it may run on any stream."""
    place = device, stream_of(device)
    if place[1] is None:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if place not in _counters:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with _one_at_a_time:
            if place not in _counters:
                # not in the memory pool that the caller may be in (torch.cuda.use_mem_pool is a matter of the thread),
                # which may be emptied
                with concurrent.futures.ThreadPoolExecutor(1) as thread:
                    _counters[place] = thread.submit(_zero, device, stream).result()
    return _counters[place]


def is_counter(address):
    return any(t.data_ptr() == address for t in list(_counters.values()))
