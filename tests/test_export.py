"""What is made of a converted model is what is made of the stock one: programs, ONNX, quantization, kernels."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config, metrics
from torch._inductor.utils import run_and_get_code

import triton_bn
from triton_bn import route

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's exporters and quantizers
NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a CPU's, whatever TRITON_INTERPRET says."""
    monkeypatch.setattr(route, "on_gpu", lambda x: x.is_cuda)
    torch._dynamo.reset()


def models() -> tuple[nn.Module, nn.Module]:
    """A model with batch norm in it, converted and stock, in evaluation."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    )
    for layer in (stock[1], stock[4]):
        for vector in (*layer.parameters(), layer.running_mean):
            nn.init.uniform_(vector)
    stock.eval()
    return triton_bn.convert(copy.deepcopy(stock)), stock


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def elsewhere(script: str, *arguments: str) -> None:
    """Runs a script in a process that never imports triton_bn."""
    script = "import sys, torch\nsys.modules['triton_bn'] = None\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_saved_program_loads_where_there_is_no_triton_bn(tmp_path: Path) -> None:
    ours, stock = models()
    program, data = tmp_path / "program.pt2", tmp_path / "data.pt"
    torch.export.save(torch.export.export(ours, (image(),)), program)
    torch.save([image(1), stock(image(1)).detach()], data)
    elsewhere(
        """
        x, y = torch.load(sys.argv[2])
        assert torch.equal(torch.export.load(sys.argv[1]).module()(x), y)
        """,
        str(program),
        str(data),
    )


@pytest.mark.models  # slow: a minute of a C++ compiler
@NEEDS_COMPILER
def test_an_aotinductor_package_loads_where_there_is_no_triton_bn(tmp_path: Path) -> None:
    ours, stock = models()
    package, data = tmp_path / "package.pt2", tmp_path / "data.pt"
    exported = torch.export.export(ours, (image(),))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    torch.save([image(1), stock(image(1)).detach()], data)
    elsewhere(
        """
        x, y = torch.load(sys.argv[2])
        torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), y)
        """,
        str(package),
        str(data),
    )


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_both_onnx_exporters_give_the_stock_graph(dynamo: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graphs = []
    for model in models():
        file = io.BytesIO()
        if dynamo:
            program: Any = torch.onnx.export(model, (image(),), dynamo=True, verbose=False)
            file.write(program.model_proto.SerializeToString())
        else:
            torch.onnx.export(model, (image(),), file, dynamo=False)
        proto = onnx.load_from_string(file.getvalue())
        onnx.checker.check_model(proto)
        graphs.append([node.op_type for node in proto.graph.node])
    assert graphs[0] == graphs[1]
    assert "Conv" in graphs[0]


def test_post_training_quantization_is_that_of_the_stock_model() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    results = []
    for model in models():
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (image(),)).module(), quantizer)
        for seed in range(3):
            prepared(image(seed))
        results.append(convert_pt2e(prepared)(image(9)).detach())
    assert torch.equal(*results)


def test_a_training_export_moves_to_evaluation_as_the_stock_models() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval

    results = []
    for model in models():
        program = torch.export.export(model.train(), (image(),)).module()
        trained = program(image(1))
        move_exported_model_to_eval(program)
        results.append([trained, program(image(2)), *program.buffers()])
        assert not torch.equal(results[-1][0], program(image(1)))
    for ours, stock in zip(*results, strict=True):
        assert torch.equal(ours, stock)


@NEEDS_COMPILER
@pytest.mark.parametrize("way", ["eval", "frozen", "training"])
def test_inductor_makes_of_it_what_it_makes_of_the_stock_model(way: str) -> None:
    """As many kernels, and with freezing no batch norm: it is folded into the convolutions."""
    counts, results = [], []
    for model in models():
        torch._dynamo.reset()
        metrics.reset()
        model.train(way == "training")
        with (
            config.patch(freezing=way == "frozen", fx_graph_cache=False),
            torch.set_grad_enabled(way == "training"),
        ):
            y, code = run_and_get_code(torch.compile(model), image())
        if way == "frozen":
            assert "rsqrt" not in "".join(code)
        counts.append(metrics.generated_kernel_count)
        results.append(y.detach())
    assert counts[0] == counts[1] > 0
    assert torch.equal(*results)
