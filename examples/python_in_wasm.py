"""Run Python in WebAssembly in a micro-VM: drives the guest and the component that others publish for Hyperlight.

Usage, with hyperlight installed (or ``PYTHONPATH=.`` in a checkout)::

    $ python3 examples/python_in_wasm.py 'print(call_tool("add", a=3, b=4))'
    7

    from python_in_wasm import PythonInWasm

    with PythonInWasm(guest, component, {"add": lambda a, b: a + b}) as python:
        python.run("print(call_tool('add', a=3, b=4))")  # Completed(stdout="7\\n", stderr="", exit_code=0)
        fresh = python.snapshot()
        python.run("import sys; sys.mark = 1")
        python.restore(fresh)
        python.run("import sys; print(hasattr(sys, 'mark'))").stdout  # "False\\n"

The guest is wasmtime as a Hyperlight guest, the ELF inside a wheel of hyperlight-sandbox-backend-wasm; the component is
CPython 3.14 compiled ahead of time by the same wasmtime, the .aot in a wheel of hyperlight-sandbox-python-guest. Take
both of the same version: 0.3.0 is for Hyperlight 0.14.0, 0.8.0 for 0.17.0. The component's 44 MB are mapped, not
copied. The guest runs code at CPL 0 that uses SSE, so it needs a KVM with hardware virtualisation; elsewhere
``InitializeError`` says so.

What this is not: a WASI host. Python gets tools, the time and random numbers. There are no files, sockets, HTTP,
environment and standard streams: what asks for them gets the error that WASI has for it. A sleep ends at once.

Sources: spec/guest-programs.md, section 2; the component model's WASI 0.2.0.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hyperlight import (
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

__all__ = ["IMPORTS", "RELEASES", "SIZES", "Completed", "PythonInWasm"]

Tools = Mapping[str, Callable[..., Any]]
"""Python functions by the name under which ``call_tool`` in the guest finds them; they get keyword arguments."""

RELEASES = ("0.14.0", "0.17.0")
"""Releases of Hyperlight for which there are both a guest and a component."""

SIZES = SandboxConfiguration(0x10000, 0x40000, heap_size=8 << 20, scratch_size=32 << 20)
"""Python's own memory comes out of scratch. What a run prints has to fit the output buffer, or the guest aborts."""

COMPONENT_GPA = 1 << 32
"""Where the guest sees the component's file: beyond its own memory, and scratch is far above."""

_RUN = "r#hyperlight::r#sandbox::run"
_MAX_RANDOM_SIZE = 0x1000


class Completed(NamedTuple):
    """What a run left: an exception's text is in *stderr*, and *exit_code* is 1 then."""

    stdout: str
    stderr: str
    exit_code: int


