"""How PyTorch reaches the kernels: activate() and its overrides, replace_attention(), what counts FLOPs."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import (
    BF16, DEVICE, F16, F32, GPU, HERE, INF, INTERPRETED, compare, randn, torch_fused,
)
from triton_attention import (
    TritonMultiheadAttention, activate, attention_fused, attention_staged, deactivate, replace_attention,
)
from triton_attention.doors import sdpa
from triton_attention.dropout import dropout_op
from triton_attention.row_stats import row_stats

aten = torch.ops.aten
current = torch.nn.attention.current_flash_attention_impl


@pytest.fixture(autouse=True)
def _deactivated():
    yield
    deactivate()
    assert current() is None


@pytest.fixture
def ran(monkeypatch):
    """Which of our operators the overrides have called."""
    calls = []
    for name in ("fused_op", "fused_backward_op"):
        op = getattr(sdpa, name)
        monkeypatch.setattr(sdpa, name, lambda *args, name=name, op=op: calls.append(name) or op(*args))
    return calls


def attend(q, k, v, mask=None, is_causal=False, scale=None):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped)


def reference(*args, **kwargs):
    return torch_fused(*args, **kwargs)[0]


def tensors(M=40, N=56, D=16, H=4, Hk=4, Dv=None, dtype=F32, **kwargs):
    return [randn(2, h, n, d, dtype=dtype, **kwargs) for h, n, d in ((H, M, D), (Hk, N, D), (Hk, N, Dv or D))]


MASKS = {
    "no mask": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3},
    "bool": {"mask": torch.rand(2, 1, 40, 56, generator=torch.Generator().manual_seed(1)) > 0.3},
    "bias": {"mask": torch.randn(40, 56, generator=torch.Generator().manual_seed(1))},
    "a large negative constant": {"mask": torch.full((2, 1, 40, 56), torch.finfo(F32).min)},
}


@pytest.mark.parametrize("name", MASKS)
def test_activated_sdpa_against_torch(name, ran):
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in MASKS[name].items()}
    with activate():
        compare(attend, reference, *tensors(), **kwargs)
    assert ran == ["fused_op", "fused_backward_op"]


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("layout", ("plain", "bnhd", "packed", "expanded"))
def test_activated_sdpa_in_16_bits(layout, dtype, ran):
    with activate():
        compare(attend, reference, *tensors(48, 48, dtype=dtype, layout=layout), is_causal=True)
        compare(attend, reference, *tensors(Hk=2, dtype=dtype, layout=layout))
    assert ran.count("fused_op") >= 1  # of grouped heads on the CPU, PyTorch takes none but its "math"


def test_what_the_kernels_refuse_stays_pytorchs(ran):
    wide = tensors(D=264)
    with activate():
        compare(attend, reference, *wide)
        assert not ran
        compare(lambda q, k, v: attend(q[0], k[0], v[0]), lambda q, k, v: reference(q, k, v)[0], *tensors())
    q, k, v = tensors()
    for args, why in (
        (wide, "head dims 264"), ((q, k, v.half()), "dtypes"), ((q[0], k, v), "3 dimensions"),
        ((q, k[:, :3], v), "shapes"),
        ((q[:, :0], k, v), "shapes|empty"), ((q, k, v, q.new_zeros(2, 3, 40, 56)), "mask of shape"),
        ((q.to("meta"), k, v), "meta"),
    ):
        assert re.search(why, sdpa.refuses(*args, *(None,) * (4 - len(args))))


def test_deactivate_restores_everything(ran):
    q, k, v = tensors()
    before, order = attend(q, k, v), torch._C._get_sdp_priority_order()
    deactivate()  # harmless
    assert current() is None
    activate()
    activate()
    assert current() == sdpa.NAME and sdpa.NAME in torch.nn.attention.list_flash_attention_impls()
    assert torch.allclose(attend(q, k, v), before, atol=1e-5)
    assert ran == ["fused_op"]
    with activate():  # within: was active before, and is after
        pass
    assert current() == sdpa.NAME
    deactivate()
    assert torch.equal(attend(q, k, v), before) and len(ran) == 1
    assert torch._C._get_sdp_priority_order() == order
    with pytest.raises(ZeroDivisionError), activate():
        raise ZeroDivisionError
    assert current() is None


def test_another_implementation_comes_back():
    class Handle:
        def remove(self):
            removed.append(self)

    removed = []
    torch.nn.attention.register_flash_attention_impl("of a test", register_fn=Handle)
    torch.nn.attention.activate_flash_attention_impl("of a test")
    with activate():
        assert current() == sdpa.NAME and len(removed) == 1
    assert current() == "of a test"
    activate()
    torch.nn.attention.activate_flash_attention_impl("of a test")  # behind our back
    deactivate()  # of which ours is not the active one
    assert current() == "of a test"
    torch.nn.attention.restore_flash_attention_impl()


def test_a_graph_is_walked_back_by_the_kernels_that_built_it(ran):
    q, k, v = tensors()
    with activate():
        out = attend(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(attend(q, k, v, is_causal=True).sum(), (q, k, v))
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert ran == ["fused_op"] if INTERPRETED else ["fused_op", "fused_backward_op"]


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_activated_sdpa_under_compile(backend, ran):
    """Inductor checks the strides of outputs and gradients against those of PyTorch's own fakes."""
    compiled = torch.compile(lambda q, k, v, mask: attend(q * 1.0, k, v, mask), backend=backend, fullgraph=True)
    with activate():
        for layout in ("plain", "bnhd"):
            compare(compiled, lambda q, k, v, m: reference(q, k, v, m), *tensors(dtype=F32, layout=layout), None)
            mask = torch.rand(2, 1, 40, 56, device=DEVICE) > 0.3
            compare(compiled, lambda q, k, v, m: reference(q, k, v, m), *tensors(dtype=F32, layout=layout), mask)
    assert "fused_op" in ran and "fused_backward_op" in ran


