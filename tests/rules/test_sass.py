# SPDX-License-Identifier: BSD-3-Clause
"""The check of Hopper's machine code finds what it looks for, and takes the shortest loop that has
exponentials for the main one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

CODE = """
.text._Z5first:
        /*0000*/                   UTMALDG.4D [UR8], [UR10] ;
.L_x_0:
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
.L_x_1:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/                   FSEL R1, R2, R3, P0 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0054*/                   MUFU.EX2 R1, R1 ;
        /*0058*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/               @P2 BRA `(.L_x_3) ;
        /*0080*/              @!P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0090*/                   EXIT ;
.text._Z6second:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_4:
        /*0010*/               @P0 LDL R3, [R1+0x8] ;
        /*0020*/                   BRA `(.L_x_4) ;
"""


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / ".ci"))
    return importlib.import_module("sass")


def test_kernels_instructions_and_loops(sass: ModuleType) -> None:
    kernels = dict(sass.parse(CODE))
    assert list(kernels) == ["_Z5first", "_Z6second"]
    first, second = kernels.values()
    assert first.opcodes[:4] == ["UTMALDG", "ISETP", "HGMMA", "FSEL"]
    assert [len(loop) for loop in first.loops] == [3, 4, 10]
    assert first.main_loop() == ["HGMMA", "MUFU", sass.WAIT, "BRA"]
    assert second.opcodes == ["HMMA", "LDL", "BRA"]
    assert second.main_loop() == []


def test_faults(sass: ModuleType) -> None:
    first, second = dict(sass.parse(CODE)).values()
    assert list(sass.faults(first, 4)) == []
    assert list(sass.faults(first, 3)) == ["its main loop has 4 instructions, and a budget of 3"]
    assert list(sass.faults(first, None)) == [
        "no budget in .ci/loop_budget.json for its main loop of 4 instructions"
    ]
    older = ["1 HMMA in its machine code", "1 LDL in its machine code"]
    assert list(sass.faults(second, None, multiplies=False)) == older
    assert list(sass.faults(second, 100)) == [
        *older,
        "no HGMMA in its machine code",
        "no UTMALDG in its machine code",
        "its main loop has 0 instructions, and a budget of 100",
    ]


@pytest.mark.parametrize("follows", [False, True])
def test_exponentials_run_under_products(sass: ModuleType, follows: bool) -> None:
    under, late = ["MUFU", sass.WAIT], [sass.WAIT, "MUFU"]
    opcodes = ["UTMALDG", "HGMMA", sass.WAIT, *(late if follows else under), "BRA"]
    code = sass.Code(opcodes, [range(1, 6)])
    found = list(sass.faults(code, 5))
    assert found == (["1 of its 1 exponentials follow the products"] if follows else [])
    assert not list(sass.faults(code, 5, overlaps=False))


def test_exponentials_may_follow_both_products(sass: ModuleType) -> None:
    code = sass.Code(["UTMALDG", "HGMMA", sass.WAIT, "MUFU", "BRA"], [range(1, 5)])
    assert list(sass.faults(code, 4)) == []
