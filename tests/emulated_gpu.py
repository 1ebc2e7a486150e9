"""A multiprocessor in numpy, for kernels whose register-level steps are warp instructions.

Inside :func:`emulated` the kernels of ``mosaic_matvec`` and ``mosaic_decode`` run as they are written: every operation
on registers acts on a vector of all threads of a block, inline PTX is executed instruction by instruction, blocks run
one after another. Shared memory is watched: a byte that one warp wrote and another reads or writes before the next
barrier is a race. What a copy brings is garbage until its barrier was waited for.

Kernels that have barriers of Pallas run every warpgroup in a Python thread of its own. A wgmma is computed when it is
waited for, from what shared memory holds then; reading its accumulators before is an error. Not known: clusters.
"""

import itertools
import re
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu

U32, U64, F32, PRED, B16 = np.uint32, np.uint64, np.float32, np.bool_, np.uint16
SHARED_BYTES = 232448
# Who touched a byte of shared memory last: a warp's number, or one of these and a team's number.
MEMBERS, DONE, STRANGERS = 1000, 2000, 3000


class RaceError(AssertionError):
    """Two warps touch a byte of shared memory without a barrier between them."""


class Register:
    """A register of every thread."""

    def __init__(self, values):
        self.values = values

    @property
    def type(self):
        return self.values.dtype.type


class Running(Register):
    """An accumulator of a wgmma that was not waited for."""

    def __init__(self, product, index):
        self.product, self.index = product, index

    @property
    def values(self):
        raise AssertionError("an accumulator is read while its wgmma runs")


class Ref:
    """An array in global or shared memory, as a kernel sees it; ``swizzle`` is the bytes of a swizzled row, or 0."""

    def __init__(self, array, address, swizzle=0):
        self.array, self.address, self.swizzle = array, address, swizzle

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        is_global = self.address >> 40
        if is_global and len(index) == self.array.ndim and not any(isinstance(i, slice) for i in index):
            return jnp.asarray(self.array[tuple(int(i) for i in index)])
        if is_global and (len(index) > 1 or isinstance(index[0], slice)):
            return Window(self.array, index + (slice(None),) * (self.array.ndim - len(index)))
        ref = self
        for i in index:
            start, stop = (int(i.start), int(i.stop)) if isinstance(i, slice) else (int(i), int(i) + 1)
            if ref.array.ndim == 1:
                return jnp.asarray(ref.array[start])
            part = ref.array[start:stop] if isinstance(i, slice) else ref.array[start]
            ref = Ref(part, ref.address + start * ref.array[start].nbytes, ref.swizzle)
        return ref


class Window:
    """A part of a global array; what lies outside reads as zeros and is not written."""

    def __init__(self, array, index):
        self.array, self.shape, inside, within = array, [], [], []
        self.outside = any(not isinstance(i, slice) and int(i) >= n for i, n in zip(index, array.shape, strict=True))
        for i, size in zip(index, array.shape, strict=True):
            if not isinstance(i, slice):
                inside.append(int(i))
                continue
            start, stop = (0, size) if i == slice(None) else (int(i.start), int(i.stop))
            end = max(min(stop, size), start)
            inside.append(slice(start, end))
            within.append(slice(0, end - start))
            self.shape.append(stop - start)
        self.inside, self.within = tuple(inside), tuple(within)

    def read(self):
        out = np.zeros(self.shape, self.array.dtype)
        if not self.outside:
            out[self.within] = self.array[self.inside]
        return out

    def write(self, values):
        assert not self.outside
        self.array[self.inside] = values[self.within]


