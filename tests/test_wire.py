"""The FlatBuffers messages of memory.py: exact bytes, round trips, and hostile input."""

from __future__ import annotations

import math
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import memory
from memory import (
    CloseSpan,
    Double,
    EditSpan,
    ErrorCode,
    Float,
    FunctionCall,
    FunctionCallType,
    GuestErrorResult,
    GuestLogData,
    GuestLogLevel,
    GuestStart,
    HostFunctionDefinition,
    HyperlightError,
    Int,
    InvalidFlatBuffer,
    KeyValue,
    LogEvent,
    Long,
    OpenSpan,
    ParameterType,
    ReturnType,
    ReturnValue,
    UInt,
    ULong,
    ValueRangeError,
)

P, R = ParameterType, ReturnType


def _read_vectors() -> dict[str, bytes]:
    lines = Path(__file__).with_name("abi-vectors.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    vectors = {name: bytes.fromhex(digits) for name, _, digits in rows}
    assert all(len(vectors[name]) == int(size) for name, size, _ in rows)
    return vectors


VECTORS = _read_vectors()

# What each vector of the reference says. Spec: abi.md 20.3.
ALL_ARGUMENTS = (
    (P.Int, -1), (P.UInt, 2), (P.Long, -3), (P.ULong, 4), (P.Float, 1.5), (P.Double, 2.5),
    (P.String, "s"), (P.Bool, True), (P.VecBytes, b"\1\2\3"),
)  # fmt: skip
GUEST, HOST = FunctionCallType.Guest, FunctionCallType.Host
FIELDS = (KeyValue("k", "v"),)
HOST_PRINT = HostFunctionDefinition("HostPrint", (P.String,), R.Int)
MEANINGS: dict[str, Any] = {
    "call_noargs_int": FunctionCall("GetCounter", (), GUEST, R.Int),
    "call_void_bytes": FunctionCall("Poke", ((P.VecBytes, bytes.fromhex("deadbeef")),), GUEST, R.Void),
    "call_echo": FunctionCall("Echo", ((P.String, "hi"),), GUEST, R.String),
    "call_add": FunctionCall("Add", ((P.Int, 1), (P.Int, -2)), GUEST, R.Int),
    "call_int0": FunctionCall("F", ((P.Int, 0),), GUEST, R.Int),
    "call_host_print": FunctionCall("HostPrint", ((P.String, "Hello"),), HOST, R.Int),
    "call_all": FunctionCall("AllArgs", ALL_ARGUMENTS, GUEST, R.VecBytes),
    "res_int": ReturnValue(R.Int, 42),
    "res_int0": ReturnValue(R.Int, 0),
    "res_uint": ReturnValue(R.UInt, 0xFFFF_FFFE),
    "res_long": ReturnValue(R.Long, -1),
    "res_ulong": ReturnValue(R.ULong, (1 << 64) - 1),
    "res_float": ReturnValue(R.Float, 1.5),
    "res_double": ReturnValue(R.Double, 2.5),
    "res_bool_true": ReturnValue(R.Bool, True),
    "res_bool_false": ReturnValue(R.Bool, False),
    "res_string": ReturnValue(R.String, "hi"),
    "res_string_empty": ReturnValue(R.String, ""),
    "res_void": ReturnValue(R.Void, None),
    "res_bytes": ReturnValue(R.VecBytes, b"\1\2\3"),
    "res_bytes_empty": ReturnValue(R.VecBytes, b""),
    "gfr_int": ReturnValue(R.Int, 42),
    "gfr_bytes": ReturnValue(R.VecBytes, b"\1\2\3"),
    "err_notfound": GuestErrorResult(ErrorCode.GuestFunctionNotFound, "Nope"),
    "err_noerror_empty": GuestErrorResult(ErrorCode.NoError, ""),
    "err_host": GuestErrorResult(ErrorCode.HostFunctionError, "HostFunction X was not found"),
    "log_info": GuestLogData("msg", "src", GuestLogLevel.Information, "caller", "main.c", 42),
    "log_trace_line0": GuestLogData("m", "s", GuestLogLevel.Trace, "c", "f", 0),
    "ev_open": OpenSpan(1, None, "span", "tgt", 10, FIELDS),
    "ev_open_parent": OpenSpan(2, 1, "span", "tgt", 11),
    "ev_open_parent0": OpenSpan(2, 0, "span", "tgt", 11),
    "ev_close": CloseSpan(1, 20),
    "ev_log": LogEvent(1, "evt", 15, FIELDS),
    "ev_edit": EditSpan(1, FIELDS),
    "ev_start": GuestStart(5),
    "kv": KeyValue("k", "v"),
    "hfd": HOST_PRINT,
    "hfdetails": (HOST_PRINT, HostFunctionDefinition("HostAdd", (P.Int, P.Int), R.Long)),
}


def encode(message: Any) -> bytes:
    """Encode any message by the encoder of its kind."""
    encoders = {
        FunctionCall: lambda: memory.encode_function_call(*message),
        ReturnValue: lambda: memory.encode_return_value(*message),
        GuestErrorResult: lambda: memory.encode_guest_error(*message),
        GuestLogData: lambda: memory.encode_guest_log_data(message),
        KeyValue: lambda: memory.encode_key_value(message),
        HostFunctionDefinition: lambda: memory.encode_host_function_definition(message),
        tuple: lambda: memory.encode_host_function_details(message),
    }
    return encoders.get(type(message), lambda: memory.encode_trace_event(message))()


def decode_one_event(data: bytes) -> Any:
    (event,) = memory.decode_trace_batch(data)
    return event


def decoder_of(message: Any) -> Any:
    """Return the decoder for a message's kind."""
    return {
        FunctionCall: memory.decode_function_call,
        ReturnValue: memory.decode_function_call_result,
        GuestErrorResult: memory.decode_function_call_result,
        GuestLogData: memory.decode_guest_log_data,
        KeyValue: memory.decode_key_value,
        HostFunctionDefinition: memory.decode_host_function_definition,
        tuple: memory.decode_host_function_details,
    }.get(type(message), decode_one_event)


DECODERS = [
    memory.decode_function_call,
    memory.decode_function_call_result,
    memory.decode_guest_log_data,
    memory.decode_key_value,
    memory.decode_trace_batch,
    memory.decode_host_function_definition,
    memory.decode_host_function_details,
]

# ---- the reference's bytes -------------------------------------------------------------


def test_every_vector_has_a_meaning() -> None:
    assert MEANINGS.keys() == VECTORS.keys()
    assert len(VECTORS) == 38


@pytest.mark.parametrize("name", VECTORS)
def test_encoders_reproduce_the_reference_bytes(name: str) -> None:
    assert encode(MEANINGS[name]).hex() == VECTORS[name].hex()


@pytest.mark.parametrize("name", VECTORS)
def test_decoders_read_the_reference_bytes(name: str) -> None:
    decoded = decoder_of(MEANINGS[name])(VECTORS[name])
    assert decoded == MEANINGS[name]
    assert type(decoded) is type(MEANINGS[name])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_recorded_call_decodes_from_any_kind_of_buffer(kind: Any) -> None:
    """B.18/267"""
    assert memory.decode_function_call(kind(VECTORS["call_all"])) == MEANINGS["call_all"]


@pytest.mark.parametrize("call_type", FunctionCallType)
@pytest.mark.parametrize("return_type", ReturnType)
def test_every_call_and_return_kind_travels(call_type: FunctionCallType, return_type: ReturnType) -> None:
    """B.18/269"""
    call = FunctionCall("f", ALL_ARGUMENTS, call_type, return_type)
    decoded = memory.decode_function_call(encode(call))
    assert decoded == call
    assert (type(decoded.call_type), type(decoded.return_type)) == (FunctionCallType, ReturnType)


# ---- the rules of the canonical encoding, abi.md 10.10 -----------------------------------


def test_a_scalar_equal_to_its_default_is_omitted() -> None:
    assert len(encode(ReturnValue(R.Int, 0))) == 48
    assert len(encode(ReturnValue(R.Int, 1))) == 64


def test_a_zero_parent_is_written_because_absence_means_none() -> None:
    absent, zero = encode(OpenSpan(1, None, "n", "t", 0)), encode(OpenSpan(1, 0, "n", "t", 0))
    assert len(zero) >= len(absent) + 8
    assert (decode_one_event(absent).parent, decode_one_event(zero).parent) == (None, 0)


@pytest.mark.parametrize("return_type", [R.Long, R.ULong, R.Double])
def test_eight_byte_values_are_aligned_from_the_size_prefix_on(return_type: ReturnType) -> None:
    message = encode(ReturnValue(return_type, 3))
    code = {R.Long: "<q", R.ULong: "<Q", R.Double: "<d"}[return_type]
    assert message.rindex(struct.pack(code, 3)) % 8 == 0


def test_equal_vtables_are_written_once() -> None:
    one, two, three = (len(encode(FunctionCall("f", ((P.Int, 7),) * n, GUEST, R.Int))) for n in (1, 2, 3))
    # A further Int costs an element (4), a Parameter table (12) and an hlint (8). The second
    # also has a new Parameter vtable (8): its value lies nearer because hlint's vtable is shared.
    assert (two - one, three - two) == (32, 24)


def test_strings_end_in_nul_and_the_first_created_is_last() -> None:
    assert encode(FunctionCall("Name", ((P.String, "text"),), GUEST, R.Int)).rstrip(b"\0").endswith(b"Name")
    assert b"text\0" in encode(FunctionCall("Name", ((P.String, "text"),), GUEST, R.Int))


def test_no_parameters_means_no_vector_but_an_empty_message_is_written() -> None:
    assert memory.decode_function_call(VECTORS["call_noargs_int"]).parameters == ()
    assert VECTORS["err_noerror_empty"] == memory.encode_guest_error(ErrorCode.NoError, "")


@pytest.mark.parametrize("return_type", [R.Float, R.Double])
def test_minus_zero_is_written_so_that_its_sign_survives(return_type: ReturnType) -> None:
    value = memory.decode_function_call_result(memory.encode_return_value(return_type, -0.0))
    assert isinstance(value, ReturnValue)
    assert math.copysign(1, value.value) == -1


# ---- round trips -------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
payloads = st.binary(max_size=60)
u64 = st.integers(0, ULong.maximum)


def integers(wrapper: Any) -> st.SearchStrategy[int]:
    low, high = wrapper.minimum, wrapper.maximum
    return st.integers(low, high) | st.sampled_from([0, low, high])


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "Int": integers(Int),
    "UInt": integers(UInt),
    "Long": integers(Long),
    "ULong": integers(ULong),
    "Float": st.floats(width=32, allow_nan=False),
    "Double": st.floats(allow_nan=False),
    "String": texts,
    "Bool": st.booleans(),
    "VecBytes": payloads,
    "Void": st.none(),
}
parameters = st.sampled_from(ParameterType).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind.name]))
calls = st.builds(
    FunctionCall,
    texts,
    st.lists(parameters, max_size=6).map(tuple),
    st.sampled_from(FunctionCallType),
    st.sampled_from(ReturnType),
)
return_values = st.sampled_from(ReturnType).flatmap(
    lambda kind: st.builds(ReturnValue, st.just(kind), VALUES[kind.name])
)
guest_errors = st.builds(GuestErrorResult, st.sampled_from(ErrorCode), texts)
logs = st.builds(
    GuestLogData, texts, texts, st.sampled_from(GuestLogLevel), texts, texts, st.integers(0, UInt.maximum)
)
pairs = st.builds(KeyValue, texts, texts)
fields = st.lists(pairs, max_size=4).map(tuple)
events = st.one_of(
    st.builds(OpenSpan, u64, st.none() | u64, texts, texts, u64, fields),
    st.builds(CloseSpan, u64, u64),
    st.builds(LogEvent, u64, texts, u64, fields),
    st.builds(EditSpan, u64, fields),
    st.builds(GuestStart, u64),
)
definitions = st.builds(
    HostFunctionDefinition,
    texts,
    st.lists(st.sampled_from(ParameterType), max_size=6).map(tuple),
    st.sampled_from(ReturnType),
)
messages = st.one_of(
    calls, return_values, guest_errors, logs, pairs, events, definitions, st.lists(definitions).map(tuple)
)


