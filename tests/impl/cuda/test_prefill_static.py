"""The prefill kernel as it was compiled: what its source asks of the compiler by its form, and could lose unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from twn_kernels.impl.cuda import loader
from twn_kernels.testing.aot import cuobjdump

_BEFORE_SETMAXNREG = 168  # registers a thread has when the block begins
_KERNEL = re.compile(r"prefill_kernelI\w*5DtypeE([01])\w*4TileILi(\d+)E")


@pytest.fixture(scope="module")
def kernels():
    """SASS by ``(dtype, columns of a tile)``."""
    info = loader.build_info()
    if not info.built or "prefill_sm90a" not in info.kernels.split():
        pytest.skip(f"needs the CUDA extension with code for 9.0a, which is {info}")
    functions = cuobjdump("-sass", Path(info.path)).split("Function : ")[1:]
    named = {found.groups(): text for text in functions if (found := _KERNEL.search(text.partition("\n")[0]))}
    assert named.keys() == {(dtype, columns) for dtype in "01" for columns in ("128", "256")}
    return named


def test_products_of_an_iteration_run_one_behind_the_other(kernels):
    """A compiler that cannot follow an accumulator waits for each product before the next: each then ends a group."""
    for kernel, text in kernels.items():
        products = re.findall(r"HGMMA\.64x(\d+)x16\S* .*", text)
        lines = re.findall(r"HGMMA\.64x.*", text)
        in_flight = [width for width, line in zip(products, lines, strict=True) if "gsb0" not in line]
        shrinks = {str(64 * slots) for slots in range(1, int(kernel[1]) // 64 + 1)}
        assert set(in_flight) == shrinks, kernel
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", text), kernel


def test_consumers_use_the_registers_that_they_take(kernels):
    for kernel, text in kernels.items():
        assert len(re.findall(r"USETMAXREG", text)) == 2, kernel
        assert not re.search(r"\b(LDL|STL)\b", text), kernel
    wide = [text for (_, columns), text in kernels.items() if columns == "256"]
    assert all(max(map(int, re.findall(r"\bR(\d+)\b", text))) > _BEFORE_SETMAXNREG for text in wide)


def test_barriers_copies_and_dependent_launches_are_there(kernels):
    for kernel, text in kernels.items():
        for mnemonic in ("UTMALDG.2D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "ACQBULK", "PREEXIT", "FENCE.VIEW.ASYNC"):
            assert mnemonic in text, (kernel, mnemonic)