def swizzled(addresses, row_bytes):
    """Where a byte lies under the swizzle of rows of that size; 0 stands for none."""
    if row_bytes == 0:
        return addresses
    return addresses ^ (addresses >> 7 & row_bytes // 16 - 1) << 4


class Block:
    """A thread block at work."""

    def __init__(self, threads, index):
        self.threads, self.index = threads, index
        self.shared = np.full(SHARED_BYTES, 0xA5, np.uint8)  # what is read before it is written is garbage
        self.used = 0
        self.warp = np.arange(threads) // 32
        self.writer = np.full(SHARED_BYTES, -1, np.int16)
        self.reader = np.full(SHARED_BYTES, -1, np.int16)
        self.arrivals = {}
        self.team = np.zeros(threads // 32, np.int64)

    def allocate(self, spec):
        if isinstance(spec, BarrierSpec):
            return Barriers(spec)
        shape, dtype = spec.shape, spec.dtype
        self.used = -(-self.used // 1024) * 1024
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = self.shared[self.used : self.used + size].view(dtype).reshape(shape)
        assert array.size == np.prod(shape), "shared memory is full"
        ref = Ref(array, self.used, spec.swizzle)
        self.used += size
        return ref

    def barrier(self):
        self.writer[:] = -1
        self.reader[:] = -1

    def team_barrier(self, team):
        """A barrier of each team of warps: what its members did is in order for them, not for the others."""
        self.team = team[::32]
        for owner in (self.writer, self.reader):
            known = (owner >= 0) & (owner < MEMBERS)
            owner[known] = DONE + self.team[owner[known]]
            within = (owner >= MEMBERS) & (owner < DONE)
            owner[within] += DONE - MEMBERS

    def apart(self, owner, warps):
        """Whether a warp may not touch a byte because of ``owner``."""
        other = (owner >= 0) & (owner < MEMBERS) & (owner != warps)
        others = (owner >= MEMBERS) & (owner < DONE)
        strangers = (owner >= DONE) & (owner != DONE + self.team[warps])
        return other | others | strangers

    def touch(self, addresses, active, size, writing):
        at = (addresses[active, None] + np.arange(size, dtype=addresses.dtype)).reshape(-1)
        warps = self.warp[active].repeat(size)
        if np.any(self.apart(self.writer[at], warps)):
            raise RaceError("a byte that another warp wrote")
        if writing:
            if np.any(self.apart(self.reader[at], warps)):
                raise RaceError("a byte that another warp reads")
            self.writer[at] = warps
            return
        first = self.reader[at]
        team = self.team[warps]
        same = (first < 0) | (first == warps) | (first == DONE + team)
        in_team = (first == MEMBERS + team) | (
            (first < MEMBERS) & (self.team[np.clip(first, 0, len(self.team) - 1)] == team)
        )
        self.reader[at] = np.where(same, warps, np.where(in_team, MEMBERS + team, STRANGERS))


class Warpgroup(Block):
    """A warpgroup of a block whose warpgroups go separate ways; it knows nothing of races."""

    def __init__(self, block, warpgroup, meetings):
        self.threads, self.index, self.warpgroup = 128, block.index, warpgroup
        self.shared, self.products, self.meetings = block.shared, [], meetings

    def meet(self, barrier, threads):
        """A named barrier with other warpgroups."""
        self.meetings.setdefault(barrier, threading.Barrier(threads // 128)).wait(timeout=60)

    def touch(self, addresses, active, size, writing):
        pass


class BarrierSpec:
    """Pallas' description of an array of barriers."""

    def __init__(self, num_arrivals=1, num_barriers=1):
        self.arrivals, self.count = num_arrivals, num_barriers


class Barriers:
    """An array of barriers."""

    def __init__(self, spec):
        self.barriers = [Barrier(spec.arrivals) for _ in range(spec.count)]

    def wait(self, *arguments):
        [barrier] = self.barriers
        barrier.wait(*arguments)

    def arrive(self, *arguments):
        [barrier] = self.barriers
        barrier.arrive(*arguments)

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self.barriers[int(index)]


class Barrier:
    """A barrier between warpgroups; what was copied on its account arrives when somebody has waited for it."""

    def __init__(self, needed):
        self.needed, self.count, self.phase = needed, 0, 0
        self.changed = threading.Condition()
        self.waited = {}
        self.copies = []

    def arrive(self, copy=None):
        with self.changed:
            if copy is not None:
                self.copies.append(copy)
            self.count += 1
            if self.count == self.needed:
                self.count, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self, warpgroup, failed):
        target = self.waited.get(warpgroup, 0)
        with self.changed:
            for _ in range(600):
                if self.phase > target or failed:
                    break
                self.changed.wait(0.1)
            assert self.phase > target, "waited for what nobody does"
            assert self.phase == target + 1, "a phase passed that nobody waited for"
            for copy in self.copies:
                copy()
            self.copies = []
        self.waited[warpgroup] = target + 1


class Product:
    """A group of wgmma: ``accumulator [+]= A · Bᵀ`` of e4m3, 64 rows; A in registers or, with ``steps``, in memory.

    Accumulators are float32 or, two to a register, float16.
    """

    def __init__(self, block, accumulator, a, descriptor, accumulate, steps=None):
        self.block, self.before, self.a, self.descriptor, self.steps = block, accumulator, a, descriptor, steps
        self.accumulate = bool(accumulate.values[0])
        self.result = None

    def compute(self):
        e4m3 = ml_dtypes.float8_e4m3fn
        thread = np.arange(128)
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        single = self.before[0].type == F32
        steps, columns = self.steps or len(self.a) // 4, (2 if single else 4) * len(self.before)

        def in_memory(descriptor, rows):
            base, row_bytes = descriptor
            logical = base + np.arange(rows)[:, None] * row_bytes + np.arange(32 * steps)
            return self.block.shared[swizzled(logical, row_bytes)].view(e4m3)

        if self.steps:
            left = in_memory(self.a, 64)
        else:
            left = np.zeros((64, 32 * steps), e4m3)
            for i, register in enumerate(self.a):
                values = register.values.view(np.uint8).reshape(128, 4).view(e4m3)
                for byte in range(4):
                    left[row + 8 * (i % 2), i // 4 * 32 + i % 4 // 2 * 16 + 4 * t + byte] = values[:, byte]
        right = in_memory(self.descriptor, columns)
        product = left.astype(np.float64) @ right.astype(np.float64).T
        if not single:
            assert not self.accumulate
            total = np.zeros_like(product)
            for i in range(0, 32 * steps, 32):  # every wgmma rounds what it accumulates
                part = left[:, i : i + 32].astype(np.float64) @ right[:, i : i + 32].astype(np.float64).T
                total = (total + part).astype(np.float16).astype(np.float64)
            pairs = total.astype(np.float16).reshape(64, columns // 8, 4, 2).view(U32)[..., 0]
            self.result = [Register(pairs[row + 8 * (j % 2), j // 2, t]) for j in range(len(self.before))]
            return
        self.result = []
        for j, register in enumerate(self.before):
            value = product[row + 8 * (j % 4 // 2), j // 4 * 8 + 2 * t + j % 2]
            if self.accumulate:
                value = value + settled(register).values.astype(np.float64)
            self.result.append(Register(value.astype(F32)))


def settled(register):
    """The accumulator itself if its wgmma was waited for."""
    if isinstance(register, Running) and register.product.result is not None:
        return register.product.result[register.index]
    return register


class Arrival:
    """An mbarrier that one thread arrives at, and the copies of its present phase."""

    def __init__(self):
        self.phase = 0
        self.expected = None
        self.copies = []

    def complete(self):
        """Delivers the copies, if the phase's thread has arrived."""
        if self.expected is None:
            return
        assert sum(len(data) for _, data in self.copies) == self.expected, "not the bytes that were announced"
        for target, data in self.copies:
            target[:] = data
        self.phase, self.expected, self.copies = self.phase + 1, None, []


class Machine:
    """What the patched functions refer to: the block at work and global memory."""

    def __init__(self):
        self.local = threading.local()
        self.arrays = []
        self.failures = []

    @property
    def block(self):
        """The block, or in its thread the warpgroup, at work."""
        return self.local.block

    @block.setter
    def block(self, block):
        self.local.block = block

    def publish(self, array):
        """Puts an array into global memory."""
        flat = np.ascontiguousarray(array)
        self.arrays.append(flat.reshape(-1).view(np.uint8))
        return Ref(flat, len(self.arrays) << 40)

    def full(self, value, dtype):
        return np.full(self.block.threads, value, dtype)

    def load(self, space, addresses, active, size):
        """``[threads, size]`` bytes."""
        out = np.zeros((self.block.threads, size), np.uint8)
        for memory, places, threads in self.accesses(space, addresses, active, size, False):
            out[threads] = memory[places]
        return out

    def store(self, space, addresses, active, data):
        for memory, places, threads in self.accesses(space, addresses, active, data.shape[1], True):
            memory[places] = data[threads]

    def accesses(self, space, addresses, active, size, writing):
        """Of each array that active threads address: its bytes, the places of ``size`` each, and the threads."""
        assert np.all(addresses[active] % size == 0), "misaligned address"
        arrays = addresses >> U64(40) if space == "global" else np.zeros_like(addresses)
        if space == "shared" and active.any():
            self.block.touch(addresses, active, size, writing)
        for array in np.unique(arrays[active]):
            threads = active & (arrays == array)
            memory = self.arrays[int(array) - 1] if space == "global" else self.block.shared
            at = (addresses[threads] & U64((1 << 40) - 1)).astype(np.int64)
            assert np.all(at + size <= memory.size), "an address outside the array"
            yield memory, at[:, None] + np.arange(size), threads

    # Inline PTX

    def run(self, ptx, constraints, operands, results):
        """Executes a snippet; ``$0`` and so on are results, then operands. Returns the results' values."""
        names = {f"${i}": None for i in range(len(results))}
        for constraint, operand in zip(constraints.split(",")[len(results) :], operands, strict=False):
            if constraint.isdigit():  # a result begins as this operand
                names[f"${constraint}"] = operand.values
        names |= {f"${len(results) + i}": operand.values for i, operand in enumerate(operands)}
        body = ptx.strip()
        if body.startswith("{") and body.endswith("}") and ";" in body:
            body = body[1:-1]
        for line in body.split(";"):
            line = line.strip()
            if not line or line.startswith(".reg"):
                continue
            active = np.ones(self.block.threads, bool)
            line = re.sub(r"^\w+:\s*", "", line)  # a label
            if not line:
                continue
            if line.startswith("@"):
                predicate, line = line[1:].split(None, 1)
                active = ~names[predicate[1:]] if predicate[0] == "!" else names[predicate]
            self.instruction(line, names, active)
        return [names[f"${i}"].view(kind) if names[f"${i}"].dtype.itemsize == np.dtype(kind).itemsize
                else names[f"${i}"].astype(kind) for i, kind in enumerate(results)]  # fmt: skip

    def instruction(self, line, names, active):
        opcode, _, rest = line.partition(" ")
        arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest)

        def value(text, dtype=U32):
            if text.startswith("0f"):
                return self.full(np.array([int(text[2:], 16)], U32).view(F32)[0], F32).view(dtype)
            if text in names:
                found = names[text]
                return found.view(dtype) if found.dtype.itemsize == np.dtype(dtype).itemsize else found.astype(dtype)
            return self.full(int(text, 0) & 0xFFFFFFFF, U32).view(dtype)

        def group(text):
            return [part.strip() for part in text.strip("{}").split(",")]

        def address(text):
            base, _, offset = text.strip("[]").partition("+")
            found = names[base.strip()]
            return found + found.dtype.type(int(offset or 0))

        def assign(name, new):
            old = names.get(name)
            if old is not None and not active.all():
                kind = U32 if new.dtype.itemsize == 4 else new.dtype
                new = np.where(active, new.view(kind), old.view(kind))
            names[name] = new

        kind = opcode.split(".")
        if opcode == "bar.warp.sync" or kind[0] == "fence":
            pass  # warps run in step
        elif kind[0] == "mbarrier" or opcode.startswith("cp.async.bulk"):
            self.asynchronous(kind, arguments, names, active, value, address)
        elif kind[0] == "bra":  # what is left out has the predicate, too, so that it can be gone through
            assert arguments[0] == "skip" or not active.any(), "a wait for what nobody announced"
        elif kind[0] == "vote":
            warps = names[arguments[1]].reshape(-1, 32)
            names[arguments[0]] = np.repeat(warps.any(1), 32)
        elif opcode == "or.pred":
            names[arguments[0]] = names[arguments[1]] | names[arguments[2]]
        elif kind[0] == "selp":
            assign(arguments[0], np.where(names[arguments[3]], value(arguments[1]), value(arguments[2])))
        elif kind[0] in ("ld", "st"):
            space = kind[1].partition("::")[0]
            count = next((int(k[1:]) for k in kind if k in ("v2", "v4")), 1)
            size = {"u16": 2, "b16": 2, "b8": 1}.get(kind[-1], 4)
            if kind[0] == "ld":
                targets = group(arguments[0]) if count > 1 else [arguments[0]]
                data = self.load(space, address(arguments[1]), active, count * size)
                for i, target in enumerate(targets):
                    word = data[:, i * size : (i + 1) * size].copy().view(U32 if size == 4 else B16)[:, 0]
                    # Registers of threads that do not load keep what they had, which may be anything.
                    before = names.get(target)
                    if before is None:
                        before = self.full(0xDEADBEEF, U32)
                    names[target] = np.where(active, word.astype(U32), before.view(U32))
            else:
                sources = group(arguments[1]) if count > 1 else [arguments[1]]
                words = [value(s, {4: U32, 2: B16, 1: np.uint8}[size]) for s in sources]
                data = np.stack(words, axis=1).view(np.uint8)
                self.store(space, address(arguments[0]), active, data)
        elif kind[0] == "bar" and isinstance(self.block, Warpgroup):
            self.block.meet(int(value(arguments[0])[0]), int(arguments[1]))
        elif kind[0] == "bar" and len(arguments) == 2:
            team = value(arguments[0]).astype(np.int64)
            assert np.all(np.unique(team, return_counts=True)[1] == int(arguments[1])), "not as many threads"
            self.block.team_barrier(team)
        elif kind[0] == "bar":
            self.block.barrier()
        elif opcode == "setp.ne.and.b32":
            names[arguments[0]] = (value(arguments[1]) != value(arguments[2])) & names[arguments[3]]
        elif opcode == "setp.neu.f32":
            names[arguments[0]] = value(arguments[1], F32) != value(arguments[2], F32)
        elif opcode == "setp.gt.f32":
            names[arguments[0]] = value(arguments[1], F32) > value(arguments[2], F32)
        elif kind[0] == "setp":
            names[arguments[0]] = value(arguments[1]) != value(arguments[2])
        elif kind[0] == "mov" and arguments[0].startswith("{"):
            low, high = group(arguments[0])
            word = value(arguments[1])
            names[low], names[high] = (word & U32(0xFFFF)).astype(B16), (word >> U32(16)).astype(B16)
        elif kind[0] == "mov" and arguments[1].startswith("{"):
            low, high = (names[part].astype(U32) for part in group(arguments[1]))
            assign(arguments[0], high << U32(16) | low)
        elif kind[0] == "mov":
            assign(arguments[0], value(arguments[1]))
        elif opcode == "cvt.rn.f16x2.e4m3x2":
            pair = names[arguments[1]].astype(B16).view(np.uint8).reshape(-1, 2).view(ml_dtypes.float8_e4m3fn)
            assign(arguments[0], pair.astype(np.float16).view(U32)[:, 0])
        elif opcode == "cvt.u32.u16":
            assign(arguments[0], names[arguments[1]].astype(U32))
        elif opcode == "cvt.rni.s32.f32":
            assign(arguments[0], np.rint(value(arguments[1], F32)).astype(np.int32).view(U32))
        elif opcode == "mov.b16":
            assign(arguments[0], value(arguments[1]).astype(B16))
        elif opcode == "cvt.f32.f16":
            assign(arguments[0], names[arguments[1]].view(np.float16).astype(F32))
        elif opcode in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
            half = np.float16 if kind[2] == "f16x2" else ml_dtypes.bfloat16
            with np.errstate(over="ignore"):
                high, low = (value(a, F32).astype(half).view(B16).astype(U32) for a in arguments[1:])
            assign(arguments[0], high << U32(16) | low)
        elif opcode == "cvt.rn.satfinite.e4m3x2.f16x2":
            pair = np.clip(value(arguments[1]).view(np.float16).astype(F32), -448, 448)
            names[arguments[0]] = pair.astype(ml_dtypes.float8_e4m3fn).view(B16)
        elif opcode == "cvt.rn.bf16.f32":
            names[arguments[0]] = value(arguments[1], F32).astype(ml_dtypes.bfloat16).view(B16)
        elif kind[0] == "lop3":
            a, b, c = (value(x) for x in arguments[1:4])
            table = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}
            assign(arguments[0], table[int(arguments[4], 0)])
        elif kind[0] == "prmt":
            source = np.stack([value(arguments[1]), value(arguments[2])], axis=1).view(np.uint8)
            selector, thread = value(arguments[3]), np.arange(self.block.threads)
            picked = [source[thread, selector >> U32(4 * i) & U32(7)] for i in range(4)]
            assign(arguments[0], np.stack(picked, axis=1).copy().view(U32)[:, 0])
        elif opcode == "shf.r.wrap.b32":
            low, high, shift = value(arguments[1]), value(arguments[2]), int(arguments[3])
            assign(arguments[0], low >> U32(shift) | high << U32(32 - shift))
        elif kind[-1] in ("f16x2", "bf16x2"):
            half = np.float16 if kind[-1] == "f16x2" else ml_dtypes.bfloat16
            a, *others = (value(x).view(B16).view(half).astype(np.float64) for x in arguments[1:])
            operation = {
                "add": np.add, "max": np.fmax, "min": np.fmin, "fma": lambda x, y, z: x * y + z,
            }[kind[0]]  # fmt: skip
            exact = operation(a, *others)
            assign(arguments[0], exact.astype(half).view(B16).view(U32))
        elif kind[0] == "max":  # of a NaN and a number, with .NaN NaN, else the number
            larger = np.maximum if "NaN" in kind else np.fmax
            assign(arguments[0], larger(value(arguments[1], F32), value(arguments[2], F32)))
        elif opcode == "mul.f32":
            assign(arguments[0], value(arguments[1], F32) * value(arguments[2], F32))
        elif opcode == "fma.rn.f32":
            a, b, c = (value(x, F32).astype(np.float64) for x in arguments[1:])
            assign(arguments[0], (a * b + c).astype(F32))
        elif kind[0] == "abs":
            assign(arguments[0], np.abs(value(arguments[1], F32)))
        elif kind[0] == "div":
            with np.errstate(invalid="ignore"):
                assign(arguments[0], value(arguments[1], F32) / value(arguments[2], F32))
        elif kind[0] in ("rsqrt", "rcp"):
            x = value(arguments[1], F32)
            assign(arguments[0], F32(1) / (np.sqrt(x) if kind[0] == "rsqrt" else x))
        elif opcode == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = (
                np.clip(value(a, F32), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(B16)
                for a in arguments[1:]
            )
            names[arguments[0]] = high << B16(8) | low
        elif opcode == "ex2.approx.f16":
            with np.errstate(under="ignore", over="ignore"):
                power = np.exp2(names[arguments[1]].view(np.float16).astype(F32))
                names[arguments[0]] = power.astype(np.float16).view(B16)
        elif kind[0] == "ex2":
            with np.errstate(under="ignore", over="ignore"):
                assign(arguments[0], np.exp2(value(arguments[1], F32)))
        elif kind[0] == "movmatrix":
            halves = value(arguments[1]).view(B16).reshape(-1, 8, 8)  # warps, rows, columns
            assign(arguments[0], halves.swapaxes(1, 2).reshape(-1).view(U32))
        elif kind[0] == "shfl":
            lanes = np.arange(self.block.threads)
            lanes = lanes ^ int(arguments[2]) if kind[2] == "bfly" else lanes // 32 * 32 + value(arguments[2]) % 32
            assign(arguments[0], value(arguments[1], F32)[lanes])
        elif kind[0] == "mma":
            self.mma(
                kind[-2], *([names[n] for n in group(a)] if i else group(a) for i, a in enumerate(arguments)), names
            )
        else:
            raise NotImplementedError(line)

    def asynchronous(self, kind, arguments, names, active, value, address):
        """mbarriers, and copies from global to shared memory that complete them."""
        threads = np.flatnonzero(active)
        if kind[1] == "init":
            for thread in threads:
                self.block.arrivals[int(address(arguments[0])[thread])] = Arrival()
        elif kind[1] == "arrive":
            for thread in threads:
                arrival = self.block.arrivals[int(address(arguments[1])[thread])]
                assert arrival.expected is None, "an arrival before the phase was waited for"
                arrival.expected = int(value(arguments[2])[thread])
        elif kind[1] == "try_wait":
            done = np.zeros(self.block.threads, bool)
            for thread in threads:
                arrival = self.block.arrivals[int(address(arguments[1])[thread])]
                parity = int(value(arguments[2])[thread])
                if arrival.phase & 1 == parity:
                    arrival.complete()
                done[thread] = arrival.phase & 1 != parity
            names[arguments[0]] = done
        else:
            sizes = value(arguments[2])
            for thread in threads:
                size = int(sizes[thread])
                target, source = int(address(arguments[0])[thread]), int(address(arguments[1])[thread])
                assert target % 16 == source % 16 == size % 16 == 0, "a misaligned copy"
                memory, at = self.arrays[(source >> 40) - 1], source & ((1 << 40) - 1)
                assert at + size <= memory.size, "an address outside the array"
                one = np.arange(self.block.threads) == thread
                self.block.touch(address(arguments[0]).astype(np.int64), one, size, True)
                place = self.block.shared[target : target + size]
                place[:] = 0xA5
                self.block.arrivals[int(address(arguments[3])[thread])].copies.append(
                    (place, memory[at : at + size].copy())
                )

    def mma(self, kind, targets, a, b, c, names):
        """m16n8k16 of every warp: fragments to matrices, product, and back."""
        half = np.float16 if kind == "f16" else ml_dtypes.bfloat16
        warps = self.block.threads // 32
        lane = np.arange(32)
        g, t = lane // 4, lane % 4

        def pairs(words):
            return words.view(U32).view(B16).view(half).astype(F32).reshape(warps, 32, 2)

        left = np.zeros((warps, 16, 16), F32)
        for i, words in enumerate(a):
            for e in range(2):
                left[:, g + 8 * (i % 2), 2 * t + 8 * (i // 2) + e] = pairs(words)[..., e]
        right = np.zeros((warps, 16, 8), F32)
        for i, words in enumerate(b):
            for e in range(2):
                right[:, 2 * t + 8 * i + e, g] = pairs(words)[..., e]
        product = np.matmul(left.astype(np.float64), right.astype(np.float64))
        for i, target in enumerate(targets):
            at = product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1)
            names[target] = (c[i].view(F32).astype(np.float64) + at).astype(F32)


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
        minui=binary(np.minimum),
        minsi=binary(lambda a, b: np.minimum(signed(a), signed(b)).view(a.dtype)),
        maxsi=binary(lambda a, b: np.maximum(signed(a), signed(b)).view(a.dtype)),
        addf=binary(np.add), subf=binary(np.subtract), mulf=binary(np.multiply),
        cmpi=lambda kind, a, b: Register(comparisons[kind](a.values, b.values)),
        cmpf=lambda kind, a, b: Register(comparisons[kind](a.values, b.values)),
        select=lambda c, a, b: Register(np.where(c.values, a.values, b.values)),
        extui=lambda kind, a: Register(a.values.astype(kind)),
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
        thread_idx=lambda: Register(np.arange(machine.block.threads, dtype=U32)), memref_ptr=lambda ref: ref
    )
    llvm = SimpleNamespace(ptrtoint=lambda kind, ref: Register(machine.full(ref.address, kind)))

    def asm(ptx, constraints, operands, results):
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

    hopper_functions = {
        "wgmma_e4m3": issue, "wait_for_wgmma": wait_for_products, "store_matrices": store_matrices,
        "load_matrices": load_matrices,
        "k_major_descriptor": lambda address, row_bytes=128: (int(address.values[0]), row_bytes),
        "thread_in_warpgroup": lambda: Register(np.arange(machine.block.threads, dtype=U32) % U32(128)),
        "asm": asm, "pure_asm": pure_asm, "constant": constant, "ir": ir, "arith": arith, "llvm": llvm,
        "utils": utils,
        "i32": lambda value: constant(value, 32), "f32": lambda value: Register(machine.full(value, F32)),
        "pack": list, "unpack": list,
        "shared_address": lambda ref: Register(machine.full(ref.address, U32)),
        "to_bf16x2": lambda low, high: pure_asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "", [high, low], U32),
    }  # fmt: skip

    def scalar(value):
        """An int32 of the kernel's control flow as a step gets it: the same in every thread."""
        if isinstance(value, jax.Array) and value.ndim == 0:
            register = Register(machine.full(int(value) & 0xFFFFFFFF, U32))
            return SimpleNamespace(registers=SimpleNamespace(item=lambda: register))
        return value

    def inline(arg_types, return_type):
        return lambda step: lambda *arguments: step(None, *map(scalar, arguments))

    def cast(array, layout):
        """A container of equal elements: a list of registers."""
        values = np.asarray(array)
        assert np.all(values == values[0])
        dtype = F32 if values.dtype == np.float32 else U32
        return [Register(machine.full(values[0], dtype)) for _ in range(values.size // 128)]

    def separately(block, warpgroups, body):
        """Runs the warpgroups of a block side by side."""

        meetings = {}

        def run(warpgroup):
            machine.block = Warpgroup(block, warpgroup, meetings)
            try:
                with jax.disable_jit():
                    body()
            except BaseException as error:  # for the thread that waits for this one
                machine.failures.append(error)

        threads = [threading.Thread(target=run, args=(warpgroup,)) for warpgroup in range(warpgroups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if machine.failures:
            raise machine.failures[0]

    def kernel(body, *, out_type, grid, scratch_types=(), num_threads, **_):
        def launch(*arrays):
            # A reference is one to memory that the kernel changes.
            refs = [machine.publish(np.array(x[...]) if isinstance(x, jax.Ref) else np.asarray(x)) for x in arrays]
            several = isinstance(out_type, tuple)
            types = out_type if several else (out_type,)
            outs = [machine.publish(np.zeros(t.shape, t.dtype)) for t in types]
            for index in range(grid[0]):
                block = Block(128 * num_threads, index)
                shared = [block.allocate(spec) for spec in scratch_types]
                if any(isinstance(spec, BarrierSpec) for spec in scratch_types):
                    separately(block, num_threads, lambda shared=shared: body(*refs, *outs, *shared))
                else:
                    machine.block = block
                    body(*refs, *outs, *shared)
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
        return jnp.int32(machine.block.warpgroup if name == "warpgroup" else machine.block.index)

    plgpu = SimpleNamespace(
        Barrier=BarrierSpec, ClusterBarrier=lambda **_: None,
        planar_snake=mosaic_gpu.planar_snake, SwizzleTransform=lambda row_bytes: row_bytes,
        barrier_wait=lambda barrier: barrier.wait(machine.block.warpgroup, machine.failures),
        barrier_arrive=lambda barrier: barrier.arrive(),
        copy_gmem_to_smem=copy_in, copy_smem_to_gmem=copy_out,
        commit_smem=lambda: None, wait_smem_to_gmem=lambda *_, **__: None, set_max_registers=lambda *_, **__: None,
        inline_mgpu=inline, kernel=kernel, layout_cast=cast, RefType=lambda *_: None,
        SMEM=lambda shape, dtype, transforms=(0,): SimpleNamespace(shape=shape, dtype=dtype, swizzle=transforms[0]),
        CompilerParams=lambda **_: None, LoweringSemantics=SimpleNamespace(Lane=None),
        Layout=SimpleNamespace(WG_SPLAT=lambda shape: None),
    )  # fmt: skip
    with (
        jax.disable_jit(),
        mock.patch.multiple(jax.lax, axis_index=index_of, fori_loop=loop),
        mock.patch.multiple(modules[0].hopper, **hopper_functions),
    ):
        patches = []
        replaced = {"arith": arith, "llvm": llvm, "utils": utils, "ir": ir, "plgpu": plgpu}
        replaced |= {name: hopper_functions[name] for name in ("f32", "i32")}
        try:
            for module in modules:
                present = {name: x for name, x in replaced.items() if hasattr(module, name)}
                if hasattr(module, "pl"):
                    present["pl"] = SimpleNamespace(when=when, ds=lambda start, size: slice(start, start + size))
                patches.append(mock.patch.multiple(module, **present))
                patches[-1].start()
            yield machine
        finally:
            for patch in reversed(patches):
                patch.stop()
