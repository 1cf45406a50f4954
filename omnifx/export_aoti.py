"""Write the graphs of a bundle for AOTInductor: one package of machine code, and the weights that it is given."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnifx.backends.aoti import Compiled, builder_of, check_options, compile_graph, write_package
from omnifx.backends.weights_file import WeightsFile, bytes_of
from omnifx.bundle import Constant, EngineInfo, file_info
from omnifx.export_files import GraphFiles, Tick
from omnifx.export_graphs import Graph
from omnifx.export_schedule import dtype_name

PACKAGE = "model.pt2"


@dataclass(frozen=True)
class AotiWriter:
    """Compiles every graph, and packs them into one file.

    Args:
        options: Of Inductor, by name.

    Raises: ConfigError for options that Inductor does not have.
    """

    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.options)

    def __call__(self, folder: Path, graphs: Mapping[str, Graph], weights: WeightsFile, tick: Tick) -> GraphFiles:
        """Write all graphs into the folder."""
        compiled: dict[str, Compiled] = {}
        index: dict[str, Constant] = {}
        with tempfile.TemporaryDirectory(prefix="omnifx-aoti-") as work:
            for number, (name, graph) in enumerate(graphs.items()):
                tick(f"compiling {name}", len(graphs))
                made = compile_graph(
                    graph.gm, graph.state, name=name, folder=Path(work) / str(number), options=self.options
                )
                compiled[name] = replace(made, weights={})
                add_weights(index, name, made.weights, weights)
            write_package(folder / PACKAGE, compiled)
        info = file_info(folder, PACKAGE)
        files = dict.fromkeys(graphs, info)
        engine = EngineInfo(files=files, builder=builder_of(compiled, _device(graphs), self.options), weights=index)
        return GraphFiles(files, {"aoti": engine})


def add_weights(index: dict[str, Constant], graph: str, tensors: Mapping[str, Tensor], weights: WeightsFile) -> None:
    """Add a graph's weights to the file and to the index: a weight under its name, or, where another graph has another
    tensor of this name, under ``graph:name``."""
    for name, tensor in tensors.items():
        data = bytes_of(tensor)
        found = Constant(
            shape=tuple(tensor.shape), dtype=dtype_name(tensor), offset=weights.add(data), bytes=data.nbytes
        )
        index[name if index.setdefault(name, found) == found else f"{graph}:{name}"] = found


def _device(graphs: Mapping[str, Graph]) -> torch.device:
    values = (port.value for graph in graphs.values() for port in (*graph.inputs, *graph.outputs))
    return next((value.device for value in values), torch.device("cpu"))


__all__ = ["PACKAGE", "AotiWriter", "add_weights"]
