"""Models of the transformers library with small random weights: logits, gradients, weights and generation of
attn_implementation="triton_attention" and "triton_attention_staged" against "eager"."""

import copy
import os
import sys

import pytest
import torch

from tests.reference import BF16, DEVICE, F32, INF, INTERPRETED, assert_close, randn, run_python, torch_staged
from triton_attention import register_with_transformers
from triton_attention.doors.huggingface import attend_fused, attend_staged

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", "4.53")
NAMES = register_with_transformers()

BASE = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}
T5 = {
    "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0,
}
WHISPER = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 10,
    "max_target_positions": 24, "num_mel_bins": 8, "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}
VIT = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "num_labels": 5,
}
BERT = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", BASE),
    "Mistral, a window": ("MistralForCausalLM", "MistralConfig", {**BASE, "sliding_window": 5}),
    "Gemma 2, a softcap": (
        "Gemma2ForCausalLM", "Gemma2Config", {**BASE, "sliding_window": 5, "attn_logit_softcapping": 2.0}
    ),
    "gpt-oss, sinks": (
        "GptOssForCausalLM", "GptOssConfig",
        {
            **BASE, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1,
            "experts_implementation": "eager",
        },
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "BERT": ("BertForMaskedLM", "BertConfig", BERT),
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
}
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
PADDING = torch.ones(2, 12, dtype=torch.long, device=DEVICE)
PADDING[0, :4] = 0  # left: its first queries see nothing


def make(name, implementation="eager", dtype=F32):
    model, config, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options, attn_implementation=implementation)
    return getattr(transformers, model)(config).to(DEVICE, dtype).eval()


def inputs(name, dtype):
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)}
    if name == "Whisper":
        features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        return {"input_features": features, "decoder_input_ids": IDS[:, :6]}
    out = {"input_ids": IDS, "attention_mask": PADDING}
    return out | {"decoder_input_ids": IDS[:, :6].contiguous()} if name == "T5" else out


def logits_and_grads(model, name):
    """The logits of tokens that are not padding, and a gradient for each parameter."""
    model.zero_grad()
    logits = model(**inputs(name, next(model.parameters()).dtype)).logits
    if name not in ("T5", "Whisper", "ViT"):
        logits = logits[PADDING.bool()]
    logits.sin().sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def takes_position_bias():
    return tuple(int(n) for n in transformers.__version__.split(".")[:2]) >= (5, 18)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name):
    """Within twice the error of eager, whole model against whole model, both against eager in float64."""
    if name == "T5" and not takes_position_bias():
        pytest.skip("this transformers computes the attention of T5 by itself")
    eager = make(name)
    exact, lower = logits_and_grads(copy.deepcopy(eager).double(), name), logits_and_grads(eager, name)
    for implementation in NAMES:
        ours = copy.deepcopy(eager)
        ours.set_attn_implementation(implementation)
        assert ours.config._attn_implementation == implementation
        got = logits_and_grads(ours, name)
        assert got.keys() == lower.keys()
        top = max(t.abs().max().item() for t in exact.values())
        for key, value in got.items():
            scale = exact[key].abs().max().item()
            if scale > 1e-9 * top:  # else it is zero, but for rounding: the gradient of a bias of keys
                both = [t.double() - exact[key] for t in (value, lower[key])]
                error, its = (t.norm().item() for t in both)
                assert error <= 2 * its + 4e-7 * exact[key].norm().item(), (implementation, key, error, its)


@pytest.mark.parametrize("name", ("Llama", "Mistral, a window", "Gemma 2, a softcap", "gpt-oss, sinks", "T5"))
def test_generation(name):
    """Token by token the same, with left padding, in a growing cache and in a static one."""
    if name == "T5" and not takes_position_bias():
        pytest.skip("this transformers computes the attention of T5 by itself")
    eager = make(name)
    for cache in (None, "static") if name == "Llama" else (None,):
        options = {
            "attention_mask": PADDING, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
            **({"cache_implementation": cache, "disable_compile": True} if cache else {}),
        }
        expected = eager.generate(IDS, **options)
        for implementation in NAMES:
            ours = copy.deepcopy(eager)
            ours.set_attn_implementation(implementation)
            assert torch.equal(ours.generate(IDS, **options), expected)


