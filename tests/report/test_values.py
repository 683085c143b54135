import numpy as np
import pytest

from vdiff.report import values


@pytest.mark.parametrize(
    "value, std_error, text",
    [
        (-86.42134, 0.131, "−86.42 ± 0.13"),
        (1.89341, 0.00291, "1.8934 ± 0.0029"),
        (12345.6, 23.0, "12,346 ± 23"),
        (12345, None, "12,345"),
        (12345.6, None, "12,346"),
        (1.23456, None, "1.235"),
        (-0.00001234, None, "−1.23e−05"),
        (0.0, None, "0.000"),
        (-2.0, 0.0, "−2.000"),
        (float("nan"), 0.1, "not a number"),
        (float("-inf"), None, "−∞"),
        (float("inf"), None, "∞"),
        (1.5, float("nan"), "1.500"),
        (None, None, "–"),
        ("exact", None, "exact"),
        (np.float32(1.5), None, "1.500"),
    ],
)
def test_format_value(value, std_error, text):
    assert values.format_value(value, std_error) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.84, "0.8 s"), (42.2, "42 s"), (183.2, "3 min 3 s"), (3599.9, "1 h 0 min")]
)
def test_format_seconds(seconds, text):
    assert values.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (2.1e-6, "0.0021 ms"), (0.00149, "1.5 ms"), (0.00999, "10 ms"), (0.0564, "56 ms")],
)
def test_format_milliseconds(seconds, text):
    assert values.format_milliseconds(seconds) == text
