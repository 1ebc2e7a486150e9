"""Inline PTX, executed instruction by instruction for all threads of an emulated block."""

import re
import threading

import ml_dtypes
import numpy as np
from emulated_memory import B16, F32, PEER_BYTES, U32, U64, Arrival, Ref, Warpgroup


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

    def store_in_cluster(self, addresses, active, data):
        """Stores to blocks' shared memory, which nobody can count on before the sender arrived at the barrier."""
        for thread in np.flatnonzero(active):
            peer, place = divmod(int(addresses[thread]), PEER_BYTES)
            assert place % data.shape[1] == 0, "misaligned address"
            self.block.sent.append((self.block.cluster.blocks[peer].shared, place, data[thread].copy()))

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
        if opcode.startswith(("st.shared", "bar.sync")):
            self.block.settle()
        if opcode == "bar.warp.sync" or kind[0] == "fence":
            pass  # warps run in step
        elif opcode == "cp.async.commit_group":
            self.block.groups.append([])
        elif opcode == "cp.async.wait_group":
            done = len(self.block.groups) - 1 - int(arguments[0])
            for place, data in (copy for group in self.block.groups[:done] for copy in group):
                place[:] = data
            self.block.groups = self.block.groups[done:]
        elif opcode == "cp.async.cg.shared.global":
            self.copy(arguments, address, value)
        elif kind[0] == "mbarrier" or opcode.startswith("cp.async.bulk"):
            self.asynchronous(kind, arguments, names, active, value, address)
        elif kind[0] == "mapa":
            assign(arguments[0], value(arguments[1]) + value(arguments[2]) * U32(PEER_BYTES))
        elif kind[:2] == ["st", "async"]:
            self.send(
                address(arguments[0]), [value(part) for part in group(arguments[1])], value(arguments[2].strip("[]"))
            )
        elif kind[0] == "bra":  # what is left out has the predicate, too, so that it can be gone through
            assert arguments[0] == "skip" or not active.any(), "a wait for what nobody announced"
        elif kind[0] == "vote":
            warps = names[arguments[1]].reshape(-1, 32)
            names[arguments[0]] = np.repeat(warps.any(1), 32)
        elif kind[0] == "elect":
            names[arguments[0].removeprefix("_|")] = np.arange(self.block.threads) % 32 == 0
        elif opcode == "or.pred":
            names[arguments[0]] = names[arguments[1]] | names[arguments[2]]
        elif kind[0] == "selp":
            assign(arguments[0], np.where(names[arguments[3]], value(arguments[1]), value(arguments[2])))
        elif kind[0] in ("ld", "st"):
            space = next(k for k in kind[1:] if k not in ("acquire", "release", "gpu")).partition("::")[0]
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
                if "shared::cluster" in kind:
                    self.store_in_cluster(address(arguments[0]), active, data)
                else:
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
        elif opcode == "setp.gt.and.s32":
            names[arguments[0]] = (value(arguments[1], np.int32) > value(arguments[2], np.int32)) & names[arguments[3]]
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
            table = {
                0xEA: (a & b) | c, 0xA8: (a | b) & c, 0x6A: (a & b) ^ c, 0xE4: (a & c) | (b & ~c),
                0xD8: (a & ~c) | (b & c),
            }  # fmt: skip
            assign(arguments[0], table[int(arguments[4], 0)])
        elif kind[0] == "prmt":
            source = np.stack([value(arguments[1]), value(arguments[2])], axis=1).view(np.uint8)
            selector, thread = value(arguments[3]), np.arange(self.block.threads)
            choices = [selector >> U32(4 * i) & U32(15) for i in range(4)]
            picked = [source[thread, choice & U32(7)] for choice in choices]
            # Of a choice's fourth bit: the byte's sign in all eight bits.
            picked = [
                np.where(choice & U32(8), np.uint8(255) * (byte >> 7), byte).astype(np.uint8)
                for choice, byte in zip(choices, picked, strict=True)
            ]
            assign(arguments[0], np.stack(picked, axis=1).copy().view(U32)[:, 0])
        elif opcode == "shr.b32":
            assign(arguments[0], value(arguments[1]) >> value(arguments[2]))
        elif opcode == "or.b32":
            assign(arguments[0], value(arguments[1]) | value(arguments[2]))
        elif opcode == "shl.b32":
            bits, by = value(arguments[1]), value(arguments[2])
            assign(arguments[0], np.where(by < 32, bits << np.minimum(by, U32(31)), U32(0)))
        elif opcode == "max.s32":
            larger = np.maximum(value(arguments[1], np.int32), value(arguments[2], np.int32))
            assign(arguments[0], larger.view(U32))
        elif opcode == "mad.lo.u32":
            a, b, c = (value(x) for x in arguments[1:])
            assign(arguments[0], a * b + c)
        elif opcode in ("and.b32", "add.u32", "add.s32"):
            operation = {"and": np.bitwise_and, "add": np.add}[kind[0]]
            assign(arguments[0], operation(value(arguments[1]), value(arguments[2])))
        elif opcode in ("shf.r.wrap.b32", "shf.l.wrap.b32"):
            low, high, shift = value(arguments[1]), value(arguments[2]), int(arguments[3])
            down = shift if kind[1] == "r" else 32 - shift
            assign(arguments[0], low >> U32(down) | high << U32(32 - down))
        elif kind[-1] in ("s16x2", "u16x2"):
            kind_of_half = {"s": np.int16, "u": np.uint16}[kind[-1][0]]
            a, b = (value(x).view(kind_of_half) for x in arguments[1:])
            assign(arguments[0], {"max": np.maximum, "min": np.minimum}[kind[0]](a, b).view(U32))
        elif kind[0] == "redux":
            largest = value(arguments[1]).reshape(-1, 32).max(axis=1)
            assign(arguments[0], np.repeat(largest, 32))
        elif kind[-1] in ("f16x2", "bf16x2"):
            half = np.float16 if kind[-1] == "f16x2" else ml_dtypes.bfloat16
            a, *others = (value(x).view(B16).view(half).astype(np.float64) for x in arguments[1:])
            operation = {
                "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin,
                "fma": lambda x, y, z: x * y + z,
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
            if kind[2] == "bfly":
                lanes = lanes ^ int(arguments[2])
            else:  # the upper bits of a lane's number that stay its own
                kept = int(arguments[3], 0) >> 8 & 31
                lanes = lanes // 32 * 32 + (lanes % 32 & kept | value(arguments[2]) % 32 & (31 ^ kept))
            assign(arguments[0], value(arguments[1], F32)[lanes])
        elif kind[0] == "mma":
            self.mma(
                kind[-2], *([names[n] for n in group(a)] if i else group(a) for i, a in enumerate(arguments)), names
            )
        else:
            raise NotImplementedError(line)

    def copy(self, arguments, address, value):
        """Of 16 bytes by each thread, or of zeros; what they replace is garbage until the group was waited for."""
        size = int(arguments[2])
        sizes = value(arguments[3]) if len(arguments) > 3 else self.full(size, U32)
        targets, sources = address(arguments[0]).astype(np.int64), address(arguments[1])
        assert np.all(targets % size == 0), "misaligned address"
        self.block.touch(targets, np.ones(self.block.threads, bool), size, True)
        data = self.load("global", sources, sizes > 0, size)
        for target, row in zip(targets, data, strict=True):
            place = self.block.shared[target : target + size]
            place[:] = 0xA5
            self.block.groups[-1].append((place, row.copy()))

    def send(self, targets, words, barriers):
        """Stores of each thread in the cluster's blocks, which arrive when the barriers there are waited for."""
        for target, barrier, data in zip(targets, barriers, np.stack(words, axis=1), strict=True):
            peer, place = divmod(int(target), PEER_BYTES)
            assert int(barrier) // PEER_BYTES == peer, "a barrier of another block than the target's"
            assert place % data.nbytes == 0, "misaligned address"
            block = self.block.cluster.blocks[peer]
            shared = block.shared[place : place + data.nbytes]
            block.arrivals[int(barrier) % PEER_BYTES].copies.append((shared, data.view(np.uint8).copy()))

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
                    arrival.complete(
                        patience=30 if isinstance(self.block, Warpgroup) or self.block.cluster is not None else 0
                    )
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