def test_models_of_torch_nn(ran):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device=DEVICE)
    x, padding = torch.randn(2, 9, 32, device=DEVICE), torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    padding[0, 6:] = True

    def grads():
        out = layer(x, src_key_padding_mask=padding)
        return out, *torch.autograd.grad(out[~padding].sin().sum(), tuple(layer.parameters()))

    expected = grads()
    with activate():
        got = grads()
    assert ran == ["fused_op", "fused_backward_op"]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours[:, :6], theirs[:, :6], atol=1e-4) if ours.dim() == 3 else True
        assert torch.allclose(ours, theirs, atol=1e-4) or ours.dim() == 3


# ---- the overrides of a GPU's operators, called on whatever device the kernels run on


@pytest.fixture
def overridden():
    """The operators with their overrides, on the device of the kernels; without a GPU, what they passed on."""
    library = torch.library.Library("aten", "IMPL")
    if INTERPRETED:
        for name, ours in (sdpa._FORWARD | sdpa._BACKWARD).items():
            def override(*args, ours=ours, **kwargs):
                return ours(lambda *a, **kw: covered.append(ours), *args, **kwargs)

            library.impl(name, override, "CPU")
    else:
        activate()
    covered = []
    yield covered
    library._destroy()


def flash(q, k, v, mask, causal, dropout_p=0.0):
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal)


def efficient(q, k, v, mask, causal, dropout_p=0.0):
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, causal)


def cudnn(q, k, v, mask, causal, dropout_p=0.0):  # takes a mask of fewer dimensions
    return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, dropout_p, causal)


OPERATORS = (flash, efficient, cudnn)


@pytest.mark.parametrize("layout", ("plain", "bnhd"))
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_of_a_gpu(operator, layout, overridden):
    """Values, gradients, and the shapes and strides of PyTorch's own fakes."""
    dtype = F32 if INTERPRETED else F16
    for heads, M, masked, causal in ((4, 40, False, False), (2, 40, False, True), (4, 37, True, True)):
        q, k, v = tensors(M, 56, Hk=heads, dtype=dtype, layout=layout)
        mask = randn(1, 4, M, 56, dtype=dtype, grad=False) if masked and operator is not flash else None
        right = 56 - M if causal and operator is flash else 0  # its last query sees the last key

        def theirs(q, k, v, mask=mask, causal=causal, right=right):
            if causal and right:
                return torch_fused(q, k, v, mask, window_size=(-1, 0))[0]
            return torch_fused(q, k, v, mask if mask is None else mask.to(q.dtype), causal)[0]

        compare(lambda q, k, v, m=mask, c=causal: operator(q, k, v, m, c)[0], theirs, q, k, v)
        outs = operator(q, k, v, mask, causal)
        on_meta = [t if t is None else t.detach().to("meta").requires_grad_(t.requires_grad) for t in (q, k, v, mask)]
        fakes = operator(*on_meta, causal)
        for out, fake in zip(outs, fakes, strict=True):
            if isinstance(fake, torch.Tensor):
                assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype)
            else:
                assert out == fake
        grads = torch.autograd.grad(outs[0].sum(), (q, k, v))
        if heads == 4 or operator is not efficient:  # older fakes of that one know no grouped heads
            fakes = torch.autograd.grad(fakes[0].sum(), on_meta[:3])
            for grad, fake in zip(grads, fakes, strict=True):
                assert (grad.shape, grad.stride()) == (fake.shape, fake.stride())


def test_gradient_of_a_bias_through_the_efficient_operator(overridden):
    q, k, v = tensors(40, 53)
    bias = randn(2, 4, 40, 53)
    compare(lambda *a: efficient(*a, False)[0], reference, q, k, v, bias)

    def without_lse(q, k, v, bias):  # what PyTorch asks for where the bias alone has a gradient
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]

    compare(without_lse, reference, *(t.detach() for t in (q, k, v)), bias)


