"""For every test: a strict interpreter, NaN in memory that nobody wrote, the same random numbers. On a Hopper GPU
--hopper always has its kernels run wherever they can, small cases too, --hopper never has the others run alone."""

import pytest
import torch

import triton_attention_launch
from triton_attention_device import DEVICE, INTERPRETED

if INTERPRETED:
    import strict_interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """torch.empty returns NaN, so that an element which a kernel did not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault of this test's kernels is not the next one's


def pytest_addoption(parser):
    choices = ("auto", "always", "never")
    parser.addoption("--hopper", choices=choices, default="auto", help="when the kernels for Hopper GPUs run")


@pytest.fixture(autouse=True)
def _hopper(request, monkeypatch):
    choice = request.config.getoption("--hopper")
    if choice == "never":
        if "hopper" in request.node.name:
            pytest.skip("--hopper never")
        monkeypatch.setattr(triton_attention_launch, "_import", lambda module: None)
    if choice == "always":
        for name in ("triton_attention_scores_hopper", "triton_attention_hopper", "triton_attention_hopper_backward"):
            kernels = triton_attention_launch.hopper(name, DEVICE)
            for limit in ("SMALLEST", "FEWEST"):
                if hasattr(kernels, limit):
                    monkeypatch.setattr(kernels, limit, 0)