@given(messages)
@settings(max_examples=400)
def test_every_message_survives_the_round_trip(message: Any) -> None:
    decoded = decoder_of(message)(encode(message))
    assert decoded == message
    assert repr(decoded) == repr(message)  # tells -0.0 from 0.0 and True from 1


@given(st.lists(events, max_size=5))
def test_trace_batches_are_concatenations(batch: list[Any]) -> None:
    """B.17/266"""
    assert memory.decode_trace_batch(b"".join(map(memory.encode_trace_event, batch))) == batch


@given(events, st.data())
def test_a_truncated_trace_batch_is_refused(event: Any, data: Any) -> None:
    """B.17/266"""
    message = memory.encode_trace_event(event)
    end = data.draw(st.integers(1, len(message) - 1))
    with pytest.raises(InvalidFlatBuffer):
        memory.decode_trace_batch(message[:end])


EXTREMES = [0.0, 1.0, -1.0, math.pi, -math.pi, math.e, math.inf, -math.inf]
DOUBLES = [*EXTREMES, -0.0, 1.7976931348623157e308, -1.7976931348623157e308, 2.2250738585072014e-308, 5e-324]
FLOATS = [*EXTREMES, -0.0, 3.4028234663852886e38, -3.4028234663852886e38, 1.1754943508222875e-38, 1e-45]


