"""The guests' printf, which formats doubles by integer arithmetic alone, against Python's % operator."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from conftest import require
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hyperlight
from hyperlight import Double, Long

pytestmark = require("kvm")

flags = st.text("-+ #0", max_size=3)
widths = st.one_of(st.just(""), st.integers(1, 40).map(str))
precisions = st.one_of(st.just(""), st.integers(0, 20).map(".{}".format))
guest_calls = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def guest() -> Iterator[hyperlight.MultiUseSandbox]:
    with hyperlight.UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox


@guest_calls
@given(flags, widths, precisions, st.sampled_from("fFeEgG"), st.floats())
@example("", "", ".0", "f", 2.5)  # a tie: to even
@example("", "", ".2", "e", 9.995e22)  # a carry into a new digit
@example("", "", "", "f", 1e22)  # more integer digits than the mantissa has
@example("", "", "", "g", 5e-324)  # the smallest there is
@example("", "", "", "e", 1.7976931348623157e308)  # the largest
@example("0", "8", "", "f", math.inf)  # no zeros before inf
def test_doubles(
    guest: hyperlight.MultiUseSandbox, flag: str, width: str, precision: str, kind: str, value: float
) -> None:
    value = abs(value) if math.isnan(value) else value  # Python's % does not show the sign of a NaN
    if not math.isfinite(value):
        flag = flag.replace("0", "")  # C pads these with spaces, Python with zeros
    conversion = f"%{flag}{width}{precision}{kind}"
    assert guest.call("FormatDouble", conversion, Double(value), returns=str) == conversion % value


@guest_calls
@given(flags, widths, st.integers(-(2**63), 2**63 - 1))
@example("", "", -(2**63))
def test_decimal_integers(guest: hyperlight.MultiUseSandbox, flag: str, width: str, value: int) -> None:
    flag = flag.replace("#", "")
    assert guest.call("FormatLong", f"%{flag}{width}ld", Long(value), returns=str) == f"%{flag}{width}d" % value


@guest_calls
@given(st.sampled_from(["lx", "lX"]), widths, st.booleans(), st.integers(1, 2**63 - 1))
def test_hexadecimal_integers(
    guest: hyperlight.MultiUseSandbox, kind: str, width: str, alternate: bool, value: int
) -> None:
    start = "%#" if alternate else "%"
    expected = f"{start}{width}{kind[-1]}" % value
    assert guest.call("FormatLong", f"{start}{width}{kind}", Long(value), returns=str) == expected


@pytest.mark.parametrize(
    ("conversion", "value", "text"),
    [
        ("%.0ld", 0, ""),
        ("%#lo", 8, "010"),
        ("%.5ld|", -42, "-00042|"),
        ("%hhd", 300, "44"),
        ("%hu", -1, "65535"),
        ("%c!", 65, "A!"),
        ("%p", 0x1234, "0x1234"),
        ("100%%", 0, "100%"),
    ],
)
def test_what_python_spells_otherwise(
    guest: hyperlight.MultiUseSandbox, conversion: str, value: int, text: str
) -> None:
    assert guest.call("FormatLong", conversion, Long(value), returns=str) == text
