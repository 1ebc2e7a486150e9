"""Hopper instructions that Pallas:Mosaic GPU does not offer, as functions on raw registers.

All of them are meant to be called inside :func:`jax.experimental.pallas.mosaic_gpu.inline_mgpu` by a whole warpgroup.
A "container" is a one-dimensional Pallas array of ``128 · r`` elements that holds r registers of each thread; it has no
meaning beyond that, and lets registers live in Pallas loops.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

WARPGROUP = 128
FREE_BARRIER = 8  # the first of the block's 16 barriers that the compiler leaves alone: it has one per warpgroup
# Of kernels whose steps are instructions: every barrier that is needed is written out.
COMPILER_PARAMS = plgpu.CompilerParams(
    unsafe_no_auto_barriers=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
)


def container_layout(registers: int) -> Any:
    """The layout of a container of ``registers`` registers per thread."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP * registers,), vec_size=1)


def container_type(registers: int, dtype: Any) -> plgpu.ShapeDtypeStruct:
    """The type of a container, for ``return_type``."""
    return plgpu.ShapeDtypeStruct((WARPGROUP * registers,), dtype, container_layout(registers))


def unpack(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """The registers of a container."""
    return [llvm.extractelement(register, i32(0)) for register in array.registers.flat]


def pack(registers: Sequence[ir.Value]) -> mgpu.FragmentedArray:
    """A container of float32 or int32 registers."""
    element = registers[0].type
    vector = ir.VectorType.get((1,), element)
    packed = np.empty((len(registers),), dtype=object)
    for i, register in enumerate(registers):
        packed[i] = llvm.insertelement(llvm.mlir_undef(vector), register, i32(0))
    return mgpu.FragmentedArray(
        _registers=packed,
        _layout=mgpu.WGStridedFragLayout((WARPGROUP * len(registers),), 1),
        _is_signed=True if isinstance(element, ir.IntegerType) else None,
    )


def splat(number: ir.Value) -> mgpu.FragmentedArray:
    """An int32 that all threads have, as a step's result."""
    return mgpu.FragmentedArray.splat(number, (), is_signed=True)


def constant(value: int, bits: int) -> ir.Value:
    """An integer constant, given as a signed or an unsigned number."""
    if bits > 1 and value >= 1 << (bits - 1):
        value -= 1 << bits
    integer = ir.IntegerType.get_signless(bits)
    return cast(Any, arith.ConstantOp)(integer, ir.IntegerAttr.get(integer, value)).result


def i32(value: int) -> ir.Value:
    """A 32-bit constant."""
    return constant(value, bits=32)


def f32(value: float) -> ir.Value:
    """A float32 constant."""
    single = ir.F32Type.get()
    return cast(Any, arith.ConstantOp)(single, ir.FloatAttr.get(single, value)).result


def asm(ptx: str, constraints: str, operands: Sequence[ir.Value], results: Sequence[ir.Type]) -> list[ir.Value]:
    """Inline PTX that the compiler neither drops nor moves across another such one."""
    if not results:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), ptx, constraints, has_side_effects=True)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], list(operands), ptx, constraints, has_side_effects=True)]
    struct = llvm.StructType.get_literal(list(results))
    out = llvm.inline_asm(struct, list(operands), ptx, constraints, has_side_effects=True)
    return [llvm.extractvalue(type_, out, [i]) for i, type_ in enumerate(results)]


def pure_asm(ptx: str, constraints: str, operands: Sequence[ir.Value], result: ir.Type) -> ir.Value:
    """Inline PTX that computes one value and may be moved or dropped."""
    return llvm.inline_asm(result, list(operands), ptx, constraints, has_side_effects=False)


def thread_in_warpgroup() -> ir.Value:
    """0 to 127, int32."""
    return arith.remui(utils.thread_idx(), i32(WARPGROUP))


def warp_number() -> ir.Value:
    """Of this thread's warp in its block, in a form of which the compiler sees that all lanes have the same.

    What is computed from it then takes no vector instructions.
    """
    warp = arith.shrui(utils.thread_idx(), i32(5))
    return asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [warp], [warp.type])[0]