@pytest.mark.parametrize("value", DOUBLES)
def test_doubles_come_back_equal(value: float) -> None:
    """B.5/92"""
    assert repr(_echo(P.Double, R.Double, value)) == repr((value, value))


@pytest.mark.parametrize("value", FLOATS)
def test_floats_come_back_rounded_to_32_bits(value: float) -> None:
    """B.5/93"""
    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    assert repr(_echo(P.Float, R.Float, value)) == repr((rounded, rounded))


@pytest.mark.parametrize("kinds", [(P.Double, R.Double), (P.Float, R.Float)])
def test_nan_comes_back_as_nan(kinds: tuple[ParameterType, ReturnType]) -> None:
    """B.5/92, B.5/93"""
    assert all(map(math.isnan, _echo(*kinds, math.nan)))


def _echo(wire_type: ParameterType, return_type: ReturnType, value: Any) -> tuple[Any, Any]:
    """Send a value as a parameter and as a result; return what arrives of each."""
    call = memory.decode_function_call(
        memory.encode_function_call("f", [(wire_type, value)], GUEST, return_type)
    )
    result = memory.decode_function_call_result(memory.encode_return_value(return_type, value))
    assert isinstance(result, ReturnValue)
    return call.parameters[0][1], result.value


def test_payloads_of_ten_mebibytes_travel() -> None:
    blob, text = bytes(range(256)) * 40960, "0123456789abcdef" * 655360
    call = FunctionCall(
        "f", ((P.VecBytes, blob), (P.VecBytes, blob), (P.String, text), (P.String, text)), GUEST, R.Int
    )
    assert memory.decode_function_call(encode(call)) == call
    for result in (ReturnValue(R.VecBytes, blob), ReturnValue(R.String, text)):
        assert memory.decode_function_call_result(encode(result)) == result


