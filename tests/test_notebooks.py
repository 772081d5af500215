"""The notebooks: each runs from top to bottom, finds what its text says, and is kept as executed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from notebooks.execute import execute, main  # noqa: E402

# Not the notebooks' affair: the kernel's transport, and asyncio's in nbclient, warn now and then.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = (
    "01-what-batchnorm-computes",
    "02-welford",
    "03-one-pass-over-memory",
    "04-tuning",
    "05-your-model",
)
LIMIT = 1_500_000  #: bytes of a file

#: By notebook, what is asked of its variables after the last cell: a Python expression, JSON-ready.
ASKED = {
    "01-what-batchnorm-computes": """dict(
        largest=max(largest.values()), cast_left=cast_left, axes_agree=bool(axes_agree),
        means=mean.tolist(), in_training=moved_in_training, in_evaluation=moved_in_evaluation,
        running=(layer.running_mean - mean).abs().max().item(),
    )""",
    "02-welford": """dict(
        errors={name: error.tolist() for name, error in errors.items()},
        spoiled={name: error.tolist() for name, error in spoiled.items()},
        tree=abs(levels[-1][0][2] / 16 - values.var()), worst=worst,
    )""",
    "03-one-pass-over-memory": """dict(
        equal=equal, distance=distance, memory=memory,
        moved={" | ".join(key): sum(parts) for key, parts in counted.items()},
        m2=(noted["channels: M2"] - toy.numpy().var((0, 2)) * 32).tolist(),
    )""",
    "04-tuning": """dict(
        code=done.returncode, report=done.stdout, spilled=spilled, widths=widths,
        before=before.source, after=after.source, same=after == found[0],
        resident={" ".join(key): int(grid.sum()) for key, grid in maps.items()},
    )""",
    "05-your-model": """dict(
        keys=keys_equal, worst=worst, losses=losses, accuracy=accuracy, kept=mebibytes,
        difference=difference, code=done.returncode, ranks=done.stdout,
        fused=[row.fused for row in triton_bn.conversion_report(model).rows],
    )""",
}
MARK = "what the notebook found: "


def test_the_notebooks_are_those_known_here() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_executed_and_clean(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert shown
    assert all(output.metadata["image/png"]["alt"] for output in shown), "a picture without words"
    assert path.stat().st_size < LIMIT
    printed = json.dumps(
        [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} for o in outputs]
    ) + "".join(output.get("text", "") for output in outputs)
    for place in ("/home/", "/tmp/", "/root/", "/Users/", "site-packages"):
        assert place not in printed, f"{name} shows a path of the machine it ran on"


def test_main_writes_outputs_back_and_says_where_a_cell_fails(tmp_path: Path) -> None:
    path = tmp_path / "sum.ipynb"

    def run(cell: str) -> dict[str, Any]:
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
        main([path])
        kept: dict[str, Any] = nbformat.read(path, 4).cells[0]
        return kept

    cell = run("6 * 7")
    assert cell["outputs"][0]["data"]["text/plain"] == "42"
    assert cell["metadata"] == {}, "when it ran is nobody's affair"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run("1 / 0")


@pytest.fixture
def found(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executes a copy of the notebook; the answer to what is asked of it."""
    name = request.param
    copied = shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    # A copy does not lie beside the package, and what this process runs on is not the notebook's affair.
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    notebook = nbformat.read(copied, 4)
    question = f"import json\nprint({MARK!r} + json.dumps({ASKED[name]}))"
    notebook.cells.append(nbformat.v4.new_code_cell(question))
    execute(notebook, tmp_path)
    answer = notebook.cells[-1].outputs[-1].text
    return json.loads(answer[answer.index(MARK) + len(MARK) :])


def of(name: str) -> Any:
    return pytest.mark.parametrize("found", [name], indirect=True, ids=[name])


