"""A compiled kernel, read: its resources, its accesses to memory, its instructions.

================  ====================================  ===================================
fact              NVIDIA                                AMD
================  ====================================  ===================================
registers, spill  ``cuobjdump -res-usage``              metadata at the end of the assembly
access widths     LLVM IR, traced to kernel arguments   the same
instructions      ``nvdisasm``                          assembly
================  ====================================  ===================================

Both NVIDIA tools come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from triton import knobs

__all__ = ["Instructions", "Resources", "accesses", "instructions", "resources"]


class Resources(NamedTuple):
    """32-bit registers a thread, and bytes a thread of local memory: where registers spill."""

    registers: int
    spilled: int


@cache
def resources(compiled: Any) -> Resources:
    """Of a ``triton.compiler.CompiledKernel``, which needs no GPU."""
    if "amdgcn" in compiled.asm:
        pattern = r"\.(vgpr_count|private_segment_fixed_size): +(\d+)"
        found = dict(re.findall(pattern, compiled.asm["amdgcn"]))
        return Resources(int(found["vgpr_count"]), int(found["private_segment_fixed_size"]))
    usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", compiled.asm["cubin"])
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return Resources(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]))


def _tool(path: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, option, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# ---- instructions ----


class _Syntax(NamedTuple):
    """How an assembly looks, line by line."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    jump: re.Pattern[str]
    access: re.Pattern[str]
    widths: Mapping[str, int]


_NVIDIA = _Syntax(
    re.compile(r"^(\.L_x_\d+):"),
    re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?[A-Z]"),
    re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"),
    re.compile(r"\b(?:LDG|STG)(?:\.(?![US]?(?:8|16|64|128|256)\b)\w+)*(?:\.[US]?(\d+))?"),
    {"8": 1, "16": 2, "": 4, "64": 8, "128": 16, "256": 32},
)
_AMD = _Syntax(
    re.compile(r"^(\.LBB\d+_\d+):"),
    re.compile(r"^\s+(?:[sv]_|ds_|buffer_|global_|flat_|scratch_)"),
    re.compile(r"\bs_c?branch\w* (\.LBB\d+_\d+)"),
    re.compile(r"\b(?:buffer|global)_(?:load|store)_[us]?(byte|short|dword(?:x[234])?)"),
    {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
)


class Instructions(NamedTuple):
    """Machine instructions of a program, and of its innermost loop that moves the most bytes.

    ``moved`` are the bytes a thread that one iteration of the machine's loop, which may be several
    of the source's, reads from and writes to global memory. Without such a loop both are 0.
    """

    program: int
    loop: int
    moved: int


@cache
def instructions(compiled: Any) -> Instructions:
    if "amdgcn" in compiled.asm:
        return _count(compiled.asm["amdgcn"], _AMD)
    return _count(_tool(knobs.nvidia.nvdisasm.path, "-c", compiled.asm["cubin"]), _NVIDIA)


def _count(text: str, syntax: _Syntax) -> Instructions:
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    moved = [0]  # bytes a thread, before each instruction
    for line in text.splitlines():
        if label := syntax.label.match(line):
            labels[label[1]] = len(moved) - 1
        if not syntax.instruction.match(line):
            continue
        access = syntax.access.search(line)
        moved.append(moved[-1] + (syntax.widths[access[1] or ""] if access else 0))
        jump = syntax.jump.search(line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], len(moved) - 1))
    innermost = (
        (moved[end] - moved[begin], end - begin)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    )
    most, loop = max(innermost, default=(0, 0))
    return Instructions(len(moved) - 1, loop if most else 0, most)


# ---- accesses ----

_POINTER = re.compile(r"ptr addrspace\([18]\)[^%,]*(%[\w.]+)")
_DERIVES = re.compile(r"(?:tail )?call ptr|getelementptr|phi ptr|select")
_PTX = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)")
_STORE = re.compile(r"(?:\bbuffer\.store\.\w+\(|\bstore )(<.*?>|\w+) ")
_LOAD = re.compile(r"= (?:load|(?:tail )?call(?=.*\.raw\.ptr\.buffer\.load)) (<.*?>|\w+)")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


@cache
def accesses(compiled: Any, tensors: tuple[str, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the loads, and of the stores, of each tensor that has any: those that move most of it.

    Args:
        tensors: names of the tensors that were passed, in their order.
    """
    text = compiled.asm["llir"]
    definition = re.search(r"^define \w+ void @\w+\((.*?)\) local", text, re.MULTILINE)
    assert definition is not None
    # Triton appends pointers of its own to those that a launch passes.
    owner = dict(zip(_POINTER.findall(definition[1]), tensors, strict=False))
    found: tuple[dict[str, Counter[int]], ...] = ({}, {})
    for line in text[definition.end() : text.index("\n}", definition.end())].splitlines():
        pointer = _POINTER.search(line)
        if pointer is None:
            continue
        result, _, operation = line.strip().partition(" = ")
        if _DERIVES.match(operation):
            owner[result] = owner[pointer[1]]
        elif access := _access(line):
            store, size = access
            found[store].setdefault(owner[pointer[1]], Counter())[size] += size
    loads, stores = (
        {name: max(sizes, key=lambda size: (sizes[size], size)) for name, sizes in each.items()}
        for each in found
    )
    return loads, stores


def _access(line: str) -> tuple[bool, int] | None:
    """Whether a line of LLVM IR stores or loads, and how many bytes; ``None`` if neither."""
    if ptx := _PTX.search(line):
        return ptx[1] == "st", int(ptx[2] or 1) * int(ptx[3]) // 8
    for store, pattern in ((True, _STORE), (False, _LOAD)):
        if match := pattern.search(line):
            vector = re.fullmatch(r"<(\d+) x (\w+)>", match[1])
            count, kind = (int(vector[1]), vector[2]) if vector else (1, match[1])
            return store, count * (_BITS[kind] if kind in _BITS else int(kind[1:])) // 8
    return None