# ---- shortcuts agree with the long way -----------------------------------------------------


def outcome(decoder: Any, data: bytes) -> str:
    """Return what a decoder makes of `data`, an error included; anything but InvalidFlatBuffer gets out."""
    try:
        return repr(decoder(data))
    except InvalidFlatBuffer as error:
        return f"InvalidFlatBuffer: {error}"


@given(calls)
def test_a_plan_gives_the_bytes_that_the_builder_gives_for_the_values_themselves(call: FunctionCall) -> None:
    rows = tuple(
        # The builder knows no minus zero; written or omitted is decided before it is asked.
        (kind + 1, (value or abs(value) if isinstance(value, float) else value,))
        for kind, value in call.parameters
    )
    plain = memory._encode(memory._FUNCTION_CALL, (call.name, rows, call.call_type, call.return_type))
    positive = tuple((kind, row[0]) for (kind, _), (_, row) in zip(call.parameters, rows, strict=True))
    assert encode(call._replace(parameters=positive)) == plain
    memory._call_plan.cache_clear()
    assert encode(call._replace(parameters=positive)) == plain


@given(return_values | guest_errors)
def test_shortcuts_decode_results_as_the_reader_does(result: Any) -> None:
    assert outcome(memory.decode_function_call_result, encode(result)) == repr(result)
    assert outcome(memory._decode_any_result, encode(result)) == repr(result)


