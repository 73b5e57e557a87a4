"""Debug a toy processor with gdb: all that gdb_rsp.py needs is this file beside it.

    $ python gdb_toy_target.py
    gdb -ex 'target remote 127.0.0.1:40013'

    $ gdb -ex 'target remote | python gdb_toy_target.py stdio'

It has three instructions, nop, inc %rax and jmp, and runs a program that counts in rax for ever. Try stepi, x/4i $pc,
break *0x1003 if $rax == 1000, watch $rax, continue and Ctrl-C. Anything else in memory is an illegal instruction.
"""

import sys

from gdb_rsp import DebugServer, Reason, Resume, Signal, Stop, TargetFault

BASE = 0x1000
PROGRAM = bytes.fromhex("48ffc0 90 ebfa")  # 1000: inc %rax   1003: nop   1004: jmp 1000


class Toy:
    def __init__(self):
        self.memory = bytearray(PROGRAM.ljust(4096, b"\x90"))
        self.registers = {"rax": 0, "rsp": BASE + 4096, "rip": BASE, "eflags": 2}
        self.interrupted = False

    def read_registers(self, names):
        return {name: self.registers[name] for name in names if name in self.registers}

    def write_registers(self, values):
        self.registers.update(values)

    def read_memory(self, address, size):
        if not BASE <= address < BASE + len(self.memory):
            raise TargetFault(address)
        return bytes(self.memory[address - BASE : address - BASE + size])

    def write_memory(self, address, data):
        if not BASE <= address <= BASE + len(self.memory) - len(data):
            raise TargetFault(address)
        self.memory[address - BASE : address - BASE + len(data)] = data

    def interrupt(self):
        self.interrupted = True

    def run(self, step):
        """Execute until there is something to report; None if interrupt() was called."""
        while not self.interrupted:
            code = self.memory[self.registers["rip"] - BASE :][:3]
            if code[:1] == b"\xcc":
                return Stop(reason=Reason.BREAKPOINT)
            if code == b"\x48\xff\xc0":
                self.registers["rax"] += 1
            elif code[:1] not in (b"\x90", b"\xeb"):
                return Stop(Signal.ILL)
            self.registers["rip"] += {0x48: 3, 0x90: 1, 0xEB: 2}[code[0]]
            if code[:1] == b"\xeb":
                self.registers["rip"] += int.from_bytes(code[1:2], "little", signed=True)
            if step:
                return Stop(reason=Reason.STEP)
        self.interrupted = False
        return None


if __name__ == "__main__":
    toy = Toy()
    with DebugServer(toy, *sys.argv[1:2]) as server:
        print(f"gdb -ex 'target remote {server.address}'", flush=True)
        server.wait_for_client()
        action = server.stopped(Stop())
        while action is not Resume.KILL and server.attached:
            stop = toy.run(step=action is Resume.STEP)
            action = server.attend() if stop is None else server.stopped(stop)
