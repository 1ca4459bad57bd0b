"""replace_attention(model): every torch.nn.MultiheadAttention of a model becomes TritonMultiheadAttention, in place."""

import torch
from torch.nn.utils import parametrize

from triton_attention_layer import TritonMultiheadAttention, _keep_off_the_native_path


def replace_attention(model: torch.nn.Module) -> int:
    """Give every torch.nn.MultiheadAttention inside a model, or the model itself, the forward of ours.

    A module stays the object that it is, with its parameters, hooks, parametrizations, devices, dtypes and mode; what
    changes is its class. So an optimizer, a state_dict, tied weights and LoRA of the PEFT library go on as before.
    Other subclasses of torch.nn.MultiheadAttention are left alone, as they have a forward of their own. Call it before
    fully_shard or torch.compile.

    Returns: how many modules were replaced; 0 the second time.

    Raises: TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    replaced = 0
    for module in model.modules():
        ours = _class_for(module)
        if ours is not None:
            module.__class__ = ours
            module.num_kv_heads = module.num_heads
            module.register_forward_pre_hook(_keep_off_the_native_path)
            replaced += 1
    return replaced


def _class_for(module):
    """The class that a module gets, or None. A parametrized module has a class of its own, below the one it had."""
    cls = type(module)
    if cls is torch.nn.MultiheadAttention:
        return TritonMultiheadAttention
    if parametrize.is_parametrized(module) and cls.__bases__ == (torch.nn.MultiheadAttention,):
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        return type(f"Parametrized{TritonMultiheadAttention.__name__}", (TritonMultiheadAttention,), own)
    return None
