"""How far a build is: a bar on a terminal, a line for each engine elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass
class BuildProgress:
    """Shows which engine is built, and the innermost phase of TensorRT's that is under way.

    Without a terminal it prints a line where an engine is done. Phases may begin and end in several threads.
    """

    console: Console
    shown: bool
    total: int = 0
    _bar: Progress | None = None
    _engines: TaskID | None = None
    _phase: TaskID | None = None
    _open: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self, total: int) -> Iterator[None]:
        """While `total` engines are built."""
        self.total = total
        if not (self.shown and self.console.is_terminal):
            yield
            return
        columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            self._bar = bar
            self._engines = bar.add_task("engines", total=total)
            self._phase = bar.add_task("", total=None, visible=False)
            try:
                yield
            finally:
                self._bar = self._engines = self._phase = None

    def engine(self, name: str, number: int) -> None:
        """An engine is begun."""
        if self._bar is not None and self._engines is not None:
            self._bar.update(self._engines, description=f"building {name}", completed=number - 1)

    def done(self, name: str, number: int, text: str) -> None:
        """An engine is there."""
        if self._bar is not None and self._engines is not None:
            self._bar.update(self._engines, completed=number)
        if self.shown:
            line = f"{name} ({number} of {self.total}): {text}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    # -- what TensorRT tells -------------------------------------------------------------------------------------------

    def phase_start(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""
        with self._lock:
            self._open[name] = steps
            self._show(name, 0, steps)

    def step_complete(self, name: str, step: int) -> None:
        """A step of a phase is done."""
        with self._lock:
            self._show(name, step + 1, self._open.get(name))

    def phase_finish(self, name: str) -> None:
        """A phase ends."""
        with self._lock:
            self._open.pop(name, None)
            if self._bar is not None and self._phase is not None:
                self._bar.update(self._phase, visible=bool(self._open))

    def _show(self, name: str, step: int, steps: int | None) -> None:
        if self._bar is not None and self._phase is not None:
            self._bar.update(self._phase, description=f"  {name}"[:48], completed=step, total=steps, visible=True)


def monitor_for(trt: Any, progress: BuildProgress, stop: Any) -> Any:
    """An `IProgressMonitor` that tells `progress`, and ends the build when `stop.stopped` holds an exception."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _guarded(stop, progress.phase_start, phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            _guarded(stop, progress.step_complete, phase_name, step)
            return stop.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            _guarded(stop, progress.phase_finish, phase_name)

    return Monitor()


def _guarded(stop: Any, function: Any, *args: Any) -> None:
    """An exception, an interrupt too, must not pass through TensorRT."""
    try:
        function(*args)
    except BaseException as error:  # noqa: BLE001
        stop.stopped = stop.stopped or error


__all__ = ["BuildProgress", "monitor_for"]