class PythonInWasm:
    """A Python interpreter in a guest.

    *guest* is the path of the guest's ELF and *component* that of the .aot, or *guest* is a ``Snapshot`` that another
    ``PythonInWasm`` took, which holds the component. Raises as ``UninitializedSandbox`` and its ``evolve()`` do,
    ``MapRegionError`` where the component cannot be mapped and ``GuestError`` where it is not one for this guest.
    """

    def __init__(
        self,
        guest: StrPath | Snapshot,
        component: StrPath | None = None,
        tools: Tools | None = None,
        *,
        config: SandboxConfiguration = SIZES,
    ) -> None:
        snapshot = guest if isinstance(guest, Snapshot) else UninitializedSandbox(guest, config).snapshot()
        self._tools = dict(tools or {})
        self.sandbox = MultiUseSandbox.from_snapshot(snapshot, self._host_functions(), config)
        if not snapshot.is_initialized:
            self._load(component)

    def run(self, code: str) -> Completed:
        """Execute *code* as ``__main__``.

        ``call_tool(name, **arguments)`` in it calls a tool of the host; RuntimeError is what it gets where the tool
        raises. Variables survive a run with 0.17.0 but not with 0.14.0. Raises a ``GuestFailure`` where the guest
        itself gives up, for lack of memory or output buffer: ``restore`` then.
        """
        answer = self.sandbox.call(_RUN, encode(_STRING, code), returns=bytes)
        return Completed(*decode(_COMPLETED, answer))

    def snapshot(self) -> Snapshot:
        """Return the state of the interpreter as it is now, the component included."""
        return self.sandbox.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to *snapshot*, whatever happened since."""
        self.sandbox.restore(snapshot)

    def close(self) -> None:
        """Release the VM. Idempotent."""
        self.sandbox.close()

    def __enter__(self) -> PythonInWasm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _load(self, component: StrPath | None) -> None:
        """Show the component's file to the guest, which maps and instantiates it in place."""
        try:
            if component is None:
                raise HyperlightError("a component is needed beside the guest: the .aot of the same version")
            self.sandbox.call("InitWasmRuntime", b"", returns=Int)
            size = self.sandbox.map_file_cow(component, COMPONENT_GPA)
            self.sandbox.call("LoadWasmModulePhys", ULong(COMPONENT_GPA), ULong(size), returns=None)
        except BaseException:
            self.sandbox.close()
            raise

    # -- what the guest imports --------------------------------------------------------------

    def _host_functions(self) -> HostFunctions:
        """Answer all imports: those of the table below by a Python function, the others by their error."""
        implemented: dict[str, Callable[..., Any]] = {
            "hyperlight:sandbox/dispatch": self._dispatch,
            "wasi:clocks/now": lambda: divmod(time.time_ns(), 10**9),
            "wasi:clocks/resolution": lambda: (0, 1),
            "wasi:io/[method]pollable.ready": lambda pollable: True,
            "wasi:io/poll": lambda pollables: list(range(len(pollables))),
            "wasi:random/get-random-bytes": _random_bytes,
            "wasi:random/get-random-u64": _random_u64,
            "wasi:random/get-insecure-random-bytes": _random_bytes,
            "wasi:random/get-insecure-random-u64": _random_u64,
            "wasi:random/insecure-seed": lambda: (_random_u64(), _random_u64()),
        }
        functions = HostFunctions()
        for signature in _signatures():
            answer = signature.answerer(implemented.get(signature.name))
            functions.register(signature.guest_name, answer, [bytes] * len(signature.parameters), bytes)
        return functions

    def _dispatch(self, name: str, arguments: str) -> str | Err:
        """Call a tool; whatever goes wrong in it is for Python in the guest to handle."""
        try:
            if name not in self._tools:
                raise LookupError(f"unknown tool: {name}")
            return json.dumps(self._tools[name](**json.loads(arguments)))
        except Exception as error:
            return Err(str(error) or type(error).__name__)


def _random_bytes(count: int) -> bytes:
    if count > _MAX_RANDOM_SIZE:
        raise ValueError(f"{count} random bytes at once: at most {_MAX_RANDOM_SIZE} are given")
    return os.urandom(count)


def _random_u64() -> int:
    return int.from_bytes(os.urandom(8), "little")


# -- component values (guest-programs.md 2.5) ---------------------------------------------------
#
# Each parameter and each result is a byte string of its own: packed, little-endian, without tags. Only what the
# functions above need can be encoded and decoded; for all others there is unsupported().


