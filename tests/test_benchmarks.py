"""The benchmarks, with a clock that tests can read: what is wrong is never timed, what is measured is never lost."""

import dataclasses
import functools
import json
import runpy
import shutil
import time

import pytest
import torch

from benchmarks import features, figures, harness, providers, tuning
from benchmarks.readme import features as results_features
from benchmarks.readme import readme, results_readme
from benchmarks.results import OURS, Row, compare, mean
from tests.reference import HERE, run_python


class FakeWatch:
    """Every call takes a millisecond; `interrupt` is the number of the timing that Ctrl-C ends."""

    def __init__(self, interrupt=None):
        self.timed, self.interrupt, self.passes, self.load = [], interrupt, harness.PASSES, 0.0

    def warm(self, call):
        call()

    def ceilings(self):
        return {"copy_gbps": 1000.0, "matmul_tflops": 100.0}

    def time(self, call):
        self.timed.append(call)
        if len(self.timed) == self.interrupt:
            raise KeyboardInterrupt
        return 1.0, 0.9, 1.1


def doubled(name, **makes):
    """A Case: 2 x, by the providers."""
    x = torch.arange(1.0, 9.0)
    build = lambda: harness.Comparison(makes, lambda t: 2 * x.to(t), lambda r: r, bytes=1e9, flops=1e9)  # noqa: E731
    return harness.Case(name, "case", list(makes), build)


def benchmark(cases, folder, watch, *options):
    """Run the cases; (exit code, rows of the JSON as {(name, provider): row})."""
    args, code = harness.parser("").parse_args(["--out", str(folder), *options]), 0
    try:
        harness.run("test", cases, args, watch)
    except SystemExit as end:
        code = end.code
    paths = list(folder.glob("*/test.json"))
    saved = json.loads(paths[0].read_text())["rows"] if paths else []
    return code, {(row["name"], row["provider"]): row for row in saved}


def twice():
    return lambda: torch.arange(2.0, 18.0, 2.0)


def test_benchmark_never_times_what_is_wrong(tmp_path, capsys):
    watch = FakeWatch()

    def missing():
        import no_such_package  # noqa: F401

    def too_large():
        raise MemoryError("needs 9 GiB, 1 are free")

    def stale():  # right at first, and what was in memory ever after
        out = torch.arange(2.0, 18.0, 2.0)
        return lambda: out

    wrong = lambda: lambda: torch.arange(3.0, 19.0, 2.0)  # noqa: E731
    case = doubled("a", right=twice, wrong=wrong, missing=missing, too_large=too_large, stale=stale, torch=twice)
    code, saved = benchmark([case, doubled("b", nobody=missing)], tmp_path, watch)
    notes = {provider: row["note"] for (_, provider), row in saved.items()}
    assert notes.pop("nobody").startswith("not installed")
    assert code == 0 and notes["right"] == notes["torch"] == "" and notes["wrong"] == notes["stale"] == "WRONG"
    assert notes["missing"].startswith("not installed") and notes["too_large"].startswith("out of memory: needs 9 GiB")
    assert {provider for (_, provider), row in saved.items() if row["ms"]} == {"right", "torch"}
    assert len(watch.timed) == 2 * harness.PASSES
    assert saved["a", "right"]["of_roofline"] == 1.0 and "WRONG" in capsys.readouterr().out


def test_benchmark_survives_ctrl_c_and_resumes(tmp_path, capsys):
    cases = lambda: [doubled(name, one=twice, two=twice) for name in "ab"]  # noqa: E731
    points = 2 * harness.PASSES
    code, saved = benchmark(cases(), tmp_path, FakeWatch(interrupt=points))  # in the last pass of the first case
    assert code == 130 and len(saved) == 1 and "--resume goes on" in capsys.readouterr().out
    watch = FakeWatch()
    code, saved = benchmark(cases(), tmp_path, watch, "--resume")
    assert code == 0 and len(saved) == 4 and len(watch.timed) == 3 * harness.PASSES
    watch = FakeWatch()
    assert benchmark(cases(), tmp_path, watch, "--resume")[1].keys() == saved.keys() and not watch.timed
    assert len(benchmark(cases()[:1], tmp_path, FakeWatch())[1]) == 2  # without --resume it starts anew


