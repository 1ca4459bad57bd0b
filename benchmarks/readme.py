"""What the README and results/README.md show of results/<gpu>/*.json: tables and figures, in plain Python.

    python3 -m benchmarks.readme             write both anew from the committed results
    python3 -m benchmarks.readme --check     write nothing; exit 1 if one would change

README.md has one block, the ladder, between <!-- results: ladder --> and <!-- end of results -->; results/README.md is
written whole, a part for each GPU. A table never mixes GPUs; what is not measured yet is left out.
"""

import argparse
import re

from benchmarks.results import HERE, OURS, PASSES_OF, PEERS, SAME, SHOWN, compare, gpus, load, mean

RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- results: ladder -->\n).*?(<!-- end of results -->)", re.DOTALL)
SHAPE = "bfloat16 B4 H16 S2048 D64"
LAYER = ("bfloat16 B4 S2048 E1024 H16", "bfloat16 B8 S2048 E1024 H16")  # the first that is measured
RUNGS = {  # row of the ladder: name in the results, provider
    "scores": ("scores QK^T", "triton"), "softmax": ("softmax", "triton"), "values": ("values PV", "triton"),
    "staged": ("attention", "triton staged"), "fused": ("attention", OURS), "layer": ("layer, weights off", "triton"),
}


def conditions(info):
    return (
        f"{info['gpu']}, driver {info['driver']}, torch {info['torch']}, triton {info['triton']}, commit "
        f"{info['commit']}; copy {info['copy_gbps']:.0f} GB/s, bfloat16 matmul {info['matmul_tflops']:.0f} TFLOP/s; "
        f"timed {info.get('timed', 'in turns on a warm chip')}."
    )


def percent(x):
    return "" if x is None else f"{100 * x:.0f} %"


# ---- the README's ladder


def ladder():
    """Six rows at one shape: ours, the best of the others, the share of the roofline."""
    loaded = next((found for gpu in SHOWN if (found := load(RESULTS / gpu / "benchmark_attention.json"))), None)
    if not loaded:
        return []
    info, rows = loaded
    timed = {row.point: row for row in rows if row.ms}
    layer = next((case for case in LAYER if ("layer, weights off", case, "triton") in timed), None)
    lines = [f"| {SHAPE} | ours, ms | best peer, ms | | of the roofline |", "|---|---|---|---|---|"]
    for rung, (name, provider) in RUNGS.items():
        case = layer if rung == "layer" else SHAPE
        ours = timed.get((name, case, provider))
        # who returns the weights too has PyTorch's operations for a peer, attention alone everything that is fused
        others = [
            row for (n, c, p), row in timed.items()
            if (n, c) == (name, case) and not p.startswith("triton") and (rung == "fused") == (p != "torch")
        ]
        if not ours or not others:
            continue
        best = min(others, key=lambda row: row.ms)
        label = rung if rung != "layer" or case == LAYER[0] else f"{rung} (B8)"
        lines.append(
            f"| {label} | {ours.ms:.3f} | {best.ms:.3f} | {best.provider} | {percent(ours.of_roofline)} |"
        )
    machine = f"{info['gpu']}, torch {info['torch']}, Triton {info['triton']}"
    return [*lines, "", f"{machine}; all of it in `results/README.md`."]


# ---- results/README.md


def picture(folder, name, says):
    """A figure in the reader's light or dark mode."""
    if not (folder / f"{name}.light.png").exists():
        return []
    path = f"{folder.name}/{name}"
    return [
        "",
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{path}.dark.png">'
        f'<img alt="{says}" src="{path}.light.png"></picture>',
    ]


def two_sided(rows):
    """Ours and PyTorch's for the same: the stages and the layer."""
    lines = ["| what | case | moves, GB | Triton, ms | of the roofline | PyTorch, ms | faster |", "|---" * 7 + "|"]
    found = {row.point: row for row in rows}
    for row in rows:
        theirs = found.get((row.name, row.case, "torch"))
        if row.provider == "triton" and row.ms and theirs and theirs.ms:
            lines.append(
                f"| {row.name} | {row.case} | {row.gbps * row.ms / 1e3:.2f} | {row.ms:.3f} | "
                f"{percent(row.of_roofline)} | {theirs.ms:.3f} | {theirs.ms / row.ms:.2f}x |"
            )
    return lines if len(lines) > 2 else []


