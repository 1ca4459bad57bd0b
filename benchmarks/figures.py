"""The figures of the benchmarks, drawn from results/<gpu>/*.json alone: no GPU, no display.

Each figure is two files, name.light.png and name.dark.png, for a README to choose from; the heatmap is one, on white.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; a line has its name at its end.
"""

import collections
import math
import operator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from benchmarks.results import curves, gpus, load  # noqa: E402
from benchmarks.tuning import DEFAULT, FINAL, KERNELS  # noqa: E402

MODES = {"light": ("#ffffff", "#1f2328", "#d8dee4"), "dark": ("#0d1117", "#e6edf3", "#30363d")}  # ground, ink, grid
LOOKS = {  # provider: colour (None: the ink), marker, line
    "triton fused": ("#D55E00", "o", "-"),
    "triton staged": ("#E69F00", "o", "-"),
    "triton staged, O": ("#E69F00", "s", "--"),
    "triton apart": ("#E69F00", "s", ":"),
    "triton": ("#E69F00", "o", "-"),
    "SDPA cudnn": ("#0072B2", "^", "-"),
    "SDPA flash": ("#56B4E9", "v", "-"),
    "SDPA efficient": ("#CC79A7", "D", "-"),
    "SDPA math": ("#8c959f", "s", "--"),
    "flex": ("#009E73", "P", "-"),
    "fa2": ("#56B4E9", "<", "--"),
    "fa3": ("#0072B2", ">", "--"),
    "fa4": ("#009E73", "X", "--"),
    "fa4 deterministic": ("#009E73", "X", ":"),
    "torch": (None, "s", "-"),
}
WIDTH = 8.3  # inches, shown at about 100 pixels each


def look(provider, ink):
    colour, marker, line = LOOKS.get(provider, (None, "o", "-"))
    return {"color": colour or ink, "marker": marker, "linestyle": line}


