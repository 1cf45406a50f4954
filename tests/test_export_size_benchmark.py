"""The benchmark of exports at real size, on a model of one block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.export_size import main
from tests.exporting import needs_onnx

needs_onnx()
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'omnifx[tensorrt-rtx]'")


@pytest.mark.slow
def test_a_model_of_one_block_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--depth", "1", "--width", "144", "--out", str(tmp_path / "size.json")])

    figures = json.loads((tmp_path / "size.json").read_text(encoding="utf-8"))["figures"]
    graphs = {row["graph"]: row for row in figures["graphs"]}
    assert (graphs["full"]["attention_kernels"], graphs["reuse"]["attention_kernels"]) == (1, 0)
    assert graphs["reuse"]["engine_mib"] < graphs["full"]["engine_mib"]
    assert figures["export"]["peak_bytes"] >= figures["export"]["peak_bytes_with_the_model_loaded"] > 2**27
    for part in ("export", "build"):
        assert figures[part]["seconds"] > 0
        assert figures[part]["cpu_seconds"] > 0
    assert "export: " in capsys.readouterr().out