def many_sided(rows, name):
    """A column for everyone who was timed, ms; the fastest in bold."""
    rows = [row for row in rows if row.name == name]
    names = [p for p in dict.fromkeys(row.provider for row in rows) if any(r.provider == p and r.ms for r in rows)]
    if not names:
        return []
    lines = ["", f"{name.capitalize()}, ms:", "", f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        times = {row.provider: row.ms for row in rows if row.case == case and row.ms}
        best = min(times.values(), default=None)
        cells = ["–" if name not in times else f"{times[name]:.3f}" for name in names]
        cells = [f"**{c}**" if n in times and times[n] == best else c for n, c in zip(names, cells, strict=True)]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def attention(folder, info, rows):
    pairs = {row.name for row in rows if {r.provider for r in rows if r.name == row.name} == {"triton", "torch"}}
    lines = ["### The stages, attention and the layer", "", conditions(info), ""]
    lines += two_sided([row for row in rows if row.name in pairs])
    for name in dict.fromkeys(row.name for row in rows):
        lines += [] if name in pairs else many_sided(rows, name)
    lines += picture(folder, "benchmark_attention", "Bars: TFLOP/s of attention, forward and backward, by provider")
    return lines + picture(folder, "benchmark_roofline", "Every kernel as a point under the roofline of the GPU")


def compared_table(title, names, compared, number):
    """A line for each case of compare(): number(case, name) of who was timed, and the ratio."""
    lines = ["", f"| {title} | {' | '.join(names)} | ratio |", "|---" * (len(names) + 2) + "|"]
    for case, medians, ratio, _ in compared:
        cells = [number(case, name) if name in medians else "–" for name in names]
        cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*ratio) if ratio else "–")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def peers(folder, info, rows):
    passes = len(rows[0].passes) or len({row.name for row in rows}) // len({row.about["mode"] for row in rows})
    lines = [
        "### Next to the fastest kernels there are", "",
        f"TFLOP/s: medians over the passes ({passes}), and the ratio of ours to the best of the others, with the least",
        "and the greatest of a pass.", "", conditions(info),
    ]
    for mode, title in PASSES_OF.items():
        if compared := compare(rows, mode):
            medians = {case: by_provider for case, by_provider, _, _ in compared}
            lines += compared_table(title, PEERS[mode], compared, lambda case, name, m=medians: f"{m[case][name]:.0f}")
            average = mean(compared)
            lines += ["", f"Geometric mean of the ratios {SAME}: {average:.2f}."] if average else []
    return lines


def features(folder, info, rows):
    lines = [
        "### What models call", "",
        "ms: medians over the passes, and the best of the others to ours, with the least and the greatest of a pass.",
        "What a peer prepares once for a model (FlexAttention's block mask, torch.compile) is not timed.", "",
        conditions(info),
    ]
    for mode, title in {**PASSES_OF, "train": "training"}.items():
        ms = {(row.case, row.provider): row.ms for row in rows if row.about["mode"] == mode}
        if compared := compare(rows, mode):
            names = list(dict.fromkeys(name for _, name in ms))
            lines += compared_table(title, names, compared, lambda case, name, ms=ms: f"{ms[case, name]:.3f}")
    return lines


def seq_lengths(folder, info, rows):
    lines = ["### Longer sequences", "", "The stages end where two S x S matrices a head do not fit the memory."]
    lines += ["", conditions(info)]
    says = "Time, TFLOP/s and memory of attention over the sequence length"
    return lines + picture(folder, "benchmark_seq_lengths", says)


def block_sizes(folder, info, rows):
    fastest = {}
    for row in rows:
        if row.ms and "BLOCK_M" in row.about:
            fastest.setdefault(row.name, []).append(row)
    lines = ["### Tiles", "", "The fastest BLOCK_M x BLOCK_N of each plain kernel, ms; `heatmap.png` has all.", ""]
    lines += [conditions(info), "", "| kernel | case | tile | ms | slowest |", "|---|---|---|---|---|"]
    for name, found in fastest.items():
        best, worst = min(found, key=lambda row: row.ms), max(found, key=lambda row: row.ms)
        tile = f"{best.about['BLOCK_M']} x {best.about['BLOCK_N']}"
        lines.append(f"| {name} | {best.case.split(' in ')[0]} | {tile} | {best.ms:.3f} | {worst.ms:.3f} |")
    return lines if fastest else []


PARTS = {
    "benchmark_attention": attention, "benchmark_peers": peers, "benchmark_features": features,
    "benchmark_seq_lengths": seq_lengths,
    "benchmark_block_sizes": block_sizes,
}


def results_readme():
    """The text of results/README.md."""
    lines = [
        "# Results", "",
        "Written by `python3 -m benchmarks.readme` from the JSON files beside it, which have errors, quantiles and",
        'peak memory too. Medians, L2 cleared before each call, every result checked against float64 first. "PyTorch"',
        'is its matmul, softmax, matmul with autograd (or its `nn.MultiheadAttention` in eval). "Of the roofline" is',
        'the time that the copy bandwidth and the matmul speed of the same run allow for the bytes ("moves") and the',
        "flops of the computation, causal counting what is visible, as a share of the time.",
    ]
    order = {name: i for i, name in enumerate(SHOWN)}
    for folder in sorted(gpus(RESULTS), key=lambda path: (order.get(path.name, len(order)), path.name)):
        loaded = {script: load(folder / f"{script}.json") for script in PARTS}
        if any(loaded.values()):
            lines += ["", f"## {folder.name.replace('_', ' ')}"]
        for script, part in PARTS.items():
            if loaded[script] and (found := part(folder, *loaded[script])):
                lines += ["", *found]
    return "\n".join(lines) + "\n"


def readme():
    """README.md with its block made anew."""
    block = "".join(f"{line}\n" for line in ladder())
    return BLOCK.sub(lambda match: match[1] + block + match[2], (HERE / "README.md").read_text())


def main():
    p = argparse.ArgumentParser(prog="python3 -m benchmarks.readme", description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if one would change")
    check = p.parse_args().check
    for path, text in ((HERE / "README.md", readme()), (RESULTS / "README.md", results_readme())):
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise SystemExit(f"{path.name} does not show the committed results: run python3 -m benchmarks.readme")


if __name__ == "__main__":
    main()
