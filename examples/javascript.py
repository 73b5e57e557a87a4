"""Evaluate JavaScript in a micro-VM: drives the QuickJS guest that others publish for Hyperlight.

Usage, with hyperlight installed (or ``PYTHONPATH=.`` in a checkout)::

    $ python3 examples/javascript.py 'console.log(1 + 1)'
    2
    $ python3 examples/javascript.py 'import("host").then(host => host.add(3, 4))'
    7
    $ python3 examples/javascript.py --event '{"n": 6}' 'export function handler(event) { return event.n * 7; }'
    42

    from javascript import JavaScript

    with JavaScript(guest, {"host": {"add": lambda a, b: a + b}}) as js:
        js.evaluate("[1, 2, 3].map(x => x * x)")  # [1, 4, 9]
        js.register("greet", '''
            import * as host from "host";
            let calls = 0;
            export function handler(event) { return {hello: event.name, sum: host.add(3, 4), calls: ++calls}; }
        ''')
        js.call("greet", {"name": "World"})["calls"]  # 1
        once = js.snapshot()
        js.call("greet", {"name": "World"})  # {"hello": "World", "sum": 7, "calls": 2}
        js.restore(once)
        js.call("greet", {"name": "World"})["calls"]  # 2

The guest is the ELF inside a wheel of hyperlight-sandbox-backend-hyperlight-js, byte for byte; its version note
says which of four calling conventions it has. It runs code at CPL 0 that uses SSE, so it needs a KVM with
hardware virtualisation; elsewhere ``InitializeError`` says so.

What this is not: a browser or Node. There are no timers, no fetch and no files; ``import`` finds the modules given to
``JavaScript``, and the guest's own console, crypto, io and require.

Sources: spec/guest-programs.md, section 1.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hyperlight import (
    GuestError,
    HostFunctions,
    HyperlightError,
    Int,
    MultiUseSandbox,
    SandboxConfiguration,
    Snapshot,
    StrPath,
    ULong,
    UninitializedSandbox,
)

__all__ = ["CONVENTIONS", "SIZES", "Convention", "JavaScript"]

Modules = Mapping[str, Mapping[str, Callable[..., Any]]]
"""Python functions by name, by the name of the module that JavaScript imports them from."""


class Convention(NamedTuple):
    """How one release of the guest wants to be called."""

    calls_by_name: bool  # a handler is a guest function of its own name; otherwise RunHandler takes the name
    carries_bytes: bool  # a Uint8Array is bytes in Python and the other way round; otherwise JSON is all there is


CONVENTIONS = {  # by the version note; hyperlight-sandbox-backend-hyperlight-js 0.3.0, 0.5.0, 0.6.0 and 0.8.0
    "0.14.0": Convention(calls_by_name=True, carries_bytes=False),
    "0.15.0": Convention(calls_by_name=False, carries_bytes=False),
    "0.16.0": Convention(calls_by_name=False, carries_bytes=True),
    "0.17.0": Convention(calls_by_name=False, carries_bytes=True),
}

SIZES = SandboxConfiguration(0x10000, 0x10000, heap_size=4 << 20, scratch_size=4 << 20)
"""Enough for scripts that hold some 3 MB; an event and a result have to fit 64 KiB each."""

_EVALUATOR = "hyperlight.evaluate"
_EVALUATOR_SOURCE = """
async function handler(code) { return {value: await (0, eval)(code)}; }
export { handler };
"""


class JavaScript:
    """A QuickJS guest: evaluates code and calls handlers; state persists from call to call.

    *guest* is the path of the guest's ELF, or a ``Snapshot`` that another ``JavaScript`` took: it goes on
    from there, with modules and functions of the same names. *output* gets what console.log prints, in
    pieces. Raises as ``UninitializedSandbox`` and its ``evolve()`` do, and ``HyperlightError`` for a guest that is
    of no known release.
    """

    def __init__(
        self,
        guest: StrPath | Snapshot,
        modules: Modules | None = None,
        *,
        output: Callable[[str], object] | None = None,
        config: SandboxConfiguration = SIZES,
    ) -> None:
        snapshot = guest if isinstance(guest, Snapshot) else UninitializedSandbox(guest, config).snapshot()
        self._convention = _convention_of(snapshot)
        self._modules = dict(modules or {})
        self._output = output or _write_to_stdout
        self.sandbox = MultiUseSandbox.from_snapshot(snapshot, self._host_functions(), config)
        if not snapshot.is_initialized:
            names = {module: list(functions) for module, functions in self._modules.items()}
            self.sandbox.call("RegisterHostModules", json.dumps(names), returns=None)
            self.register(_EVALUATOR, _EVALUATOR_SOURCE)

    def evaluate(self, code: str) -> Any:
        """Evaluate *code* as a script in the global scope and return its last value, as JSON can carry it.

        A promise is awaited; None stands for undefined. Raises ``GuestError`` with what JavaScript threw.
        """
        return self.call(_EVALUATOR, code).get("value")

    def register(self, name: str, source: str) -> None:
        """Compile the ES module *source*, which exports a function ``handler``, under *name*.

        The export has to begin a line: the guest looks for it there, and adds one where it sees none. Replaces the
        handler that had the name. Raises ``GuestError`` where it does not compile.
        """
        self.sandbox.call("register_handler", name, source, "", returns=None)

    def call(self, name: str, event: Any = None) -> Any:
        """Call a registered handler with *event*, which JSON can carry, and return what it returns.

        Raises ``GuestError`` where there is no such handler, where it throws, and where it returns undefined or a
        promise that cannot settle; a ``GuestFailure`` where the guest itself gives up: ``restore`` then.
        """
        arguments = (json.dumps(event), True)  # True: collect garbage after the call
        if self._convention.calls_by_name:
            return json.loads(self.sandbox.call(name, *arguments, returns=str))
        return json.loads(self.sandbox.call("RunHandler", name, *arguments, returns=str))

    def snapshot(self) -> Snapshot:
        """Return the state of all JavaScript as it is now."""
        return self.sandbox.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to *snapshot*, whatever happened since."""
        self.sandbox.restore(snapshot)

    def close(self) -> None:
        """Release the VM. Idempotent."""
        self.sandbox.close()

    def __enter__(self) -> JavaScript:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- what the guest calls ----------------------------------------------------------------

    def _host_functions(self) -> HostFunctions:
        functions = HostFunctions.empty()
        functions.register("CurrentTimeMicros", lambda: time.time_ns() // 1000, (), ULong)
        functions.register("HostPrint", self._print, (str,), Int)
        if self._convention.carries_bytes:
            functions.register("CallHostJsFunction", self._call_with_bytes, (str, str, str, bytes), bytes)
        else:
            functions.register("CallHostJsFunction", self._call_with_json, (str, str, str), str)
        return functions

    def _print(self, text: str) -> int:
        if text:  # 0.14.0 says "flush" by printing nothing
            self._output(text)
        return len(text.encode())

    def _call_with_json(self, module: str, name: str, arguments: str) -> str:
        return json.dumps(self._function(module, name)(*json.loads(arguments)))

    def _call_with_bytes(self, module: str, name: str, arguments: str, sidecar: bytes) -> bytes:
        return _pack_result(self._function(module, name)(*_unpack_arguments(arguments, sidecar)))

    def _function(self, module: str, name: str) -> Callable[..., Any]:
        """Return the Python function; a LookupError becomes an exception in JavaScript, as do all others."""
        if module not in self._modules:
            raise LookupError(f"Host module '{module}' not found")
        if name not in self._modules[module]:
            raise LookupError(f"Host function '{name}' not found in module '{module}'")
        return self._modules[module][name]


def _convention_of(snapshot: Snapshot) -> Convention:
    version = snapshot.elf.version
    if version not in CONVENTIONS:
        raise HyperlightError(f"a JavaScript guest of Hyperlight {', '.join(CONVENTIONS)} is needed, not {version}")
    return CONVENTIONS[version]


def _write_to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# -- bytes beside JSON (guest-programs.md 1.4) -------------------------------------------------
#
# JSON holds {"__bin__": k} where blob k of the sidecar belongs: u32 count, then for each blob u32 size and bytes.

_U32 = struct.Struct("<I")
_JSON_ONLY, _JSON_WITH_SIDECAR = b"\x00", b"\x02"


def _unpack_arguments(text: str, sidecar: bytes) -> list[Any]:
    """Decode a JSON array and its blobs. Raises ValueError where the guest sent anything else."""
    blobs = _unpack_sidecar(sidecar)

    def resolve(value: dict[str, Any]) -> Any:
        if set(value) != {"__bin__"}:
            return value
        index = value["__bin__"]
        if type(index) is not int or not 0 <= index < len(blobs):
            raise ValueError(f"there is no blob {index!r}: the sidecar holds {len(blobs)}")
        return blobs[index]

    arguments = json.loads(text, object_hook=resolve)
    if not isinstance(arguments, list):
        raise ValueError("the arguments are not a JSON array")
    return arguments


def _unpack_sidecar(sidecar: bytes) -> list[bytes]:
    try:
        (count,), offset = _U32.unpack_from(sidecar), _U32.size
        blobs = []
        for _ in range(count):
            (size,) = _U32.unpack_from(sidecar, offset)
            offset += _U32.size + size
            blobs.append(sidecar[offset - size : offset])
    except struct.error as error:
        raise ValueError("the sidecar is cut short") from error
    if offset != len(sidecar):
        raise ValueError(f"the sidecar should end after {offset} bytes, not after {len(sidecar)}")
    return blobs


def _pack_result(value: Any) -> bytes:
    """Encode what a Python function returned, with the bytes in it as blobs."""
    blobs: list[bytes] = []

    def set_aside(part: Any) -> dict[str, int]:
        if not isinstance(part, (bytes, bytearray, memoryview)):
            raise TypeError(f"a {type(part).__name__} cannot go to JavaScript")
        blobs.append(bytes(part))
        return {"__bin__": len(blobs) - 1}

    text = json.dumps(value, default=set_aside).encode()
    if not blobs:
        return _JSON_ONLY + text
    sidecar = _U32.pack(len(blobs)) + b"".join(_U32.pack(len(blob)) + blob for blob in blobs)
    return _JSON_WITH_SIDECAR + _U32.pack(len(sidecar)) + sidecar + text


# -- the command line --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1, and a message that says why, for whatever goes wrong."""
    arguments = _parser().parse_args(argv)
    code = sys.stdin.read() if arguments.code == "-" else arguments.code
    try:
        with JavaScript(_guest(arguments), {"host": {"add": lambda a, b: a + b}}) as js:
            if "event" in arguments:
                js.register("handler", code)
                value = js.call("handler", arguments.event)
            else:
                value = js.evaluate(code)
    except HyperlightError as error:
        print(f"javascript: {error.message if isinstance(error, GuestError) else error}", file=sys.stderr)
        return 1
    if value is not None:
        print(json.dumps(value))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="javascript",
        description="Evaluate JavaScript in a micro-VM. import('host') has the function add of this process.",
    )
    parser.add_argument("code", help="JavaScript, or - to read it from standard input")
    parser.add_argument(
        "--event",
        metavar="JSON",
        type=_json,
        default=argparse.SUPPRESS,
        help="take CODE as a module: call its handler with this event",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--guest", metavar="ELF", help="the guest (default: the pinned one, fetched through pip)")
    choice.add_argument("--release", choices=CONVENTIONS, default="0.17.0", help="of the pinned guest (%(default)s)")
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


def _guest(arguments: argparse.Namespace) -> StrPath:
    if arguments.guest is not None:
        return str(arguments.guest)
    from pinned_guests import guest

    return guest("js", arguments.release)


if __name__ == "__main__":
    sys.exit(main())
