"""Guests that others built and published run here byte for byte: QuickJS, and Python in WebAssembly.

Most of this needs a KVM that runs code at CPL 0 on the processor: ``tests/run-in-kvm-amd`` has one. The last
chapter is for the others. The guests come from ``wheels``, and the drivers are the examples'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import wheels
from conftest import REPOSITORY, require
from hypothesis import given
from hypothesis import strategies as st
from tinyguest import READ, tiny_guest

import hyperlight
import memory
from hyperlight import (
    DebugInfo,
    EmulationFailure,
    ExecutionCanceledByHost,
    GuestAborted,
    GuestError,
    InitializeError,
    Int,
    InterruptHandle,
    Long,
    MultiUseSandbox,
    PoisonedSandbox,
    Snapshot,
    UninitializedSandbox,
)

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(REPOSITORY / "examples"))
    import javascript
    import pinned_guests
    import python_in_wasm
from javascript import JavaScript
from python_in_wasm import Completed, PythonInWasm, Type

needs_real_guests = [require("kvm"), require("wheels"), require("real_cpl0")]

started = threading.Event()
"""Set by guests that are about to loop for ever."""


@contextlib.contextmanager
def killed_once_started(handle: InterruptHandle) -> Iterator[None]:
    """Kill the call in progress as soon as its guest has said that it started."""
    started.clear()
    kills: list[bool] = []
    thread = threading.Thread(target=lambda: kills.append(started.wait(60) and handle.kill()))
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert kills == [True]


def booted_as(releases: Iterable[str]) -> list[Any]:
    """Return parameters: each release, with a copy at the first write to a page by either side."""
    pairs = itertools.product(releases, ("host", "guest"))
    return [pytest.param(pair, id="{}, copied by the {}".format(*pair)) for pair in pairs]


# ======================================================================================
# JavaScript
# ======================================================================================

MODULES: javascript.Modules = {
    "host": {
        "add": lambda a, b: a + b,
        "fail": lambda: 1 / 0,
        "reverse": lambda data: data[::-1],
        "wrap": lambda data: {"data": data, "size": len(data)},
        "start": started.set,
    }
}
COUNTER = """
import * as host from "host";
let calls = 0;
export function handler(event) { return {calls: ++calls, sum: host.add(3, 4), event}; }
"""


@pytest.fixture(scope="module", params=booted_as(javascript.CONVENTIONS))
def js_snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """Return a guest of one release at rest, with a handler that counts."""
    release, copy_on_write = request.param
    config = dataclasses.replace(javascript.SIZES, copy_on_write=copy_on_write)
    with JavaScript(wheels.guest_elf("js", release), MODULES, config=config) as booted:
        booted.register("count", COUNTER)
        snapshot = booted.snapshot()
    assert (snapshot.elf.version, snapshot.copy_on_write) == request.param
    return snapshot


@pytest.fixture
def js(js_snapshot: Snapshot) -> Iterator[JavaScript]:
    with JavaScript(js_snapshot, MODULES) as sandboxed:
        yield sandboxed


def with_host(expression: str) -> str:
    """Return a script that evaluates *expression*, in which ``host`` is the module of that name."""
    return f"import('host').then(host => {expression})"


class TestJavaScript:
    pytestmark = needs_real_guests

    def test_evaluates_and_prints(self, js: JavaScript, capsys: pytest.CaptureFixture[str]) -> None:
        assert js.evaluate("console.log(1 + 1, 'ü'); [1.5, 'ü', {a: null}]") == [1.5, "ü", {"a": None}]
        assert capsys.readouterr().out == "2 ü\n"

    def test_evaluates_async_code_and_keeps_globals(self, js: JavaScript) -> None:
        assert js.evaluate("globalThis.x = 5; undefined") is None
        assert js.evaluate("(async () => await x + 1)()") == 6

    def test_handler_gets_the_event_and_the_result_of_a_host_function(self, js: JavaScript) -> None:
        event = {"a": [1, 2, {"b": "ü"}]}
        assert js.call("count", event) == {"calls": 1, "sum": 7, "event": event}
        assert js.call("count") == {"calls": 2, "sum": 7, "event": None}

    def test_guest_reads_the_hosts_clock(self, js: JavaScript) -> None:
        assert js.evaluate("new Date().getFullYear()") > 2021  # 2021 is what it shows where the host has no clock

    @pytest.mark.parametrize("js_snapshot", booted_as(["0.16.0", "0.17.0"]), indirect=True)
    def test_byte_arrays_travel_both_ways(self, js: JavaScript) -> None:
        assert js.evaluate(with_host("Array.from(host.reverse(new Uint8Array([1, 2, 255])))")) == [255, 2, 1]
        nested = with_host("{ const it = host.wrap(new Uint8Array(3)); return [it.size, it.data.length]; }")
        assert js.evaluate(nested) == [3, 3]

    @pytest.mark.parametrize(
        ("act", "code", "text"),
        [
            (lambda js: js.call("absent"), 15, "No handler registered for function absent"),
            (lambda js: js.evaluate("throw new Error('boom')"), 15, '"boom"'),
            (lambda js: js.register("bad", "function handler( {"), 15, "stack"),
            (lambda js: js.evaluate("new Promise(() => {})"), 15, "WouldBlock"),
            (lambda js: js.evaluate(with_host("host.fail()")), 15, "division by zero"),
            (lambda js: js.evaluate(with_host("host.absent()")), 15, "not a function"),
            (lambda js: js.evaluate("import('absent')"), 15, "Error resolving module 'absent'"),
            (lambda js: js.sandbox.call("register_handler", "x"), 5, "with 1 parameters but it takes 3"),
        ],
        ids=["unknown handler", "exception", "syntax", "promise", "host failure", "no function", "no module", "arity"],
    )
    def test_errors_come_back_and_the_guest_goes_on(
        self, js: JavaScript, act: Callable[[JavaScript], Any], code: int, text: str
    ) -> None:
        with pytest.raises(GuestError) as caught:
            act(js)
        assert caught.value.code == code
        assert text in caught.value.message
        assert js.evaluate("1 + 1") == 2

    def test_javascript_catches_what_a_host_function_raises(self, js: JavaScript) -> None:
        caught = js.evaluate("import('host').then(host => host.fail()).catch(error => error.message)")
        assert "division by zero" in caught

    def test_handler_that_returns_undefined_is_an_error(self, js: JavaScript) -> None:
        js.register("silent", "export function handler() {}")
        with pytest.raises(GuestError, match="did not return a value"):
            js.call("silent")

    def test_restore_goes_back_to_the_snapshot_any_number_of_times(self, js: JavaScript) -> None:
        assert js.call("count")["calls"] == 1
        later = js.snapshot()
        for _ in range(2):
            assert js.call("count")["calls"] == 2
            js.restore(later)

    def test_two_sandboxes_from_one_snapshot_share_nothing(self, js: JavaScript, js_snapshot: Snapshot) -> None:
        with JavaScript(js_snapshot, MODULES) as other:
            assert [each.call("count")["calls"] for each in (js, js, other, js, other)] == [1, 2, 1, 3, 2]

    def test_endless_loop_is_killed_and_the_sandbox_restored(self, js: JavaScript, js_snapshot: Snapshot) -> None:
        with killed_once_started(js.sandbox.interrupt_handle()), pytest.raises(ExecutionCanceledByHost):
            js.evaluate(with_host("{ host.start(); for (;;); }"))
        with pytest.raises(PoisonedSandbox):
            js.evaluate("1")
        js.restore(js_snapshot)
        assert js.call("count")["calls"] == 1

    def test_panic_is_reported_with_its_text(self, js: JavaScript, js_snapshot: Snapshot) -> None:
        with pytest.raises(GuestAborted) as caught:
            js.evaluate("'x'.repeat(200000)")  # more than the output buffer holds
        assert caught.value.code == 8
        assert caught.value.message.startswith("panicked at ")
        assert "Not enough space in shared output buffer" in caught.value.message
        js.restore(js_snapshot)
        assert js.evaluate("1 + 1") == 2

    def test_endless_recursion_ends_with_the_guests_memory(self, js: JavaScript) -> None:
        with pytest.raises(GuestAborted) as caught:
            js.evaluate("(function f() { f(); })()")
        assert (caught.value.code, caught.value.message) == (13, "Out of physical memory")
        assert js.sandbox.poisoned


class TestJavaScriptBytes:
    """The encoding of bytes beside JSON. Spec: guest-programs.md 1.4."""

    def test_arguments_of_the_specification(self) -> None:
        text = '[1,"two",{"__bin__":0},{"x":{"__bin__":1}}]'
        sidecar = bytes.fromhex("02000000 03000000 010203 01000000 09")
        assert javascript._unpack_arguments(text, sidecar) == [1, "two", b"\1\2\3", {"x": b"\x09"}]

    def test_results_of_the_specification(self) -> None:
        assert javascript._pack_result(7) == b"\x007"
        packed = javascript._pack_result({"k": b"abc", "j": 1})
        assert packed == bytes.fromhex("02 0b000000 01000000 03000000 616263") + b'{"k": {"__bin__": 0}, "j": 1}'

    @given(st.binary(max_size=40))
    def test_no_sidecar_makes_more_than_it_holds(self, sidecar: bytes) -> None:
        with contextlib.suppress(ValueError):
            blobs = javascript._unpack_sidecar(sidecar)
            assert 4 + sum(4 + len(blob) for blob in blobs) == len(sidecar)

    @pytest.mark.parametrize("text", ['[{"__bin__":0}]', '[{"__bin__":-1}]', '[{"__bin__":true}]', "{}", "[", "NaN"])
    def test_other_arguments_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            javascript._unpack_arguments(text, bytes(4))

    def test_what_json_cannot_carry_is_refused(self) -> None:
        with pytest.raises(TypeError, match="a set cannot go to JavaScript"):
            javascript._pack_result({1})


# ======================================================================================
# Python in WebAssembly
# ======================================================================================

WASM_RELEASES = [release for engine, release in wheels.GUESTS if engine == "wasm"]
TOOLS: python_in_wasm.Tools = {"add": lambda a, b: a + b, "fail": lambda: 1 / 0, "start": started.set}


@pytest.fixture(scope="module", params=booted_as(python_in_wasm.RELEASES))
def wasm_snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """Return a guest of one release at rest, with the component loaded and its first run behind it."""
    release, copy_on_write = request.param
    guest, component = wheels.guest_elf("wasm", release), wheels.python_component(release)
    config = dataclasses.replace(python_in_wasm.SIZES, copy_on_write=copy_on_write)
    with PythonInWasm(guest, component, TOOLS, config=config) as booted:
        assert booted.run("print('up')") == Completed("up\n", "", 0)
        snapshot = booted.snapshot()
        booted.run("import sys; sys.mark = 1")
        booted.restore(snapshot)  # which unmaps the component's file: the snapshot holds it
        assert booted.run("import sys; print(hasattr(sys, 'mark'))").stdout == "False\n"
    assert (snapshot.elf.version, snapshot.copy_on_write) == request.param
    return snapshot


@pytest.fixture
def python(wasm_snapshot: Snapshot) -> Iterator[PythonInWasm]:
    with PythonInWasm(wasm_snapshot, tools=TOOLS) as sandboxed:
        yield sandboxed


class TestPythonInWasm:
    pytestmark = needs_real_guests

    def test_python_runs_and_calls_a_tool_of_the_host(self, python: PythonInWasm) -> None:
        assert python.run("print(call_tool('add', a=3, b=4), 'ü')") == Completed("7 ü\n", "", 0)

    @pytest.mark.parametrize(
        ("code", "stderr", "exit_code"),
        [
            ("1 / 0", "ZeroDivisionError: ", 1),
            ("call_tool('fail')", "RuntimeError: Tool 'fail' failed: division by zero\n", 1),
            ("call_tool('absent')", "RuntimeError: Tool 'absent' failed: unknown tool: absent\n", 1),
            ("call_tool('add', a=1)", "RuntimeError: Tool 'add' failed: ", 1),
            ("raise SystemExit(3)", "", 3),
            ("open('/etc/passwd')", "FileNotFoundError: ", 1),
            ("import os; os.listdir('/')", "FileNotFoundError: ", 1),
            ("import sys; print('x', file=sys.__stdout__, flush=True)", "BrokenPipeError: ", 1),
            ("http_get('http://localhost/')", "Err: ", 1),
        ],
    )
    def test_failures_are_python_s_own(self, python: PythonInWasm, code: str, stderr: str, exit_code: int) -> None:
        completed = python.run(code)
        assert completed.stdout == ""
        assert completed.stderr.startswith(stderr)
        assert completed.exit_code == exit_code
        assert python.run("print(1)").stdout == "1\n"

    def test_time_and_random_numbers_come_from_the_host(self, python: PythonInWasm) -> None:
        code = "import os, time; time.sleep(0.001); print(time.time() > 1.7e9, os.urandom(8) != os.urandom(8))"
        assert python.run(code).stdout == "True True\n"

    def test_restore_goes_back_to_the_snapshot_any_number_of_times(self, python: PythonInWasm) -> None:
        python.run("import sys; sys.mark = 1")
        later = python.snapshot()
        for _ in range(2):
            assert python.run("import sys; sys.mark += 1; print(sys.mark)").stdout == "2\n"
            python.restore(later)

    def test_two_sandboxes_from_one_snapshot_share_nothing(
        self, python: PythonInWasm, wasm_snapshot: Snapshot
    ) -> None:
        with PythonInWasm(wasm_snapshot, tools={**TOOLS, "add": lambda a, b: a * b}) as other:
            python.run("import sys; sys.mark = 1")
            code = "import sys; print(hasattr(sys, 'mark'), call_tool('add', a=3, b=4))"
            assert [python.run(code).stdout, other.run(code).stdout] == ["True 7\n", "False 12\n"]

    def test_endless_loop_is_killed_and_the_sandbox_restored(
        self, python: PythonInWasm, wasm_snapshot: Snapshot
    ) -> None:
        with killed_once_started(python.sandbox.interrupt_handle()), pytest.raises(ExecutionCanceledByHost):
            python.run("call_tool('start')\nwhile True: pass")
        python.restore(wasm_snapshot)
        assert python.run("print(1)").stdout == "1\n"

    def test_panic_is_reported_with_its_text(self, python: PythonInWasm, wasm_snapshot: Snapshot) -> None:
        with pytest.raises(GuestAborted) as caught:
            python.run("print('x' * 300_000)")  # more than the output buffer holds
        assert caught.value.code == 8
        assert caught.value.message.startswith("panicked at ")
        assert "Not enough space in shared output buffer" in caught.value.message
        python.restore(wasm_snapshot)
        assert python.run("print(1)").stdout == "1\n"

    def test_lack_of_memory_is_reported(self, python: PythonInWasm) -> None:
        with pytest.raises(GuestAborted) as caught:
            python.run("bytearray(40_000_000)")
        assert (caught.value.code, caught.value.message) == (13, "Out of physical memory")


@pytest.mark.parametrize("release", WASM_RELEASES)
class TestWasmGuestWithoutComponent:
    pytestmark = needs_real_guests

    def test_driver_says_what_is_missing(self, release: str) -> None:
        with pytest.raises(hyperlight.HyperlightError, match="a component is needed"):
            PythonInWasm(wheels.guest_elf("wasm", release))

    def test_run_before_load_panics(self, release: str) -> None:
        snapshot = UninitializedSandbox(wheels.guest_elf("wasm", release), python_in_wasm.SIZES).snapshot()
        with MultiUseSandbox.from_snapshot(snapshot, config=python_in_wasm.SIZES) as sandbox:
            assert sandbox.call("InitWasmRuntime", b"", returns=Int) == 0
            with pytest.raises(GuestAborted, match="panicked at ") as caught:
                sandbox.call("r#hyperlight::r#sandbox::run", bytes(4), returns=bytes)
            assert caught.value.code == 8


class TestImportsOfTheComponent:
    def test_there_are_173_and_each_has_an_answer_of_its_type(self) -> None:
        signatures = python_in_wasm._signatures()
        assert len({signature.guest_name for signature in signatures}) == len(signatures) == 173
        for signature in signatures:
            answer = signature.answerer(None)(*[b""] * len(signature.parameters))
            assert answer.startswith(b"\1") or signature.result.name != "result"

    @require("wheels")
    @pytest.mark.parametrize("release", WASM_RELEASES)
    def test_the_guest_holds_each_name(self, release: str) -> None:
        elf = wheels.guest_elf("wasm", release).read_bytes()
        absent = [each.guest_name for each in python_in_wasm._signatures() if each.guest_name.encode() not in elf]
        assert absent == []

    @pytest.mark.parametrize(
        ("kind", "value", "encoded"),
        [
            ("string", "add", "03000000 616464"),
            ("tuple<string,string,s32>", ("2\n", "", 0), "02000000 320a 00000000 00000000"),
            ("list<u32>", [1, 2], "02000000 01000000 02000000"),
            ("list<tuple<u8,bool>>", [(5, True)], "01000000 05 01"),
            ("datetime", (1, 2), "0100000000000000 02000000"),
        ],
    )
    def test_values_are_encoded_and_decoded(self, kind: str, value: Any, encoded: str) -> None:
        parsed, data = Type.parse(kind), bytes.fromhex(encoded)
        assert python_in_wasm.encode(parsed, value) == data
        assert python_in_wasm.decode(parsed, data) == value

    def test_results_are_encoded(self) -> None:
        kind = Type.parse("result<string,string>")
        assert python_in_wasm.encode(kind, "7") == bytes.fromhex("00 01000000 37")
        assert python_in_wasm.encode(kind, python_in_wasm.Err("no")) == bytes.fromhex("01 02000000 6e6f")

    @pytest.mark.parametrize(
        ("kind", "answer"),
        [
            ("result<_,stream-error>", "01 01000000"),
            ("result<tuple<list<u8>,bool>,file-error>", "01 1b000000"),
            ("result", "01"),
            ("option<own:fields>", "00"),
            ("list<tuple<own:descriptor,string>>", "00000000"),
            ("-", ""),
        ],
    )
    def test_unsupported_answers_are_errors_where_there_are_errors(self, kind: str, answer: str) -> None:
        assert python_in_wasm.unsupported(Type.parse(kind)) == bytes.fromhex(answer)

    @given(st.sampled_from(["string", "u64", "list<&pollable>", "tuple<string,list<u8>>"]), st.binary(max_size=60))
    def test_decoding_garbage_raises_only_value_error(self, kind: str, data: bytes) -> None:
        parsed = Type.parse(kind)
        with contextlib.suppress(ValueError):
            assert python_in_wasm.encode(parsed, python_in_wasm.decode(parsed, data)) == data


# ======================================================================================
# The examples as their documentation shows them
# ======================================================================================


def usage(example: ModuleType) -> tuple[list[tuple[str, str]], str]:
    """Return the commands in the docstring of *example*, each with what it prints, and the Python code."""
    documentation = example.__doc__ or ""
    commands = re.findall(r"^    \$ python3 examples/\w+.py (.*\n)    (.*\n)", documentation, re.MULTILINE)
    (code,) = re.findall(r"^    from [^\n]*\n(?:\n| {4}[^\n]*\n)+", documentation, re.MULTILINE)
    return commands, textwrap.dedent(code)


class TestUsage:
    pytestmark = needs_real_guests

    @pytest.mark.parametrize("example", [javascript, python_in_wasm])
    def test_commands(self, example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        commands, _ = usage(example)
        assert commands
        for arguments, printed in commands:
            assert example.main(shlex.split(arguments)) == 0
            assert capsys.readouterr() == (printed, "")

    @pytest.mark.parametrize("example", [javascript, python_in_wasm])
    def test_expressions_give_what_their_comments_say(self, example: ModuleType) -> None:
        _, code = usage(example)
        code, checks = re.subn(r"^( *)(\S.*?) +# (.+)$", r"\1assert (\2) == (\3)", code, flags=re.MULTILINE)
        assert checks
        engine = "js" if example is javascript else "wasm"
        files = {"guest": pinned_guests.guest(engine, "0.17.0"), "component": pinned_guests.component("0.17.0")}
        exec(code, {**vars(example), **files})


# ======================================================================================
# The examples as commands
# ======================================================================================


class TestCommands:
    pytestmark = needs_real_guests

    @pytest.mark.parametrize(
        ("arguments", "status", "out", "err"),
        [
            (["undefined"], 0, "", ""),
            (["--event", '{"n": 1}', "export function handler(event) { return [event]; }"], 0, '[{"n": 1}]\n', ""),
            (["throw new Error('boom')"], 1, "", "boom"),
        ],
    )
    def test_javascript(
        self, arguments: list[str], status: int, out: str, err: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        guest = wheels.guest_elf("js", "0.17.0")
        assert javascript.main(["--guest", str(guest), *arguments]) == status
        printed = capsys.readouterr()
        assert printed.out == out
        assert err in printed.err

    def test_python_in_wasm(self, capsys: pytest.CaptureFixture[str]) -> None:
        guest, component = wheels.guest_elf("wasm", "0.17.0"), wheels.python_component("0.17.0")
        code = "print(call_tool('add', a=3, b=4)); raise SystemExit(3)"
        assert python_in_wasm.main(["--guest", str(guest), "--component", str(component), code]) == 3
        assert capsys.readouterr() == ("7\n", "")


@pytest.mark.parametrize("main", [javascript.main, python_in_wasm.main], ids=["javascript", "python_in_wasm"])
def test_guest_that_is_not_there_is_named_in_one_line(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--guest", "/absent/guest", *(["--component", "/absent"] if main is python_in_wasm.main else [])]
    assert main([*options, "1"]) == 1
    assert re.fullmatch(r"\w+: GuestBinary not found: '/absent/guest': .*\n", capsys.readouterr().err)


def test_event_that_is_not_json_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        javascript.main(["--event", "{", "code"])
    assert "argument --event: not JSON: " in capsys.readouterr().err


# ======================================================================================
# A debugger
# ======================================================================================


@require("gdb")
class TestDebugger:
    pytestmark = needs_real_guests

    def test_gdb_stops_at_a_named_function_and_shows_a_backtrace(self, js_snapshot: Snapshot, tmp_path: Path) -> None:
        commands = ["break JS_CallInternal", "continue", "backtrace 2", "delete", "detach"]
        sessions: list[subprocess.Popen[str]] = []

        def attach(address: str) -> None:
            script = ["set remotetimeout 100", f"target remote {address.removeprefix('unix:')}", *commands]
            arguments = [word for command in script for word in ("-ex", command)]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            sessions.append(subprocess.Popen(["gdb", "-nx", "-q", "-batch", *arguments], **pipes))

        debug_info = DebugInfo(f"unix:{tmp_path}/gdb", wait_timeout_s=100, announce=attach)
        config = dataclasses.replace(javascript.SIZES, guest_debug_info=debug_info)
        with JavaScript(js_snapshot, MODULES, config=config) as js:
            assert js.evaluate("1 + 1") == 2
        (gdb,) = sessions
        shown, _ = gdb.communicate(timeout=100)
        assert re.search(r"^Breakpoint 1, 0x[0-9a-f]+ in JS_CallInternal \(\)$", shown, re.MULTILINE), shown
        assert re.search(r"^#0 .* in JS_CallInternal \(\)\n#1 .* in JS_Call \(\)$", shown, re.MULTILINE), shown


# ======================================================================================
# Versions, and machines where none of this runs
# ======================================================================================


@require("kvm")
@require("gcc")
@pytest.mark.parametrize("version", [None, *memory.SUPPORTED_GUEST_VERSIONS])
def test_bookkeeping_after_a_restore_is_what_the_release_knows(version: str | None) -> None:
    """Spec: guest-versions.md 7; a guest without a note is one of 0.14."""
    guest = tiny_guest(user_mode=False, version=version and version.encode())
    with UninitializedSandbox(guest).evolve() as sandbox:
        snapshot = sandbox.snapshot()
        sandbox.restore(snapshot)
        places = (memory.SCRATCH_TOP_SNAPSHOT_PT_BASE, memory.SCRATCH_TOP_GENERATION, memory.SCRATCH_TOP_RNG_SEED)
        table, generation, seed = (sandbox.call(READ, Long(-0x1000 - place)) for place in places)
    known = version not in (None, "0.14.0")
    assert (table, generation) == ((snapshot.layout.pt_base_gpa, snapshot.generation) if known else (0, 0))
    assert seed >> 32 == (version == "0.17.0")


@require("wheels")
@pytest.mark.parametrize("engine", ["js", "wasm"])
def test_guest_of_an_unknown_release_is_refused_with_the_known_ones(engine: str) -> None:
    elf = wheels.guest_elf(engine, "0.17.0").read_bytes()
    (offset,) = [match.start() for match in re.finditer(rb"Hyperlight\0.{1,5}0\.17\.0\0", elf, re.DOTALL)]
    changed = elf[:offset] + elf[offset:].replace(b"0.17.0", b"0.18.0", 1)
    known = "0.14.0, 0.15.0, 0.16.0, 0.17.0"
    with pytest.raises(hyperlight.GuestBinVersionMismatch, match=rf"0\.18\.0.*{re.escape(known)}") as caught:
        UninitializedSandbox(changed)
    assert caught.value.guest_bin_version == "0.18.0"


@require("kvm")
@require("wheels")
@require("emulated_cpl0")
class TestOnEmulatingKvm:
    @pytest.mark.parametrize(("engine", "release"), wheels.GUESTS)
    def test_each_guest_says_in_one_line_that_it_cannot_run_here(self, engine: str, release: str) -> None:
        config = {"js": javascript.SIZES, "wasm": python_in_wasm.SIZES}[engine]
        with pytest.raises(InitializeError) as caught:
            UninitializedSandbox(wheels.guest_elf(engine, release), config).evolve()
        self.check_line(str(caught.value))
        assert isinstance(caught.value.__cause__, EmulationFailure)

    @pytest.mark.parametrize(("engine", "release"), wheels.GUESTS)
    def test_the_command_says_so_and_where_the_guest_stopped(
        self, engine: str, release: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert hyperlight.main(["call", str(wheels.guest_elf(engine, release)), "Any"]) == 1
        out, err = capsys.readouterr()
        line, place, end = err.split("\n")
        assert (out, end) == ("", "")
        self.check_line(line)
        assert re.fullmatch(r"    stopped at 0x[0-9a-f]+ \(\w+\+0x[0-9a-f]+\)", place)

    @pytest.mark.parametrize("example", ["javascript.py", "python_in_wasm.py"])
    @pytest.mark.parametrize("release", python_in_wasm.RELEASES)
    def test_each_example_says_so_too_and_fails(self, example: str, release: str) -> None:
        command = [sys.executable, str(REPOSITORY / "examples" / example), "--release", release, "1"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        self.check_line(done.stderr.removesuffix("\n"))

    @staticmethod
    def check_line(text: str) -> None:
        assert "\n" not in text
        assert "This KVM emulates code at CPL 0" in text
        assert "hardware virtualisation" in text