def test_benchmark_compares_with_the_best_of_the_others():
    def rows(provider, *tflops, case="a", mode="fwd"):
        about = {"mode": mode, "same": case == "a"}
        return [Row(f"pass {i}", case, provider, tflops=x, about=about) for i, x in enumerate(tflops)]

    ours = OURS
    measured = rows(ours, 4.0, 6.0, 5.0) + rows("fa3", 5.0, 2.0, 4.0) + rows("fa4", 1.0, None, 8.0)
    measured += rows(ours, 3.0, case="alone") + rows("fa3", 1.0, mode="bwd")
    lines = compare(measured, "fwd")
    assert lines[0] == ("a", {ours: 5.0, "fa3": 4.0, "fa4": 4.5}, (5.0 / 4.5, 5.0 / 8.0, 6.0 / 2.0), True)
    assert lines[1] == ("alone", {ours: 3.0}, None, False)
    assert mean(lines) == pytest.approx(5.0 / 4.5) and mean(lines[1:]) is None


def test_benchmark_compares_passes_of_one_row():
    about = {"mode": "fwd", "same": True}
    measured = [Row("forward", "a", OURS, ms=2.0, tflops=6.0, passes=[2.0, 1.0, 3.0], about=about)]
    measured.append(Row("forward", "a", "fa3", ms=4.0, tflops=3.0, passes=[4.0, 4.0, 2.0], about=about))
    assert compare(measured, "fwd") == [("a", {OURS: 6.0, "fa3": 3.0}, (2.0, 2.0 / 3.0, 4.0), True)]


def test_benchmark_of_features_has_a_table():
    about = {"mode": "fwd", "same": False}
    rows = [Row("forward", "padding", OURS, ms=1.0, tflops=2.0, passes=[1.0, 0.9, 1.1], about=about)]
    rows.append(Row("forward", "padding", "flex", ms=2.0, tflops=1.0, passes=[2.0, 2.0, 2.0], about=about))
    rows.append(Row("forward", "padding", "SDPA flash", note="RuntimeError", about=about))
    info = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit"), "") | {"copy_gbps": 1.0, "matmul_tflops": 1.0}
    assert results_features(None, info, rows)[-1] == "| padding | 1.000 | 2.000 | – | 2.00 [1.82, 2.22] |"


@pytest.mark.parametrize("name,mode", [
    (name, mode) for name, feature in features.FEATURES.items() for mode in ("fwd", "bwd")
    if not feature().compiled and not (mode == "bwd" and feature().queries)  # that for seconds, this is never asked
])
def test_benchmark_of_features_asks_everybody_the_same(name, mode):
    """Ours and SDPA by a tensor, the reference by the function of places that FlexAttention gets."""
    comparison = features.attention(mode, name, 2, 2, 48, 16, "float32", 0)
    for provider in (OURS, "SDPA math"):
        comparison.makes.setdefault(provider, functools.partial(comparison.makes[OURS].func, functools.partial(
            features.sdpa, "MATH")))
        _, picked, _ = harness.try_out(comparison.makes[provider], comparison.pick)
        exact, _, _ = harness.allowance(comparison, torch.float32)
        assert len(picked) == len(exact) == (1 if mode == "fwd" else 4 if name == "bias that learns" else 3)
        assert harness.error_of(picked, exact) < 2e-6


@pytest.mark.parametrize("name", features.LAYERS)
def test_benchmark_of_layers_asks_everybody_the_same(name):
    comparison = features.layer(name, 2, 2, 16, 32, "float32", 0)
    for make in comparison.makes.values():
        _, picked, _ = harness.try_out(make, comparison.pick)
        assert harness.error_of(picked, harness.allowance(comparison, torch.float32)[0]) < 1e-5


def test_benchmark_of_shared_keys_is_checked_against_every_query_that_shares_them():
    for mode in ("fwd", "bwd"):
        comparison = providers.attention(mode, 1, 4, 32, 16, "float32", True, 0, kv_heads=2)
        _, picked, _ = harness.try_out(comparison.makes["triton fused"], comparison.pick)
        exact, _, _ = harness.allowance(comparison, torch.float32)
        assert [t.shape[1] for t in picked] == [2, 1, 1][: len(picked)]
        assert harness.error_of(picked, exact) < 1e-6


def test_benchmark_without_a_gpu_saves_nothing(tmp_path):
    assert benchmark([doubled("a", torch=twice)], tmp_path, None) == (0, {}) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ("attention", "peers", "seq_lengths", "block_sizes", "heatmap"))