def unknown_zero(axis: Literal["y", "z"] = "y") -> ir.Value:
    """A 0 of which the compiler does not know that it is one: a block's further coordinate in a grid of one axis."""
    return asm(f"mov.u32 $0, %ctaid.{axis};", "=r", [], [ir.IntegerType.get_signless(32)])[0]


def thread_anew() -> ir.Value:
    """The thread's number in its block, of which the compiler does not know that it has it already.

    What is computed from it is not kept in registers from where the same was computed before.
    """
    return asm("mov.u32 $0, %tid.x;", "=r", [], [ir.IntegerType.get_signless(32)])[0]


def run_where(condition: ir.Value, body: Callable[[], None]) -> None:
    """Has what a function emits run by the threads where a bit holds."""
    branch = cast(Any, scf.IfOp)(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def split_address(address: ir.Value) -> list[ir.Value]:
    """The lower and the upper half of a global address, for a container."""
    word, upper = ir.IntegerType.get_signless(32), arith.shrui(address, constant(32, bits=64))
    return [arith.trunci(word, address), arith.trunci(word, upper)]


def join_address(low: ir.Value, high: ir.Value) -> ir.Value:
    """Inverse of :func:`split_address`."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.ori(arith.shli(arith.extui(i64, high), constant(32, bits=64)), arith.extui(i64, low))


def shared_address(ref: ir.Value) -> ir.Value:
    """The 32-bit address of a shared-memory reference."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def global_address(ref: ir.Value, element_bytes: int, *index: tuple[ir.Value | int, int]) -> ir.Value:
    """The address of an element of global memory; ``index`` holds pairs of an index and its stride in elements."""
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    for value, stride in index:
        wide = constant(value, bits=64) if isinstance(value, int) else arith.extui(i64, value)
        address = arith.addi(address, arith.muli(wide, constant(stride * element_bytes, bits=64)))
    return address


def load_bf16_if(address: ir.Value, condition: ir.Value) -> ir.Value:
    """A bf16 of global memory as float32, or 0 where the condition does not hold."""
    load = (
        "{ .reg .pred p; .reg .b16 z, h; setp.ne.b32 p, $2, 0; mov.b16 z, 0; mov.b16 h, 0; "
        "@p ld.global.nc.b16 h, [$1]; mov.b32 $0, {z, h}; }"
    )
    flag = arith.extui(ir.IntegerType.get_signless(32), condition)
    return asm(load, "=f,l,r", [address, flag], [ir.F32Type.get()])[0]


READ_ONLY = "ld.global.nc"  # of memory that the kernel does not write, so that its lines may stay in the cache


def load_global(
    words: int, address: ir.Value, condition: ir.Value | None = None, offset: int = 0, load: str = "ld.global"
) -> list[ir.Value]:
    """1, 2 or 4 neighbouring words at a global address that is aligned to all of them.

    They are zeros where the condition, a bit, does not hold. ``load`` is the instruction; unlike a plain one,
    ``READ_ONLY`` may be moved before stores.
    """
    word, registers = ir.IntegerType.get_signless(32), [f"${i}" for i in range(words)]
    vector, listed = (f".v{words}", "{" + ", ".join(registers) + "}") if words > 1 else ("", registers[0])
    instruction = f"{load}{vector}.b32 {listed}, [${words}+{offset}];"
    if condition is None:
        return asm(instruction, ",".join(["=r"] * words + ["l"]), [address], [word] * words)
    zeros = " ".join(f"mov.b32 {register}, 0;" for register in registers)
    return asm(
        f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros} @p {instruction} }}",
        ",".join(["=&r"] * words + ["l", "r"]), [address, arith.extui(word, condition)], [word] * words,
    )  # fmt: skip


def wait_for_phase(barrier: ir.Value, parity: ir.Value) -> None:
    """Waits until a phase of that parity of the mbarrier at a shared address is over."""
    asm(
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [$0], $1; @!p bra again; }",
        "r,r",
        [barrier, parity],
        [],
    )


def load_shared(address: ir.Value, offset: int = 0, words: int = 4) -> list[ir.Value]:
    """1, 2 or 4 32-bit words at a shared address that is aligned to all of them."""
    word = ir.IntegerType.get_signless(32)
    out = ", ".join(f"${i}" for i in range(words))
    vector, listed = (f".v{words}", f"{{{out}}}") if words > 1 else ("", out)
    ptx = f"ld.shared{vector}.b32 {listed}, [${words}+{offset}];"
    return asm(ptx, ",".join(["=r"] * words + ["r"]), [address], [word] * words)


