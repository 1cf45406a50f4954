"""Peak memory of exports, measured in processes of their own."""

import pytest

from benchmarks.export_memory import peak_of
from tests.exporting import needs_onnx

needs_onnx()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_export_takes_two_and_a_half_times_the_weights_at_most(dtype: str) -> None:
    peak = peak_of(target="onnx", blocks=8, width=1024, dtype=dtype)

    assert peak.weights_bytes > 300 * 2**20  # else it is not the weights that count
    assert peak.ratio <= 2.5
