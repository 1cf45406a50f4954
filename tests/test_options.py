"""Options: every key optional, every value checked, every error says what is allowed."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifx.errors import ConfigError
from omnifx.options import Options, parse_bytes
from omnifx.policies.fora import Fora
from omnifx.policy import policies
from tests.toys import Pattern


def test_everything_is_optional() -> None:
    options = Options.parse(None)

    assert options == Options.parse({})
    assert (options.policy, options.speedup, options.lowering, options.cache_budget) == (
        "auto",
        None,
        "inductor",
        None,
    )


def test_unknown_keys_are_listed_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown options \['budget', 'speed'\]; known are \['cache_budget'.*'inductor'"
    ):
        Options.parse({"speed": 2, "budget": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "teacache2"},
            rf"option 'policy' found 'teacache2': .*expected one of {re.escape(str(list(policies())))}",
        ),
        ({"policy": 3}, "option 'policy' found 3"),
        ({"speedup": 0.5}, "option 'speedup' found 0.5: .*greater than or equal to 1"),
        ({"speedup": "fast"}, "option 'speedup' found 'fast'"),
        ({"speedup": float("nan")}, "option 'speedup' found nan"),
        ({"steps": 0}, "option 'steps' found 0: .*greater than or equal to 1"),
        ({"steps": 2.5}, "option 'steps' found 2.5"),
        ({"lowering": "onnx"}, "option 'lowering' found 'onnx': .*'inductor' or 'eager'"),
        ({"cache_budget": "2 bananas"}, "option 'cache_budget' found '2 bananas': .*text such as '2GiB'"),
        ({"cache_budget": -1}, "option 'cache_budget' found -1"),
        ({"record_budget": "1.2.3GB"}, "option 'record_budget' found '1.2.3GB'"),
        ({"inductor": 3}, "option 'inductor' found 3"),
    ],
    ids=str,
)
def test_values_out_of_range_name_the_key_and_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Options.parse(options)

    assert "allowed: " in str(caught.value)


@pytest.mark.parametrize("policy", ["fora", Fora(interval=2), Pattern(pattern="Fr")])
def test_a_policy_may_be_a_name_or_an_object(policy: Any) -> None:
    resolved = Options.parse({"policy": policy}).resolved_policy

    assert resolved == (Fora() if policy == "fora" else policy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2**31),
        ("500 MB", 500 * 10**6),
        ("1.5kib", 1536),
        (" 64MiB ", 2**26),
        ("12", 12),
        (12, 12),
        ("0", 0),
        ("7B", 7),
    ],
)
def test_bytes_may_be_written_with_units(text: Any, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert Options.parse({"cache_budget": text}).cache_budget == expected


@given(st.integers(0, 2**60))
def test_plain_numbers_of_bytes_stay_what_they_are(value: int) -> None:
    assert parse_bytes(value) == parse_bytes(str(value)) == value or value > 2**53


@pytest.mark.parametrize("value", [True, -5, 1.5, "GiB", "", "1 TiBB", "-3"])
def test_what_is_no_number_of_bytes_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected bytes"):
        parse_bytes(value)


def test_paths_and_inductor_options_pass_through() -> None:
    options = Options.parse({"profile": Path("a.safetensors"), "plan": "b.json", "inductor": {"max_autotune": True}})

    assert (options.profile, options.plan, options.inductor) == (
        Path("a.safetensors"),
        "b.json",
        {"max_autotune": True},
    )
