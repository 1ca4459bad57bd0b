"""Replays of launches: what is replayed, what is refused, and on a GPU that results are those of a full run."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from tests.reference import BF16, DEVICE, F32, GPU, randn
from triton_attention import replay
from triton_attention_fused import attention_fused
from triton_attention_layer import TritonMultiheadAttention, attention_staged


class Doubling:
    """A kernel that works by address, like a compiled one: y[i] = FACTOR * x[i * stride] in float32."""

    arg_names = ("x_ptr", "stride", "y_ptr", "n", "FACTOR")

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def run(x, stride, y, n, FACTOR):
            x = getattr(x, "base", x)  # of a descriptor
            self.launches.append("full" if isinstance(x, torch.Tensor) else "replay")
            x, y = (t if isinstance(t, int) else t.data_ptr() for t in (x, y))
            x, y = (ctypes.cast(address, ctypes.POINTER(ctypes.c_float)) for address in (x, y))
            for i in range(n):
                y[i] = FACTOR * x[i * stride]
            return self

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(replay, "is_current", lambda device: True)
    monkeypatch.setattr(replay, "_records", {})
    return Doubling()


def launcher_of(kernel, before=lambda x: x, after=lambda y: y, describe=lambda x: x):
    def launch(x, *others, factor=2.0):
        x = before(x)
        y = x.new_empty(len(x))
        args = (describe(x), x.stride(0), y, len(x))
        replay.note(kernel, kernel[(1,)](*args, FACTOR=factor), 1, args, {"FACTOR": factor})
        return after(y)

    return launch


def run(launcher, *xs):
    """Replayed calls with each of the tensors: the results."""
    calls = [x if isinstance(x, tuple) else (x,) for x in xs]
    return [launcher(*args) if (found := replay.stand_in(launcher, args, {})) is None else found() for args in calls]


def test_the_third_call_is_a_replay(kernel):
    xs = [torch.randn(7) for _ in range(5)]
    outs = run(launcher_of(kernel), *xs)
    assert kernel.launches == ["full"] * 2 + ["replay"] * 3
    assert all(torch.equal(out, 2 * x) for out, x in zip(outs, xs, strict=True))
    assert len({out.data_ptr() for out in outs}) == len(outs)


def test_slices_of_the_arguments_and_tuples(kernel):
    xs = [torch.randn(9, 2) for _ in range(4)]
    outs = run(launcher_of(kernel, lambda x: x[3:, 1], lambda y: (y, None, y)), *xs)
    assert kernel.launches[2:] == ["replay"] * 2
    assert all(torch.equal(out[2], 2 * x[3:, 1]) and out[1] is None for out, x in zip(outs, xs, strict=True))


def test_descriptors_are_filled_in_again(kernel):
    given = []

    def describe(x):
        given.append(SimpleNamespace(base=x, shape=list(x.shape)))  # as Triton's TensorDescriptor
        return given[-1]

    xs = [torch.randn(9) for _ in range(4)]
    outs = run(launcher_of(kernel, lambda x: x[4:], describe=describe), *xs)
    assert kernel.launches == ["full"] * 2 + ["replay"] * 2
    assert all(torch.equal(out, 2 * x[4:]) for out, x in zip(outs, xs, strict=True))
    assert [d.base.data_ptr() for d in given] == [x[4:].data_ptr() for x in xs[:2]]


def test_memory_that_is_not_returned_is_taken_at_once(kernel):
    def launcher(x):
        places = [x.new_empty(len(x)) for _ in range(4)]
        for source, target in zip((x, *places[:3]), places, strict=True):
            args = (source, 1, target, len(x))
            replay.note(kernel, kernel[(1,)](*args, FACTOR=2.0), 1, args, {"FACTOR": 2.0})
        return places[3], places[1]

    xs = [torch.randn(700) for _ in range(4)]
    for (last, second), x in zip(run(launcher, *xs), xs, strict=True):
        assert torch.equal(last, 16 * x) and torch.equal(second, 4 * x)
    assert kernel.launches == ["full"] * 8 + ["replay"] * 8
    recording, = (record for record in replay._records.values() if record)
    assert recording.scratch == 2 * 3072 and recording.taken[0] == 0 and recording.taken[2] == 3072


@pytest.mark.parametrize("before,after", [
    (lambda x: x + 0, lambda y: y), (lambda x: x, lambda y: y.add_(0)), (lambda x: x, lambda y: y[1:]),
])
def test_who_computes_is_never_replayed(kernel, before, after):
    run(launcher_of(kernel, before, after), *(torch.randn(5) for _ in range(4)))
    assert kernel.launches == ["full"] * 4


def test_what_the_key_tells_apart(kernel):
    launcher = launcher_of(kernel)
    run(launcher, *(torch.randn(5) for _ in range(3)))
    buffer = torch.randn(30)
    for x in (torch.randn(6), buffer[:10:2], buffer[1:6]):  # shape, stride, alignment
        kernel.launches.clear()
        assert torch.equal(run(launcher, x)[0], 2 * x) and kernel.launches == ["full"]
    kernel.launches.clear()
    x, other = torch.randn(5), torch.randn(5)
    run(launcher, *[(x, x)] * 3, (x, other))
    assert kernel.launches == ["full", "full", "replay", "full"]
    kernel.launches.clear()
    x = torch.view_as_complex(torch.randn(5, 2)).conj().imag
    assert x.is_neg()
    run(launcher, *[x] * 3)
    assert kernel.launches == ["full"] * 3


def test_slices_of_two_inputs_of_one_storage(kernel):
    """Where a slice begins says nothing about whose it is."""
    both = torch.randn(20)
    launcher = launcher_of(kernel, lambda x: x[2:])
    run(launcher, *[(both[:10], both[10:])] * 4)
    assert kernel.launches == ["full"] * 4
    kernel.launches.clear()
    outs = run(launcher_of(kernel), *[(both[:10], both[10:])] * 4)  # no slices: addresses are enough
    assert kernel.launches[2:] == ["replay"] * 2 and torch.equal(outs[3], 2 * both[:10])


def test_options_of_other_types_are_other_calls(kernel):
    launcher, x = launcher_of(kernel), torch.randn(5)
    run(lambda x, pair: launcher(x), (x, (1, 1)))  # a function of its own: another key
    takes = lambda x, pair: launcher(x)  # noqa: E731
    kernel.launches.clear()
    run(takes, *[(x, (1, 1))] * 3, (x, (True, 1)), (x, (1.0, 1)), (x, [1, 1]))
    assert kernel.launches == ["full", "full", "replay", "full", "full", "full"]
    kernel.launches.clear()
    with torch.no_grad():
        run(takes, (x, (1, 1)))
    assert kernel.launches == ["full"]


def test_one_memory_by_two_storages(kernel):
    """A slice of x that begins where y does, which another library shared: it is x's."""
    buffer = torch.randn(24)
    launcher = launcher_of(kernel, lambda x: x[4:])
    x, y = buffer[:20], torch.from_dlpack(buffer[4:24])
    run(launcher, *[(x, y)] * 2)
    x, y = torch.randn(20), torch.randn(20)
    assert torch.equal(run(launcher, (x, y))[0], 2 * x[4:])


