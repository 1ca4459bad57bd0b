"""For every test: a strict interpreter, NaN in memory that nobody wrote, the same random numbers. On a Hopper GPU
--hopper always has its kernels run wherever they can, small cases too, --hopper never has the others run alone."""

import collections

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


# what --quick runs, forward and backward of every public function; of a parametrised test so many cases
QUICK = {
    "test_strides": 3, "test_scale": 2, "test_masks": 1, "test_causal_bias": 2, "test_against_sdpa": 3, "test_lse": 1,
    "test_rows_that_see_nothing": 1, "test_the_future_does_not_leak": 2, "test_dropout_in_attention": 2,
    "test_features": 4, "test_merge_attention": 1, "test_layer_against_torch": 6, "test_layer_in_half_precision": 1,
    "test_layer_state_dict_both_ways_and_copies": 1, "test_layer_dropout": 1, "test_bad_input": 1000,
}
LEFT_OUT = (
    "left out: most shapes, dtypes and tiles, torch.compile and torch.func, replays, every GPU's compiler, the "
    "emulator of Hopper, the benchmarks, the fuzzer; run without --quick"
)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        seen, kept, rest = collections.Counter(), [], []
        for item in items:
            seen[item.originalname] += 1
            (kept if seen[item.originalname] <= QUICK.get(item.originalname, 0) else rest).append(item)
        config.hook.pytest_deselected(items=rest)
        items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--quick"):
        terminalreporter.write_line(LEFT_OUT)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="an answer in a minute and a half: some of every function")
    choices = ("auto", "always", "never")
    parser.addoption("--hopper", choices=choices, default="auto", help="when the kernels for Hopper GPUs run")


@pytest.fixture(autouse=True)
def _hopper(request):
    choice = request.config.getoption("--hopper")
    if choice == "never" and "hopper" in request.node.name:
        pytest.skip("--hopper never")
    with hopper_kernels(choice):
        yield
