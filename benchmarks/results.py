"""Results: the machine, a Row for every point, the JSON file they are kept in, the table they are shown in."""

import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # the root of the repository
SHOWN = ("NVIDIA_H200", "NVIDIA_H100_80GB_HBM3")  # the README shows a script's results of the first that has them


def shown(script):
    """The folder whose results of a script the README shows, as a name in results/."""
    return next((gpu for gpu in SHOWN if (HERE / "results" / gpu / f"{script}.json").exists()), SHOWN[-1])


@dataclass
class Row:
    """One provider's result; times in ms (median, 20 % and 80 % quantile), None where it was not timed."""

    name: str
    case: str
    provider: str
    error: float | None = None
    allowed: float | None = None
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    passes: list = field(default_factory=list)  # the median of each
    gbps: float | None = None
    tflops: float | None = None
    of_roofline: float | None = None
    intensity: float | None = None  # flop per byte, where the roofline chart puts it
    peak_mib: float | None = None  # that the call allocates on top of its inputs
    note: str = ""
    commit: str = ""
    about: dict = field(default_factory=dict)

    @property
    def point(self):
        return self.name, self.case, self.provider


def machine():
    """What was measured on: GPU, driver, versions, commit."""
    import torch
    import triton

    def output(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    commit = os.environ.get("GIT_COMMIT")  # where the files are, but not their history
    if not commit:
        dirty = "+changes" if output("git", "status", "--porcelain", "--untracked-files=no") else ""
        commit = (output("git", "rev-parse", "--short", "HEAD") or "unknown") + dirty
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (Triton's interpreter)",
        "driver": driver[0] if driver else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
    }


class Results:
    """results/<gpu>/<script>.json: the machine, the ceilings and the rows, written after every one of them."""

    def __init__(self, path, info, keep=lambda row: True):
        self.path, self.info, self.rows = path, info, []
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["gpu"] == info["gpu"]:
                self.rows = [row for row in map(_as_row, saved["rows"]) if keep(row)]
            if self.rows and saved.get("timed") != info.get("timed"):
                print(f"{len(self.rows)} points in {path.name} were timed in another way: they are measured anew")
                self.rows = []
            if self.rows and saved["commit"] != info["commit"]:
                print(f"{len(self.rows)} points in {path.name} are of commit {saved['commit']}, now {info['commit']}")

    def has(self, *point):
        return any(row.point == point for row in self.rows)

    def add(self, row):
        """Put the row in place of its point's older one, and write the file."""
        row.commit = self.info["commit"]
        self.rows = [old for old in self.rows if old.point != row.point] + [row]
        self.write()

    def settle(self, name, case, providers):
        """The rows of a finished case, last and in the order of its providers."""
        mine = [row for row in self.rows if row.point[:2] == (name, case)]
        mine.sort(key=lambda row: providers.index(row.provider) if row.provider in providers else -1)
        self.rows = [row for row in self.rows if row.point[:2] != (name, case)] + mine
        self.write()

    def write(self):
        """To the side first, so that the file is never half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".json.new")
        aside.write_text(json.dumps({**self.info, "rows": [asdict(r) for r in self.rows]}, indent=1) + "\n")
        aside.replace(self.path)


def _as_row(saved):
    return Row(**{key: value for key, value in saved.items() if key in Row.__dataclass_fields__})


def path_of(args, script, gpu=None):
    """The results file of a script, for the GPU at hand if none is named."""
    return args.out / (gpu or machine()["gpu"]).replace(" ", "_") / f"{script}.json"


def saved_points(args, script):
    """The points that --resume will skip: those of the results file of this GPU."""
    loaded = load(path_of(args, script)) if args.resume else None
    return {row.point for row in loaded[1]} if loaded else set()


def load(path):
    """(machine and ceilings, rows) of a results file, or None where there is none."""
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    return data, [_as_row(row) for row in data.pop("rows")]


COLUMNS = (
    f"{'what':18} {'case':36} {'provider':17} {'ms':>8} {'[20 %, 80 %]':>18} {'GB/s':>6} {'TFLOP/s':>8} "
    f"{'roofline':>8} {'speed-up':>8} {'MiB':>8} {'error':>8} {'allowed':>8}"
)


def show(row, base, say=print):
    """Print one row of the table; base is the row of the last provider, which speed-up is over."""
    number = lambda x, form: "-" if x is None else format(x, form)  # noqa: E731
    spread = "-" if row.ms is None else f"[{row.ms_20:.3f}, {row.ms_80:.3f}]"
    share = "-" if row.of_roofline is None else f"{100 * row.of_roofline:.1f} %"
    faster = base.ms / row.ms if row.ms and base and base.ms else None
    say(
        f"{row.name:18} {row.case:36} {row.provider:17} {number(row.ms, '.3f'):>8} {spread:>18} "
        f"{number(row.gbps, '.0f'):>6} {number(row.tflops, '.1f'):>8} {share:>8} {number(faster, '.2f'):>8} "
        f"{number(row.peak_mib, '.0f'):>8} {number(row.error, '.1e'):>8} {number(row.allowed, '.1e'):>8}  {row.note}"
    )


def gpus(out):
    """The result folders, one a GPU."""
    return sorted(path for path in out.glob("*") if path.is_dir())


# ---- what several scripts make of the rows


def curves(rows):
    """{(name, every parameter but S): {provider: [rows by S]}}."""
    found = {}
    for row in sorted(rows, key=lambda row: row.about["S"]):
        kind = (row.name, " ".join(word for word in row.case.split() if not word.startswith("S")))
        found.setdefault(kind, {}).setdefault(row.provider, []).append(row)
    return found


OURS = "triton fused"
PEERS = {"fwd": (OURS, "SDPA cudnn", "fa3", "fa4"), "bwd": (OURS, "SDPA cudnn", "fa4 deterministic")}
PASSES_OF = {"fwd": "forward", "bwd": "backward"}
TOKENS, CHANNELS, PEER_HEAD_DIMS = 16384, 2048, (128, 64)
SAME = f"of D {PEER_HEAD_DIMS[1]} and {PEER_HEAD_DIMS[0]} where B S = {TOKENS}, H D = {CHANNELS}"


def compare(results, mode):
    """[(case, {provider: median TFLOP/s}, (ratio of ours to the best of the others, least, greatest of a pass), whether
    it is one of the same work)]; the ratio is None where there are no others. A pass is a number of row.passes, or in
    older results a row."""
    found = {}
    for row in results:
        if row.about["mode"] == mode and row.tflops:
            passes = found.setdefault((row.case, row.about["same"]), {}).setdefault(row.provider, {})
            each = {i: row.tflops * row.ms / ms for i, ms in enumerate(row.passes)} or {row.name: row.tflops}
            passes.update(each)
    lines = []
    for (case, same), by_provider in found.items():
        medians = {name: statistics.median(passes.values()) for name, passes in by_provider.items()}
        ours, others = by_provider.get(OURS, {}), [name for name in medians if name != OURS]
        ratio = None
        both = [p for p in ours if any(p in by_provider[name] for name in others)]
        if both:
            each = [ours[p] / max(by_provider[name].get(p, 0.0) for name in others) for p in both]
            shared = {name: [passes[p] for p in both if p in passes] for name, passes in by_provider.items()}
            best = max(statistics.median(shared[name]) for name in others if shared[name])
            ratio = (statistics.median(shared[OURS]) / best, min(each), max(each))
        lines.append((case, medians, ratio, same))
    return lines


def mean(lines):
    """Geometric mean of the ratios over the cases of the same work, or None."""
    ratios = [ratio[0] for _, _, ratio, same in lines if same and ratio]
    return statistics.geometric_mean(ratios) if ratios else None
