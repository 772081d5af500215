"""The examples run, shortened, as a user runs them, and train as PyTorch's layers do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = ["--epochs", "1", "--limit", "512"]


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, *command, *SHORT],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def losses(output: str) -> list[tuple[float, float]]:
    """Of each training printed, the first and the last step's."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss (\S+) → ([\d.]+)", output)]


@pytest.mark.parametrize("name", ["import_swap", "whole_model"])
def test_ours_beside_torch_begins_with_the_same_loss(name: str) -> None:
    output = run(f"examples/{name}.py")
    theirs, ours = losses(output)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] < ours[0]
    if name == "whole_model":
        assert re.search(r"6 replaced, [56] fused", output)


def test_fine_tuning_leaves_frozen_statistics_alone() -> None:
    output = run("examples/fine_tuning.py")
    assert len(losses(output)) == 3
    free, frozen = re.findall(r"(\d+) of (\d+) statistics", output)
    assert free[0] == free[1]
    assert frozen == ("0", free[1])


@pytest.mark.dist
def test_two_processes_train_one_network() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run(*launcher, "examples/data_parallel.py")
    assert "2 processes" in output
    ((first, last),) = losses(output)
    assert last < first


def test_every_example_is_named_in_the_readme() -> None:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("examples/*.py"):
        assert path.name in text