@pytest.mark.parametrize("name", ("Llama", "Gemma 2, a softcap", "gpt-oss, sinks"))
def test_output_attentions(name):
    eager = make(name)
    expected = eager(**inputs(name, F32), output_attentions=True).attentions
    for implementation in NAMES:
        ours = copy.deepcopy(eager)
        ours.set_attn_implementation(implementation)
        got = ours(**inputs(name, F32), output_attentions=True).attentions
        assert len(got) == len(expected) == 2
        for mine, its in zip(got, expected, strict=True):
            keep = PADDING[:, None, :, None].bool().expand_as(mine)
            assert torch.allclose(mine[keep], its[keep], atol=1e-6)
            assert (mine[~keep] == 0).all()  # queries that see nothing; eager has them look everywhere


def test_training_with_dropout():
    model = make("Llama", NAMES[0])
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(input_ids=IDS, attention_mask=PADDING).logits)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("attend", (attend_fused, attend_staged))
def test_what_layers_pass(attend):
    """Learned queries with a batch of one, a scale in a tensor, the keys that sparse attention has chosen, a window
    that no mask holds; and what it does not know is refused, not dropped."""
    layer = torch.nn.Module()
    q, k, v = randn(1, 4, 5, 8, grad=False), randn(2, 2, 7, 8, grad=False), randn(2, 2, 7, 8, grad=False)
    both = q.expand(2, -1, -1, -1)
    out, _ = attend(layer, q, k, v, None, scaling=torch.tensor(0.3), is_causal=False)
    assert torch.allclose(out, torch_staged(both, k, v, scale=0.3)[0].transpose(1, 2), atol=1e-5)
    indices = torch.rand(2, 5, 7, device=DEVICE).topk(3).indices
    chosen = torch.zeros(2, 1, 5, 7, dtype=torch.bool, device=DEVICE).scatter_(-1, indices[:, None], True)
    expected = torch_staged(both, k, v, chosen, True)[0].transpose(1, 2)
    assert torch.allclose(attend(layer, q, k, v, None, indices=indices)[0], expected, atol=1e-5)
    lower = torch.ones(5, 7, dtype=torch.bool, device=DEVICE).tril()
    for mask in (lower, torch.zeros(5, 7, device=DEVICE).masked_fill(~lower, -INF)):
        assert torch.allclose(attend(layer, q, k, v, mask, indices=indices)[0], expected, atol=1e-5)
    square, window = k[:, :, :5].repeat_interleave(2, 1), torch.ones(5, 5, dtype=torch.bool, device=DEVICE).triu(-1)
    out, _ = attend(layer, square, k[:, :, :5], v[:, :, :5], None, sliding_window=2)
    expected = torch_staged(square, k[:, :, :5], v[:, :, :5], window, True)[0].transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Module passes block_indices="):
        attend(layer, q, k, v, None, block_indices=indices)


def test_a_model_with_an_attention_of_its_own_is_refused():
    config = transformers.BloomConfig(
        vocab_size=99, hidden_size=64, n_layer=1, n_head=4, attn_implementation="triton_attention"
    )
    with pytest.raises(ValueError, match="BloomConfig computes its attention by itself"):
        transformers.BloomForCausalLM(config)(input_ids=IDS.cpu(), attention_mask=PADDING.cpu())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes bfloat16 as float32")
def test_in_bfloat16():
    exact = logits_and_grads(make("Llama").double(), "Llama")["logits"]
    lower = logits_and_grads(make("Llama", dtype=BF16), "Llama")["logits"]
    for implementation in NAMES:
        assert_close(logits_and_grads(make("Llama", implementation, BF16), "Llama")["logits"], lower, exact)


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import triton_attention\n"
    run = run_python(code + "triton_attention.register_with_transformers()")
    assert "ImportError: register_with_transformers() needs transformers 4.53 or newer" in run.stderr, run.stderr
    assert "transformers" in sys.modules
