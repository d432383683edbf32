"""The static report of the compiled extension: resources and machine code of each kernel, by architecture.

Read with ``cuobjdump`` from the library as it is; needs no GPU, and takes some ten seconds. A baseline in a file holds
later builds to it, as that of the Triton kernels does (:mod:`.kernel_report`).

``python -m twn_kernels.testing.cuda_report`` prints it as JSON lines; ``--baseline FILE`` writes the baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from twn_kernels.testing import kernel_report
from twn_kernels.testing.aot import cuobjdump

__all__ = ["COMPILER", "CudaReport", "baseline_text", "parse", "read_baseline", "report"]

COMPILER, _MORE = "nvcc", ("wide",)

# Mnemonics that a kernel may owe its speed to: products on tensor cores, copies by the copy engine, 16-byte words.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA)\b")
_BULK_COPY = re.compile(r"\b(UBLKCP|UTMALDG|UTMASTG)\b")
_WIDE = re.compile(r"\b(LDGSTS|LDG|LDS|STG|STS)\.[\w.]*\b128\b|\b(LDSM)\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/")


@dataclasses.dataclass
class CudaReport:
    """What one kernel uses on one architecture.

    Attributes:
        variant: the kernel's name as the compiler writes it, without anonymous namespaces.
        arch: such as ``"80"`` or ``"90a"``.
        registers: a thread.
        spill_bytes: local memory a thread, stack and spills together.
        shared_bytes: static shared memory.
        tensor_core, bulk_copy, wide: which mnemonics of each kind its code holds.
        local_accesses: instructions that read or write local memory.
        instructions: of the whole kernel.
    """

    variant: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: tuple[str, ...] = ()
    bulk_copy: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    local_accesses: int = 0
    instructions: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)


def report(library: str | Path) -> list[CudaReport]:
    """The kernels of a built library, by architecture and name.

    Raises:
        RuntimeError: the file holds no code that ``cuobjdump`` can read.
    """
    path = Path(library)
    return parse(cuobjdump("-res-usage", path), cuobjdump("-sass", path))


def parse(usage: str, sass: str) -> list[CudaReport]:
    """The same from what ``cuobjdump -res-usage`` and ``cuobjdump -sass`` printed."""
    found = {(kernel.arch, kernel.variant): kernel for kernel in _usages(usage)}
    for arch, name, lines in _functions(sass):
        _read_code(found[arch, name], lines)
    return [found[key] for key in sorted(found)]


def _usages(text: str) -> Iterator[CudaReport]:
    arch = name = ""
    for line in text.splitlines():
        if line.startswith("arch = sm_"):
            arch = line.removeprefix("arch = sm_").strip()
        elif line.startswith(" Function "):
            name = _stable(line.removeprefix(" Function ").strip().rstrip(":"))
        elif (usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)) is not None:
            registers, stack, shared, local = map(int, usage.groups())
            yield CudaReport(name, arch, registers, stack + local, shared)


def _stable(name: str) -> str:
    """Without the digests that the compiler puts into the names of anonymous namespaces, which change with the text."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", name)


def _functions(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """``(architecture, kernel, lines of its code)``."""
    found: list[tuple[str, str, list[str]]] = []
    arch = ""
    for line in text.splitlines():
        if line.startswith("arch = sm_"):
            arch = line.removeprefix("arch = sm_").strip()
        elif "Function : " in line:
            found.append((arch, _stable(line.split("Function : ")[1].strip()), []))
        elif found:
            found[-1][2].append(line)
    yield from found


def _read_code(kernel: CudaReport, lines: list[str]) -> None:
    code = [line for line in lines if _INSTRUCTION.match(line)]
    text = "\n".join(code)
    kernel.tensor_core = _mnemonics(_TENSOR_CORE, text)
    kernel.bulk_copy = _mnemonics(_BULK_COPY, text)
    kernel.wide = _mnemonics(_WIDE, text)
    kernel.local_accesses, kernel.instructions = len(_LOCAL.findall(text)), len(code)


def _mnemonics(pattern: re.Pattern, text: str) -> tuple[str, ...]:
    return tuple(sorted({next(filter(None, found.groups())) for found in pattern.finditer(text)}))


def baseline_text(reports: Iterable[CudaReport], version: str) -> str:
    """A baseline file; ``version`` is the compiler's."""
    return kernel_report.baseline_text(reports, version, COMPILER, _MORE)


def read_baseline(path: str | Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """``(version of the compiler, entry by "sm_<arch> <kernel>")``; raises as :func:`.kernel_report.read_baseline`."""
    return kernel_report.read_baseline(path, COMPILER, _MORE)


def _main(arguments: list[str]) -> int:
    from twn_kernels.impl.cuda.loader import build_info

    parser = argparse.ArgumentParser(
        prog="python -m twn_kernels.testing.cuda_report", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--baseline", metavar="FILE", help="write the baseline of the report to FILE")
    options = parser.parse_args(arguments)
    info = build_info()
    if not info.built:
        parser.error(f"the extension is {info}")
    reports = report(info.path)
    if options.baseline is None:
        for kernel in reports:
            print(json.dumps(kernel.to_dict()))
    else:
        Path(options.baseline).write_text(baseline_text(reports, info.nvcc), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