@of(NAMES[0])
def test_batch_norm_is_what_the_first_notebook_says(found: Any) -> None:
    assert len(found["means"]) == 3
    assert found["axes_agree"]
    # Channel 1: mean -30, std 0.1, γ 2; an ulp of the mean, 2e-6, comes out 20 times as large.
    assert found["largest"] < 2 * 20 * 2e-6
    assert found["cast_left"] < 1e-3
    assert found["in_training"] > 0.5
    assert found["in_evaluation"] == 0
    assert found["running"] < 0.2  # crops of the photographs: their mean, roughly


@of(NAMES[1])
def test_the_kernels_keep_the_digits_that_the_naive_formula_loses(found: Any) -> None:
    errors, spoiled = found["errors"], found["spoiled"]
    assert max(errors["triton_bn's kernel"]) < 2e-6
    assert errors["E[x²] − E[x]²"][-1] > 1
    assert errors["Welford, a value at a time"][-1] > 1e-3
    assert errors["chunks, Chan's rule"][-1] > 1e-3
    assert max(errors["the same, means − base"]) < 2e-6
    assert max(spoiled["one shift for all: the first value"]) > 1e-4
    assert max(spoiled["triton_bn's kernel: each chunk's first value"]) < 5e-6
    assert found["tree"] < 1e-5  # the share is rounded to float32
    assert found["worst"] <= 1 + 1e-6


@of(NAMES[2])
def test_the_drivers_move_what_the_third_notebook_says(found: Any) -> None:
    assert all(found["equal"].values())
    plain = {
        ("forward", "resident"): 2, ("forward", "split"): 3, ("forward", "streamed"): 3,
        ("backward", "resident"): 3, ("backward", "split"): 5, ("backward", "streamed"): 5,
    }  # fmt: skip
    for (direction, driver), passes in plain.items():
        # A value a channel and block besides, from which the means are counted.
        assert passes <= found["moved"][f"batch norm | {direction} | {driver}"] < passes + 0.1
    assert found["distance"]["resident"] == 0
    assert found["distance"]["streamed"] < 1 < found["distance"]["split"]
    for stock, ours in found["memory"].values():
        assert ours <= stock
    # Vectors of C values are kept besides.
    assert found["memory"]["+ ReLU"] == pytest.approx([2, 1], abs=0.02)
    assert found["memory"]["+ add + ReLU"][1] == pytest.approx(
        2, abs=0.02
    )  # x and y, which the next layer keeps
    assert found["m2"] == pytest.approx([0, 0], abs=1e-3)


@of(NAMES[3])
def test_plans_reports_and_cache_are_as_the_fourth_notebook_shows_them(found: Any) -> None:
    assert found["code"] == 0
    assert "sm_90: forward" in found["report"]
    assert "gfx942: backward" in found["report"]
    assert found["spilled"][0] == 0
    assert found["spilled"][-1] > 0
    assert found["widths"] == [2, 4, 8, 16]
    assert found["before"] == "heuristic"
    assert found["after"] != "heuristic"
    assert found["same"]
    assert found["resident"]["H200 forward"] > found["resident"]["H200 backward"]


@of(NAMES[4])
def test_a_converted_network_trains_as_the_stock_one(found: Any) -> None:
    assert found["keys"]
    assert found["fused"].count("add + relu") == 3
    assert found["fused"].count("relu") == 4
    assert found["worst"]["triton_bn"] < 10 * found["worst"]["torch.nn"]
    stock, ours = found["losses"]["torch.nn"], found["losses"]["triton_bn"]
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert ours[-1] < ours[0] / 5
    assert min(found["accuracy"].values()) > 0.9
    stock, ours, less = found["kept"].values()
    assert less < 0.8 * stock
    assert ours <= stock
    assert found["difference"] < 1e-4
    assert found["code"] == 0
    assert "2 processes with parts of [5, 7] images" in found["ranks"]
    error = float(found["ranks"].split("largest difference ")[1].split()[0])
    assert error < 1e-4