@st.composite
def damaged(draw: Any, originals: st.SearchStrategy[bytes]) -> bytes:
    """Draw a valid message with a few bytes flipped, words overwritten, cut off or added."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["byte", "word", "cut", "extend"]))
        at = draw(st.integers(0, max(0, len(data) - 4)))
        if kind == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "word":
            near = st.integers(0, len(data)) | st.integers(-len(data), 0).map(lambda n: n % (1 << 32))
            data[at : at + 4] = draw(near | st.integers(0, UInt.maximum)).to_bytes(4, "little")
        elif kind == "cut":
            del data[at:]
        else:
            data += draw(st.binary(min_size=1, max_size=8))
    if draw(st.booleans()) and len(data) >= 4:  # with a true size prefix the damage gets further in
        data[:4] = (len(data) - 4).to_bytes(4, "little")
    return bytes(data)


@given(damaged((return_values | guest_errors).map(encode)))
@settings(max_examples=1000)
def test_shortcuts_judge_damaged_results_as_the_reader_does(data: bytes) -> None:
    assert outcome(memory.decode_function_call_result, data) == outcome(memory._decode_any_result, data)


def test_the_shortcuts_take_every_canonical_result() -> None:
    """They agree with the reader; here: they are not skipped."""
    names = [name for name in VECTORS if name.startswith(("res_", "gfr_"))]
    taken = [memory._RESULT_SHORTCUTS[VECTORS[name][memory._SHORTCUT_KEY]](VECTORS[name]) for name in names]
    assert taken == [MEANINGS[name] for name in names]


# ---- hostile input -------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=bytes(8))
@example(data=bytes.fromhex("04000000ffffffff"))
def test_arbitrary_bytes_raise_only_invalid_flat_buffer(decoder: Any, data: bytes) -> None:
    """B.18/270"""
    outcome(decoder, data)
    outcome(decoder, len(data).to_bytes(4, "little") + data)


@pytest.mark.parametrize("decoder", DECODERS)
@given(data=damaged(st.sampled_from(list(VECTORS.values()))))
@settings(max_examples=300)
def test_damaged_messages_raise_only_invalid_flat_buffer(decoder: Any, data: bytes) -> None:
    """B.18/270, B.17/266"""
    outcome(decoder, data)


@pytest.mark.parametrize("name", VECTORS)
def test_every_truncation_and_extension_is_refused(name: str) -> None:
    """B.18/270: the size prefix must tell the exact size."""
    decoder, data = decoder_of(MEANINGS[name]), VECTORS[name]
    for wrong in [*(data[:size] for size in range(1, len(data))), data + b"\0", data + bytes(8)]:
        with pytest.raises(InvalidFlatBuffer):
            decoder(wrong)


@pytest.mark.parametrize("name", VECTORS)
def test_no_single_wrong_byte_gets_anything_else_out(name: str) -> None:
    """B.18/270"""
    for at in range(len(VECTORS[name])):
        for wrong in (0, 1, 4, 0x7F, 0x80, 0xFF):
            outcome(decoder_of(MEANINGS[name]), VECTORS[name][:at] + bytes([wrong]) + VECTORS[name][at + 1 :])


def patched(name: str, at: int, code: str, value: int) -> bytes:
    data = bytearray(VECTORS[name])
    struct.pack_into(code, data, at, value)
    return bytes(data)


UNION_HALF = "Parameter.value: a union has both a type and a value, or neither"


# Positions are those of abi.md 20.3.
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "size prefix: 4 bytes at 0 are outside the message of 0 bytes"),
        (patched("call_echo", 0, "<I", 95), "size prefix: says 95 bytes, 96 bytes follow it"),
        (patched("call_echo", 4, "<I", 0xFFFFFFFC), "FunctionCall: 4 bytes at 4294967296 are outside"),
        (patched("call_echo", 4, "<I", 0x12), "FunctionCall: position 22 is not a multiple of 4"),
        (patched("call_echo", 0x14, "<i", -100), "FunctionCall: 2 bytes at 120 are outside the message"),
        (patched("call_echo", 0x14, "<i", 100), "FunctionCall: 2 bytes at -80 are outside the message"),
        (patched("call_echo", 8, "<H", 2), "FunctionCall: vtable of 2 bytes; the size is even"),
        (patched("call_echo", 8, "<H", 13), "FunctionCall: vtable of 13 bytes; the size is even"),
        (patched("call_echo", 8, "<H", 0x1000), "FunctionCall: 4096 bytes at 8 are outside the message"),
        (patched("call_echo", 12, "<H", 0), "Missing field: function_name"),
        (patched("call_echo", 0x1A, "<B", 0), "FunctionCall.function_call_type: unknown value 0"),
        (patched("call_echo", 0x1A, "<B", 3), "FunctionCall.function_call_type: unknown value 3"),
        (patched("call_echo", 0x1B, "<B", 10), "FunctionCall.expected_return_type: unknown value 10"),
        (patched("call_echo", 0x3B, "<B", 0), UNION_HALF),
        (patched("call_echo", 0x3B, "<B", 10), "Parameter.value: unknown type 10"),
        (patched("call_echo", 0x32, "<H", 0), UNION_HALF),
        (patched("call_echo", 0x30, "<I", 0), "Missing field: value"),
        (patched("call_echo", 0x24, "<I", 1 << 30), "FunctionCall.parameters: 4294967296 bytes at 40 are"),
        (patched("call_echo", 0x50, "<I", 200), "hlstring.value: 200 bytes at 84 are outside the message"),
        (patched("call_echo", 0x50, "<I", 1), "hlstring.value: string is not followed by a NUL byte"),
        (patched("call_echo", 0x54, "<B", 0xFF), "hlstring.value: string is not UTF-8 at its byte 0"),
    ],
)
def test_each_lie_is_named(data: bytes, message: str) -> None:
    with pytest.raises(InvalidFlatBuffer) as caught:
        memory.decode_function_call(data)
    assert str(caught.value).startswith(message)


def test_a_result_of_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidFlatBuffer, match=r"ReturnValueBox.value: unknown type 11"):
        memory.decode_function_call_result(patched("res_int", 0x2B, "<B", 11))
    with pytest.raises(InvalidFlatBuffer, match=r"FunctionCallResult.result: unknown type 3"):
        memory.decode_function_call_result(patched("res_int", 0x17, "<B", 3))


def test_a_misaligned_long_is_refused() -> None:
    """The encoding without the size prefix, four zero bytes in front, is misaligned. Spec: abi.md 10.9."""
    body = bytearray(VECTORS["res_long"])
    body[4:4] = bytes(4)
    struct.pack_into("<II", body, 0, len(body) - 4, 20)
    with pytest.raises(InvalidFlatBuffer, match=r"hllong.value: position 68 is not a multiple of 8"):
        memory.decode_function_call_result(bytes(body))


def test_unassigned_error_codes_are_unknown_errors() -> None:
    for code in (1, 9, 18, 1 << 63):
        result = memory.decode_function_call_result(patched("err_notfound", 0x30, "<Q", code))
        assert result == GuestErrorResult(ErrorCode.UnknownError, "Nope")


def test_an_absent_error_message_is_empty() -> None:
    result = memory.decode_function_call_result(patched("err_notfound", 0x26, "<H", 0))
    assert result == GuestErrorResult(ErrorCode.GuestFunctionNotFound, "")


@pytest.mark.parametrize(
    ("slot", "name"), [(0, "message"), (1, "source"), (3, "caller"), (4, "source_file")]
)
def test_log_data_needs_all_four_strings(slot: int, name: str) -> None:
    with pytest.raises(InvalidFlatBuffer) as caught:
        memory.decode_guest_log_data(patched("log_info", 0x0C + 2 * slot, "<H", 0))
    assert str(caught.value) == f"Missing field: {name}"


def test_log_data_of_unknown_level_is_refused() -> None:
    with pytest.raises(InvalidFlatBuffer, match=r"GuestLogData.level: unknown value 7"):
        memory.decode_guest_log_data(patched("log_info", 0x1F, "<B", 7))


@pytest.mark.parametrize("value", [7, 0])
def test_any_valid_layout_decodes(value: int) -> None:
    """Front to back, two tables with one vtable, a default written out, a slot nobody knows, a tail."""
    message = struct.pack(
        "<II 4H iB3xI iB3xI 5H2x iI 4s",
        60, 12,  # size prefix; at 4: root at 16
        8, 12, 4, 8,  # at 8: vtable: type at 4, value at 8
        8, 1, 4,  # at 16: FunctionCallResult, whose value is at 24 + 4
        20, 1, 16,  # at 28: ReturnValueBox, whose value is at 36 + 16
        10, 8, 4, 0, 4,  # at 40: vtable of hlint, with three slots
        12, value,  # at 52: hlint
        b"tail",
    )  # fmt: skip
    assert len(message) == 64
    assert memory.decode_function_call_result(message) == ReturnValue(R.Int, value)


def parameters_vector(call: bytes | bytearray) -> int:
    """Return the position of the length of a call's parameter vector."""
    root = 4 + struct.unpack_from("<I", call, 4)[0]
    vtable = root - struct.unpack_from("<i", call, root)[0]
    at = root + struct.unpack_from("<H", call, vtable + 6)[0]
    position: int = at + struct.unpack_from("<I", call, at)[0]
    return position