class Type(NamedTuple):
    """A type as WIT writes it: ``result<list<u8>,stream-error>``."""

    name: str
    arguments: tuple[Type, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Type:
        """Parse a type; a resource, ``own:...`` or ``&...``, is just a "handle"."""
        text = _RECORDS.get(text, text)
        if text.startswith(("own:", "&")):
            return cls("handle")
        name, bracket, arguments = text.partition("<")
        return cls(name, tuple(map(cls.parse, _split(arguments[:-1]))) if bracket else ())


def _split(text: str) -> Iterator[str]:
    """Yield the parts of *text* between commas that are not within angle brackets."""
    start = depth = 0
    for index, character in enumerate(text + ","):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            if part := text[start:index].strip():
                yield part
            start = index + 1


class Err(NamedTuple):
    """The error case of a ``result``; any other value is the ok case."""

    value: Any


_RECORDS = {"datetime": "tuple<u64,u32>"}
_NUMBERS = {
    name: struct.Struct(f"<{code}")
    for name, code in (
        *(("bool", "?"), ("u8", "B"), ("u16", "H"), ("u32", "I"), ("u64", "Q"), ("handle", "I")),
        *(("s8", "b"), ("s16", "h"), ("s32", "i"), ("s64", "q")),
    )
}
_U32 = _NUMBERS["u32"]
_STRING = Type("string")
_COMPLETED = Type.parse("tuple<string,string,s32>")


def encode(kind: Type, value: Any) -> bytes:
    """Encode a bool, int, str, list, tuple or, of a ``result``, the ok value or an ``Err``."""
    if number := _NUMBERS.get(kind.name):
        return number.pack(value)
    if kind.name == "string":
        data = value.encode()
        return _U32.pack(len(data)) + bytes(data)
    if kind.name == "list":
        items = [value] if isinstance(value, bytes) else [encode(kind.arguments[0], item) for item in value]
        return _U32.pack(len(value)) + b"".join(items)
    if kind.name == "tuple":
        return b"".join(map(encode, kind.arguments, value))
    if kind.name == "result":
        ok, error = kind.arguments
        return b"\1" + encode(error, value.value) if isinstance(value, Err) else b"\0" + encode(ok, value)
    raise TypeError(f"no value of type {kind.name} is encoded here")


def decode(kind: Type, data: bytes) -> Any:
    """Decode a bool, int, str, list or tuple that takes up all of *data*. Raises ValueError for anything else."""
    try:
        value, end = _decode_at(kind, data, 0)
    except struct.error as error:
        raise ValueError(f"{len(data)} bytes are too few for a {kind.name}") from error
    if end != len(data):
        raise ValueError(f"a {kind.name} of {end} bytes is followed by {len(data) - end} more")
    return value


def _decode_at(kind: Type, data: bytes, offset: int) -> tuple[Any, int]:
    """Return the value at *offset* and where it ends."""
    if number := _NUMBERS.get(kind.name):
        return number.unpack_from(data, offset)[0], offset + number.size
    if kind.name == "string":
        (size,) = _U32.unpack_from(data, offset)
        end = offset + _U32.size + size
        return data[offset + _U32.size : end].decode(), end  # too large an end is found by decode()
    if kind.name == "tuple":
        members = kind.arguments
    elif kind.name == "list":
        (count,) = _U32.unpack_from(data, offset)
        offset += _U32.size
        members = kind.arguments * min(count, len(data))  # no item is empty, so more cannot be there
    else:
        raise TypeError(f"no value of type {kind.name} is decoded here")
    values = []
    for member in members:
        value, offset = _decode_at(member, data, offset)
        values.append(value)
    return (tuple(values) if kind.name == "tuple" else values), offset


def unsupported(kind: Type) -> bytes:
    """Return the answer of a function that is not implemented: its error if it has one, else nothing, none or 0."""
    if kind.name == "result":
        return b"\1" + b"".join(map(unsupported, kind.arguments[1:]))
    if kind.name == "tuple":
        return b"".join(map(unsupported, kind.arguments))
    return _UNSUPPORTED[kind.name]


_UNSUPPORTED = {
    **{name: bytes(number.size) for name, number in _NUMBERS.items()},
    "-": b"",
    "_": b"",
    "option": b"\0",
    "string": _U32.pack(0),
    "list": _U32.pack(0),
    # Cases of enums and variants by their index. Each package's own error-code has a name of its own here.
    "stream-error": _U32.pack(1),  # closed
    "file-error": _U32.pack(27),  # unsupported
    "socket-error": _U32.pack(2),  # not-supported
    "http-error": _U32.pack(15),  # HTTP-request-denied
    "header-error": _U32.pack(1),  # forbidden
    "method": _U32.pack(0),  # get
    "ip-address-family": _U32.pack(0),  # ipv4
}


# -- the imports -------------------------------------------------------------------------------


class _Signature(NamedTuple):
    """One import: ``name`` is "package/function", ``guest_name`` what the guest calls."""

    name: str
    guest_name: str
    parameters: tuple[Type, ...]
    result: Type

    def answerer(self, implementation: Callable[..., Any] | None) -> Callable[..., bytes]:
        """Return the host function: *implementation* between decoding and encoding, or the unsupported answer.

        It raises only for bytes that are not of the types. The guest dies of an exception, and not of an error value.
        """
        if implementation is None:
            constant = unsupported(self.result)
            return lambda *parameters: constant

        def answer(*parameters: bytes) -> bytes:
            return encode(self.result, implementation(*map(decode, self.parameters, parameters)))

        return answer


@functools.cache
def _signatures() -> tuple[_Signature, ...]:
    """Parse ``IMPORTS``."""
    signatures, package = [], ""
    for line in filter(None, IMPORTS.splitlines()):
        if (match := re.fullmatch(r"  (?P<name>\S+)\((?P<parameters>.*)\) -> *(?P<result>.+)", line)) is None:
            package = line
            continue
        name, parameters = match["name"], tuple(map(Type.parse, _split(match["parameters"])))
        if "." in name and not name.startswith("["):
            name, parameters = f"[method]{name}", (Type("handle"), *parameters)
        guest_package = "::".join(f"r#{part}" for part in package.split(":"))
        guest_name = f"{guest_package}::{name}"
        signatures.append(_Signature(f"{package}/{name}", guest_name, parameters, Type.parse(match["result"])))
    return tuple(signatures)


# A name with a dot is a method's: the handle of its resource comes first. The guest's names lack interfaces, so those
# of wall-clock and monotonic-clock coincide: it takes the answer of now() for a datetime in the one case, and the first
# eight bytes of it for a u64 in the other.
IMPORTS = """\
hyperlight:sandbox
  dispatch(string, string) -> result<string,string>
wasi:io
  error.to-debug-string() -> string
  pollable.ready() -> bool
  pollable.block() -> -
  poll(list<&pollable>) -> list<u32>
  input-stream.read(u64) -> result<list<u8>,stream-error>
  input-stream.blocking-read(u64) -> result<list<u8>,stream-error>
  input-stream.skip(u64) -> result<u64,stream-error>
  input-stream.blocking-skip(u64) -> result<u64,stream-error>
  input-stream.subscribe() -> own:pollable
  output-stream.check-write() -> result<u64,stream-error>
  output-stream.write(list<u8>) -> result<_,stream-error>
  output-stream.blocking-write-and-flush(list<u8>) -> result<_,stream-error>
  output-stream.flush() -> result<_,stream-error>
  output-stream.blocking-flush() -> result<_,stream-error>
  output-stream.subscribe() -> own:pollable
  output-stream.write-zeroes(u64) -> result<_,stream-error>
  output-stream.blocking-write-zeroes-and-flush(u64) -> result<_,stream-error>
  output-stream.splice(&input-stream, u64) -> result<u64,stream-error>
  output-stream.blocking-splice(&input-stream, u64) -> result<u64,stream-error>
wasi:cli
  get-environment() -> list<tuple<string,string>>
  get-arguments() -> list<string>
  initial-cwd() -> option<string>
  exit(result) -> -
  get-stdin() -> own:input-stream
  get-stdout() -> own:output-stream
  get-stderr() -> own:output-stream
  get-terminal-stdin() -> option<own:terminal-input>
  get-terminal-stdout() -> option<own:terminal-output>
  get-terminal-stderr() -> option<own:terminal-output>
wasi:clocks
  subscribe-instant(u64) -> own:pollable
  subscribe-duration(u64) -> own:pollable
  now() -> datetime
  resolution() -> datetime
wasi:filesystem
  descriptor.read-via-stream(u64) -> result<own:input-stream,file-error>
  descriptor.write-via-stream(u64) -> result<own:output-stream,file-error>
  descriptor.append-via-stream() -> result<own:output-stream,file-error>
  descriptor.advise(u64, u64, advice) -> result<_,file-error>
  descriptor.sync-data() -> result<_,file-error>
  descriptor.get-type() -> result<descriptor-type,file-error>
  descriptor.set-size(u64) -> result<_,file-error>
  descriptor.set-times(new-timestamp, new-timestamp) -> result<_,file-error>
  descriptor.read(u64, u64) -> result<tuple<list<u8>,bool>,file-error>
  descriptor.write(list<u8>, u64) -> result<u64,file-error>
  descriptor.read-directory() -> result<own:directory-entry-stream,file-error>
  descriptor.sync() -> result<_,file-error>
  descriptor.create-directory-at(string) -> result<_,file-error>
  descriptor.stat() -> result<descriptor-stat,file-error>
  descriptor.readlink-at(string) -> result<string,file-error>
  descriptor.remove-directory-at(string) -> result<_,file-error>
  descriptor.rename-at(string, &descriptor, string) -> result<_,file-error>
  descriptor.symlink-at(string, string) -> result<_,file-error>
  descriptor.unlink-file-at(string) -> result<_,file-error>
  descriptor.is-same-object(&descriptor) -> bool
  descriptor.metadata-hash() -> result<metadata-hash-value,file-error>
  descriptor.get-flags() -> result<descriptor-flags,file-error>
  descriptor.stat-at(path-flags, string) -> result<descriptor-stat,file-error>
  descriptor.set-times-at(path-flags, string, new-timestamp, new-timestamp) -> result<_,file-error>
  descriptor.link-at(path-flags, string, &descriptor, string) -> result<_,file-error>
  descriptor.open-at(path-flags, string, open-flags, descriptor-flags) -> result<own:descriptor,file-error>
  descriptor.metadata-hash-at(path-flags, string) -> result<metadata-hash-value,file-error>
  directory-entry-stream.read-directory-entry() -> result<option<directory-entry>,file-error>
  filesystem-error-code(&error) -> option<file-error>
  get-directories() -> list<tuple<own:descriptor,string>>
wasi:sockets
  instance-network() -> own:network
  udp-socket.start-bind(&network, ip-socket-address) -> result<_,socket-error>
  udp-socket.finish-bind() -> result<_,socket-error>
  udp-socket.stream(option<ip-socket-address>) -> \
    result<tuple<own:incoming-datagram-stream,own:outgoing-datagram-stream>,socket-error>
  udp-socket.local-address() -> result<ip-socket-address,socket-error>
  udp-socket.remote-address() -> result<ip-socket-address,socket-error>
  udp-socket.address-family() -> ip-address-family
  udp-socket.unicast-hop-limit() -> result<u8,socket-error>
  udp-socket.set-unicast-hop-limit(u8) -> result<_,socket-error>
  udp-socket.receive-buffer-size() -> result<u64,socket-error>
  udp-socket.set-receive-buffer-size(u64) -> result<_,socket-error>
  udp-socket.send-buffer-size() -> result<u64,socket-error>
  udp-socket.set-send-buffer-size(u64) -> result<_,socket-error>
  udp-socket.subscribe() -> own:pollable
  incoming-datagram-stream.receive(u64) -> result<list<incoming-datagram>,socket-error>
  incoming-datagram-stream.subscribe() -> own:pollable
  outgoing-datagram-stream.check-send() -> result<u64,socket-error>
  outgoing-datagram-stream.send(list<outgoing-datagram>) -> result<u64,socket-error>
  outgoing-datagram-stream.subscribe() -> own:pollable
  create-udp-socket(ip-address-family) -> result<own:udp-socket,socket-error>
  tcp-socket.start-bind(&network, ip-socket-address) -> result<_,socket-error>
  tcp-socket.finish-bind() -> result<_,socket-error>
  tcp-socket.start-connect(&network, ip-socket-address) -> result<_,socket-error>
  tcp-socket.finish-connect() -> result<tuple<own:input-stream,own:output-stream>,socket-error>
  tcp-socket.start-listen() -> result<_,socket-error>
  tcp-socket.finish-listen() -> result<_,socket-error>
  tcp-socket.accept() -> result<tuple<own:tcp-socket,own:input-stream,own:output-stream>,socket-error>
  tcp-socket.local-address() -> result<ip-socket-address,socket-error>
  tcp-socket.remote-address() -> result<ip-socket-address,socket-error>
  tcp-socket.is-listening() -> bool
  tcp-socket.address-family() -> ip-address-family
  tcp-socket.set-listen-backlog-size(u64) -> result<_,socket-error>
  tcp-socket.keep-alive-enabled() -> result<bool,socket-error>
  tcp-socket.set-keep-alive-enabled(bool) -> result<_,socket-error>
  tcp-socket.keep-alive-idle-time() -> result<u64,socket-error>
  tcp-socket.set-keep-alive-idle-time(u64) -> result<_,socket-error>
  tcp-socket.keep-alive-interval() -> result<u64,socket-error>
  tcp-socket.set-keep-alive-interval(u64) -> result<_,socket-error>
  tcp-socket.keep-alive-count() -> result<u32,socket-error>
  tcp-socket.set-keep-alive-count(u32) -> result<_,socket-error>
  tcp-socket.hop-limit() -> result<u8,socket-error>
  tcp-socket.set-hop-limit(u8) -> result<_,socket-error>
  tcp-socket.receive-buffer-size() -> result<u64,socket-error>
  tcp-socket.set-receive-buffer-size(u64) -> result<_,socket-error>
  tcp-socket.send-buffer-size() -> result<u64,socket-error>
  tcp-socket.set-send-buffer-size(u64) -> result<_,socket-error>
  tcp-socket.subscribe() -> own:pollable
  tcp-socket.shutdown(shutdown-type) -> result<_,socket-error>
  create-tcp-socket(ip-address-family) -> result<own:tcp-socket,socket-error>
  resolve-address-stream.resolve-next-address() -> result<option<ip-address>,socket-error>
  resolve-address-stream.subscribe() -> own:pollable
  resolve-addresses(&network, string) -> result<own:resolve-address-stream,socket-error>
wasi:random
  get-random-bytes(u64) -> list<u8>
  get-random-u64() -> u64
  get-insecure-random-bytes(u64) -> list<u8>
  get-insecure-random-u64() -> u64
  insecure-seed() -> tuple<u64,u64>
wasi:http
  [constructor]fields() -> own:fields
  [static]fields.from-list(list<tuple<string,list<u8>>>) -> result<own:fields,header-error>
  fields.get(string) -> list<list<u8>>
  fields.has(string) -> bool
  fields.set(string, list<list<u8>>) -> result<_,header-error>
  fields.delete(string) -> result<_,header-error>
  fields.append(string, list<u8>) -> result<_,header-error>
  fields.entries() -> list<tuple<string,list<u8>>>
  fields.clone() -> own:fields
  incoming-request.method() -> method
  incoming-request.path-with-query() -> option<string>
  incoming-request.scheme() -> option<scheme>
  incoming-request.authority() -> option<string>
  incoming-request.headers() -> own:fields
  incoming-request.consume() -> result<own:incoming-body>
  [constructor]outgoing-request(own:fields) -> own:outgoing-request
  outgoing-request.body() -> result<own:outgoing-body>
  outgoing-request.method() -> method
  outgoing-request.set-method(method) -> result
  outgoing-request.path-with-query() -> option<string>
  outgoing-request.set-path-with-query(option<string>) -> result
  outgoing-request.scheme() -> option<scheme>
  outgoing-request.set-scheme(option<scheme>) -> result
  outgoing-request.authority() -> option<string>
  outgoing-request.set-authority(option<string>) -> result
  outgoing-request.headers() -> own:fields
  [constructor]request-options() -> own:request-options
  request-options.connect-timeout() -> option<u64>
  request-options.set-connect-timeout(option<u64>) -> result
  request-options.first-byte-timeout() -> option<u64>
  request-options.set-first-byte-timeout(option<u64>) -> result
  request-options.between-bytes-timeout() -> option<u64>
  request-options.set-between-bytes-timeout(option<u64>) -> result
  [static]response-outparam.set(own:response-outparam, result<own:outgoing-response,http-error>) -> -
  incoming-response.status() -> u16
  incoming-response.headers() -> own:fields
  incoming-response.consume() -> result<own:incoming-body>
  incoming-body.stream() -> result<own:input-stream>
  [static]incoming-body.finish(own:incoming-body) -> own:future-trailers
  future-trailers.subscribe() -> own:pollable
  future-trailers.get() -> option<result<result<option<own:fields>,http-error>>>
  [constructor]outgoing-response(own:fields) -> own:outgoing-response
  outgoing-response.status-code() -> u16
  outgoing-response.set-status-code(u16) -> result
  outgoing-response.headers() -> own:fields
  outgoing-response.body() -> result<own:outgoing-body>
  outgoing-body.write() -> result<own:output-stream>
  [static]outgoing-body.finish(own:outgoing-body, option<own:fields>) -> result<_,http-error>
  future-incoming-response.subscribe() -> own:pollable
  future-incoming-response.get() -> option<result<result<own:incoming-response,http-error>>>
  http-error-code(&error) -> option<http-error>
  handle(own:outgoing-request, option<own:request-options>) -> result<own:future-incoming-response,http-error>
"""
"""The functions that the guest imports, all 173, by package. Spec: guest-programs.md 2.6."""


# -- the command line --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status of the Python code, or 1 with a line that says what went wrong."""
    arguments = _parser().parse_args(argv)
    code = sys.stdin.read() if arguments.code == "-" else arguments.code
    try:
        with PythonInWasm(*_files(arguments), {"add": lambda a, b: a + b}) as python:
            completed = python.run(code)
    except HyperlightError as error:
        print(f"python_in_wasm: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(completed.stdout)
    sys.stderr.write(completed.stderr)
    return completed.exit_code & 0xFF


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python_in_wasm",
        description="Run Python in WebAssembly in a micro-VM. It may call_tool('add', a=..., b=...) in this process.",
    )
    parser.add_argument("code", help="Python code, or - to read it from standard input")
    parser.add_argument("--guest", metavar="ELF", help="the guest (default: the pinned one, fetched through pip)")
    parser.add_argument("--component", metavar="AOT", help="the component (default: the pinned one, fetched likewise)")
    parser.add_argument("--release", choices=RELEASES, default="0.17.0", help="of what is pinned (%(default)s)")
    return parser


def _files(arguments: argparse.Namespace) -> tuple[StrPath, StrPath]:
    """Return the paths of the guest and the component."""
    guest, component = arguments.guest, arguments.component
    if guest is None or component is None:
        import pinned_guests

        guest = guest or pinned_guests.guest("wasm", arguments.release)
        component = component or pinned_guests.component(arguments.release)
    return guest, component


if __name__ == "__main__":
    sys.exit(main())