def copy_to_shared(
    address: ir.Value, source: ir.Value, offset: int, source_offset: int, exists: ir.Value | None = None
) -> None:
    """Asks for 16 bytes of global memory to be written to a shared address, or zeros where a bit does not hold.

    No register waits for them. Both addresses are aligned to 16 bytes.
    """
    ptx = f"cp.async.cg.shared.global [$0+{offset}], [$1+{source_offset}], 16"
    if exists is None:
        asm(ptx + ";", "r,l", [address, source], [])
        return
    asm(ptx + ", $2;", "r,l,r", [address, source, arith.select(exists, i32(16), i32(0))], [])


def open_barriers(address: ir.Value, size: int, count: int = 1) -> None:
    """Makes mbarriers from a shared address on; the first phase of each is over when so many bytes have come."""
    first = arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), i32(0))
    first = arith.extui(ir.IntegerType.get_signless(32), first)
    for number in range(count):
        asm(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.init.shared.b64 [$0], 1; "
            f"@p mbarrier.arrive.expect_tx.shared.b64 _, [$0], {size}; }}",
            "r,r", [arith.addi(address, i32(8 * number)), first], [],
        )  # fmt: skip
    asm("fence.mbarrier_init.release.cluster;", "", [], [])


def copy_in_bulk(address: ir.Value, source: ir.Value, size: int, barrier: ir.Value, condition: ir.Value) -> None:
    """Asks for bytes of global memory to be copied to a shared address, where a bit holds.

    Their number is a multiple of 16, and both addresses are. The mbarrier at ``barrier`` counts them.
    """
    asm(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; "
        "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3]; }",
        "r,l,r,r,r", [address, source, i32(size), barrier, arith.extui(ir.IntegerType.get_signless(32), condition)], [],
    )  # fmt: skip


def end_group_of_copies() -> None:
    """Puts what :func:`copy_to_shared` was asked for since the last such end into a group."""
    asm("cp.async.commit_group;", "", [], [])


def wait_for_copies(later: int) -> None:
    """Waits for all groups of this thread's warp but so many of the last ones, and for the warp's other lanes."""
    asm(f"cp.async.wait_group {later}; bar.warp.sync 0xffffffff;", "", [], [])


def store_shared(
    address: ir.Value, registers: Sequence[ir.Value], offset: int = 0, condition: ir.Value | None = None
) -> None:
    """As :func:`store`, to a shared address."""
    store("shared", address, registers, offset, condition)


def store_global(
    address: ir.Value, registers: Sequence[ir.Value], offset: int = 0, condition: ir.Value | None = None
) -> None:
    """As :func:`store`, to a global address."""
    store("global", address, registers, offset, condition)


def store(
    space: str, address: ir.Value, registers: Sequence[ir.Value], offset: int = 0, condition: ir.Value | None = None
) -> None:
    """Writes 1, 2 or 4 float32 or words to an address that is aligned to all of them.

    If there is a condition, a bit, only where it holds. ``space`` is "global", "shared" or "shared::cluster".
    """
    count, (kind, listed) = len(registers), _vector(registers, 1)
    vector = f".v{count}" if count > 1 else ""
    constraints = ",".join(["l" if space == "global" else "r"] + [kind] * count)
    instruction = f"st.{space}{vector}.b32 [$0+{offset}], {listed};"
    if condition is None:
        asm(instruction, constraints, [address, *registers], [])
        return
    flag = arith.extui(ir.IntegerType.get_signless(32), condition)
    predicated = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; @p {instruction} }}"
    asm(predicated, constraints + ",r", [address, *registers, flag], [])


def _vector(registers: Sequence[ir.Value], first: int) -> tuple[str, str]:
    """The constraint of registers of one type, and how an instruction lists them as operands from ``first`` on."""
    names = [f"${first + i}" for i in range(len(registers))]
    kind = "f" if registers[0].type == ir.F32Type.get() else "r"
    return kind, "{" + ", ".join(names) + "}" if len(names) > 1 else names[0]


