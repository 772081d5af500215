"""SyncBatchNorm: several processes against float64 over their whole batch, and what they do when they disagree.

What takes several processes is a *check*: a function that every rank of a group runs. All checks share
one start of four processes over gloo, each check with a group (and a timeout) of its own, whose other ranks
skip it; the tests read what came of them.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import Bounded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import triton_bn
from triton_bn import Activation, launch, reference, route, verbs

WORLD = 4
PACKAGE = Path(triton_bn.__file__).parent


@dataclass
class Peer:
    """What a check knows: its rank, how many there are, and their group."""

    rank: int
    size: int
    group: Any
    patch: pytest.MonkeyPatch

    def use(self, mode: str) -> torch.device:
        """Who computes in this check: plain torch, or the kernels (on a GPU, else interpreted)."""
        if mode == "kernels" and torch.cuda.is_available():
            return torch.device("cuda")
        for module, name in ((route, "on_gpu"), (verbs, "use_kernels")):
            self.patch.setattr(module, name, lambda x: mode == "kernels")
        return torch.device("cpu")

    def layer(self, channels: int, **options: Any) -> triton_bn.SyncBatchNorm:
        return triton_bn.SyncBatchNorm(channels, process_group=self.group, **options)

    def total(self, t: Tensor) -> Tensor:
        """The sum over all ranks, in float64."""
        t = t.detach().double().cpu().clone()
        dist.all_reduce(t, group=self.group)
        return t

    @contextmanager
    def collectives(self, expected: int) -> Iterator[None]:
        before = self.group._get_sequence_number_for_group()
        yield
        assert self.group._get_sequence_number_for_group() - before == expected

    @contextmanager
    def raises(self, error: type[Exception], match: str, within: float = 10.0) -> Iterator[None]:
        """An error in good time: the group's timeout is three times as long."""
        begin = time.monotonic()
        with pytest.raises(error, match=match):
            yield
        assert time.monotonic() - begin < within


CHECKS: dict[str, tuple[Callable[..., None], dict[str, Any], int, float]] = {}


