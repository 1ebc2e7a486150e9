"""The tensor core's instructions and those that bring matrices to and from it; see :mod:`pallas_kernels.hopper`."""

from collections.abc import Sequence
from typing import cast

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import hopper
from pallas_kernels.hopper import constant, i32


def wait_for_wgmma(in_flight: int, registers: Sequence[ir.Value], keep: Sequence[ir.Value] = ()) -> list[ir.Value]:
    """Waits until at most ``in_flight`` groups of wgmma run.

    Nothing that reads ``registers`` moves before the wait, and the registers ``keep`` are not reused before it.
    """
    n = len(registers)
    kinds = ["=f" if register.type == ir.F32Type.get() else "=r" for register in registers]
    constraints = ",".join(kinds + [str(i) for i in range(n)] + ["r"] * len(keep))
    operands = [*registers, *keep]
    return hopper.asm(f"wgmma.wait_group.sync.aligned {in_flight};", constraints, operands, [r.type for r in registers])


def wgmma_e4m3(
    accumulator: Sequence[ir.Value],
    a: Sequence[ir.Value] | ir.Value,
    b_descriptor: ir.Value,
    accumulate: ir.Value,
    steps: int | None = None,
) -> list[ir.Value]:
    """Issues ``acc += A · Bᵀ`` as one group: fence, a wgmma m64nNk32 per step of 32 along k, commit.

    Args:
      accumulator: N / 2 float32 registers, or N / 4 int32 ones of two float16 each.
      a: 4 registers of e4m3 for each step; or the descriptor of the first ``[64, 32]`` part of A, K-major.
      b_descriptor: of the first ``[N, 32]`` part of B, K-major; the others follow in the same rows.
      accumulate: int32; 0 to overwrite the accumulator instead of adding to it.
      steps: given when A has a descriptor.

    Returns:
      The registers that the accumulator will be in; they must not be read before :func:`wait_for_wgmma`.
    """
    single = accumulator[0].type == ir.F32Type.get()
    r, n = len(accumulator), (2 if single else 4) * len(accumulator)
    kind, constraint = ("f32", "f") if single else ("f16", "r")
    in_registers = steps is None
    operands = list(cast(Sequence[ir.Value], a)) if in_registers else [cast(ir.Value, a)]
    steps = len(operands) // 4 if steps is None else steps
    registers = "{" + ",".join(f"${i}" for i in range(r)) + "}"
    a_base = 2 * r
    b, p = a_base + len(operands), a_base + len(operands) + 1
    lines = [
        "{ .reg .pred p, q; .reg .b64 d, e;",
        f"setp.ne.b32 p, ${p}, 0;",
        "setp.eq.u32 q, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        part = "e"
        if in_registers:
            part = "{" + ",".join(f"${a_base + 4 * step + i}" for i in range(4)) + "}"
        else:
            lines.append(f"add.s64 e, ${a_base}, {2 * step};")
        lines.append(f"add.s64 d, ${b}, {2 * step};")
        flag = "p" if step == 0 else "q"
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{n}k32.{kind}.e4m3.e4m3 {registers}, {part}, d, {flag}, 1, 1;")
    lines.append("wgmma.commit_group.sync.aligned; }")
    kinds = ["r" if in_registers else "l"] * len(operands)
    constraints = ",".join([f"={constraint}"] * r + [str(i) for i in range(r)] + kinds + ["l", "r"])
    arguments = [*accumulator, *operands, b_descriptor, accumulate]
    return hopper.asm("\n".join(lines), constraints, arguments, [accumulator[0].type] * r)


def k_major_descriptor(address: ir.Value, row_bytes: int = 128) -> ir.Value:
    """The wgmma descriptor of an 8-bit K-major operand in rows of 64 or 128 bytes with the swizzle of that size."""
    i64 = ir.IntegerType.get_signless(64)
    field = llvm.lshr(llvm.and_(address, i32(0x3FFFF)), i32(4))
    swizzle = {128: 1, 64: 2}[row_bytes]
    fixed = ((8 * row_bytes >> 4) << 32) | (swizzle << 62)
    return llvm.or_(arith.extui(i64, field), constant(fixed, bits=64))


def store_matrices(address: ir.Value, registers: Sequence[ir.Value], transposed: bool) -> None:
    """Stores two or four 8x8 matrices of 16-bit elements (stmatrix); ``address`` is each lane's row."""
    operands = ", ".join(f"${i + 1}" for i in range(len(registers)))
    kind = ".trans" if transposed else ""
    hopper.asm(
        f"stmatrix.sync.aligned.m8n8.x{len(registers)}{kind}.shared.b16 [$0], {{{operands}}};",
        ",".join(["r"] * (len(registers) + 1)),
        [address, *registers],
        [],
    )


def load_matrices(address: ir.Value, count: int, transposed: bool) -> list[ir.Value]:
    """Loads two or four 8x8 matrices of 16-bit elements (ldmatrix), the inverse of :func:`store_matrices`."""
    word = ir.IntegerType.get_signless(32)
    results = ", ".join(f"${i}" for i in range(count))
    kind = ".trans" if transposed else ""
    return hopper.asm(
        f"ldmatrix.sync.aligned.m8n8.x{count}{kind}.shared.b16 {{{results}}}, [${count}];",
        ",".join(["=r"] * count + ["r"]),
        [address],
        [word] * count,
    )


def transpose_matrix(register: ir.Value) -> ir.Value:
    """An 8x8 matrix of 16-bit elements, two of a row in each lane (as in a product's operand), transposed."""
    return hopper.asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [register], [register.type])[0]


def multiply_tiles(
    sums: Sequence[ir.Value], a: Sequence[ir.Value], b: Sequence[ir.Value], kind: str
) -> list[ir.Value]:  # fmt: skip
    """``sums + A · B`` of a warp, m16n8k16: operands of "f16" or "bf16", sums in float32."""
    return hopper.asm(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *sums], [ir.F32Type.get()] * 4,
    )  # fmt: skip
