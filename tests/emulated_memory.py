"""Registers, shared memory with its watch, barriers and running products of the emulated multiprocessor."""

import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np

U32, U64, F32, PRED, B16 = np.uint32, np.uint64, np.float32, np.bool_, np.uint16
SHARED_BYTES = 232448
PEER_BYTES = 1 << 24  # apart are the shared memories of a cluster's blocks, as its addresses have it
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


class Load:
    """A load from shared memory that stands in its queue until somebody needs what it gives, or stores behind it."""

    def __init__(self, carry_out):
        self.carry_out, self.results = carry_out, None

    def settled(self):
        if self.results is None:
            self.results = self.carry_out()
        return self.results


class Loaded(Register):
    """One of the registers that a load gives."""

    def __init__(self, load, index, kind):
        self.load, self.index, self.kind = load, index, kind

    @property
    def values(self):
        return self.load.settled()[self.index]

    @property
    def type(self):
        return self.kind


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


class Cluster:
    """Blocks at work together, and the barrier of all of their warpgroups that have not ended."""

    def __init__(self, blocks, warpgroups):
        self.blocks, self.changed = blocks, threading.Condition()
        self.arrived = {(block.peer, warpgroup): 0 for block in blocks for warpgroup in range(warpgroups)}

    def arrive(self, member):
        with self.changed:
            self.arrived[member] += 1
            self.changed.notify_all()

    def end(self, member):
        with self.changed:
            del self.arrived[member]
            self.changed.notify_all()

    def wait(self, member, failed):
        with self.changed:
            phase = self.arrived[member]
            done = self.changed.wait_for(lambda: failed or min(self.arrived.values()) >= phase, timeout=60)
            assert done, "waited for a block that does not come"


class Block:
    """A thread block at work; ``peer`` is its number in a cluster."""

    def __init__(self, threads, index, peer=0):
        self.threads, self.index, self.peer, self.warpgroup = threads, index, peer, 0
        self.shared = np.full(SHARED_BYTES, 0xA5, np.uint8)  # what is read before it is written is garbage
        self.used = 0
        self.warp = np.arange(threads) // 32
        self.writer = np.full(SHARED_BYTES, -1, np.int16)
        self.reader = np.full(SHARED_BYTES, -1, np.int16)
        self.arrivals, self.cluster = {}, None
        self.team = np.zeros(threads // 32, np.int64)
        self.loads = []  # that may not have been carried out
        self.groups = [[]]  # of copies without barriers; the last one has not ended
        self.sent = []  # to shared memory of the cluster: arrays, places and bytes

    def deliver(self):
        """Has what was stored to other blocks' memory arrive there, as an arrival at the cluster's barrier does."""
        for memory, place, data in self.sent:
            memory[place : place + data.size] = data
        self.sent.clear()

    def settle(self):
        """Carries out all loads, as is done before a warp stores anything, or meets another one."""
        for load in self.loads:
            load.settled()
        self.loads.clear()

    def allocate(self, spec):
        if isinstance(spec, BarrierSpec):
            return Barriers(spec)
        if isinstance(spec, list):  # of the cluster's blocks
            return ClusterBarriers(spec, self.peer)
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
        self.threads, self.index, self.warpgroup, self.peer = 128, block.index, warpgroup, block.peer
        self.shared, self.products, self.meetings, self.arrivals = block.shared, [], meetings, block.arrivals
        self.cluster, self.loads, self.sent = block.cluster, [], []

    def meet(self, barrier, threads):
        """A named barrier with other warpgroups."""
        self.meetings.setdefault(barrier, threading.Barrier(threads // 128)).wait(timeout=60)

    def touch(self, addresses, active, size, writing):
        pass


class BarrierSpec:
    """Pallas' description of an array of barriers."""

    def __init__(self, num_arrivals=1, num_barriers=1):
        self.arrivals, self.count = num_arrivals, num_barriers


class ClusterBarrierSpec:
    """Pallas' description of an array of barriers in each block of a cluster; arrivals count in all of them."""

    def __init__(self, collective_axes, num_arrivals, num_barriers):
        self.arrivals, self.count = num_arrivals, num_barriers

    def of(self, blocks):
        """That of the barriers of a block among so many."""
        return BarrierSpec(self.arrivals * blocks, self.count)


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


class ClusterBarriers:
    """An array of barriers in each block of a cluster: all of them are arrived at, one's own is waited for."""

    def __init__(self, of_blocks, peer):
        self.of_blocks, self.peer = of_blocks, peer

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return ClusterBarriers([barriers[index] for barriers in self.of_blocks], self.peer)

    def wait(self, *arguments):
        self.of_blocks[self.peer].wait(*arguments)

    def arrive(self):
        for barrier in self.of_blocks:
            barrier.arrive()


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
        self.lock = threading.Lock()

    def complete(self, patience=0):
        """Delivers the copies, if the phase's thread has arrived; they may still be on their way for some seconds."""
        with self.lock:  # several warpgroups may wait for them
            if self.expected is None:
                return
            deadline = time.monotonic() + patience
            while sum(len(data) for _, data in self.copies) < self.expected and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sum(len(data) for _, data in self.copies) == self.expected, "not the bytes that were announced"
            for target, data in self.copies:
                target[:] = data
            self.phase, self.expected, self.copies = self.phase + 1, None, []
