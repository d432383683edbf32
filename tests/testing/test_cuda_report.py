"""The static report of the extension reads what cuobjdump prints, and a baseline notices what got worse."""

from __future__ import annotations

import dataclasses

import pytest

from twn_kernels.errors import TableError
from twn_kernels.testing import cuda_report, kernel_report

ANONYMOUS = "_ZN3twn5small40_GLOBAL__N__4e7a2aa8_8_front_cu_14c8749712gated_kernelEv"
USAGE = f"""
Fatbin elf code:
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3twn1fEv:
  REG:40 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
arch = sm_90a

Resource usage:
 Function {ANONYMOUS}:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
arch = sm_90
"""
SASS = f"""
arch = sm_80
\t\tFunction : _ZN3twn1fEv
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fc40000000f00 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDG.E.64 R2, [R2.64] ;
        /*0040*/              @!P0 STL [R1], R2 ;
\t\t..........
arch = sm_90a
\t\tFunction : {ANONYMOUS}
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0010*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0020*/                   LDS.128 R4, [R8] ;
"""


def test_what_cuobjdump_prints_is_read():
    first, second = cuda_report.parse(USAGE, SASS)
    assert first == cuda_report.CudaReport(
        "_ZN3twn1fEv", "80", 40, 12, 1024, ("HMMA",), (), ("LDGSTS",), local_accesses=1, instructions=5
    )
    assert (second.variant, second.arch, second.registers) == ("_ZN3twn5small12gated_kernelEv", "90a", 168)
    assert (second.tensor_core, second.bulk_copy, second.wide) == (("HGMMA",), ("UTMALDG",), ("LDS",))


def test_a_baseline_survives_the_round_trip_and_sees_what_is_lost(tmp_path):
    path = tmp_path / "report.json"
    reports = cuda_report.parse(USAGE, SASS)
    path.write_text(cuda_report.baseline_text(reports, "13.0"))
    version, recorded = cuda_report.read_baseline(path)
    assert version == "13.0" and list(recorded) == ["sm_80 _ZN3twn1fEv", "sm_90a _ZN3twn5small12gated_kernelEv"]
    entry = recorded["sm_80 _ZN3twn1fEv"]
    assert kernel_report.regressions(reports[0], entry) == []
    worse = dataclasses.replace(reports[0], spill_bytes=16, wide=(), tensor_core=())
    assert kernel_report.regressions(worse, entry) == [
        "spills 16 bytes a thread, recorded 12",
        "lost its tensor-core instructions HMMA (left: none)",
        "lost its 16-byte instructions LDGSTS (left: none)",
    ]
    with pytest.raises(TableError, match="KeyError: 'triton'"):
        kernel_report.read_baseline(path)