def test_benchmark_help_is_quick(script):
    code = f"import runpy, sys\nsys.argv = ['benchmark_{script}.py', '--help']\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert not {'torch', 'triton', 'matplotlib'} & set(sys.modules)"
    start = time.monotonic()
    run = run_python(code)
    assert run.returncode == 0 and "--resume" in run.stdout, run.stderr
    assert time.monotonic() - start < 2


def test_benchmark_figures_need_the_json_alone(tmp_path):
    info = {"gpu": "GPU", "torch": "", "triton": "", "commit": "", "copy_gbps": 4e3, "matmul_tflops": 700.0}
    folder = tmp_path / "GPU"
    folder.mkdir()
    rows = [
        dataclasses.asdict(Row(
            name, f"bfloat16 B4 H16 S{S} D64", provider, ms=S / 1e3, gbps=1e3, tflops=100.0, of_roofline=0.5,
            intensity=100.0, peak_mib=float(S), about={"S": S, "D": 64, "dtype": "bfloat16", "causal": False},
        ))
        for name in ("attention", "attention backward") for S in (512, 1024) for provider in ("triton staged", "torch")
    ]
    rows.append({**rows[0], "case": "bfloat16 B4 H16 S2048 D64", "ms": None, "note": "out of memory", "about": {
        **rows[0]["about"], "S": 2048}})
    for script in ("benchmark_attention", "benchmark_seq_lengths"):
        (folder / f"{script}.json").write_text(json.dumps({**info, "rows": rows}))
        figures.redraw(tmp_path, script)
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {f"benchmark_{name}.{mode}.png" for name in ("attention", "roofline", "seq_lengths")
                     for mode in ("light", "dark")}
    tiles = [
        {"name": "scores", "case": "c", "provider": f"16x{n}", "ms": ms, "note": note,
         "about": {"BLOCK_M": 16, "BLOCK_N": n, "chosen": n == 16}}
        for n, ms, note in ((16, 1.0, ""), (32, None, "WRONG"), (64, None, "ValueError: the tile does not fit"))
    ]
    tiles.append({"name": "scores", "case": "c", "provider": tuning.DEFAULT, "ms": 0.5, "about": {"plain": False}})
    (folder / "tiles.json").write_text(json.dumps({**info, "rows": tiles}))
    assert figures.redraw_heatmap(folder / "tiles.json", tmp_path / "heatmap.png")
    assert not figures.redraw_heatmap(folder / "none.json", tmp_path / "none.png")


@pytest.mark.parametrize("error,expected", [
    (MemoryError("needs 256 GiB"), "out of memory: needs 256 GiB"),
    (ImportError("No module named 'fa3'"), "not installed: No module named 'fa3'"),
    (ValueError("first.\n Second. Third"), "ValueError: first"),
    (RuntimeError("ptxas fatal : (C7602) Insufficient registers (128) to compile instruction at line 537"),
     "RuntimeError: the tile does not fit: it needs more than 128 registers a thread"),
], ids=str)
def test_benchmark_reasons(error, expected):
    assert harness.reason(error) == expected


def test_benchmark_saves_the_winning_tile(tmp_path):
    path = tmp_path / "tuned.py"
    shutil.copy(HERE / "triton_attention/tuned.py", path)
    before = runpy.run_path(str(path))
    tile = before["Tile"](32, 256, 64, 4, 5, SPAN=4)

    def saved(*key):
        tuning.save(path, key, tile, "0.12 on a test")
        return runpy.run_path(str(path))["TILES"]

    table = saved("scores", "sm_90", 16, 64, False)  # the row for causal or not is the one that served
    assert table["scores", "sm_90", 16, 64, None] == tile and len(table) == len(before["TILES"])
    table = saved("scores", "sm_90", 16, 64, True)
    order = [key[4] for key in table if key[:4] == ("scores", "sm_90", 16, 64)]
    assert order == [None, True]  # the later of two rows holds
    table = saved("values", "sm_90", 16, 64, True)
    assert table["values", "sm_90", 16, 64, True] == tile and len(table) == len(before["TILES"]) + 1
    table = saved("scores", "sm_120", 32, 128, False)
    assert table["scores", "sm_120", 32, 128, None] == tile and len(table) == len(before["TILES"]) + 2
    assert path.read_text().count("# 0.12 on a test") == 4


def test_readme_shows_the_committed_results():
    for path, text in ((HERE / "README.md", readme()), (HERE / "results/README.md", results_readme())):
        assert text == path.read_text(), "run python3 -m benchmarks.readme"
