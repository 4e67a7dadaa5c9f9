"""What is read from the machine code of a kernel, on programs short enough to count by hand."""

import pytest

pytest.importorskip("triton")

from benchmarks.aot import sass  # noqa: E402

# A loop that waits for its loads out of line, in which a block may be skipped, and a second loop without products.
PROGRAM = """
        .section        .text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R2 ;
        /*0030*/              @!P2 BRA `(.L_x_7) ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   BRA.U !UP0, `(.L_x_3) ;
        /*0080*/                   LDL.64 R2, [R1+0x8] ;
.L_x_3:
        /*0090*/                   MUFU.EX2 R3, R2 ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   FADD R3, R2, R3 ;
        /*00c0*/                   STL [R1], R3 ;
        /*00d0*/               @P1 BRA `(.L_x_4) ;
.L_x_9:
        /*00e0*/                   EXIT ;
.L_x_7:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R2 ;
        /*0100*/              @!P2 BRA `(.L_x_7) ;
        /*0110*/                   BRA `(.L_x_2) ;
.L_x_8:
        /*0120*/                   BRA `(.L_x_8);
"""
IN_LOOP = 9 + 3  # .L_x_1 to .L_x_3, and the wait at the end

LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 128, 16]}>
"""
TTGIR = f"""{LAYOUTS}
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 4 : i32}} {{
  tt.func public @kernel(%arg0: !tt.ptr<bf16> {{tt.divisibility = 16 : i32}}) {{
    %0 = tt.dot %a, %b, %c : tensor<512x64xbf16, #x> * tensor<64x512xbf16, #y> -> tensor<512x512xf32, #mma>
    %1:2 = scf.for %i = %z to %n step %o iter_args(%s = %c, %t = %c) -> (tensor<16x16xf32, #mma>)  : i32 {{
      %2 = scf.if %p -> (i32) {{
        %3 = tt.dot %a, %b, %s : tensor<32x64xbf16, #x> * tensor<64x32xbf16, #y> -> tensor<32x32xf32, #mma>
        scf.yield %q : i32
      }} else {{
        scf.yield %q : i32
      }}
    }} {{tt.num_stages = 3 : i32}}
    %4 = scf.for %i = %z to %n step %o iter_args(%s = %c) -> (tensor<16x16xf32, #mma>)  : i32 {{
      %5 = tt.dot %a, %b, %s : tensor<16x16xbf16, #x> * tensor<16x8xbf16, #y> -> tensor<16x8xf32, #mma>
      %6 = tt.dot %a, %b, %s : tensor<16x16xf32, #x> * tensor<16x16xf32, #y> -> tensor<16x16xf32, #blocked>
    }}
  }}
}}
"""


def test_loops_have_all_blocks_from_which_they_repeat():
    instructions, labels = sass.parse(PROGRAM)
    assert len(instructions) == 19 and labels[".L_x_2"] == 4 and labels[".L_x_7"] == 15
    loops = sorted(sass.loops_of(instructions, labels), key=min)
    assert [min(loop) for loop in loops] == [2, 11, 15]  # what nothing reaches is no loop
    assert loops[0] == {*range(2, 11), 15, 16, 17} and len(loops[0]) == IN_LOOP
    assert loops[1] == {11, 12, 13} and loops[2] == {15, 16}


def test_main_loop_counts_what_one_iteration_does(monkeypatch):
    monkeypatch.setattr(sass, "disassemble", lambda cubin: PROGRAM)
    loop, spills = sass.main_loop(b"", TTGIR)
    assert (loop.instructions, loop.barriers, spills) == (IN_LOOP, 1, 1)
    # 4 warps of 16 x 32 for a product of 32 x 32; the machine code has 2 of its products.
    assert loop.tensor_work == 2
    useful = 4 * 2 * (16 * 8 * 16) / 2
    assert loop.instructions_per_kmac == pytest.approx(IN_LOOP * 4 * 1024 / useful, abs=1e-3)


def test_without_products_there_is_no_main_loop(monkeypatch):
    monkeypatch.setattr(sass, "disassemble", lambda cubin: PROGRAM.replace("HMMA.16816.F32.BF16", "FFMA"))
    assert sass.main_loop(b"", TTGIR) == (None, 0)
    assert sass.local_in_loops(b"") == 2  # in either loop that computes, not in the wait inside the first
    monkeypatch.setattr(sass, "disassemble", lambda cubin: PROGRAM.replace("FADD", "IADD3"))
    assert sass.local_in_loops(b"") == 1


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("HGMMA.64x128x16.F32.BF16", 64 * 128 * 16 // 4),  # of a warpgroup
        ("HMMA.16816.F32", 2048),
        ("HMMA.1688.F32.TF32", 1024),
        ("UTCHMMA", 0),
        ("FFMA", 0),
        ("IMAD.WIDE", 0),
    ],
)
def test_multiply_adds(name, macs):
    one = sass.Instruction("", name, "", None)
    assert one.macs == macs and one.multiplies == (macs > 0 or name == "UTCHMMA")


@pytest.mark.parametrize(
    ("name", "operands", "factor"),
    [
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR4], R24, !UPT", 1),
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24, !UPT", 1),
        # 1 KiB of the right operand and 2 of the left one take 24 cycles, the product 16
        ("HGMMA.64x32x16.F32.BF16", "R24, gdesc[UR4], R24, !UPT", 1.5),
        ("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR4], R24, !UPT", 2.5),
        ("HGMMA.64x16x8.F32.TF32", "R24, gdesc[UR4], R24, !UPT", 2.5),
        ("HGMMA.64x32x16.F32.BF16", "R24, R4, gdesc[UR4], R24", 1),
        ("HMMA.16816.F32", "R4, R8, R12, R4", 1),
    ],
)
def test_narrow_products_wait_for_their_operands(name, operands, factor):
    one = sass.Instruction("", name, operands, None)
    assert one.busy == one.macs * factor


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (
            "%0 = tt.dot %a, %b, %c : tensor<64x16xbf16, #x> * tensor<16x8xbf16, #y> -> tensor<64x8xf32, #mma>",
            (1, 4),
        ),
        (
            "%0 = tt.dot %a, %b, %c : tensor<16x16xbf16, #x> * tensor<16x8xbf16, #y> -> tensor<16x8xf32, #mma>",
            (4, 4),
        ),
        (
            "%0 = ttng.warp_group_dot %a, %b, %c {inputPrecision = 0 : i32, isAsync = true} : "
            "!ttg.memdesc<64x64xbf16, #s, #smem> * !ttg.memdesc<64x128xbf16, #s, #smem> -> tensor<64x128xf32, #mma1>",
            (2, 8),
        ),
        (
            "%0 = ttng.warp_group_dot %a, %b, %c : tensor<128x64xbf16, #op> * !ttg.memdesc<64x64xbf16, #s> -> "
            "tensor<128x256xf32, #mma1>",
            (1, 8),
        ),
        (
            "ttng.tc_gen5_mma %a, %b, %d, %u, %p : !ttg.memdesc<128x64xbf16, #s, #smem>, "
            "!ttg.memdesc<64x32xbf16, #s, #smem>, !ttg.memdesc<128x32xf32, #tmem, #ttng.tensor_memory, mutable>",
            (1, 4),
        ),
    ],
)
def test_work_of_products(product, expected):
    """What the layout does for each multiply-add that is needed, and the warps that share it."""
    module = 'module attributes {"ttg.num-warps" = 4 : i32} {'
    [found] = sass._main_products("\n".join([LAYOUTS, module, "scf.for %i = %a to %b {", product, "}", "}"]))
    assert (found.issued / found.macs, found.warps) == expected
