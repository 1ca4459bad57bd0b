"""For every test: a strict interpreter, NaN in memory that nobody wrote, the same random numbers."""

import pytest
import torch

from triton_attention_launch import INTERPRETED

if INTERPRETED:
    import strict_interpreter  # noqa: F401


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """torch.empty returns NaN, so that an element which a kernel did not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
