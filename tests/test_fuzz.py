"""The fuzzer itself: it passes what is right, notices what is not, and a wrong call's line draws that call again.
And the script of repeats."""

import re
import shlex

import pytest

from tests import fuzz, fuzz_calls, repeat
from tests.reference import run_python


def run(capsys, *options):
    """(exit code, lines printed)."""
    code = fuzz.main([str(option) for option in options])
    return code, capsys.readouterr().out.splitlines()


def test_a_few_calls(capsys):
    code, lines = run(capsys, "--seed", 29, "--calls", 3, "--only", "softmax")
    assert code == 0 and lines[-1].startswith("3 calls") and " 0 wrong: 3 softmax" in lines[-1], lines


def test_a_planted_fault_is_noticed_and_its_line_repeats_it(capsys, monkeypatch):
    monkeypatch.setattr(fuzz, "DRAWS", 2)
    right = fuzz_calls.attention_scores
    monkeypatch.setattr(fuzz_calls, "attention_scores", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    code, lines = run(capsys, "--seed", 18, "--calls", 1, "--only", "scores")
    wrong = [line for line in lines if line.startswith("python3 -m tests.fuzz")]
    assert code == 1 and wrong and f" {len(wrong)} wrong" in lines[-1], lines
    command, _, what = wrong[0].partition("  # ")
    assert re.search(r"^scores .*: AssertionError: .*error .*, allowed", what)
    code, lines = run(capsys, *shlex.split(command)[3:])
    assert code == 1 and lines[1] == wrong[0]
    monkeypatch.undo()
    assert run(capsys, *shlex.split(command)[3:])[0] == 0


@pytest.mark.parametrize("script,option", (("fuzz", "--minutes"), ("repeat", "--runs")))
def test_help_needs_no_torch(script, option):
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['{script}', '--help']\n"
    result = run_python(code + f"runpy.run_module('tests.{script}', run_name='__main__')")
    assert result.returncode == 0 and option in result.stdout, result.stderr


def test_repeats_of_a_call_that_changes_are_noticed():
    function, inputs = repeat.calls(1, 2, 20, 16)["two masks"]
    assert repeat.differing(function, inputs, 3, "") == 0
    factors = iter((1.0, 1.0, 1.01, 1.0))
    assert repeat.differing(lambda: function() * next(factors), inputs, 4, "") == 1