def sharing_call(count: int, value: tuple[ParameterType, Any]) -> bytes:
    """Return a call with `count` parameters that all point to the first one's table."""
    others = [(P.Bool, False)] * (count - 1)
    call = bytearray(memory.encode_function_call("f", [value, *others], GUEST, R.Int))
    first = parameters_vector(call) + 4
    target = first + struct.unpack_from("<I", call, first)[0]
    offsets = range(target - first, target - first - 4 * count, -4)
    struct.pack_into(f"<{count}I", call, first, *offsets)
    return bytes(call)


def test_parameters_may_share_a_table() -> None:
    call = memory.decode_function_call(sharing_call(9, (P.String, "shared")))
    assert call.parameters == ((P.String, "shared"),) * 9


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (lambda: sharing_call(20_000, (P.VecBytes, bytes(100_000))), "too many parts of the message overlap"),
        (lambda: sharing_call(20_000, (P.String, "x" * 100_000)), "too many parts of the message overlap"),
        (lambda: patched("call_echo", 0x24, "<I", 1 << 30), "are outside the message"),
        (lambda: patched("call_echo", 0x24, "<I", UInt.maximum), "are outside the message"),
    ],
)
def test_small_messages_cannot_cost_much_memory_or_time(bomb: Any, message: str) -> None:
    data = bomb()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFlatBuffer, match=message):
            memory.decode_function_call(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(data) + (16 << 20)


def test_the_number_of_tables_is_bounded() -> None:
    with pytest.raises(InvalidFlatBuffer, match="more than 65536 tables in one message"):
        memory.decode_function_call(sharing_call(40_000, (P.Int, 1)))


# ---- Python values and their wire types ------------------------------------------------------


@pytest.mark.parametrize("wrapper", [Int, UInt, Long, ULong])
def test_integer_wrappers_check_their_range(wrapper: Any) -> None:
    for value in (wrapper.minimum, 0, wrapper.maximum):
        assert wrapper(value) == value
    for value in (wrapper.minimum - 1, wrapper.maximum + 1, 10**5000, -(10**5000)):
        with pytest.raises(ValueRangeError):
            wrapper(value)


def test_the_range_error_names_the_range() -> None:
    with pytest.raises(ValueRangeError) as caught:
        Int(2147483648)
    assert str(caught.value) == "Int must be between -2147483648 and 2147483647, got 2147483648"
    assert isinstance(caught.value, HyperlightError)


class Index:
    def __index__(self) -> int:
        return 7


def test_integer_wrappers_take_anything_with_an_index() -> None:
    assert Int(Index()) == 7
    assert Double(Index()) == 7.0


@pytest.mark.parametrize("value", [True, 1.5, "5", None, b"5", [10**5000]])
def test_integer_wrappers_refuse_other_types(value: Any) -> None:
    with pytest.raises(ValueRangeError, match="Int needs an int, got "):
        Int(value)


@pytest.mark.parametrize("value", [True, "1.5", None, b"1", [1.0]])
def test_float_wrappers_refuse_other_types(value: Any) -> None:
    with pytest.raises(ValueRangeError, match="Double needs a float, got "):
        Double(value)


def test_float_rounds_and_refuses_what_would_become_infinite() -> None:
    assert Float(0.1) == struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert Float(math.inf) == math.inf
    assert Double(float("1e400")) == math.inf
    with pytest.raises(ValueRangeError, match=r"Float cannot hold a number as large as 1e\+39"):
        Float(1e39)
    with pytest.raises(ValueRangeError, match="Double cannot hold a number as large as 10000"):
        Double(10**400)


@pytest.mark.parametrize("value", [Int(5), UInt(5), Long(-5 + 6), ULong(5), Float(1.5), Double(2.5)])
def test_wrappers_are_numbers_with_a_telling_repr(value: Any) -> None:
    base = int if isinstance(value, int) else float
    assert repr(value) == f"{type(value).__name__}({base(value)!r})"
    assert (str(value), f"{value}", hash(value)) == (str(base(value)), f"{base(value)}", hash(base(value)))
    assert type(value + value) is base
    copy = pickle.loads(pickle.dumps(value))
    assert (copy, type(copy)) == (value, type(value))


@pytest.mark.parametrize(
    ("value", "wire_type"),
    [
        (True, P.Bool), (0, P.Int), (Int.maximum, P.Int), (Int.maximum + 1, P.Long),
        (Int.minimum - 1, P.Long),
        (Long.maximum + 1, P.ULong), (1.0, P.Double), ("", P.String), (b"", P.VecBytes),
        (bytearray(), P.VecBytes), (memoryview(b""), P.VecBytes), (Int(1), P.Int), (UInt(1), P.UInt),
        (Long(1), P.Long), (ULong(1), P.ULong), (Float(1), P.Float), (Double(1), P.Double),
        (ErrorCode.OutbError, P.Int),
    ],
)  # fmt: skip
def test_the_wire_type_of_a_python_value(value: Any, wire_type: ParameterType) -> None:
    assert memory.wire_type_of(value) is wire_type


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, 10**4000, None, [1], 1j, object()])
def test_values_without_a_wire_type_are_refused(value: Any) -> None:
    with pytest.raises(ValueRangeError):
        memory.wire_type_of(value)