def test_off_and_threads(kernel):
    launcher, x = launcher_of(kernel), torch.randn(5)
    with replay.off():
        run(launcher, *[x] * 4)
    assert kernel.launches == ["full"] * 4 and not replay._records
    run(launcher, *[x] * 3)
    thread = threading.Thread(target=run, args=(launcher, x))
    thread.start()
    thread.join()
    assert kernel.launches[4:] == ["full", "full", "replay", "replay"]


def test_threads_record_and_forget_at_once(kernel, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    launcher = launcher_of(kernel)
    xs = [torch.randn(n) for n in (4, 5, 6, 7) * 40]
    with ThreadPoolExecutor(8) as threads:
        for out, x in zip(threads.map(lambda x: run(launcher, x, x, x)[2], xs), xs, strict=True):
            assert torch.equal(out, 2 * x)
    assert len(replay._records) <= 3 + 8 and "replay" in kernel.launches


def test_forgets_when_full(kernel, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 3)
    launcher = launcher_of(kernel)
    for n in range(1, 8):
        run(launcher, torch.randn(n))
    assert len(replay._records) <= 3


def packed(B, H, M, N, D, dtype, Hk=None):
    """q, k and v as views of one projection where the lengths allow it."""
    Hk = Hk or H
    if M == N:
        x = torch.randn(B, M, (H + 2 * Hk) * D, device=DEVICE, dtype=dtype)
        return [t.unflatten(-1, (-1, D)).transpose(1, 2) for t in x.split([H * D, Hk * D, Hk * D], -1)]
    return [randn(B, h, n, D, dtype=dtype, grad=False) for h, n in ((H, M), (Hk, N), (Hk, N))]


CALLS = {
    "fused": ((2, 4, 100, 100, 64, BF16), {}, attention_fused),
    "fused, causal, grouped, float32": ((1, 4, 77, 77, 40, F32, 2), {"is_causal": True}, attention_fused),
    "fused, window": ((1, 2, 90, 300, 64, BF16), {"window_size": (30, 5)}, attention_fused),
    "decoding": ((2, 8, 1, 3000, 64, BF16, 2), {}, attention_fused),
    "decoding, a slice of the keys": ((2, 8, 1, 3000, 64, BF16, 2), {"window_size": (1500, 0)}, attention_fused),
    "staged": ((2, 4, 100, 100, 64, BF16), {}, lambda *args, **options: attention_staged(*args, **options)[0]),
    "staged, no weights": (
        (1, 4, 65, 65, 64, BF16), {"is_causal": True},
        lambda *args, **options: attention_staged(*args, **options, need_weights=False)[0],
    ),
    "staged, causal": ((1, 2, 65, 130, 24, F32), {"is_causal": True}, lambda *a, **o: attention_staged(*a, **o)[0]),
}


@GPU
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_a_full_run(name, masked):
    shape, options, function = CALLS[name]
    replay._records.clear()
    for _ in range(5):
        args = [t.detach().requires_grad_() for t in packed(*shape)]
        mask = torch.rand(1, 1, shape[2], shape[3], device=DEVICE) > 0.2 if masked else None
        results = []
        for context in (replay.off, torch.enable_grad):
            with context():
                out = function(*args, mask, **options, enable_gqa=True)
                grads = torch.autograd.grad(out, args, torch.ones_like(out))
                with torch.no_grad():
                    results.append([out, *grads, function(*args, mask, **options, enable_gqa=True)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(isinstance(record, replay.Recording) for record in replay._records.values())


@GPU
def test_layer_streams_and_graphs():
    layer = TritonMultiheadAttention(256, 4, batch_first=True, device=DEVICE, dtype=BF16).eval()
    for weights in (True, False):
        for step in range(6):
            x = torch.randn(3, 70, 256, device=DEVICE, dtype=BF16)
            stream = torch.cuda.Stream() if step % 2 else torch.cuda.current_stream()
            torch.cuda.synchronize()
            with torch.no_grad(), torch.cuda.stream(stream):
                out = layer(x, x, x, need_weights=weights)[0]
            stream.synchronize()
            with torch.no_grad(), replay.off():
                assert torch.equal(out, layer(x, x, x, need_weights=weights)[0])
    x, graph = torch.randn(3, 70, 256, device=DEVICE, dtype=BF16), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            out = layer(x, x, x, need_weights=False)[0]
        x.normal_()
        graph.replay()
        assert torch.equal(out, layer(x, x, x, need_weights=False)[0])