def spread(wanted, gap, low, high):
    """Positions close to the wanted ones, in their order, at least `gap` apart, from low to high."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    groups = []  # [sum of what the members want of the first one's place, members]: a crowded group is centred on that
    for i in order:
        group = [wanted[i], [i]]
        while groups and group[0] / len(group[1]) - groups[-1][0] / len(groups[-1][1]) < gap * len(groups[-1][1]):
            total, members = groups.pop()
            group = [total + group[0] - gap * len(members) * len(group[1]), members + group[1]]
        groups.append(group)
    places = [total / len(members) + gap * step for total, members in groups for step in range(len(members))]
    places = [min(place, high - gap * (len(places) - 1 - rank)) for rank, place in enumerate(places)]
    places = [max(place, low + gap * rank) for rank, place in enumerate(places)]
    return [places[order.index(i)] for i in range(len(wanted))]


def label_ends(ax, ends, ink, size=8.5):
    """Names to the right of the axes, pushed apart, each tied to the end of its line: ends are (x, y, text, style)."""
    if not ends:
        return
    ax.figure.canvas.draw()
    height = ax.get_window_extent().height / ax.figure.dpi * 72
    where = [ax.transAxes.inverted().transform(ax.transData.transform((x, y))) for x, y, *_ in ends]
    heights = spread([y for _, y in where], 1.3 * size / height, 0.02, 0.98)
    for (x, y), place, (_, _, text, style) in zip(where, heights, ends, strict=True):
        line = {"color": style["color"], "clip_on": False, "transform": ax.transAxes}
        ax.plot([x, 1.03], [y, place], linewidth=0.6, alpha=0.7, **line)
        face = style.get("markerfacecolor", style["color"])
        ax.plot([1.045], [place], marker=style["marker"], markerfacecolor=face, markersize=4.5, **line)
        ax.text(1.075, place, text, transform=ax.transAxes, va="center", fontsize=size, color=ink)


def plain(x, _=None):
    return f"{x:g}" if x < 1000 else f"{x / 1024:g}K" if x % 1024 == 0 else f"{x:,.0f}"


def log_axes(ax, lengths):
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths)
    ax.xaxis.set_major_formatter(FuncFormatter(plain))
    ax.yaxis.set_major_locator(LogLocator(10, numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=8)


def caption(info):
    """Where the figures come from, in one line."""
    return (
        f"{info['gpu']}, torch {info['torch']}, triton {info['triton']}, commit {info['commit']}; ceilings of the same "
        f"run: copy {info['copy_gbps']:.0f} GB/s, bfloat16 matmul {info['matmul_tflops']:.0f} TFLOP/s"
    )


# ---- the figures


def seq_lengths(info, rows, ink):
    """Time, TFLOP/s and memory over S; marked is the end of a line whose next point is out of memory."""
    kinds = curves(rows)
    first = next(iter(kinds))
    backward = ("attention backward", first[1])
    panels = [(first, "ms", "time, ms"), (backward, "ms", "time, ms"), (first, "tflops", "TFLOP/s")]
    panels += [(first, "peak_gib", "memory it allocates, GiB")]
    panels = [panel for panel in panels if panel[0] in kinds]
    high = math.ceil(len(panels) / 2)
    fig, axes = plt.subplots(high, 2, figsize=(WIDTH, 3.5 * high), squeeze=False)
    fig.subplots_adjust(0.07, 0.17 / high, 0.85, 1 - 0.19 / high, wspace=0.65, hspace=0.26)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (kind, what, title) in zip(axes.flat, panels, strict=False):
        lengths = sorted({row.about["S"] for row in rows if row.ms})
        log_axes(ax, lengths)
        ends, memory_ends = [], []
        for provider, line in kinds[kind].items():
            style = look(provider, ink)
            read = (lambda row: row.peak_mib / 1024) if what == "peak_gib" else operator.attrgetter(what)
            points = [(row.about["S"], read(row)) for row in line if row.ms]
            if not points:
                continue
            ax.plot(*zip(*points, strict=True), markersize=4, linewidth=1.6, **style)
            ends.append((*points[-1], provider, style))
            failed = [row for row in line if row.about["S"] > points[-1][0] and "out of memory" in row.note]
            if failed:
                ax.plot(*points[-1], marker="x", markersize=11, markeredgewidth=2, color=style["color"], zorder=5)
                memory_ends.append(provider)
        if what == "tflops":
            ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        if what != "peak_gib":
            ax.plot(*zip(*roof(info, kinds[kind], what), strict=True), color=ink, linewidth=1, linestyle=(0, (5, 3)))
            ends.append((*roof(info, kinds[kind], what)[-1], "roofline", {"color": ink, "marker": "_"}))
        title = f"{kind[0].replace('attention', '').strip() or 'forward'}: {title}"
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        label_ends(ax, ends, ink)
        if memory_ends and what == "ms":
            ax.text(0.97, 0.04, "× the next S is out of memory", transform=ax.transAxes, ha="right", fontsize=8.5)
    fig.suptitle(f"Attention over the sequence length S, {first[1]}", x=0.01, ha="left", fontsize=11.5, weight="bold")
    return fig


def roof(info, providers, what):
    """[(S, the best that the ceilings allow)] for who stores nothing in between."""
    best = {}
    for line in providers.values():
        for row in line:
            if row.ms:
                S, flops = row.about["S"], row.tflops * row.ms * 1e9
                ms = max(row.gbps * row.ms / info["copy_gbps"], flops / info["matmul_tflops"] / 1e9)
                best[S] = min(best.get(S, (math.inf,)), (ms, flops))
    return [(S, ms if what == "ms" else flops / ms / 1e9) for S, (ms, flops) in sorted(best.items())]


def peers(info, rows, ink):
    """Bars: TFLOP/s of everybody, forward on the left, backward on the right, a row for a case of bfloat16."""
    rows = [row for row in rows if row.ms and row.name.startswith("attention") and row.about["dtype"] == "bfloat16"]
    if not rows:
        return None
    longest = max(row.about["S"] for row in rows)
    cases = list(dict.fromkeys(row.case for row in rows if row.about["S"] == longest))
    names = [name for name in LOOKS if name != "triton apart" and any(row.provider == name for row in rows)]
    tall = len(cases) * (0.55 + 0.2 * len(names)) + 0.7
    fig, axes = plt.subplots(len(cases), 2, figsize=(WIDTH, tall), squeeze=False, sharex="col")
    fig.subplots_adjust(0.14, 0.5 / tall, 0.97, 1 - 0.75 / tall, wspace=0.09, hspace=0.24)
    for i, case in enumerate(cases):
        for j, kind in enumerate(("attention", "attention backward")):
            ax, found = axes[i, j], {r.provider: r for r in rows if (r.name, r.case) == (kind, case)}
            for y, name in enumerate(reversed(names)):
                if name not in found:
                    ax.text(0.01, y, "–", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
                    continue
                bar = ax.barh(y, found[name].tflops, color=look(name, ink)["color"], height=0.72)
                ax.bar_label(bar, [f"{found[name].tflops:.0f}"], padding=3, fontsize=8.5, color=ink)
            ax.set_yticks(range(len(names)), reversed(names) if j == 0 else [""] * len(names), fontsize=8.5)
            ax.tick_params(length=0)
            ax.grid(False, axis="y")
            ax.margins(x=0.12)
            words = [word for word in case.split() if word[0] in "SD" or word == "causal"]
            ax.set_title(f"{'backward' if j else 'forward'}, {' '.join(words)}", fontsize=10, loc="left")
    fig.suptitle("Attention, TFLOP/s, bfloat16", x=0.01, ha="left", fontsize=11.5, weight="bold")
    return fig


def roofline(info, rows, ink):
    """Every kernel as a point under the roof: flop a second over flop a byte; hollow is backward."""
    rows = [row for row in rows if row.ms and row.intensity and row.about.get("dtype") == "bfloat16"]
    rows = [row for row in rows if "D" in row.about and not row.about["causal"] and row.provider != "triton apart"]
    if not rows:
        return None
    case = rows[0].case
    rows = [row for row in rows if row.case == case]
    fig, ax = plt.subplots(figsize=(WIDTH, 5.6))
    fig.subplots_adjust(0.1, 0.15, 0.75, 0.91)
    copy, matmul = info["copy_gbps"] / 1e3, info["matmul_tflops"]
    lowest, highest = min(row.intensity for row in rows) / 2, max(row.intensity for row in rows) * 2
    ridge = matmul / copy
    ax.plot([lowest, ridge, highest], [lowest * copy, matmul, matmul], color=ink, linewidth=1.4)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ends = []
    for row in sorted(rows, key=lambda row: row.intensity * row.gbps):
        style = look(row.provider, ink) | {"linestyle": "none"}
        style |= {"markerfacecolor": "none" if "backward" in row.name else style["color"]}
        y = row.intensity * row.gbps / 1e3
        ax.plot(row.intensity, y, markersize=7, **style)
        what = {"attention": "", "attention backward": " bwd"}.get(row.name, f" {row.name.split()[0]}")
        ends.append((row.intensity, y, f"{row.provider}{what}, {100 * row.of_roofline:.0f} %", style))
    ax.set_xlim(lowest, highest)
    ax.set_ylim(bottom=min(y for _, y, *_ in ends) / 2, top=matmul * 2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
    ax.text(ridge * 1.1, matmul * 1.08, f"matmul {matmul:.0f} TFLOP/s", fontsize=9)
    corner = max(lowest, min(y for _, y, *_ in ends) / 2 / copy)
    angle = ax.transData.transform([(corner, corner * copy), (ridge, matmul)])
    angle = math.degrees(math.atan2(angle[1][1] - angle[0][1], angle[1][0] - angle[0][0]))
    middle = math.sqrt(corner * ridge)
    ax.text(
        middle / 1.1, middle * copy * 1.12, f"copy {1e3 * copy:.0f} GB/s", rotation=angle, rotation_mode="anchor",
        ha="center", fontsize=9,
    )
    ax.set_xlabel("flop per byte that must move", fontsize=9.5)
    ax.set_ylabel("TFLOP/s", fontsize=9.5)
    label_ends(ax, ends, ink, 8)
    title = f"Under the roof, {case} (percentages of the roof; hollow: backward)"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11.5, weight="bold")
    return fig


def heatmap(info, rows):
    """BLOCK_M x BLOCK_N of each kernel; the chosen tile outlined, hatched what does not fit, crossed what is wrong."""
    rows = [row for row in rows if not row.case.endswith(FINAL)]
    case = collections.Counter(row.case for row in rows if row.ms).most_common(1)[0][0]
    rows = [row for row in rows if row.case == case]
    found = [name for name in KERNELS if any(row.name == name and row.ms and row.provider != DEFAULT for row in rows)]
    wide = 2 if len(found) == 4 else min(3, len(found))
    high = math.ceil(len(found) / wide)
    fig, axes = plt.subplots(high, wide, figsize=(WIDTH, 0.95 + 2.75 * high), squeeze=False)
    tall = fig.get_figheight()
    fig.subplots_adjust(0.075, 0.75 / tall, 0.99, 1 - 0.85 / tall, wspace=0.17, hspace=0.35)
    for ax in axes.flat[len(found) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, found, strict=False):
        of_kernel = [row for row in rows if row.name == name]
        tiles = [row for row in of_kernel if row.provider != DEFAULT]
        times = [row.ms for row in tiles if row.ms]
        ms = sorted({row.about["BLOCK_M"] for row in tiles}, reverse=True)
        ns = sorted({row.about["BLOCK_N"] for row in tiles})
        scale = matplotlib.colors.LogNorm(min(times), min(max(times), 8 * min(times)), clip=True)
        colours = plt.get_cmap("cividis_r")
        for y, m in enumerate(ms):
            for x, n in enumerate(ns):
                here = [row for row in tiles if (row.about["BLOCK_M"], row.about["BLOCK_N"]) == (m, n)]
                best = min((row for row in here if row.ms), key=lambda row: row.ms, default=None)
                wrong = any(row.note == "WRONG" for row in here)
                face = colours(float(scale(best.ms))) if best else "white"
                hatch = "xx" if wrong and not best else "///" if here and not best else None
                if here:
                    ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=face, edgecolor="#8c959f", hatch=hatch, lw=0.5))
                if best:
                    dark = sum(c * w for c, w in zip(face, (0.3, 0.59, 0.11), strict=False)) < 0.5
                    text = f"{best.ms:.2f}" if best.ms < 10 else f"{best.ms:.0f}"
                    ax.text(
                        x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8.5,
                        color="white" if dark else "black",
                    )
                if any(row.about["chosen"] for row in here):
                    frame = {"fill": False, "edgecolor": "#D55E00", "lw": 2.5, "zorder": 3, "clip_on": False}
                    ax.add_patch(plt.Rectangle((x, y), 1, 1, **frame))
        ax.set(xlim=(0, len(ns)), ylim=(len(ms), 0), xlabel="BLOCK_N (keys)")
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("BLOCK_M (queries)")
        ax.set_xticks([x + 0.5 for x in range(len(ns))], ns, fontsize=8.5)
        ax.set_yticks([y + 0.5 for y in range(len(ms))], ms, fontsize=8.5)
        ax.tick_params(length=0)
        ax.set_frame_on(False)
        default = next((row for row in of_kernel if row.provider == DEFAULT and row.ms), None)
        plain = default is None or default.about.get("plain", True)
        by_default = f" (by default {'' if plain else 'another one: '}{default.ms:.2f})" if default else ""
        ax.set_title(f"{name}{'' if plain else ', plain kernel'}, ms{by_default}", fontsize=9.5)
    title = f"BLOCK_M × BLOCK_N on {info['gpu']}, {case}"
    fig.suptitle(title, x=0.01, y=1 - 0.1 / tall, va="top", ha="left", fontsize=11.5, weight="bold")
    legend = [
        plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor="#D55E00", lw=2.5, label="chosen tile"),
        plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#8c959f", hatch="////", label="does not fit"),
        plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#8c959f", hatch="xxxx", label="wrong result"),
    ]
    corner = (0.0, 1 - 0.28 / tall)
    fig.legend(handles=legend, loc="upper left", bbox_to_anchor=corner, ncols=3, frameon=False, fontsize=9)
    fig.text(0.01, 0.1 / tall, f"torch {info['torch']}, triton {info['triton']}, commit {info['commit']}", fontsize=8)
    return fig


FIGURES = {  # script: {figure: function}
    "benchmark_attention": {"benchmark_attention": peers, "benchmark_roofline": roofline},
    "benchmark_seq_lengths": {"benchmark_seq_lengths": seq_lengths},
}


def redraw(out, script):
    """Draw a script's figures for every GPU that has its results."""
    for folder in gpus(Path(out)):
        loaded = load(folder / f"{script}.json")
        for name, figure in FIGURES[script].items() if loaded else ():
            if not any(row.ms and row.peak_mib is not None for row in loaded[1]):
                continue
            for mode, (ground, ink, grid) in MODES.items():
                with plt.rc_context({
                    "figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground,
                    "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": ink,
                    "ytick.color": ink, "axes.edgecolor": grid, "grid.color": grid, "axes.grid": True,
                    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.linewidth": 0.6,
                }):
                    fig = figure(*loaded, ink)
                    if fig is None:  # the run left out what it shows
                        continue
                    fig.text(0.01, 0.08 / fig.get_figheight(), caption(loaded[0]), fontsize=7.5, alpha=0.8)
                    path = folder / f"{name}.{mode}.png"
                    fig.savefig(path, dpi=200)
                    plt.close(fig)
                    print(f"drawn: {path}")


def redraw_heatmap(results, target):
    """Draw the heatmap of a results file; False where there is none."""
    loaded = load(results)
    if not loaded or not any(row.ms for row in loaded[1]):
        return False
    with plt.rc_context({"savefig.facecolor": "white", "hatch.linewidth": 0.6}):
        fig = heatmap(*loaded)
        fig.savefig(target, dpi=200)
        plt.close(fig)
    print(f"drawn: {target}")
    return True
