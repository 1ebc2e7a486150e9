"""A multiprocessor in numpy, for kernels whose register-level steps are warp instructions.

Inside :func:`emulated` the kernels of ``mosaic_matvec`` and ``mosaic_decode`` run as they are written: every operation
on registers acts on a vector of all threads of a block, inline PTX is executed instruction by instruction, blocks run
one after another. Shared memory is watched: a byte that one warp wrote and another reads or writes before the next
barrier is a race. What a copy brings is garbage until its barrier was waited for, and it may overtake loads: these are
carried out when something needs what they give.

Kernels that have barriers of Pallas run every warpgroup in a Python thread of its own. A wgmma is computed when it is
waited for, from what shared memory holds then; reading its accumulators before is an error. The blocks of a cluster run
together, if they have such barriers; what they copy together each copies for itself.

Memory, barriers and products are in ``emulated_memory``, PTX in ``emulated_ptx``.
"""

import functools
import itertools
import math
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from emulated_memory import (
    B16,
    F32,
    PRED,
    U32,
    U64,
    Barriers,
    BarrierSpec,
    Block,
    Cluster,
    ClusterBarrierSpec,
    Load,
    Loaded,
    Product,
    Register,
    Running,
    Warpgroup,
    settled,
    swizzled,
)
from emulated_ptx import Machine
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels import arithmetic, hopper, tensor_core


