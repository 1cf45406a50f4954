"""What every benchmark writes: a JSON with its command, versions, machine and date beside the figures."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they matter to a figure."""
    import diffusers

    import omnifx

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "omnifx": omnifx.__version__,
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def save(path: str | Path, figures: object, *, quiet: bool = False) -> None:
    """Write figures with their environment, and say so unless `quiet`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(
        json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n", encoding="utf-8"
    )
    if not quiet:
        print(f"written to {path}")


def table(rows: list[dict[str, Any]], title: str) -> None:
    """Print rows as a table; all rows have the keys of the first."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    for key in rows[0]:
        grid.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        grid.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(grid)


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")),
            platform.processor(),
        )
    except OSError:
        return platform.processor()