@pytest.mark.parametrize(
    ("return_type", "value", "message"),
    [
        (R.Int, 1 << 40, "Int must be between -2147483648 and 2147483647, got 1099511627776"),
        (R.UInt, -1, "UInt must be between 0 and 4294967295, got -1"),
        (R.Int, "5", "Int needs an int, got str '5'"),
        (R.Int, True, "Int needs an int, got bool True"),
        (R.Double, "x", "Double needs a float, got str 'x'"),
        (R.String, b"x", "String needs a str, got bytes b'x'"),
        (R.String, "a\ud800", "String is not valid Unicode: lone surrogate at index 1"),
        (R.Bool, 1, "Bool needs a bool, got int 1"),
        (R.VecBytes, "x", "VecBytes needs bytes, got str 'x'"),
        (R.Void, 0, "Void needs None, got int 0"),
        (R.Int, None, "Int needs an int, got None"),
    ],
)
def test_values_that_do_not_fit_their_wire_type_are_refused(
    return_type: ReturnType, value: Any, message: str
) -> None:
    with pytest.raises(ValueRangeError) as caught:
        memory.encode_return_value(return_type, value)
    assert str(caught.value) == message
    if return_type is not R.Void:
        with pytest.raises(ValueRangeError) as caught:
            memory.encode_function_call("f", [(P[return_type.name], value)], GUEST, R.Void)
        assert str(caught.value) == message


