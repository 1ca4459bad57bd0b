"""The README's results: tables and figures between markers, from results/<gpu>/*.json of one GPU, in plain Python.

    python3 -m benchmarks.readme             write the README's tables anew from the committed results
    python3 -m benchmarks.readme --check     exit 1 if that would change the README

A block is <!-- results: name --> ... <!-- end of results -->; what is not measured yet leaves its block empty.
"""

import argparse
import re

import benchmark_peers
from benchmarks.results import HERE, load, shown

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def results(script):
    return load(HERE / "results" / shown(script) / f"{script}.json")


def picture(script, says, name=None):
    """A script's figure in the reader's light or dark mode; its name is that of the script where none is given."""
    path = f"results/{shown(script)}/{name or script}"
    if not (HERE / f"{path}.light.png").exists():
        return []
    return [
        "",
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{path}.dark.png">'
        f'<img alt="{says}" src="{path}.light.png"></picture>',
    ]


def conditions(info):
    return (
        f"{info['gpu']}, driver {info['driver']}, torch {info['torch']}, triton {info['triton']}, commit "
        f"{info['commit']}; copy {info['copy_gbps']:.0f} GB/s, bfloat16 matmul {info['matmul_tflops']:.0f} TFLOP/s."
    )


def percent(x):
    return "" if x is None else f"{100 * x:.0f} %"


def two_sided(rows):
    """Ours and PyTorch's for the same: the stages and the layer."""
    lines = ["| what | case | Triton, ms | of roofline | PyTorch, ms | faster |", "|---|---|---|---|---|---|"]
    found = {row.point: row for row in rows}
    for row in rows:
        theirs = found.get((row.name, row.case, "torch"))
        if row.provider == "triton" and row.ms and theirs and theirs.ms:
            lines.append(
                f"| {row.name} | {row.case} | {row.ms:.3f} | {percent(row.of_roofline)} | {theirs.ms:.3f} | "
                f"{theirs.ms / row.ms:.2f}x |"
            )
    return lines if len(lines) > 2 else []


def many_sided(rows, name):
    """A column for everybody who was timed, ms; the fastest in bold."""
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


def attention():
    loaded = results("benchmark_attention")
    if not loaded:
        return []
    info, rows = loaded
    pairs = {row.name for row in rows if {r.provider for r in rows if r.name == row.name} == {"triton", "torch"}}
    lines = [conditions(info), "", *two_sided([row for row in rows if row.name in pairs])]
    for name in dict.fromkeys(row.name for row in rows):
        lines += [] if name in pairs else many_sided(rows, name)
    lines += picture("benchmark_attention", "Bars: TFLOP/s of attention, forward and backward, for every provider")
    says = "Every kernel as a point under the roofline of the GPU"
    return lines + picture("benchmark_attention", says, "benchmark_roofline")


def peers():
    loaded = results("benchmark_peers")
    if not loaded:
        return []
    passes = len({row.name for row in loaded[1]}) // len({row.about["mode"] for row in loaded[1]})
    lines = [
        f"Next to the fastest kernels there are, TFLOP/s: medians over the passes ({passes}), and the ratio of ours to",
        "the best of the others, with the least and the greatest of a pass.", "", conditions(loaded[0]),
    ]
    for mode, name in benchmark_peers.NAMES.items():
        names, compared = benchmark_peers.PEERS[mode], benchmark_peers.compare(loaded[1], mode)
        if not compared:
            continue
        lines += ["", f"| {name} | {' | '.join(names)} | ratio |", "|---" * (len(names) + 2) + "|"]
        for case, medians, ratio, _ in compared:
            cells = [f"{medians[name]:.0f}" if name in medians else "–" for name in names]
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*ratio) if ratio else "–")
            lines.append(f"| {case} | {' | '.join(cells)} |")
        mean = benchmark_peers.mean(compared)
        lines += ["", f"Geometric mean of the ratios {benchmark_peers.SAME}: {mean:.2f}."] if mean else []
    return lines


def seq_lengths():
    loaded = results("benchmark_seq_lengths")
    if not loaded:
        return []
    lines = ["Longer sequences: the stages end where two S x S matrices a head do not fit the memory any more."]
    lines += ["", conditions(loaded[0])]
    return lines + picture("benchmark_seq_lengths", "Time, TFLOP/s and memory of attention over the sequence length")


def block_sizes():
    if not results("benchmark_block_sizes"):
        return []
    return [
        "How the time of a kernel depends on its tile (hatched: it does not fit; fused is the plain kernel):", "",
        "![Time of each kernel over BLOCK_M and BLOCK_N](heatmap.png)",
    ]


BLOCKS = {"attention": attention, "peers": peers, "seq_lengths": seq_lengths, "block_sizes": block_sizes}


def readme():
    """README.md with its blocks made anew."""

    def block(match):
        lines = BLOCKS[match[2]]()
        return match[1] + "".join(f"{line}\n" for line in (lines and ["", *lines, ""])) + match[3]

    return BLOCK.sub(block, (HERE / "README.md").read_text())


def main():
    p = argparse.ArgumentParser(prog="python3 -m benchmarks.readme", description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README would change")
    check, path = p.parse_args().check, HERE / "README.md"
    if check and readme() != path.read_text():
        raise SystemExit("README.md does not show the committed results: run python3 -m benchmarks.readme")
    if not check:
        path.write_text(readme())


if __name__ == "__main__":
    main()
