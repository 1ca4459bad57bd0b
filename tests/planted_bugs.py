"""Does the test suite notice? Plants one bug at a time in a copy of the kernels and expects test_attention.py to fail.

    python3 -m tests.planted_bugs      some minutes; exit 1 if a bug survives
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BUGS = {  # name: (file, what is there, what a tired author writes)
    "the tail mask is dropped": (
        "triton_attention/tiles.py",
        "return tl.load(ptrs, mask=(rows[:, None] < shape[0]) & (cols[None, :] < shape[1]), other=other)",
        "return tl.load(ptrs, mask=rows[:, None] < shape[0], other=other)",
    ),
    "the scale is forgotten": ("triton_attention_scores.py", "        s *= scale\n", ""),
    "the wrong KV head is read": ("triton_attention_scores.py", "off_h // GROUP", "off_h % (H // GROUP)"),
    "causal is off by one": (
        "triton_attention/tiles.py", "cols[None, :] <= rows[:, None] + d", "cols[None, :] < rows[:, None] + d",
    ),
    "the batch stride is ignored": (
        "triton_attention/tiles.py", "off_b.to(tl.int64) * stride_b + off_h", "off_h",
    ),
}


def survives(file, right, wrong):
    """Whether the suite still passes with `right` replaced by `wrong` in a copy; also the test that failed first."""
    with tempfile.TemporaryDirectory() as folder:
        for path in [*HERE.glob("*.py"), HERE / "README.md", HERE / "pyproject.toml"]:
            shutil.copy(path, folder)
        for room in ("triton_attention", "tests", "benchmarks", "results"):
            shutil.copytree(HERE / room, Path(folder) / room)
        source = (Path(folder) / file).read_text()
        assert right in source, f"{file} has changed: plant this bug anew"
        (Path(folder) / file).write_text(source.replace(right, wrong))
        command = [sys.executable, "test_attention.py", "-x", "--no-header", "-k", "not compile"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
        return run.returncode == 0, failed[0] if failed else run.stdout[-300:]


def main():
    argparse.ArgumentParser("python3 -m tests.planted_bugs", description=__doc__.split("\n")[0]).parse_args()
    survivors = 0
    for name, bug in BUGS.items():
        alive, evidence = survives(*bug)
        survivors += alive
        print(f"{name}: {'NOT NOTICED' if alive else evidence}", flush=True)
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