def test_numbers_and_strings_that_do_not_fit_other_messages_are_refused() -> None:
    with pytest.raises(ValueRangeError, match="GuestLogData: a number does not fit its field"):
        memory.encode_guest_log_data(GuestLogData("", "", GuestLogLevel.Error, "", "", -1))
    with pytest.raises(ValueRangeError, match="lone surrogate at index 0"):
        memory.encode_guest_error(ErrorCode.GuestError, "\udfff")
    with pytest.raises(ValueRangeError, match="lone surrogate at index 0"):
        memory.encode_function_call("\udfff", (), GUEST, R.Void)


def test_a_message_of_two_gibibytes_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueRangeError, match="longer than 2147483647 bytes"):
        memory._result_plan(R.VecBytes, 1 << 31)


def test_bytes_likes_of_every_kind_are_sent_as_their_bytes() -> None:
    strided = memoryview(b"a-b-c-")[::2]
    wide = memoryview(struct.pack("<2H", 1, 2)).cast("H")
    for value in (bytearray(b"abc"), strided, wide):
        result = memory.decode_function_call_result(memory.encode_return_value(R.VecBytes, value))
        assert result == ReturnValue(R.VecBytes, bytes(value))


@pytest.mark.parametrize(
    ("wire_type", "value", "text"),
    [
        (P.Int, -1, "Int(-1)"),
        (P.ULong, 5, "ULong(5)"),
        (P.Double, 1.0, "Double(1.0)"),
        (P.Float, math.nan, "Float(NaN)"),
        (P.Double, -math.inf, "Double(-inf)"),
        (P.Bool, True, "Bool(true)"),
        (P.String, 'say "hi"\n\x7f', r'String("say \"hi\"\n\u{7f}")'),
        (P.String, "x" * 65, 'String("' + "x" * 64 + '"...)'),
        (P.VecBytes, b"\1\2", "VecBytes([1, 2])"),
        (P.Int, Int(3), "Int(3)"),
    ],
)
def test_parameters_are_spelled_as_in_the_reference(wire_type: ParameterType, value: Any, text: str) -> None:
    assert memory.spell_parameter(wire_type, value) == text


SIMPLE_VALUES = st.one_of(
    *(st.integers(-(2**31), 2**31 - 1), st.text(max_size=9), st.booleans(), st.binary(max_size=9)),
)


@given(st.lists(SIMPLE_VALUES, max_size=4), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=3))
def test_a_call_like_one_seen_before_is_read_like_any_other(
    values: list[Any], spoilt: list[tuple[int, int]]
) -> None:
    """What the shortcut for known calls makes of a message is what the reader makes of it, a spoilt one included."""

    def outcome(decode: Callable[[bytes], FunctionCall], data: bytes) -> object:
        try:
            return repr(decode(data))  # a NaN is not equal to itself
        except InvalidFlatBuffer:
            return InvalidFlatBuffer

    message = bytearray(memory.encode_guest_call("Known", values, ReturnType.Int))
    call = memory.decode_function_call(bytes(message))
    assert call == memory._decode_any_call(bytes(message))
    assert memory.decode_function_call(bytes(message)) == call, "by its plan, the second time"
    for position, byte in spoilt:
        message[position % len(message)] = byte
    data = bytes(message)
    assert outcome(memory.decode_function_call, data) == outcome(memory._decode_any_call, data)
