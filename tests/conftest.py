"""The suite runs on compiled kernels where torch sees a GPU, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import tempfile

import hypothesis
import pytest
import torch

# Triton decides at decoration, so this must stand before triton is first imported.
# TRITON_INTERPRET=0 in the environment tests the plain-torch reference instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test reads or writes the tuned plans of whoever runs it.
os.environ["TRITON_BN_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton_bn_tests_")

torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import memory

    memory.install()

# The interpreter takes milliseconds a program, so a deadline would only measure the machine.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where the tests put their tensors: the GPU, or the CPU (interpreter or reference)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
