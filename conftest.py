"""For every test: a strict interpreter, NaN in memory that nobody wrote, the same random numbers. On a Hopper GPU
--hopper always has its kernels run wherever they can, small cases too, --hopper never has the others run alone."""

import pytest
import torch

from tests.reference import hopper_kernels
from triton_attention.device import INTERPRETED

if INTERPRETED:
    from tests import strict_interpreter  # noqa: F401


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
def _hopper(request):
    choice = request.config.getoption("--hopper")
    if choice == "never" and "hopper" in request.node.name:
        pytest.skip("--hopper never")
    with hopper_kernels(choice):
        yield
