""".ci/run, with short stand-ins for the scripts it starts: order, summary, and what a failure does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / ".ci" / "run"
STAND_IN = """#!/bin/sh
echo "started $(basename "$0") $* slow=${TUNE_SLOW_COUNT:-}"
[ "$(basename "$0")" = test ] && echo "=== 5 passed in 0.1s ==="
[ "$(basename "$0") $*" = "$FAILING" ] && exit 4
exit 0
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci" / "run")
    (tmp_path / "scripts").mkdir()
    for name in ("quickstart", "test", "lint"):
        path = tmp_path / "scripts" / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    return tmp_path


def run(tree: Path, failing: str) -> tuple[int, list[str]]:
    variables = {"PATH": os.environ["PATH"], "FAILING": failing}
    done = subprocess.run([tree / ".ci" / "run"], env=variables, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout.splitlines()


def test_all_stages_in_order_and_a_summary(tree: Path) -> None:
    code, lines = run(tree, failing="nothing")
    assert code == 0
    assert [line.split(" slow=")[0].strip() for line in lines if line.startswith("started")] == [
        "started quickstart", "started test", "started lint", "started test -m slow",
    ]  # fmt: skip
    assert "slow=2" in next(line for line in lines if "-m slow slow=" in line)
    # The last lines are the summary, with the closing line of pytest in it.
    assert [line.split()[0] for line in lines[-4:]] == ["quickstart", "test", "lint", "slow"]
    assert lines[-3].endswith("=== 5 passed in 0.1s ===")


def test_a_failing_stage_ends_it_with_its_code(tree: Path) -> None:
    code, lines = run(tree, failing="test ")
    assert code == 4
    assert not any("started lint" in line for line in lines)
    assert "exit 4" in lines[-1]
    assert "5 passed" in lines[-1]
