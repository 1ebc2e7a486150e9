"""How int4 codes and group scales become operands and factors in a thread's registers, for the Hopper matmuls."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import arithmetic, hopper
from pallas_kernels.hopper import f32, i32

# What a code of 1 is worth when its bits are read as e4m3: sign and magnitude are a subnormal number.
CODE_UNIT = 2.0**-9
# What a code of 1 is worth when its bits are put into the upper byte of a float16.
HALF_CODE_UNIT = 2.0**-16
MINUS_HALF = 0x80808080  # twice, in that unit


def decode_codes(words: Sequence[ir.Value]) -> list[ir.Value]:
    """Words of 8 codes as e4m3 operand registers of 4, worth ``CODE_UNIT`` times the codes.

    A negative code's magnitude is stored less one, so its sign is added to it, of all eight at once: magnitudes are in
    the lower three bits of each half byte, and seven bits above each, around the word's end, is its sign. Here a
    rotation and a sum are one instruction, and a choice of bits is one, six in all.
    """
    ptx = (
        "{ .reg .b32 signs, rotated, sizes; and.b32 signs, $2, 0x88888888; and.b32 sizes, $2, 0x77777777; "
        "shf.l.wrap.b32 rotated, signs, signs, 25; add.u32 sizes, sizes, rotated; "
        "lop3.b32 $0, sizes, signs, 0x0F0F0F0F, 0xE4; lop3.b32 sizes, sizes, signs, 0xF0F0F0F0, 0xE4; "
        "shf.r.wrap.b32 $1, sizes, sizes, 4; }"
    )
    return [register for word in words for register in hopper.asm(ptx, "=&r,=&r,r", [word], [word.type] * 2)]


def fold_codes(words: Sequence[ir.Value], scales: Sequence[ir.Value]) -> list[ir.Value]:
    """Words of 8 codes as operand registers of ``e4m3(code · scale)``, those of the first output and the second's.

    FireQ's look-up (arXiv 2505.20839, section 3.1): the stored magnitudes, eight of positive codes and eight of
    negative ones, choose bytes of two registers each, and the sign one of the two.
    """
    tables = []
    for scale in scales:
        sizes = [arith.mulf(scale, f32(i)) for i in range(8)]
        minus = [arith.mulf(scale, f32(-i)) for i in range(1, 9)]
        tables.append([arithmetic.to_e4m3x4(four) for four in (sizes[:4], sizes[4:8], minus[:4], minus[4:])])
    # Of four bytes the lower three bits are brought together, four bits each, as a choice of bytes.
    look_up = (
        "{ .reg .b32 chosen, upper, positive, negative, signs; and.b32 chosen, $1, 0x07070707; "
        "shr.b32 upper, chosen, 4; or.b32 chosen, chosen, upper; prmt.b32 chosen, chosen, 0, 0x4420; "
        "prmt.b32 positive, $2, $3, chosen; prmt.b32 negative, $4, $5, chosen; prmt.b32 signs, $1, 0, 0xBA98; "
        "lop3.b32 $0, negative, positive, signs, 0xE4; }"
    )
    registers = []
    for word in words:
        turned = hopper.pure_asm("shf.r.wrap.b32 $0, $1, $1, 4;", "=r,r", [word], word.type)
        for source, table in zip((word, turned), tables, strict=True):
            registers.append(hopper.pure_asm(look_up, "=r,r,r,r,r,r", [source, *table], word.type))
    return registers


def decode_scales(raw: ir.Value, scale_dtype: Any) -> tuple[ir.Value, ir.Value]:
    """A word of two neighbouring group scales, e4m3 in its lower half or bf16, as float32."""
    if scale_dtype == jnp.float8_e4m3fn:
        low, high = arithmetic.of_f16x2(arithmetic.to_halves(raw)[0])
        return low, high
    single = ir.F32Type.get()
    low, high = arith.shli(raw, i32(16)), arith.andi(raw, i32(0xFFFF0000))
    return arith.bitcast(single, low), arith.bitcast(single, high)


def load_short_scales(address: ir.Value, unit: float) -> list[ir.Value]:
    """Two neighbouring e4m3 group scales by ``unit``, each as a register of twice the same float16; exact."""
    [raw] = hopper.asm("ld.shared.u16 $0, [$1];", "=r,r", [address], [ir.IntegerType.get_signless(32)])
    one_over = arithmetic.to_f16x2(f32(1 / unit), f32(1 / unit))
    pair = arithmetic.f16x2("mul.rn", arithmetic.to_halves(raw)[0], one_over)
    return [arithmetic.permute(pair, i32(0), selector) for selector in (0x1010, 0x3232)]


def load_scales(address: ir.Value, scale_dtype: Any) -> tuple[ir.Value, ir.Value]:
    """Two neighbouring group scales as float32. Zeros, which only copies from outside the weight bring, become ones."""
    word = ir.IntegerType.get_signless(32)
    size, ones = ("u16", 0x3838) if scale_dtype == jnp.float8_e4m3fn else ("b32", 0x3F803F80)
    [raw] = hopper.asm(f"ld.shared.{size} $0, [$1];", "=r,r", [address], [word])
    outside = arith.cmpi(arith.CmpIPredicate.eq, raw, i32(0))
    return decode_scales(arith.select(outside, i32(ones), raw), scale_dtype)


def decode_to_halves(word: ir.Value) -> list[ir.Value]:
    """A word of 8 codes as the first operand of an m16n8k16 product in float16, worth ``HALF_CODE_UNIT`` each.

    A code is (-1)^s (j + 1/2) - 1/2 where s is its sign and j its stored magnitude, and s, j and a half beside them
    are a subnormal float16 once they are masked out of the word.
    """
    word_type = word.type
    rotated = hopper.pure_asm("shf.r.wrap.b32 $0, $1, $1, 4;", "=r,r", [word], word_type)
    operand = []
    for shift in (8, 0):  # inputs 0 and 2, then 1 and 3 of four
        for source in (word, rotated):
            shifted = arith.shli(source, i32(shift)) if shift else source
            bits = arithmetic.and_or(shifted, i32(0x87008700), i32(0x00800080))
            operand.append(arithmetic.f16x2("add.rn", bits, i32(MINUS_HALF)))
    return operand