def test_masks_of_few_dimensions_through_cudnns_operator(overridden):
    q, k, v = tensors(dtype=F32 if INTERPRETED else F16)
    mask = randn(1, 1, 40, 56, dtype=q.dtype, grad=False)
    for fewer in (mask[0, 0], mask[0]):
        compare(lambda *a, m=fewer: cudnn(*a, m, False)[0], lambda *a: reference(*a, mask.to(a[0].dtype)), q, k, v)


@pytest.mark.parametrize("operator", OPERATORS)
def test_dropout_in_operators_of_a_gpu(operator, overridden):
    """Drawn from torch's generator, the same forward and backward; kept weights are what the public function keeps."""
    q, k, v = tensors(dtype=F32 if INTERPRETED else F16)
    torch.manual_seed(3)
    outs = operator(q, k, v, None, False, 0.4)
    torch.manual_seed(3)
    again = operator(q, k, v, None, False, 0.4)
    assert torch.equal(outs[0], again[0])
    drawn = outs[6] if operator is not efficient else outs[2]
    seed = drawn.view(torch.int64).reshape(-1)[:1]
    keep = dropout_op(torch.ones(2, 4, 40, 56, device=DEVICE), seed, 0.4, None, True)
    compare(
        lambda q, k, v: torch.manual_seed(3) and operator(q, k, v, None, False, 0.4)[0],
        lambda q, k, v: torch_fused(q, k, v, keep=keep.to(q.dtype))[0], q, k, v,
    )
    assert not torch.equal(operator(q, k, v, None, False, 0.4)[0], outs[0])


@pytest.mark.skipif(not INTERPRETED, reason="the covered operators are PyTorch's own")
def test_backward_follows_its_forward(overridden, ran):
    q, k, v = tensors()
    o, lse, *_, seed, mark, _ = flash(q, k, v, None, False)
    rest = None, None, 40, 56, 0.0, False, seed
    aten._scaled_dot_product_flash_attention_backward(o, q, k, v, o, lse, *rest, mark)
    assert ran == ["fused_op", "fused_backward_op"] and not overridden
    with pytest.raises(TypeError):  # what covers for PyTorch's operator returns nothing
        theirs = torch.zeros((), dtype=torch.uint64)
        aten._scaled_dot_product_flash_attention_backward(o, q, k, v, o, lse, *rest, theirs)
    assert overridden == [sdpa._flash_backward] and len(ran) == 2


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
def test_row_stats(dtype):
    """P from them is P: in rows of small scores, of one large negative constant, and of nothing."""
    q, k, _ = tensors(40, 56, Hk=2, dtype=dtype, grad=False)
    mask = randn(2, 1, 40, 56, dtype=dtype, grad=False)
    mask[0, :, :7], mask[1, :, 5], mask[1, :, 9] = torch.finfo(dtype).min, -INF, 1000.0
    for scale, right in ((0.25, None), (-0.25, 3)):
        full = mask.expand(2, 4, 40, 56)
        s = torch_fused_scores(q, k, mask, scale, right)
        lse = s.logsumexp(-1)
        top, total = row_stats(q, k, full, lse.float(), scale, None, right).double().unbind(-1)
        assert torch.equal(total == 0, lse == -INF)
        probs = torch.exp(s - top[..., None]) / total[..., None]
        exact = torch._safe_softmax(s, -1)
        seen = lse > -INF
        assert (probs - exact)[seen].abs().max() < 2e-5


def torch_fused_scores(q, k, mask, scale, right):
    """Logits in float32, where a large negative constant swallows the scores, as float64."""
    s = (q.float() @ k.float().repeat_interleave(2, 1).mT) * scale + mask.float()
    if right is not None:
        s = s.masked_fill(~torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).tril(right), -INF)
    return s.double()


# ---- replace_attention


