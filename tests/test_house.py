"""The house: who may import whom, what is installed, what a name from before the move still finds."""

import ast
import base64
import pickle
import re
import zlib

import pytest
import torch

from tests.reference import DEVICE, HERE, run_python
from triton_attention_layer import TritonMultiheadAttention

FLOORS = [  # from the ground up; a file imports files of its own floor and below, on the ground only those before it
    ["device", "tuned", "tiles", "logits", "replay", "tile_choice", "operators", "launch"],
    ["hopper", "float32", "dropout", "merge", "checks", "softmax_backward", "softmax_mean", "nan_repair",
     "fused_common", "fused_probs", "fused_backward", "fused_bias", "mean_weights", "mask_map", "row_stats"],
    ["scores", "softmax", "values", "fused"], ["backward"], ["layer"], ["doors"], ["tests", "benchmarks"],
]
STAGES = {"scores", "softmax", "values", "fused", "backward", "layer"}
FILES = [path for room in (".", "triton_attention", "tests", "benchmarks") for path in HERE.glob(
    f"{room}/**/*.py" if room == "triton_attention" else f"{room}/*.py"
)]


def room_of(module):
    """The name in FLOORS of a module of the project, or None."""
    parts = module.split(".")
    if parts[0] in ("tests", "benchmarks") or re.match("benchmark_|test_attention|conftest", parts[0]):
        return "benchmarks" if parts[0].startswith("bench") else "tests"
    if parts[0] == "triton_attention":
        return parts[1] if len(parts) > 1 else "__init__"
    return parts[0].removeprefix("triton_attention_") if parts[0].startswith("triton_attention_") else None


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(path):
    """The modules that a file imports, of a package each name that is a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                inside = HERE / node.module.replace(".", "/") / alias.name
                module = inside.with_suffix(".py").exists() or inside.is_dir()
                yield f"{node.module}.{alias.name}" if module else node.module


def wrong(importer, imported):
    """Why one module of the project must not import another, or None."""
    a, b = room_of(importer), room_of(imported)
    if b is None or b == "__init__" or a == "__init__":
        return None if b != "doors" else "only __init__ imports the doors"
    if {a, b} <= {"scores", "values"} or a == b:  # each is the derivative of the other
        return None
    if floor_of(b) > floor_of(a):
        return "upwards"
    if floor_of(a) == floor_of(b) == 0 and FLOORS[0].index(b) > FLOORS[0].index(a):
        return "upwards on the ground"
    inside = importer.startswith("triton_attention.") and a != "doors"
    if inside and b in STAGES and not imported.startswith("triton_attention."):
        return "the machinery imports no stage"
    if a == "hopper" and b == "checks":
        return "the kernels for Hopper check nothing"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HERE)))
def test_imports_run_downwards(path):
    importer = ".".join(path.relative_to(HERE).with_suffix("").parts)
    bad = {name: why for name in imports_of(path) if (why := wrong(importer, name))}
    assert not bad, f"{importer} imports {bad}"


@pytest.mark.parametrize("importer,imported", [
    ("triton_attention.tiles", "triton_attention.launch"), ("triton_attention.launch", "triton_attention_scores"),
    ("triton_attention.hopper.forward", "triton_attention.checks"), ("triton_attention_scores", "tests.reference"),
    ("triton_attention_softmax", "triton_attention_layer"), ("triton_attention_layer", "triton_attention.doors"),
])
def test_a_wrong_import_is_seen(importer, imported):
    assert wrong(importer, imported)


def test_what_is_installed():
    listed = re.findall(r'"(triton_attention[\w.]*)"', (HERE / "pyproject.toml").read_text())
    packages = {".".join(path.relative_to(HERE).parent.parts) for path in HERE.glob("triton_attention/**/__init__.py")}
    assert set(listed) == packages | {path.stem for path in HERE.glob("triton_attention_*.py")}


def test_public_names_of_the_package():
    code = "import sys, triton_attention\nbefore = set(sys.modules)\n"
    code += "assert not any(name.startswith('triton_attention_') for name in before), 'imported before it is used'\n"
    code += "from triton_attention import *\nimport triton_attention_fused\n"
    code += "assert attention_fused is triton_attention_fused.attention_fused\n"
    code += "assert set(triton_attention.__all__) <= set(dir(triton_attention)) and triton_attention.__version__\n"
    code += "print(*triton_attention.__all__)"
    run = run_python(code)
    assert "TritonMultiheadAttention" in run.stdout.split(), run.stderr
    with pytest.raises(ImportError, match="cannot import name 'attention'"):
        from triton_attention import attention  # noqa: F401


# pickle.dumps(TritonMultiheadAttention(4, 2, bias=False, batch_first=True)) by the last commit before the move
PICKLED = (
    b"c-qxfO>7%Q6t*4b*LHAI8rlSv3RKk*VA9~0q|}>Ig@UxHOVb=IAsEKqv3KkBu6K9V!3j|VqNz&;QpBQOD$#PH2rexst&&XmQ6vab4^fdQP$6+Ctv"
    b"EphDgudFuT5g7a3_bn=l8yu_h#mM-%fbn{<hIo`XlXFm$0e;h%r*I#5@@mkZzI9!==PQQ^t~rpzuTmV7+B^y=;wJA<~3(C@GSXwu;0Da!`j^gpqE"
    b"PlC6>ga=LmHj36m3VvG2(swc%TFtH>X7HI=IN|=%?tS)3bi_L2ite~OlAm76hArf%b8_d8ovPclfDilCUSF<2dz{p^z{j+YDYr^wdi~Q%A1Gl#we"
    b"eanq;R(;dn|18}xaJDQgY3+#E376}8RS{7>_D2E0pbCcktK{}1dt*~P|-Zacnb^SLJk2#8byXyH?Da@@p=|CL{-OHJ@1Lvv0svcwFcfB_u6}?N?L"
    b"2=y{5@(hT`@;ms{3c$<h&84zR}Y5hvK9x#O)2(-(<E9_{Jt>)jdY-ML$H_D$wYt&Z=GVa<D(?e?7Jx)at7!`;qnx;ESx;Xd0o$6bHpDt)0?q+OpU"
    b"xnmD|`db5T8hYmzhqo`ypZ)07=<Qzu{U2sGEG)rAI{nF3dQ8DIuQ&Dw_k2Z94WFWe{_p76a@)f9^)qzw(}w={Z%lEI{C1l2-KvX@(X;f~@YSdR+7"
    b">R5AL+`w=V;gRBIo{khPyj3MWN^8xq-<qxWB&X>`(vjB6m$bAAO~FncH#Z5<PM8X7tLYU+HM<8a@8|IeOvx>)cHEC9d=GWg6C^oORq9vUnHo=e?5"
    b"_@8#W-)=A=HZzZFo%{|5&-yvN<IuZt?B(|wIWMQ_ZC~jun3FeW2R>iv*31n&m`I>;g!qtQX4J&4nCXg^wDTm6W6DVvfayD5Edj={wU?6NwTVx|hz"
    b"+`3w>Ws=d0-~yB46D=+xob7GHrx&*1Efq@u1>Q~T0u(H*Wo*=qhLhBBCyw`D~Nk*5Ktb01p_1@yE&nZY5NCL(<bi{U1ST$Ad~}YDh05JfC90UM{G"
    b"8+$ZpvnTh}kXLmL}_fgwgfV2@LEf=z1^wYSvaO!9vqI@cpqqq;&9$f|-VqtcT#sU|MHs73B^WJ6KH<$PF{6a<;V-4|1pfr0|Fl6_5u!zN_<HVP9m"
    b"8gvj9p%d$iVuP(|4Q0lNJ~0pygZm%<pR3JdJ&|3#k?tzB3I2=PRIp5Kf@QUF4V$yi51-`PFD}!G)Er&ud6NFjH*@<A-9LBbk0ma*uxoyBtdaX*wu"
    b"9!L{&N1(n=5o^>OB3a^$2y%p59xTcJG>LFFj_>M0?9)DLyc6iQA_waYrd9b~)z3nD~(6g&ouFm>$RMc1*8h_Bdv*V>rj`W0dhR4M-t~O`TDQ_Y%K"
    b"Np)~<BVUT8&O(200Fl!^cnTnGyI~#$P$peFZ&A=+MNSYNh3+!(w+s8v11zpXt&8?>@*GPN`h?62nNxFd<zRAWqRXn7@K0L6s!SV98fI&e3qexfn&"
    b"$hxO(r;H_r7K0uMEGw%PwqP"
)


def test_a_layer_pickled_before_the_move_loads():
    layer = pickle.loads(zlib.decompress(base64.b85decode(PICKLED)))
    x = torch.randn(2, 3, 4)
    assert type(layer) is TritonMultiheadAttention and layer.num_heads == 2
    expected = torch.nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
    expected.load_state_dict(layer.state_dict())
    assert torch.allclose(layer.to(DEVICE)(*[x.to(DEVICE)] * 3)[0].cpu(), expected(x, x, x)[0], atol=1e-5)