def check(*sizes: int, timeout: float = 30.0, **options: Any) -> Callable[..., Any]:
    """Registers a check for groups of these sizes; ``options`` are its arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for size in sizes:
            named = [value for value in options.values() if isinstance(value, str)]
            name = "-".join([function.__name__, *named, str(size)])
            CHECKS[name] = (function, options, size, timeout)
        return function

    return register


def _rank(rank: int, folder: str, wanted: set[str]) -> None:
    """Runs the checks as one of the four processes, and writes down what came of them."""
    torch.set_num_threads(1)
    # Memory that is not initialized is full of NaN.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    outcomes = {}
    for name, (function, options, size, timeout) in CHECKS.items():
        if name not in wanted:
            continue
        group = dist.new_group(range(size), timeout=timedelta(seconds=timeout))
        if rank < size:
            torch.manual_seed(0)
            with pytest.MonkeyPatch.context() as patch:
                try:
                    function(Peer(rank, size, group, patch), **options)
                    outcomes[name] = ""
                except BaseException:
                    outcomes[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What came of every check on every rank that was asked for. pytest-xdist's workers share one run."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {
        item.callspec.params["name"] for item in functions if item.originalname == "test_ranks"
    }
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sync"
    folder.mkdir(exist_ok=True)
    files = [folder / f"rank{rank}.json" for rank in range(WORLD)]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "store").exists():
            with pytest.MonkeyPatch.context() as patch:
                if not torch.cuda.is_available():
                    patch.setenv("TRITON_INTERPRET", "1")
                mp.spawn(_rank, (str(folder), wanted), nprocs=WORLD)
    return [json.loads(file.read_text()) for file in files]


# ---- right results ----

#: The share of each rank in a batch of 13, by the size of the group.
PARTS = {2: (9, 4), 3: (6, 0, 7), 4: (5, 1, 0, 7)}


@dataclass
class Case:
    shape: tuple[int, ...] = (13, 5, 6, 7)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    shift: float = 1.0
    scale: float = 2.0
    eps: float = 1e-5
    momentum: float | None = 0.3
    activation: str | Activation | None = None
    residual: bool = False
    affine: bool = True
    bias: bool = True
    parameters: torch.dtype | None = None


#: "many" has more values a channel than float16 can count; interpreted, it would take long.
CASES = {
    "relu": Case(activation="relu", residual=True),
    "channels_last": Case(
        layout="channels_last", activation=Activation("leaky_relu", 0.2), shift=100.0
    ),
    "vectors": Case(shape=(13, 9), momentum=None, bias=False),
    "half": Case(
        dtype=torch.float16,
        layout="channels_last",
        activation="relu",
        residual=True,
        parameters=torch.float16,
    ),
    "bfloat16": Case(dtype=torch.bfloat16, activation="silu"),
    "double": Case(
        (13, 3, 5), torch.float64, shift=5.0, activation="gelu", residual=True, momentum=None
    ),
    "tiny": Case(scale=1e-7, shift=0.0, eps=1e-16, affine=False),
    "many": Case((13, 1, 72, 72), torch.float16, parameters=torch.float16, residual=True),
    "sliced": Case(layout="sliced_channels", activation="hardswish"),
}


@check(2, 4, mode="kernels", names=("relu", "channels_last"))
@check(2, 4, mode="reference", names=("relu", "channels_last"))
@check(3, mode="kernels", names=tuple(name for name in CASES if name != "many"))
@check(3, mode="reference", names=tuple(CASES))
def equals_the_whole_batch(peer: Peer, mode: str, names: tuple[str, ...]) -> None:
    device = peer.use(mode)
    for name in names:
        try:
            _compare(peer, mode, device, CASES[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _compare(peer: Peer, mode: str, device: torch.device, case: Case) -> None:
    """Two steps of training, of which the second is judged."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = case.shape[1]
    layer = peer.layer(
        channels, eps=case.eps, momentum=case.momentum, affine=case.affine, bias=case.bias,
        activation=case.activation, device=device,
        dtype=case.parameters or (case.dtype if case.dtype == torch.float64 else torch.float32),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(randn(channels) + 0.5)
    parts = PARTS[peer.size]
    begin = sum(parts[: peer.rank])
    own = slice(begin, begin + parts[peer.rank])

    for _ in range(2):
        before = {n: b.clone() for n, b in layer.named_buffers() if n.startswith("running")}
        whole = (case.scale * (randn(*case.shape) + case.shift)).to(case.dtype)
        residual = randn(*case.shape).to(case.dtype) if case.residual else None
        dy = randn(*case.shape).to(case.dtype)
        x = oracle.arrange(whole[own].to(device), case.layout).requires_grad_()
        added = None if residual is None else residual[own].to(device).requires_grad_()
        layer.zero_grad()
        y = layer(x, added)
        assert y.dtype == case.dtype
        assert y.stride() == torch.empty_like(x).stride()
        y.backward(dy[own].to(device))

    want = oracle.batch_norm(
        whole, weight=layer.weight, bias=layer.bias, training=True, residual=residual, dy=dy,
        momentum=0.5 if case.momentum is None else case.momentum, eps=case.eps,
        activation=case.activation, interpreted=mode == "kernels" and device.type == "cpu", **before,
    )  # fmt: skip
    found = {"y": y, "dx": x.grad, "dresidual": None if added is None else added.grad}
    for name, tensor in found.items():
        if name in want:
            part = Bounded(want[name].value[own], want[name].bound[own])
            part.assert_close(tensor, name)
    for name in before:
        running = getattr(layer, name)
        want[name].assert_close(running, name)
        assert torch.equal(peer.total(running), peer.size * running.double().cpu()), (
            "not the same bits"
        )
    assert layer.num_batches_tracked == 2
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            # The own part's share, also where that is nothing.
            total = peer.total(parameter.grad)
            if case.parameters is None:
                want[f"d{name}"].assert_close(total, f"d{name}")


@check(2)
def one_value_a_rank(peer: Peer) -> None:
    """PyTorch's layer takes it as well: there are two values in all."""
    layer, plain = peer.layer(3), nn.BatchNorm1d(3)
    whole = torch.randn(2, 3)
    torch.testing.assert_close(layer(whole[peer.rank :][:1]), plain(whole)[peer.rank :][:1])
    torch.testing.assert_close(layer.running_var, plain.running_var)


@check(3, mode="reference")
@check(3, mode="kernels")
def nobody_has_a_value(peer: Peer, mode: str) -> None:
    device = peer.use(mode)
    layer = peer.layer(3, activation="relu", device=device)
    x = torch.empty(0, 3, 4, 4, device=device, requires_grad=True)
    y = layer(x, torch.empty_like(x))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked == 1
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]


