"""The counts of instructions behind the cost model."""

from .instructions import counted_in
from .test_programs import run_python

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R5, R5 ;
        /*0050*/                   FADD R5, R5, 1 ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FMUL R5, R5, R5 ;
.L_x_3:
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_0:
        /*0090*/                   STG.E [R2.64], R5 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   RET.REL.NODEC R10 `(kernel) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
        /*00d0*/                   NOP;
"""


def test_a_warp_runs_what_is_counted() -> None:
    """Neither the branch that is not taken nor what lies behind the end."""
    assert counted_in(LISTING) == (4, [4])


def test_the_counts_are_of_the_present_kernels() -> None:
    result = run_python("-m", "tests.programs.instructions", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
