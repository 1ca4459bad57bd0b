"""The machinery behind the six top-level files, and one place to import their public functions from.

    from triton_attention import attention_fused, TritonMultiheadAttention

The first import of any of it chooses where kernels run, a GPU or Triton's interpreter (device.py).
"""

import importlib

from triton_attention import device  # noqa: F401  before triton: it chooses the mode

__version__ = "0.1.0"
_HOME = {
    "attention_scores": "triton_attention_scores",
    "attention_softmax": "triton_attention_softmax",
    "attention_values": "triton_attention_values",
    "attention_staged": "triton_attention_layer",
    "attention_fused": "triton_attention_fused",
    "merge_attention": "triton_attention_fused",
    "TritonMultiheadAttention": "triton_attention_layer",
    "activate": "triton_attention.doors.sdpa",
    "deactivate": "triton_attention.doors.sdpa",
    "register_with_transformers": "triton_attention.doors.huggingface",
    "replace_attention": "triton_attention.doors.replace",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(_HOME[name]), name))


def __dir__():
    return sorted({*globals(), *__all__})