def shuffle(register: ir.Value, lane: ir.Value) -> ir.Value:
    """The float32 that another lane of the warp holds."""
    return asm("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [register, lane], [register.type])[0]


def exchange(register: ir.Value, distance: int) -> ir.Value:
    """The register of the lane whose number differs by that power of two."""
    kind = "f" if register.type == ir.F32Type.get() else "r"
    ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
    return asm(ptx, f"={kind},{kind}", [register], [register.type])[0]


def across_lanes(
    value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value], lanes: int = 32, apart: int = 1
) -> ir.Value:
    """A register of each of as many neighbouring lanes, combined; all of them get the result.

    If they are some lanes ``apart``, that many times ``lanes`` are meant, and each result is of every so manieth one.
    """
    return all_across_lanes([value], combine, lanes, apart)[0]


def all_across_lanes(
    values: Sequence[ir.Value], combine: Callable[[ir.Value, ir.Value], ir.Value], lanes: int = 32, apart: int = 1
) -> list[ir.Value]:
    """:func:`across_lanes` of several registers side by side, so that none waits for another one's exchanges."""
    values, distance = list(values), apart
    while distance < lanes * apart:
        others = [exchange(value, distance) for value in values]
        values, distance = [combine(a, b) for a, b in zip(values, others, strict=True)], 2 * distance
    return values


def of_neighbour(register: ir.Value, number: int, among: int) -> ir.Value:
    """The register of the lane of that number among 2, 4, 8 ... neighbouring ones."""
    kind = "f" if register.type == ir.F32Type.get() else "r"
    ptx = f"shfl.sync.idx.b32 $0, $1, {number}, {(32 - among) << 8 | 0x1F:#x}, 0xffffffff;"
    return asm(ptx, f"={kind},{kind}", [register], [register.type])[0]


def largest_across_warp(word: ir.Value) -> ir.Value:
    """The largest unsigned number that a lane of the warp has."""
    return asm("redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", [word], [word.type])[0]


def block_in_cluster() -> ir.Value:
    """The number of this block among those of its cluster."""
    return pure_asm("mov.u32 $0, %cluster_ctarank;", "=r", [], ir.IntegerType.get_signless(32))


def in_block(address: ir.Value, block: ir.Value) -> ir.Value:
    """A shared address of this block as that of the same place in another block of the cluster."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", [address, block], [address.type])[0]


def send_words(address: ir.Value, offset: int, registers: Sequence[ir.Value], barrier: ir.Value) -> None:
    """Stores two or four float32 or words in a block of the cluster, whose barrier is told of their bytes' arrival.

    That takes no fence. Both addresses are of :func:`in_block`.
    """
    count, (kind, listed) = len(registers), _vector(registers, 1)
    asm(
        f"st.async.shared::cluster.mbarrier::complete_tx::bytes.v{count}.b32 [$0+{offset}], {listed}, [${count + 1}];",
        ",".join(["r"] + [kind] * count + ["r"]), [address, *registers, barrier], [],
    )  # fmt: skip


def block_barrier() -> None:
    """Waits for all threads of the block; inside a step."""
    asm("bar.sync 0;", "", [], [])


@plgpu.inline_mgpu(arg_types=(), return_type=())
def cluster_arrive(ctx: object) -> tuple[()]:
    """Tells the cluster that this thread got here, not what it wrote: that takes a fence of the whole device."""
    asm("barrier.cluster.arrive.relaxed;", "", [], [])
    return ()


@plgpu.inline_mgpu(arg_types=(), return_type=())
def cluster_arrive_done(ctx: object) -> tuple[()]:
    """As :func:`cluster_arrive`; what this thread did to other blocks' memory has happened once all have arrived."""
    asm("barrier.cluster.arrive.release;", "", [], [])
    return ()


@plgpu.inline_mgpu(arg_types=(), return_type=())
def cluster_wait(ctx: object) -> tuple[()]:
    """Waits until every thread of the cluster has arrived, and sees the barriers that they made before."""
    asm("barrier.cluster.wait.acquire;", "", [], [])
    return ()


@plgpu.inline_mgpu(arg_types=(), return_type=())
def warpgroup_barrier(ctx: object) -> tuple[()]:
    """Waits for all threads of the warpgroup."""
    utils.warpgroup_barrier()
    return ()
