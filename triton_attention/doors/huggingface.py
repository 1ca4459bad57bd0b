"""register_with_transformers(): attn_implementation="triton_attention", and "triton_attention_staged", in transformers.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="triton_attention")

A model of the transformers library calls the attention function of that name in each layer, and a mask function of the
same name once a forward pass; without the latter it would drop its padding masks silently. Of a mask, True is "attend",
and causality is in it; without one, the layer says whether it is causal.

"triton_attention" is the fused kernel: grouped heads, sliding windows, softcap (Gemma 2), sinks (gpt-oss), and the bias
of relative positions with its gradient (T5). "triton_attention_staged" is the three stages, so that one can watch the
weights of a real model: it always returns them, the fused one for output_attentions=True, by the stages too.
"""

import functools

import torch
import torch.nn.functional as F

from triton_attention_fused import MAX_HEAD_DIM, attention_fused
from triton_attention_layer import attention_staged
from triton_attention_scores import attention_scores
from triton_attention_softmax import attention_softmax
from triton_attention_values import attention_values

FUSED, STAGED = "triton_attention", "triton_attention_staged"


def register_with_transformers():
    """Make attn_implementation="triton_attention" and "triton_attention_staged" known to the transformers library.

    Works for every model that calls its attention through transformers.AttentionInterface, also by
    model.set_attn_implementation(...); registering twice is harmless. `output_attentions=True` is taken as an argument
    of a call; as an entry of a configuration, transformers refuses it for any implementation but its own.

    Returns: the two names.

    Raises: ImportError: transformers is not installed, or older than 4.53.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask  # noqa: F401  the newest of what is needed
    except ImportError as error:
        raise ImportError("register_with_transformers() needs transformers 4.53 or newer: pip install -U transformers"
                          ) from error
    for name, attend in ((FUSED, attend_fused), (STAGED, attend_staged)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, make_mask)
    return FUSED, STAGED


def make_mask(*args, config=None, **options):
    """The mask of a forward pass, bool [B, 1, M, N], or None where it is causal or all is visible: what "sdpa" gets."""
    from transformers.masking_utils import sdpa_mask

    if config is not None and not _calls_the_interface(type(config)):
        raise ValueError(
            f"the model of {type(config).__name__} computes its attention by itself, not through AttentionInterface: "
            "triton_attention.activate() may reach it"
        )
    if getattr(config, "num_kv_shared_layers", 0):  # a layer may drop queries, and a causal bound would be another one
        options["allow_is_causal_skip"] = False
    return sdpa_mask(*args, config=config, **options)


@functools.lru_cache
def _calls_the_interface(config_class):
    """Whether a model of transformers with such a configuration can be given an attention function."""
    from transformers import MODEL_MAPPING

    try:
        model = MODEL_MAPPING[config_class]
    except KeyError:  # a part of a model, or not one of theirs
        return True
    models = model if isinstance(model, tuple) else (model,)
    return all(getattr(m, "_can_set_attn_implementation", lambda: True)() for m in models)


def attend_fused(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """What a layer of transformers calls: query [B, H, M, D], key and value [B, Hk, N, D] -> (out [B, M, H, Dv],
    weights [B, H, M, N] or None). Weights, asked for by output_attentions, come from the stages."""
    if options.get("output_attentions") or max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return attend_staged(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    query, key, value, mask, causal, window = _prepared(
        module, query, key, value, attention_mask, is_causal, **options
    )
    scaling = float(scaling) if isinstance(scaling, torch.Tensor) else scaling
    out = attention_fused(
        query, key, value, mask, dropout, causal, scaling, enable_gqa=True,
        window_size=None if window is None else (window - 1, 0),
        softcap=options.get("softcap"), sinks=options.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


def attend_staged(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """attend_fused by the three stages, with the weights, as they are in memory anyway."""
    query, key, value, mask, causal, window = _prepared(
        module, query, key, value, attention_mask, is_causal, **options
    )
    scaling = float(scaling) if isinstance(scaling, torch.Tensor) else scaling
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if window is not None:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask, causal = visible.tril().triu(1 - window), False
    if softcap is None and sinks is None:
        out, weights = attention_staged(query, key, value, mask, dropout, causal, scaling, enable_gqa=True)
    else:
        scores = attention_scores(query, key, scale=scaling)
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        weights = _softmax(scores, mask, causal, dropout, sinks)
        out = attention_values(weights, value)
    return out.transpose(1, 2).contiguous(), weights


def _prepared(
    module, query, key, value, mask, is_causal, sliding_window=None, position_bias=None, indices=None, **options
):
    """(query, key, value, mask, causal, window): as the public functions take them. A window is given only where no
    mask holds it already; indices [B, M, n] are the keys that a query of sparse attention sees."""
    for name in ("block_indices", "sinks", "head_mask"):
        if options.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} passes {name}=, which triton_attention does not know")
    B, M, N = max(query.shape[0], key.shape[0]), query.shape[2], key.shape[2]
    query, key, value = (t.expand(B, -1, -1, -1) for t in (query, key, value))  # learned queries have a batch of 1
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = M > 1 and mask is None and bool(causal)  # a single query is the newest, and sees all
    window = sliding_window if causal and M == N and sliding_window is not None and N > sliding_window else None
    if mask is not None and mask.shape[-1] > N:
        mask = mask[..., :N]
    if indices is not None:
        chosen = torch.zeros(B, M, N, dtype=torch.bool, device=query.device).scatter_(-1, indices.long(), True)[:, None]
        floating = mask is not None and mask.dtype != torch.bool
        mask = mask.masked_fill(~chosen, float("-inf")) if floating else chosen if mask is None else mask & chosen
    if position_bias is not None:
        bias = position_bias[..., :N]
        if mask is not None:
            bias = torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
        mask = bias
    return query, key, value, mask, causal, window


def _softmax(scores, mask, causal, dropout, sinks):
    """attention_softmax, with a sink as one more column that is visible to all and has no weight in the end."""
    if sinks is None:
        return attention_softmax(scores, mask, is_causal=causal, dropout_p=dropout)
    B, H, M, N = scores.shape
    if causal:  # whose diagonal the new column would shift
        visible = torch.ones(M, N, dtype=torch.bool, device=scores.device).tril()
        floating = mask is not None and mask.dtype != torch.bool
        mask = torch.where(visible, mask, float("-inf")) if floating else visible if mask is None else visible & mask
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    column = sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, M, 1)
    return attention_softmax(torch.cat([column, scores], 3), mask, dropout_p=dropout)[..., 1:]