def test_replace_attention():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device=DEVICE)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, seen = torch.randn(2, 7, 32, device=DEVICE), []
    model.layers[1].self_attn.register_forward_hook(lambda module, args, out: seen.append(module))
    expected, before = model(x), {name: p.data_ptr() for name, p in model.named_parameters()}
    seen.clear()
    assert replace_attention(model) == 2 and replace_attention(model) == 0
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():  # where PyTorch would pass the layer by
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert seen == [model.layers[1].self_attn]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.layers[0]))):
        assert all(type(m) is TritonMultiheadAttention for m in other.modules() if hasattr(m, "in_proj_weight"))
    single = torch.nn.MultiheadAttention(8, 2, device=DEVICE, add_bias_kv=True, kdim=3)
    single.train(False)
    args = [torch.randn(5, 2, n, device=DEVICE) for n in (8, 3, 8)]
    expected = single(*args)
    assert replace_attention(single) == 1 and type(single) is TritonMultiheadAttention
    for ours, theirs in zip(single(*args), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_replace_attention_leaves_others_alone():
    class Own(torch.nn.MultiheadAttention):
        pass

    model = torch.nn.Sequential(Own(8, 2), TritonMultiheadAttention(8, 2), torch.nn.Linear(8, 8))
    assert replace_attention(model) == 0 and type(model[0]) is Own
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        replace_attention([model])


def test_replace_a_parametrized_attention():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = torch.nn.MultiheadAttention(8, 2, batch_first=True, device=DEVICE), torch.randn(1, 5, 8, device=DEVICE)
    parametrize.register_parametrization(layer, "in_proj_weight", Doubled())
    expected = layer(x, x, x)
    assert replace_attention(layer) == 1 and replace_attention(layer) == 0
    assert isinstance(layer, TritonMultiheadAttention) and parametrize.is_parametrized(layer, "in_proj_weight")
    for module in (layer, copy.deepcopy(layer)):
        for ours, theirs in zip(module(x, x, x), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    parametrize.remove_parametrizations(layer, "in_proj_weight")
    assert type(layer) is TritonMultiheadAttention and torch.allclose(layer(x, x, x)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("first", ("replaced", "adapted"))
def test_replace_attention_and_lora(first):
    peft = pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, device=DEVICE)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    def adapt(model):
        torch.manual_seed(1)
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["attention"], init_lora_weights=False, r=2)
        ).to(DEVICE)

    x, model = torch.randn(2, 5, 16, device=DEVICE), Model()
    theirs, ours = adapt(copy.deepcopy(model)), copy.deepcopy(model)
    if first == "replaced":
        assert replace_attention(ours) == 1
    ours = adapt(ours)
    if first == "adapted":
        assert replace_attention(ours) == 1
    assert type(ours.base_model.model.attention.base_layer) is TritonMultiheadAttention
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    for model in (ours, theirs):
        model(x).sin().sum().backward()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, its.grad, atol=1e-3)


# ---- FLOPs


def flops(function, *args):
    """(forward, backward)"""
    with FlopCounterMode(display=False) as counter:
        out = function(*args)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("compiled", (False, True))
def test_flops_are_counted_as_torch_counts_them(compiled):
    """Dv apart, a causal bound not halved; the stages do not multiply Q K^T again in the backward pass."""
    run = (lambda f: torch.compile(f, backend="aot_eager")) if compiled else (lambda f: f)
    q, k, v = tensors(9, 11, 16, Hk=2, Dv=8)
    one = 2 * 2 * 4 * 9 * 11
    fused_call = run(lambda q, k, v: attention_fused(q, k, v, is_causal=True, enable_gqa=True))
    assert flops(fused_call, q, k, v) == (one * 24, one * (3 * 16 + 2 * 8))
    staged_call = run(lambda q, k, v: attention_staged(q, k, v, enable_gqa=True)[0])
    assert flops(staged_call, q, k, v) == (one * 24, one * (2 * 16 + 2 * 8))
    q, k, v = tensors(9, 11, 16)
    with activate():
        assert flops(run(lambda q, k, v: attend(q, k, v)), q, k, v) == (one * 32, one * 80)


@GPU
def test_the_profiler_names_our_kernels_while_active():
    q, k, v = tensors(256, 256, 64, dtype=F16)

    def kernels():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attend(q, k, v).sum().backward()
            torch.cuda.synchronize()
        return {event.key for event in profile.key_averages()}

    with activate():
        active = kernels()
    forward, backward = {"_fwd_kernel", "_forward_kernel"}, {"_dkdv_kernel", "_backward_kernel"}
    assert active & forward and active & backward, active
    assert not kernels() & (forward | backward)


# ---- the README


SNIPPETS = re.findall(
    r"```python\n(.*?)```", (HERE / "README.md").read_text().split("## Use it in your model")[1].split("\n## ")[0], re.S
)


@pytest.mark.parametrize("number", range(5))
def test_snippets_of_the_readme(number):
    """`model` is one of torch.nn, `language_model` one of transformers."""
    assert len(SNIPPETS) == 5
    model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, device=DEVICE)
    names = {"torch": torch, "model": model, "x": torch.randn(2, 8, 32, device=DEVICE)}
    names |= zip("qkv", tensors(8, 8), strict=True)
    if "language_model" in SNIPPETS[number]:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=4)
        names["language_model"] = transformers.GPT2LMHeadModel(config)
    torch._dynamo.reset()
    exec(SNIPPETS[number], names)
    if "language_model" in names:
        assert names["language_model"].config._attn_implementation == "triton_attention"
    else:
        assert names["out"].isfinite().all()
