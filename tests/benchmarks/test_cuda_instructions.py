"""Instructions counted in machine code: the way through a loop that does its work, without what is seldom."""

from __future__ import annotations

import pytest

from benchmarks import cuda_instructions
from benchmarks.cuda_instructions import codes, loops, main, operation, turn

LISTING = """
	.section	.text._Zproduct,"ax",@progbits
.text._Zproduct:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R19], [R16.64], P1 ;
        /*0040*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0050*/                   LDG.E.U8 R27, [R16.64] ;
        /*0060*/                   STS.U8 [R19], R27 ;
.L_x_4:
        /*0070*/               @P2 BRA `(.L_x_5) ;
        /*0080*/                   LDS R4, [R5] ;
        /*0090*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
.L_x_5:
        /*00a0*/              @!P3 FADD R9, R9, R8 ;
        /*00b0*/               @P4 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
	.section	.text._Zother,"ax",@progbits
.text._Zother:
        /*0000*/                   EXIT ;
"""


def test_a_turn_copies_and_multiplies_and_does_nothing_byte_by_byte() -> None:
    product, other = codes(LISTING)
    assert (product.name, other.name) == ("_Zproduct", "_Zother")
    assert loops(other) == []
    ((first, last),) = loops(product)
    way = turn(product, first, last)
    assert [operation(text).split(".")[0] for text in way] == [
        *("IADD3", "BRA", "LDGSTS", "BRA", "BRA", "LDS", "HMMA", "FADD", "BRA")
    ]


def test_those_who_copy_and_those_who_multiply_have_loops_of_their_own() -> None:
    listing = """
.text._Zkernel:
.L_x_1:
        /*0000*/                   HGMMA.64x8x16.F32.BF16 R8, R4, gdesc[UR4], R8 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R19], [R16.64] ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   EXIT ;
"""
    (code,) = codes(listing)
    assert [len(turn(code, *loop)) for loop in loops(code)] == [2, 3]


def test_a_wait_that_is_tried_again_behind_a_loop_is_none() -> None:
    listing = """
.text._Zkernel:
.L_x_0:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R19], [R16.64] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDGSTS.E.BYPASS.128 [R19], [R16.64] ;
        /*0070*/                   UBLKCP.S.G [UR20], [UR14], UR13 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/               @P1 BRA `(.L_x_2) ;
        /*00b0*/                   BRA `(.L_x_3) ;
"""
    (code,) = codes(listing)
    assert loops(code) == [(2, 8)]


def test_without_a_tool_it_says_which(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_instructions.shutil, "which", lambda tool: None)
    assert main(["--disassembler", "nowhere"]) == 1
    assert "needs nvcc, which is not on PATH" in capsys.readouterr().err
