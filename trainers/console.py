"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Console:
    """One line per finished stage or step stays; the line below it lives."""

    def __init__(self, console: RichConsole | None = None) -> None:
        self.rich = console or RichConsole()
        self._live = self.rich.is_terminal
        self._started = time.monotonic()
        self._status = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.rich,
            transient=True,
        )

    def __enter__(self) -> Console:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def say(self, line: str) -> None:
        """A line that stays. Rich markup is not interpreted: the text may come from anywhere."""
        elapsed = time.monotonic() - self._started
        self.rich.print(
            f"[{int(elapsed // 60):3d}:{int(elapsed % 60):02d}] {line}", markup=False, highlight=False, soft_wrap=True
        )

    def status(self, text: str) -> None:
        """What stands at the end of the live line: success, tokens/s, time left."""
        self._status = text
        for task in self._progress.task_ids:
            self._progress.update(task, status=text)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Stage]:
        if not self._live:
            self.say(f"{title} …")
        task = self._progress.add_task(title, total=total, status=self._status)
        try:
            yield Stage(self._progress, task)
        finally:
            self._progress.remove_task(task)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(str, row))
        self.rich.print(table)


class Stage:
    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def at(self, done: int) -> None:
        self._progress.update(self._task, completed=done)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
