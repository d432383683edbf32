"""Ahead-of-time compilation of Triton kernels, and what the machine code says about them.

Needs no GPU: a kernel is compiled for a named architecture, and registers, spills, shared memory and the SASS mnemonics
are read with the ``cuobjdump`` inside the Triton wheel. It must run in a process without ``TRITON_INTERPRET``, where
kernels are real; :class:`AotWorker` is such a process for callers (a test session, say) that do interpret.

``python -m twn_kernels.testing.aot [ARCH ...]`` prints the static report of every kernel of ``impl="triton"`` as JSON
lines, ``--table`` as a table; ``--baseline FILE`` writes the file that later reports are held to.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twn_kernels.errors import ImplUnavailable

__all__ = ["SHARED_MEMORY_BYTES", "AotReport", "AotWorker", "compile_kernel", "cuobjdump", "static_report"]

# Shared memory that one thread block may ask for: CUDA programming guide, specifications per compute capability.
SHARED_MEMORY_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA|OMMA|QMMA)\b")
_BULK_COPY = re.compile(r"\b(UTMALDG|UTMASTG|UBLKCP)\b")


@dataclasses.dataclass(frozen=True)
class AotReport:
    """What one compiled kernel uses.

    ``spill_bytes`` is local memory a thread (stack and spills together); ``tensor_core`` and ``bulk_copy`` are the
    mnemonics of tensor-core products and of copies by tensor descriptor that its machine code holds.
    """

    kernel: str
    variant: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    tensor_core: tuple[str, ...]
    bulk_copy: tuple[str, ...]
    local_accesses: int
    instructions: int
    num_warps: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    divisible: tuple[str, ...] = (),
    max_registers: int | None = None,
    variant: str = "",
) -> AotReport:
    """Compile one ``@triton.jit`` kernel and read its resources.

    Args:
        kernel: the jitted function.
        signature: Triton type of every parameter that is not a constant: ``"*bf16"``, ``"i32"``, ``"fp32"``, ...
        constants: the values of all other parameters (``tl.constexpr`` ones, ``None`` pointers, strides known to be 1).
        arch: 80, 90, 100, ... (compute capability without the dot).
        num_warps, num_stages, max_registers: launch options (``maxnreg`` in Triton).
        divisible: parameters known to be multiples of 16, as the launcher would find them.
        variant: a name for the report.

    Raises:
        ImplUnavailable: this process interprets kernels (``TRITON_INTERPRET``).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise ImplUnavailable(
            f"kernel must be a compiled @triton.jit function, got {type(kernel).__name__}: this process has "
            "TRITON_INTERPRET set. Use AotWorker, or unset it before the first import of triton."
        )
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    values = {name: constants[name] for name in types if types[name] == "constexpr"}
    source = ASTSource(kernel, types, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, "maxnreg": max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills, sass = _read_cubin(compiled.asm["cubin"])
    return AotReport(
        kernel=kernel.__name__,
        variant=variant,
        arch=arch,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        shared_limit_bytes=SHARED_MEMORY_BYTES[arch],
        tensor_core=tuple(sorted(set(_TENSOR_CORE.findall(sass)))),
        bulk_copy=tuple(sorted(set(_BULK_COPY.findall(sass)))),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        num_warps=num_warps,
    )


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """``(registers a thread, stack and spill bytes a thread, SASS text)`` of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = cuobjdump("-res-usage", path)
        sass = cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource line for the kernel: {usage[:500]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, sass


def cuobjdump(option: str, path: Path) -> str:
    """What the ``cuobjdump`` inside the Triton wheel says of a cubin or a library.

    Raises:
        RuntimeError: it cannot read the file.
    """
    tool = _tool_folder() / "cuobjdump"
    done = subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {option} failed with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@functools.cache
def _tool_folder() -> Path:
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin"


def static_report(arch: int) -> Iterator[AotReport]:
    """Compile every kernel of ``impl="triton"`` in every configuration it can choose for ``arch``, one report each."""
    from twn_kernels.impl.triton.variants import variants

    for variant in variants(arch):
        yield _compile_variant(variant, arch)


def _compile_variant(variant: Any, arch: int) -> AotReport:
    from twn_kernels.impl.triton.config import MAX_REGISTERS

    return compile_kernel(
        variant.kernel,
        variant.signature,
        variant.constants,
        arch=arch,
        num_warps=variant.config.num_warps,
        num_stages=variant.config.num_stages,
        divisible=variant.divisible,
        max_registers=MAX_REGISTERS,
        variant=variant.name,
    )


class AotWorker:
    """A process without ``TRITON_INTERPRET`` that compiles variants on request; use it as a context manager."""

    def __init__(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twn_kernels.testing.aot", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def compile(self, arch: int, variant: str) -> AotReport:
        """The report of one variant by its name.

        Raises:
            RuntimeError: it does not compile; the message holds the compiler's.
        """
        self._process.stdin.write(json.dumps({"arch": arch, "variant": variant}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"the compiling process ended (exit status {status}) at {variant}, sm_{arch}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{variant} does not compile for sm_{arch}: {answer['error']}")
        lists = {field: tuple(answer[field]) for field in ("tensor_core", "bulk_copy")}
        return AotReport(**{**answer, **lists})

    def __enter__(self) -> AotWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    """Answer one JSON line of :class:`AotWorker` after the other."""
    from twn_kernels.impl.triton.variants import variants

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a compiler prints must not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            named = {variant.name: variant for variant in variants(request["arch"])}
            answer = _compile_variant(named[request["variant"]], request["arch"]).to_dict()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m twn_kernels.testing.aot", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "arch", nargs="*", type=int, default=[80, 90, 100], help="80, 90, 100, ...; default: these three"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--table", action="store_true", help="for people, instead of JSON lines")
    how.add_argument("--baseline", metavar="FILE", help="write the baseline of the report to FILE")
    how.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        _serve()
        return
    for arch in options.arch:
        if arch not in SHARED_MEMORY_BYTES:
            parser.error(f"arch must be one of {', '.join(map(str, SHARED_MEMORY_BYTES))}, got {arch}")
    _print_report(options)


def _print_report(options: argparse.Namespace) -> None:
    import triton

    from twn_kernels.impl.triton.variants import variants
    from twn_kernels.testing import kernel_report

    entries = []
    for arch in options.arch:
        for variant, report in zip(variants(arch), static_report(arch), strict=True):
            work = kernel_report.counted(variant, arch)
            entries.append((report, work))
            if not options.table and options.baseline is None:
                print(json.dumps(report.to_dict() | {"work": work and work.to_dict()}), flush=True)
    if options.table:
        print(kernel_report.table(entries))
    elif options.baseline is not None:
        text = kernel_report.baseline_text((report for report, _ in entries), triton.__version__)
        Path(options.baseline).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
