"""A compiled kernel, read: its resources, its accesses to memory, its instructions.

================  ====================================  ===================================
fact              NVIDIA                                AMD
================  ====================================  ===================================
registers, spill  ``cuobjdump -res-usage``              metadata at the end of the assembly
access widths     LLVM IR, traced to kernel arguments   the same
instructions      ``nvdisasm``                          assembly
eviction hints    PTX                                   (not read)
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

__all__ = ["Instructions", "Resources", "accesses", "hinted", "instructions", "resources"]


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
    """How an assembly looks, line by line. ``access`` finds kind and width of an access to global memory."""

    label: re.Pattern[str]
    instruction: re.Pattern[str]
    jump: re.Pattern[str]
    barrier: re.Pattern[str]
    access: re.Pattern[str]
    widths: Mapping[str, int]
    stores: frozenset[str]


_NVIDIA = _Syntax(
    re.compile(r"^(\.L_x_\d+):"),
    re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?[A-Z]"),
    re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"),
    re.compile(r"\bBAR\."),
    re.compile(
        r"\b(LDGSTS|LDG|STG)(?:\.(?![US]?(?:8|16|64|128|256)\b)\w+)*(?:\.[US]?(\d+)(?!\w))?"
    ),
    {"8": 1, "16": 2, "": 4, "64": 8, "128": 16, "256": 32},
    frozenset({"STG"}),
)
_AMD = _Syntax(
    re.compile(r"^(\.LBB\d+_\d+):"),
    re.compile(r"^\s+(?:[sv]_|ds_|buffer_|global_|flat_|scratch_)"),
    re.compile(r"\bs_c?branch\w* (\.LBB\d+_\d+)"),
    re.compile(r"\bs_barrier\b"),
    re.compile(r"\b(?:buffer|global)_(load|store)_[us]?(byte|short|dword(?:x[234])?)"),
    {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
    frozenset({"store"}),
)


class Instructions(NamedTuple):
    """Machine instructions of a program, and of its innermost loop that moves the most bytes.

    ``moved`` are the bytes a thread that one iteration of the machine's loop, which may be several
    of the source's, reads from and writes to global memory. Without such a loop both are 0, and what
    is said of loads is about the whole program.
    """

    program: int
    loop: int
    moved: int
    #: Loads of the widths that were asked about ...
    loads: int
    #: ... those that are under way before the first of them is waited for (asynchronous copies to shared
    #: memory all are) ...
    together: int
    #: ... and those that stand behind a store.
    behind: int
    #: Barriers in that loop, in all the other loops (each once), and outside of loops.
    barriers: tuple[int, int, int]


def instructions(compiled: Any, widths: frozenset[int]) -> Instructions:
    """Reads the machine code.

    Args:
        widths: bytes of the loads to be counted.
    """
    if "amdgcn" in compiled.asm:
        return _count(compiled.asm["amdgcn"], _AMD, widths)
    return _count(_disassembled(compiled), _NVIDIA, widths)


@cache
def _disassembled(compiled: Any) -> str:
    return _tool(knobs.nvidia.nvdisasm.path, "-c", compiled.asm["cubin"])


def _count(text: str, syntax: _Syntax, widths: frozenset[int]) -> Instructions:
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    code: list[str] = []
    moved = [0]  # bytes a thread, before each instruction
    for line in text.splitlines():
        if label := syntax.label.match(line):
            labels[label[1]] = len(code)
        if not syntax.instruction.match(line):
            continue
        code.append(line)
        access = syntax.access.search(line)
        moved.append(moved[-1] + (syntax.widths[access[2] or ""] if access else 0))
        jump = syntax.jump.search(line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], len(code)))
    innermost = [
        (moved[end] - moved[begin], begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
    ]
    most, begin, end = max(
        innermost, default=(0, 0, 0), key=lambda loop: (loop[0], loop[2] - loop[1])
    )
    size = end - begin
    if not most:
        size, begin, end = 0, 0, len(code)
    barriers = [i for i, line in enumerate(code) if syntax.barrier.search(line)]
    inside = sum(begin <= i < end for i in barriers) if most else 0
    looped = sum(any(b <= i < e for _, b, e in innermost) for i in barriers)
    return Instructions(
        len(code),
        size,
        most,
        *_flight(code[begin:end], syntax, widths),
        (inside, looped - inside, len(barriers) - looped),
    )


_REGISTER = re.compile(r"\bR(\d+)((?:\.\w+)*)")


def _flight(code: list[str], syntax: _Syntax, widths: frozenset[int]) -> tuple[int, int, int]:
    """(loads, those before the first wait for one, those behind a store) of straight code."""
    loads = together = behind = 0
    waited = stored = False
    pending: set[int] = set()  # NVIDIA: registers that loads will write
    for line in code:
        access = syntax.access.search(line)
        if syntax is _AMD:
            waited = waited or (loads > 0 and "vmcnt(" in line)
        elif not waited and pending:
            waited = bool(pending & _read(line.split("*/", 1)[1], access))
        if access is None:
            continue
        width = syntax.widths[access[2] or ""]
        if access[1] in syntax.stores:
            stored = stored or width in widths
        elif width in widths:
            loads += 1
            together += not waited or access[1] == "LDGSTS"
            behind += stored and access[1] != "LDGSTS"
            if access[1] == "LDG" and (target := _REGISTER.search(line, access.end())):
                pending |= {int(target[1]) + i for i in range(max(width // 4, 1))}
    return loads, together, behind


def _read(line: str, access: re.Match[str] | None) -> set[int]:
    """The registers that an instruction of SASS reads: all that it names but its target."""
    if access is None or access[1] == "LDG":
        line = line.partition(",")[2]
    return {
        int(number) + i
        for number, suffix in _REGISTER.findall(line)
        for i in range(1 + (".64" in suffix))
    }


def hinted(compiled: Any) -> bool | None:
    """Whether the hints that loads carry for the caches are in what was compiled; ``None`` for AMD.

    Of loads that became asynchronous copies, every one has the hint or none.
    """
    if "amdgcn" in compiled.asm:
        return None
    lines = re.findall(r"\b(?:ld\.global|cp\.async\.c[ag])\.\S*", compiled.asm["ptx"])
    hints = ["evict" in line or "cache_hint" in line for line in lines]
    copies = [hint for line, hint in zip(lines, hints, strict=True) if line.startswith("cp.async")]
    return all(copies) and any(hints)


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