@check(4)
def groups_keep_to_themselves(peer: Peer) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, other = pairs[peer.rank // 2], pairs[1 - peer.rank // 2]
    whole = torch.randn(8, 3) + torch.arange(4).repeat_interleave(2)[:, None]
    own = slice(2 * peer.rank, 2 * peer.rank + 2)
    pair = slice(4 * (peer.rank // 2), 4 * (peer.rank // 2) + 4)
    for group, part in ((mine, pair), (None, slice(None)), (other, own)):
        layer = triton_bn.SyncBatchNorm(3, process_group=group)
        layer(whole[own])
        torch.testing.assert_close(layer.running_mean, 0.1 * whole[part].mean(0))


@check(2, mode="reference")
@check(2, mode="kernels")
def outputs_made_again_change_no_bit(peer: Peer, mode: str) -> None:
    """Nor do they talk about it; a part may be empty."""
    device = peer.use(mode)
    for rows in (4, 4 * (1 - peer.rank)):
        x = torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(peer.rank)).to(device)
        found = []
        for context in (nullcontext(), triton_bn.recompute()):
            layer = peer.layer(3, activation="silu", device=device)
            torch.nn.init.constant_(layer.weight, 1.5)
            leaf = x.clone().requires_grad_()
            with context:
                y = layer(leaf)
                z = y.pow(3)
            with peer.collectives(1):
                z.sum().backward()
            found.append([leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        assert all(map(torch.equal, *found))


# ---- how often they talk ----


@check(2)
def one_collective_forward_and_one_backward(peer: Peer) -> None:
    layer = peer.layer(3, activation="relu")
    x = torch.randn(4, 3, requires_grad=True)
    with peer.collectives(2):  # num_features are compared once
        y = layer(x)
    with peer.collectives(1):
        y.sum().backward()
    for _ in range(2):
        with peer.collectives(1):
            y = layer(x, x)
        with peer.collectives(1):
            y.sum().backward()
    with peer.collectives(1), torch.no_grad():
        layer(x)
    with peer.collectives(1):
        layer(x.detach()).sum().backward()  # weight and bias need nobody
    layer.eval()
    with peer.collectives(0):
        layer(x).sum().backward()
    layer = triton_bn.SyncBatchNorm(3, track_running_stats=False, process_group=peer.group).eval()
    with peer.collectives(0):
        layer(x).sum().backward()


@check(2)
def a_copy_asks_again(peer: Peer) -> None:
    layer = triton_bn.SyncBatchNorm(3, process_group=None)
    x = torch.randn(4, 3)
    layer.process_group = peer.group
    layer(x)
    twin = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert twin[0] is twin[1] is not layer
    assert twin[0].process_group is peer.group
    assert twin[0].weight is not layer.weight
    assert torch.equal(twin[0].running_mean, layer.running_mean)
    layer.process_group = None  # a group cannot be pickled
    sent = pickle.loads(pickle.dumps(layer))
    sent.process_group = peer.group
    for copied in (twin[0], sent):
        with peer.collectives(2):
            copied(x)


# ---- when they do not fit together ----


@check(3)
def ranks_disagree_on_num_features(peer: Peer) -> None:
    channels = 4 if peer.rank == 2 else 3
    layer = peer.layer(channels)
    message = "disagree on num_features: 3 on rank 0, 3 on rank 1, 4 on rank 2"
    for _ in range(2):
        with peer.raises(RuntimeError, message):
            layer(torch.randn(5, channels))
    assert layer.num_batches_tracked == 0


@check(3, mode="reference")
@check(3, mode="kernels")
def ranks_disagree_on_dtype(peer: Peer, mode: str) -> None:
    if not torch.cuda.is_available():
        peer.use(mode)
    layer = peer.layer(3)
    x = torch.randn(5, 3)
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    message = "dtype: float32 on rank 0, float16 on rank 1, float32 on rank 2"
    with peer.raises(RuntimeError, message):
        layer(x.half() if peer.rank == 1 else x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    layer(x.half())  # all together they may


def in_step(peer: Peer, layer: triton_bn.SyncBatchNorm) -> None:
    """The ranks normalize the batch of one and the same step: by its statistics, and nobody else's."""
    whole = torch.randn(12, 3, generator=torch.Generator().manual_seed(7)) * 3 + 5
    plain = nn.BatchNorm1d(3)
    for _ in range(2):
        whole = whole + 1
        own = slice(4 * peer.rank, 4 * peer.rank + 4)
        torch.testing.assert_close(layer(whole[own]), plain(whole)[own])


@check(3)
def a_rank_is_given_what_is_wrong(peer: Peer) -> None:
    x = torch.randn(5, 3)
    for wrong, error, message in (
        ((torch.randn(5, 4),), RuntimeError, "should contain 4 elements not 3"),
        ((torch.randn(5),), ValueError, "expected at least 2D input"),
        ((torch.ones(5, 3, dtype=torch.int64),), NotImplementedError, "not implemented"),
        ((x, torch.randn(2, 3)), RuntimeError, "broadcast|match"),
        ((x.to_sparse(),), RuntimeError, "."),
        ((x.to_mkldnn(),), RuntimeError, "."),
    ):
        for used in (False, True):
            layer = peer.layer(3)
            if used:
                layer(x)
            if peer.rank == 1:
                with peer.raises(error, message):
                    layer(*wrong)
            else:
                with peer.raises(RuntimeError, "rank 1 of the group raised an error"):
                    layer(x)
            assert layer.num_batches_tracked == int(used)
            in_step(peer, layer)


@check(3, mode="reference")
@check(3, mode="kernels")
def a_rank_runs_out_of_memory(peer: Peer, mode: str) -> None:
    """Before its row is sent: then all raise. Behind the collective: then it alone does."""
    if torch.cuda.is_available():
        return
    peer.use(mode)
    x = torch.randn(5, 3)
    computes = launch if mode == "kernels" else reference

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    for verb, all_raise in (("row", True), ("normalize", False)):
        for used in (False, True):
            layer = peer.layer(3)
            if used:
                layer(x)
            if peer.rank == 1:
                with (
                    pytest.MonkeyPatch.context() as patch,
                    peer.raises(torch.OutOfMemoryError, "out of memory"),
                ):
                    patch.setattr(computes, verb, full)
                    layer(x)
            elif all_raise:
                with peer.raises(RuntimeError, "rank 1 of the group raised an error"):
                    layer(x)
            else:
                layer(x)
            assert layer.num_batches_tracked == int(used) + (not all_raise)
            in_step(peer, layer)


@check(2)
def an_operators_error_is_sent_once(peer: Peer) -> None:
    """Where somebody watches operators, the row is made and sent inside one."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return op(*args, **(kwargs or {}))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    peer.use("reference")
    layer = peer.layer(3)
    layer(torch.randn(4, 3))
    with pytest.MonkeyPatch.context() as patch, Watch():
        if peer.rank == 1:
            patch.setattr(reference, "row", full)
        with peer.raises(RuntimeError, "out of memory|rank 1 of the group"):
            layer(torch.randn(4, 3))
    with peer.collectives(1):
        layer(torch.randn(4, 3))


@check(2)
def without_parameters_channels_are_checked(peer: Peer) -> None:
    layer = peer.layer(3, affine=False, track_running_stats=False)
    with peer.raises(RuntimeError, "expected input with 3 channels|rank 1 of the group"):
        layer(torch.randn(5, 4 if peer.rank == 1 else 3))


@check(3)
def one_value_on_all_ranks_together(peer: Peer) -> None:
    layer = peer.layer(3)
    with peer.raises(ValueError, "Expected more than 1 value per channel"):
        layer(torch.randn(1 if peer.rank == 1 else 0, 3))
    assert layer.num_batches_tracked == 0


@check(3, timeout=2.0)
def a_rank_fails_elsewhere(peer: Peer) -> None:
    """The others are released by the group's timeout."""
    layer = peer.layer(3)
    layer(torch.randn(5, 3))
    if peer.rank == 1:
        return
    with peer.raises(RuntimeError, "(?i)timed out|closed", within=20.0):
        layer(torch.randn(5, 3))


# ---- beside the rest of PyTorch ----


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 2)).double()


@check(2, options={})
@check(3, options={"find_unused_parameters": True})
@check(2, options={"static_graph": True})
def ddp_equals_one_process(peer: Peer, options: dict[str, bool]) -> None:
    alone, model = network(nn.BatchNorm1d(6)), network(peer.layer(6))
    if "find_unused_parameters" in options:
        model.unused = nn.Parameter(torch.zeros(2))
    shared = DistributedDataParallel(model, process_group=peer.group, **options)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (alone, shared)]
    whole = torch.randn(3 * peer.size, 4, dtype=torch.float64) * 3 + 5
    own = whole[3 * peer.rank :][:3]
    for _ in range(3):
        for model, batch, optimizer in zip((alone, shared), (whole, own), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    found = shared.module.state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@check(2)
def fsdp_mixed_precision(peer: Peer) -> None:
    """Parameters in bfloat16 beside buffers in float32, as PyTorch's layer takes them on a GPU."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    peer.use("reference")
    model = nn.Sequential(peer.layer(6, activation="relu"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = DeviceMesh.from_group(peer.group, "cpu")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    whole, dy = torch.randn(10, 6).bfloat16(), torch.randn(10, 6).bfloat16()
    own = slice(0, 3) if peer.rank == 0 else slice(3, 10)
    y = model(whole[own].float())
    y.backward(dy[own])
    weight, bias = torch.ones(6).bfloat16(), torch.zeros(6).bfloat16()
    want = oracle.batch_norm(
        whole, torch.zeros(6), torch.ones(6), weight, bias, True, activation="relu", dy=dy
    )
    assert y.dtype == torch.bfloat16
    Bounded(want["y"].value[own], want["y"].bound[own]).assert_close(y, "y")
    want["running_var"].assert_close(model[0].running_var, "running_var")
    average = model[0].weight.grad.full_tensor() * peer.size
    torch.testing.assert_close(average.double(), want["dweight"].value, rtol=0.02, atol=0.02)


@check(2)
def compiled_it_is_one_graph(peer: Peer) -> None:
    torch.manual_seed(peer.rank)
    model, eager = (
        nn.Sequential(nn.Linear(4, 6), peer.layer(6, activation="relu")) for _ in range(2)
    )
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        x = torch.randn(3, 4)
        with peer.collectives(3 if step == 0 else 2):
            y = compiled(x)
            y.sum().backward()
        want = eager(x)
        want.sum().backward()
        assert torch.equal(y, want)
    for name, value in model.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name
    assert torch.equal(model[1].weight.grad, eager[1].weight.grad)


@check(2)
def checkpointed_it_runs_twice(peer: Peer) -> None:
    """As torch.nn.BatchNorm1d does: the running statistics advance twice."""
    layer, plain, torchs = peer.layer(3), peer.layer(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    weights = torch.randn(4, 3)
    layer(x)
    with peer.collectives(3):
        (checkpoint(layer, x, use_reentrant=False) * weights).sum().backward()
    found, x.grad = x.grad, None
    (plain(x) * weights).sum().backward()
    assert torch.equal(found, x.grad)
    checkpoint(torchs, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked - 1 == torchs.num_batches_tracked == 2


@check(2)
def second_derivatives_raise(peer: Peer) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = peer.layer(3)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with peer.raises(RuntimeError, "second derivative"):
        dx.sum().backward()


@pytest.mark.dist
@pytest.mark.parametrize("name", CHECKS)
def test_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    failures = {
        rank: outcome[name]
        for rank, outcome in enumerate(outcomes[: CHECKS[name][2]])
        if outcome[name]
    }
    assert not failures, "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())


# ---- what one process can see ----

INTERPRETS = pytest.mark.skipif(
    not (torch.cuda.is_available() or launch.interpreting()), reason="no GPU, and no interpreter"
)


def test_without_a_process_group_it_is_plain_batch_norm() -> None:
    plain, layer = triton_bn.BatchNorm1d(3), triton_bn.SyncBatchNorm(3)
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x[:1])


@pytest.mark.parametrize("shape", [(3,), (5, 0, 2)])
def test_its_input_errors_are_pytorchs(shape: tuple[int, ...]) -> None:
    errors = []
    for layer in (nn.SyncBatchNorm(3), triton_bn.SyncBatchNorm(3)):
        with pytest.raises(ValueError) as raised:
            layer(torch.randn(shape))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_its_state_is_pytorchs() -> None:
    theirs = nn.SyncBatchNorm(3, 1e-3, 0.2, dtype=torch.float64)
    ours = triton_bn.SyncBatchNorm(3, 1e-3, 0.2, dtype=torch.float64)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert ours.extra_repr() == theirs.extra_repr()


def test_conversion_keeps_everything() -> None:
    group = object()
    weight_only = nn.BatchNorm1d(3, 1e-3, None)
    weight_only.bias = None  # as bias=False leaves it, which PyTorch 2.11 does not know
    model = nn.Sequential(
        nn.Linear(2, 3),
        weight_only,
        nn.ModuleDict({"inner": triton_bn.BatchNorm2d(4, affine=False, activation="relu")}),
        nn.SyncBatchNorm(5, track_running_stats=False),
    ).eval()
    before, state = list(model.parameters()), model.state_dict()
    converted = triton_bn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    layers = [m for m in converted.modules() if isinstance(m, triton_bn.SyncBatchNorm)]
    assert [layer.num_features for layer in layers] == [3, 4, 5]
    assert [layer.eps for layer in layers] == [1e-3, 1e-5, 1e-5]
    assert [layer.momentum for layer in layers] == [None, 0.1, 0.1]
    assert [layer.activation for layer in layers] == [None, Activation("relu"), None]
    assert all(layer.process_group is group and not layer.training for layer in layers)
    assert all(a is b for a, b in zip(converted.parameters(), before, strict=True))
    for name, value in converted.state_dict().items():
        assert value.device.type == "cpu"
        assert value.data_ptr() == state[name].data_ptr()
    alone = triton_bn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm3d(2))
    assert isinstance(alone, triton_bn.SyncBatchNorm)
    assert alone.process_group is None


def rows_of(counts: list[float], tags: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of two channels, with the mean and the biased variance of all."""
    generator = torch.Generator().manual_seed(0)
    count = torch.tensor(counts, dtype=torch.float64)[:, None]
    mean = torch.randn(len(counts), 2, generator=generator, dtype=torch.float64) * (count > 0)
    m2 = count * torch.rand(len(counts), 2, generator=generator, dtype=torch.float64)
    tag = torch.tensor(tags, dtype=torch.float64)[:, None]
    rows = torch.cat([mean, m2, count, tag], 1)
    centre = (count * mean).sum(0) / count.sum()
    variance = (m2 + count * (mean - centre) ** 2).sum(0) / count.sum()
    return rows, centre, variance


@pytest.mark.parametrize("mode", ["reference", pytest.param("kernels", marks=INTERPRETS)])
@pytest.mark.parametrize(
    "counts", [[2**24, 1, 0, 2**24 + 1], [70000] * 150], ids=["large", "ranks"]
)
def test_counts_of_any_size_are_merged(mode: str, counts: list[int], device: torch.device) -> None:
    rows, mean, variance = rows_of(counts, [0] * len(counts))
    running = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    tracked = torch.zeros((), dtype=torch.int64)
    if mode == "kernels":
        rows, running, tracked = (
            rows.to(device),
            [r.to(device) for r in running],
            tracked.to(device),
        )
        count = rows.new_empty(2)
        moments, agree = launch.merge(rows, count, *running, tracked, None)
        assert agree == 1
        found = torch.stack([*moments, count])
    else:
        found = reference.merge(rows, *running, tracked, None)
    total = sum(counts)
    want = torch.stack([mean, variance, torch.full((2,), total, dtype=torch.float64)])
    torch.testing.assert_close(found.cpu(), want, rtol=1e-14, atol=1e-14)
    assert found[2].tolist() == [total, total]
    unbiased = variance * total / (total - 1)
    torch.testing.assert_close(running[1].cpu(), unbiased, rtol=1e-14, atol=0)


@INTERPRETS
@pytest.mark.parametrize(
    ("counts", "tags", "agree"),
    [
        ([4, 5, 6], [2, 2, 2], 1),
        ([4, 5, 6], [2, 2, 1], 0),
        ([4, 5, 6], [1, 2, 2], 0),
        ([4, 0, 6], [2, -1, 2], 0),
        ([0, 1, 0], [2, 2, 2], 0),
        ([1, 0, 1], [2, 2, 2], 1),
        ([0, 0, 0], [2, 2, 2], 1),
        ([4] * 200, [2] * 199 + [3], 0),
    ],
)
def test_the_kernel_sees_whether_the_ranks_agree(
    counts: list[float], tags: list[float], agree: float, device: torch.device
) -> None:
    """On a GPU nobody else looks."""
    rows = rows_of(counts, tags)[0].to(device)
    assert launch.merge(rows, rows.new_empty(2), None, None, None, 0.1)[1] == agree


def test_its_kernels_compile_for_gpus() -> None:
    """The interpreter takes what the compiler refuses."""
    script = textwrap.dedent("""
        import torch
        from dataclasses import replace
        from triton_bn import launch
        from triton_bn.inspection import binary
        from triton_bn.inspection import report
        from triton_bn.plan import DEVICES, heuristic
        from triton_bn.problem import describe

        OURS = ("row_kernel", "merge_rows_kernel", "sums_kernel")
        for dtype, layout, target in (
            (torch.bfloat16, torch.channels_last, "sm_90"),
            (torch.float64, torch.contiguous_format, "sm_80"),
            (torch.float32, torch.contiguous_format, "gfx942"),
        ):
            x = torch.empty(8, 64, 28, 28, dtype=dtype, device="meta").to(memory_format=layout)
            problem, x = describe(x, training=False)
            plan = heuristic(problem, DEVICES["H200"])
            acc = launch.accumulator(problem)
            vector = torch.empty(64, dtype=acc, device="meta")
            stats = torch.empty(3, 64, dtype=acc, device="meta")
            tracked = torch.empty((), dtype=torch.int64, device="meta")
            with report._capture(target) as launches:
                compile = launch.run
                launch.run = lambda one, *rest: one.kernel.__name__ in OURS and compile(one, *rest)
                row = launch.row(problem, plan, x, 1)
                rows = row.new_empty(8, row.numel())
                for momentum in (0.1, None):
                    launch.merge(rows, vector, vector, vector, tracked, momentum)
                problem = replace(problem, direction="backward")
                plan = heuristic(problem, DEVICES["H200"])
                needs = (True, True, True, False)
                launch.backward(
                    problem, plan, x, x, stats, vector, vector, None, None, needs, lambda sums: None
                )
            for entry in launches:
                print(target, entry.kernel, binary.resources(entry.compiled).spilled)
    """)
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.split("\n")[:-1]
    assert len(lines) == 3 * 4
    assert not [line for line in lines if not re.fullmatch(r"\w+ \w+_kernel 0", line)]


@pytest.mark.dist
def test_the_demo_equals_one_process() -> None:
    pytest.importorskip("sklearn")
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "triton_bn.demo.ddp", "--epochs", "1", "--batch", "63"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "agree" in done.stdout


def test_the_demo_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    from triton_bn.demo import ddp as ddp_demo

    assert ddp_demo.main([]) == 2
    assert "torch.distributed.run" in capsys.readouterr().err