@contextmanager
def emulated(*modules):
    """Runs the kernels of these modules on the emulated machine."""
    machine = Machine()

    def binary(operation):
        def apply(a, b):
            with np.errstate(over="ignore"):
                return Register(operation(a.values, b.values))

        return apply

    def signed(values):
        return values.view(np.int32 if values.dtype.itemsize == 4 else np.int64)

    comparisons = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "slt": lambda a, b: signed(a) < signed(b),
        "sle": lambda a, b: signed(a) <= signed(b), "ult": lambda a, b: a < b, "OLE": lambda a, b: a <= b,
        "OEQ": lambda a, b: a == b, "OGT": lambda a, b: a > b,
    }  # fmt: skip
    arith = SimpleNamespace(
        addi=binary(np.add), subi=binary(np.subtract), muli=binary(np.multiply), andi=binary(np.bitwise_and),
        ori=binary(np.bitwise_or), xori=binary(np.bitwise_xor), shli=binary(np.left_shift),
        shrui=binary(np.right_shift), divui=binary(np.floor_divide), remui=binary(np.remainder),
        minui=binary(np.minimum), maxui=binary(np.maximum), minnumf=binary(np.fmin),
        minsi=binary(lambda a, b: np.minimum(signed(a), signed(b)).view(a.dtype)),
        maxsi=binary(lambda a, b: np.maximum(signed(a), signed(b)).view(a.dtype)),
        addf=binary(np.add), subf=binary(np.subtract), mulf=binary(np.multiply), negf=lambda a: Register(-a.values),
        cmpi=lambda kind, a, b: Register(comparisons[kind](a.values, b.values)),
        cmpf=lambda kind, a, b: Register(comparisons[kind](a.values, b.values)),
        select=lambda c, a, b: Register(np.where(c.values, a.values, b.values)),
        extui=lambda kind, a: Register(a.values.astype(kind)),
        trunci=lambda kind, a: Register(a.values.astype(kind)),
        bitcast=lambda kind, a: Register(a.values.view(kind)),
        CmpIPredicate=SimpleNamespace(eq="eq", ne="ne", slt="slt", sle="sle", ult="ult"),
        CmpFPredicate=SimpleNamespace(OLE="OLE", OEQ="OEQ", OGT="OGT"),
    )  # fmt: skip
    widths = {1: PRED, 16: B16, 32: U32, 64: U64}
    ir = SimpleNamespace(
        IntegerType=SimpleNamespace(get_signless=widths.__getitem__),
        F32Type=SimpleNamespace(get=lambda: F32),
        Value=object,
    )
    utils = SimpleNamespace(
        thread_idx=lambda: Register(np.arange(machine.block.threads, dtype=U32) + U32(128 * machine.block.warpgroup)),
        memref_ptr=lambda ref: ref,
    )
    llvm = SimpleNamespace(ptrtoint=lambda kind, ref: Register(machine.full(ref.address, kind)))

    def asm(ptx, constraints, operands, results):
        # Of kernels that wait for copies by themselves; where Pallas has barriers, those are in order with loads.
        if ptx.startswith("ld.shared") and not isinstance(machine.block, Warpgroup):
            operands = [Register(operand.values) for operand in operands]
            load = Load(lambda: machine.run(ptx, constraints, operands, results))
            machine.block.loads.append(load)
            return [Loaded(load, i, kind) for i, kind in enumerate(results)]
        return [Register(values) for values in machine.run(ptx, constraints, operands, results)]

    def pure_asm(ptx, constraints, operands, result):
        return asm(ptx, constraints, operands, [result])[0]

    def constant(value, bits):
        mask = (1 << bits) - 1
        return Register(machine.full(value & mask, widths[bits]))

    def issue(accumulator, a, descriptor, accumulate, steps=None):
        products = machine.block.products
        products.append(Product(machine.block, accumulator, a, descriptor, accumulate, steps))
        return [Running(products[-1], i) for i in range(len(accumulator))]

    def wait_for_products(in_flight, registers, keep=()):
        products = machine.block.products
        while len(products) > in_flight:
            products.pop(0).compute()
        return [settled(register) for register in registers]

    def places(address, matrix, transposed):
        """Of each lane and byte of a fragment, where it lies in shared memory, per warp."""
        rows = address.values.astype(np.int64).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
        for lane, byte in itertools.product(range(32), range(4)):
            row, column = lane // 4, lane % 4 * 2 + byte // 2
            row, column = (column, row) if transposed else (row, column)
            yield lane, U32(8 * byte), rows[:, row] + 2 * column + byte % 2

    def store_matrices(address, registers, transposed):
        for i, register in enumerate(registers):
            words = register.values.view(U32).reshape(-1, 32)
            for lane, shift, place in places(address, i, transposed):
                machine.block.shared[place] = words[:, lane] >> shift & U32(0xFF)

    def load_matrices(address, count, transposed):
        results = []
        for i in range(count):
            words = np.zeros((len(address.values) // 32, 32), U32)
            for lane, shift, place in places(address, i, transposed):
                words[:, lane] |= machine.block.shared[place].astype(U32) << shift
            results.append(Register(words.reshape(-1)))
        return results

    def member():
        return machine.block.peer, machine.block.warpgroup

    def arrive_done():
        machine.block.deliver()
        machine.block.cluster.arrive(member())

    tensor_core_functions = {
        "wgmma_e4m3": issue, "wait_for_wgmma": wait_for_products, "store_matrices": store_matrices,
        "load_matrices": load_matrices,
        "k_major_descriptor": lambda address, row_bytes=128: (int(address.values[0]), row_bytes),
    }  # fmt: skip
    hopper_functions = {
        "thread_in_warpgroup": lambda: Register(np.arange(machine.block.threads, dtype=U32) % U32(128)),
        "asm": asm, "pure_asm": pure_asm, "constant": constant, "ir": ir, "arith": arith, "llvm": llvm,
        "utils": utils,
        "i32": lambda value: constant(value, 32), "f32": lambda value: Register(machine.full(value, F32)),
        "pack": list, "unpack": list, "splat": lambda number: number,
        "cluster_arrive": lambda: machine.block.cluster.arrive(member()),
        "cluster_arrive_done": arrive_done,
        "cluster_wait": lambda: machine.block.cluster.wait(member(), machine.failures),
        "warpgroup_barrier": lambda: None,
        "unknown_zero": lambda axis="y": constant(0, 32), "thread_anew": lambda: utils.thread_idx(),
        "run_where": lambda condition, body: body(),  # whose loads and stores have conditions of their own
        "shared_address": lambda ref: Register(machine.full(ref.address, U32)),
    }  # fmt: skip

    def scalar(value):
        """An int32 of the kernel's control flow as a step gets it: the same in every thread."""
        if isinstance(value, jax.Array) and value.ndim == 0:
            register = Register(machine.full(int(value) & 0xFFFFFFFF, U32))
            return SimpleNamespace(registers=SimpleNamespace(item=lambda: register))
        return value

    def inline(arg_types, return_type):
        def of_python(result):
            """A number of the kernel's control flow that a step gives."""
            return jnp.int32(result.values[0]) if isinstance(result, Register) else result

        return lambda step: lambda *arguments: of_python(step(None, *map(scalar, arguments)))

    def cast(array, layout):
        """A container of equal elements: a list of registers."""
        values = np.asarray(array)
        assert np.all(values == values[0])
        dtype = F32 if values.dtype == np.float32 else U32
        return [Register(machine.full(values[0], dtype)) for _ in range(values.size // 128)]

    def separately(blocks, warpgroups, bodies):
        """Runs the warpgroups of a cluster's blocks side by side; of 0, the blocks as wholes."""
        cluster = Cluster(blocks, max(warpgroups, 1)) if len(blocks) > 1 else None

        def run(block, warpgroup, meetings, body):
            block.cluster = cluster
            machine.block = Warpgroup(block, warpgroup, meetings) if warpgroups else block
            try:
                with jax.disable_jit():
                    body()
            except BaseException as error:  # for the thread that waits for this one
                machine.failures.append(error)
            if cluster is not None:
                cluster.end((block.peer, warpgroup))

        threads = [
            threading.Thread(target=run, args=(block, warpgroup, meetings, body))
            for block, body, meetings in zip(blocks, bodies, [{} for _ in blocks], strict=True)
            for warpgroup in range(max(warpgroups, 1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if machine.failures:
            raise machine.failures[0]

    def garbage(t):
        return np.full(math.prod(t.shape) * np.dtype(t.dtype).itemsize, 0xA5, np.uint8).view(t.dtype).reshape(t.shape)

    def kernel(body, *, out_type, grid, scratch_types=(), num_threads, cluster=(1,), **_):
        def launch(*arrays):
            # A reference is one to memory that the kernel changes.
            refs = [machine.publish(np.array(x[...]) if isinstance(x, jax.Ref) else np.asarray(x)) for x in arrays]
            several = isinstance(out_type, tuple)
            types = out_type if several else (out_type,)
            outs = [machine.publish(garbage(t)) for t in types]
            for index in range(grid[0]):
                blocks = [Block(128 * num_threads, index, peer) for peer in range(cluster[0])]
                specs = [
                    [Barriers(spec.of(cluster[0])) for _ in blocks] if isinstance(spec, ClusterBarrierSpec) else spec
                    for spec in scratch_types
                ]
                bodies = [
                    functools.partial(body, *refs, *outs, *[block.allocate(spec) for spec in specs]) for block in blocks
                ]
                if any(isinstance(spec, BarrierSpec) for spec in scratch_types):
                    separately(blocks, num_threads, bodies)
                elif len(blocks) > 1:
                    separately(blocks, 0, bodies)
                else:
                    [machine.block], [body_of_block] = blocks, bodies
                    body_of_block()
            for array, ref in zip(arrays, refs, strict=True):
                if isinstance(array, jax.Ref):
                    array[...] = machine.arrays[(ref.address >> 40) - 1].view(array.dtype).reshape(array.shape)
            results = [
                jnp.asarray(machine.arrays[(out.address >> 40) - 1].view(t.dtype).reshape(t.shape))
                for out, t in zip(outs, types, strict=True)
            ]
            return tuple(results) if several else results[0]

        return launch

    def loop(low, high, body, carry):
        for i in range(int(low), int(high)):
            carry = body(jnp.int32(i), carry)
        return carry

    def when(condition):
        return lambda block: block() if bool(condition) else None

    def copy_in(window, target, barrier, **_):
        data = window.read().view(np.uint8).reshape(-1)
        assert data.size == target.array.nbytes
        places = swizzled(target.address + np.arange(data.size), target.swizzle)
        shared = machine.block.shared
        shared[places] = 0xFF  # NaN, until it has arrived

        def arrive():
            shared[places] = data

        barrier.arrive(arrive)

    def copy_out(source, window):
        places = swizzled(source.address + np.arange(source.array.nbytes), source.swizzle)
        window.write(machine.block.shared[places].view(source.array.dtype).reshape(window.shape))

    def index_of(name):
        block = machine.block
        return jnp.int32(getattr(block, {"warpgroup": "warpgroup", "peer": "peer", "split": "peer"}.get(name, "index")))

    plgpu = SimpleNamespace(
        Barrier=BarrierSpec, ClusterBarrier=ClusterBarrierSpec,
        planar_snake=mosaic_gpu.planar_snake, SwizzleTransform=lambda row_bytes: row_bytes,
        barrier_wait=lambda barrier: barrier.wait(machine.block.warpgroup, machine.failures),
        barrier_arrive=lambda barrier: barrier.arrive(),
        copy_gmem_to_smem=copy_in, copy_smem_to_gmem=copy_out,
        commit_smem=lambda: None, wait_smem_to_gmem=lambda *_, **__: None, set_max_registers=lambda *_, **__: None,
        inline_mgpu=inline, kernel=kernel, layout_cast=cast, RefType=lambda *_: None,
        SMEM=lambda shape, dtype, transforms=(0,): SimpleNamespace(shape=shape, dtype=dtype, swizzle=transforms[0]),
        ShapeDtypeStruct=lambda *_: None, CompilerParams=lambda **_: None, LoweringSemantics=SimpleNamespace(Lane=None),
        Layout=SimpleNamespace(WG_SPLAT=lambda shape: None),
    )  # fmt: skip
    with (
        jax.disable_jit(),
        mock.patch.multiple(jax.lax, axis_index=index_of, fori_loop=loop),
        mock.patch.multiple(hopper, **hopper_functions),
        mock.patch.multiple(tensor_core, **tensor_core_functions),
    ):
        patches = []
        replaced = {"arith": arith, "llvm": llvm, "utils": utils, "ir": ir, "plgpu": plgpu}
        replaced |= {name: hopper_functions[name] for name in ("f32", "i32")}
        try:
            for module in (*modules, arithmetic, tensor_core):
                present = {name: x for name, x in replaced.items() if hasattr(module, name)}
                if hasattr(module, "pl"):
                    present["pl"] = SimpleNamespace(when=when, ds=lambda start, size: slice(start, start + size))
                patches.append(mock.patch.multiple(module, **present))
                patches[-1].start()
            yield machine
        finally:
            for patch in reversed(patches):
                patch.stop()
