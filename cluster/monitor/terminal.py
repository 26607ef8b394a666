"""The run in the terminal: a live screen on a tty, else plain lines that read well in a log.

Both take the dicts of `Monitor.view()`; a value not known yet is shown as "-".
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from core.config.evaluation import HELD_OUT
from core.staleness import StalenessBound
from core.text import printable

View = Mapping[str, Any]

_REFRESH_HZ = 4
_PLAIN_LINES_PER_RUN = 40
_PLAIN_INTERVAL_S = 10.0
_SPARK_WIDTH = 40
_LIVE_EVENTS = 6
_BARS = "▁▂▃▄▅▆▇█"


class Terminal:
    """Shows views; a context manager. `stream` is stdout by default, `live` follows from it being a tty."""

    def __init__(
        self,
        stream: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stdout
        is_live = stream.isatty() if live is None else live
        self._shower: _Live | _Plain = _Live(stream) if is_live else _Plain(stream, clock)

    def __enter__(self) -> Terminal:
        self._shower.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shower.stop()

    def update(self, view: View) -> None:
        """Shows the newest view. Call it as often as you like: a few times a second is enough."""
        self._shower.update(view)


class _Plain:
    """Events as they come, and a line every 1/40 of the run or 10 s, whichever is first."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._clock = stream, clock
        self._event_number = 0
        self._step: float | None = None
        self._line_s = 0.0
        self._last_view: View | None = None

    def start(self) -> None:
        pass

    def update(self, view: View) -> None:
        for event in view["events"]:
            if event["number"] > self._event_number:
                self._event_number = event["number"]
                self._write(f"[{duration(event['wall_s'])}] {printable(event['text'])}")
        step = view["row"].get("progress/step")
        self._last_view = view
        if step is None or step == self._step:
            return
        stride = max(1, view["steps"] // _PLAIN_LINES_PER_RUN)
        due = self._step is None or step // stride != self._step // stride or step >= view["steps"]
        if due or self._clock() - self._line_s >= _PLAIN_INTERVAL_S:
            self._show(view)

    def stop(self) -> None:
        view = self._last_view
        if view is not None and view["row"].get("progress/step") not in (None, self._step):
            self._show(view)

    def _show(self, view: View) -> None:
        self._step, self._line_s = view["row"]["progress/step"], self._clock()
        self._write(plain_line(view))

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # Who closed the output (`| head`) does not end the run.
            self._stream.write(line + "\n")
            self._stream.flush()


def plain_line(view: View) -> str:
    """One line on where the run is: `step 120/600  reward 0.52  solve 0.48@v118  stale 2.1/5  ...`."""
    row = view["row"]
    solve = {suite: f"{known[-1][1]:.2f}@v{known[-1][0]:.0f}" for suite, known in view["evaluations"].items()}
    named = {name: value for name, value in solve.items() if name != HELD_OUT}
    parts = [
        f"step {_count(row.get('progress/step'))}/{view['steps']}",
        f"reward {figure(row.get('reward/mean'), 2)}",
        *([f"solve {solve.get(HELD_OUT, '-')}"] if HELD_OUT in solve or not solve else []),
        *(f"{suite} {value}" for suite, value in named.items()),
        f"stale {figure(row.get('staleness/mean'), 1)}/{figure(row.get('staleness/oldest_token'), 0)}",
        f"{figure(row.get('perf/sampled_tokens_per_s'), 0)} tok/s",
        f"buffer {figure(row.get('buffer/groups'), 0)}",
        f"kl {figure(row.get('objective/kl_ref'), 2)}",
        f"grad {figure(row.get('optim/grad_norm'), 2)}",
        f"eta {duration(view['eta_s'])}",
    ]
    return "  ".join(parts)


class _Live:
    """One screen, redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self._live = Live(
            console=Console(file=stream),
            refresh_per_second=_REFRESH_HZ,
            transient=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        self._live.start()

    def update(self, view: View) -> None:
        self._live.update(screen(view))

    def stop(self) -> None:
        self._live.stop()


def screen(view: View) -> RenderableType:
    """The live screen of a view."""
    blocks = [_header(view), _figures(view), _buffer_bar(view), _actor_table(view)]
    if view["events"]:
        blocks.append(_event_lines(view))
    return Panel(
        Group(*blocks),
        title=f"[bold]agro[/bold] {view['name']}",
        title_align="left",
        border_style="dim",
        padding=(0, 1),
    )


def _header(view: View) -> RenderableType:
    step = view["row"].get("progress/step") or 0
    line = Table.grid(padding=(0, 2))
    line.add_row(
        Text(f"step {step:.0f}/{view['steps']}", style="bold"),
        ProgressBar(total=view["steps"], completed=step, width=30),
        f"elapsed {duration(view['wall_s'])}",
        f"eta {duration(view['eta_s'])}",
        Text(f"W&B {view['wandb']}", style="dim"),
    )
    return line


def _figures(view: View) -> RenderableType:
    row = view["row"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=10)
    grid.add_column(min_width=8)
    grid.add_column(style="green", min_width=_SPARK_WIDTH)
    grid.add_column(style="dim")
    grid.add_row(
        "reward",
        figure(row.get("reward/mean"), 3),
        sparkline(view["rewards"]),
        f"error {_percent(row.get('reward/error_fraction'))}",
    )
    for suite, known in view["evaluations"].items() or [(HELD_OUT, [])]:
        label = "solve rate" if suite == HELD_OUT else Text(suite)
        newest = known[-1] if known else (None, None)
        at = "" if newest[0] is None else f"at v{newest[0]:.0f}"
        grid.add_row(label, figure(newest[1], 3), sparkline([rate for _, rate in known]), at)
    age = f"mean {figure(row.get('staleness/mean'), 2)}  oldest {figure(row.get('staleness/oldest_token'), 0)} of {view['max_staleness']}"
    grid.add_row("staleness", _age(row.get("staleness/oldest_token"), view["max_staleness"]), age, "")
    speed = f"{figure(row.get('perf/sampled_tokens_per_s'), 0)} sampled, {figure(row.get('perf/trained_all_tokens_per_s'), 0)} trained"
    busy = f"busy: actors {_percent(row.get('time/actor_busy_fraction'))}, learner {_percent(row.get('time/learner_busy_fraction'))}"
    grid.add_row("tokens/s", "", speed, busy)
    norm, rate = figure(row.get("optim/grad_norm"), 2), figure(row.get("optim/lr"), 7)
    training = f"kl {figure(row.get('objective/kl_ref'), 3)}  grad {norm}  lr {rate}"
    grid.add_row("training", "", training, f"weights v{_count(row.get('weights/version'))}")
    if row.get("environment/errors") is not None:
        grid.add_row("episodes", figure(row.get("completions/turns"), 1), *_episodes(row))
    return grid


def _episodes(row: View) -> tuple[str, str]:
    """What is told of runs with environments: turns and what they cost, and what went wrong by kind."""
    calls, answer = row.get("completions/tool_calls"), row.get("environment/answer_s")
    told = f"turns, {figure(calls, 1)} tool calls, {figure(answer, 2)} s an answer"
    kinds = {
        "raised": "errors",
        "timed out": "timeouts",
        "died": "crashes",
        "tool errors": "tool_errors",
        "cut at max_turns": "cut_at_max_turns",
    }
    counts = {name: row.get(f"environment/{kind}") for name, kind in kinds.items()}
    return told, "  ".join(f"{name} {figure(count, 0)}" for name, count in counts.items() if count)


def _age(oldest: float | None, bound: int) -> Text:
    """The oldest token's age, coloured by how near it is to the bound."""
    if oldest is None:
        return Text("-")
    return Text(figure(oldest, 0), style="yellow" if StalenessBound(bound).is_near(oldest) else "green")


def _buffer_bar(view: View) -> RenderableType:
    groups = view["buffer"].get("buffer/groups")
    evicted = {
        name.removeprefix("buffer/evicted_"): count
        for name, count in view["buffer"].items()
        if name.startswith("buffer/evicted_")
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=10)
    grid.add_row(
        "buffer",
        ProgressBar(total=view["capacity"], completed=min(groups or 0, view["capacity"]), width=30),
        f"{figure(groups, 0)} of {view['capacity']} groups",
        Text("  ".join(f"{reason} {figure(count, 0)}" for reason, count in evicted.items()), style="dim"),
    )
    return grid


def _actor_table(view: View) -> RenderableType:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("actor")
    for heading in ("version", "tok/s", "busy", "samples", "updates", "errors", "seen"):
        table.add_column(heading, justify="right")
    for name, actor in sorted(view["actors"].items()):
        table.add_row(
            Text(name),
            _count(actor.get("version")),
            figure(actor.get("tokens_per_s"), 0),
            _percent(actor.get("busy_fraction")),
            figure(actor.get("generated_samples"), 0),
            figure(actor.get("updates"), 0),
            figure(actor.get("errors"), 0),
            f"{duration(actor.get('silent_s'))} ago",
        )
    return table


def _event_lines(view: View) -> RenderableType:
    events = list(view["events"])[-_LIVE_EVENTS:]
    return Group(
        *(
            Text(
                f"{duration(event['wall_s']):>8}  {printable(event['text'])}",
                overflow="ellipsis",
                no_wrap=True,
            )
            for event in events
        )
    )


def summary_screen(summary: Mapping[str, Any], go_on: str | None = None) -> str:
    """The last screen of a run: what came out, where it is, and what to type next; `go_on` is what goes on
    with a run that was stopped.
    """

    def number(name: str, digits: int) -> str:
        return figure(summary.get(name), digits)

    stopped, policy, run_dir = summary.get("stopped"), summary.get("policy_dir"), summary.get("run_dir")
    version = (
        f" at v{_count(summary['final_policy_version'])}"
        if summary.get("final_policy_version") is not None
        else ""
    )
    errors = {name: count for name, count in (summary.get("errors") or {}).items() if count}
    suites = {name: course for name, course in (summary.get("suites") or {}).items() if name != HELD_OUT}
    wall = duration(summary.get("wall_s"))
    took = f"; {wall} since the last start" if summary.get("is_continued") else f" in {wall}"
    solve_rate = f"{number('base_solve_rate', 3)} -> {number('final_solve_rate', 3)}{version}"
    if summary.get("final_policy_version") == 0:
        solve_rate = f"{number('base_solve_rate', 3)}{version}, and none later"
    rows = [(name, _course(course)) for name, course in suites.items()]
    if not suites or summary.get("final_solve_rate") is not None:
        rows = [("solve rate", solve_rate), *rows]
    rows += [
        ("staleness", f"mean {number('staleness_mean', 2)}, max {number('staleness_max', 0)} learner steps"),
        ("steps", f"{_count(summary.get('steps'))}{took}"),
        (
            "samples",
            f"{number('samples', 0)} ({number('samples_per_s', 1)} per second), {number('tokens', 0)} tokens",
        ),
        ("errors", ", ".join(f"{name} {figure(count, 0)}" for name, count in errors.items()) or "none"),
        *(("", f"{count} x {text}") for text, count in (summary.get("last_errors") or {}).items()),
        ("policy", policy or "-"),
        *(("best", _best(best)) for best in [summary.get("best")] if best),
        ("report", summary.get("report") or "-"),
        ("run", run_dir or "-"),
        ("W&B", summary.get("wandb_mode") or "-"),
    ]
    if policy:
        # A chat has neither the prompts' form nor the tools of an environment.
        verbs = ("evaluate",) if summary.get("environments") else ("chat", "evaluate")
        rows += [(verb, command(verb, policy)) for verb in verbs]
    if go_on:
        rows.append(("go on", go_on))
    outcome = f"stopped: {stopped}" if stopped else "finished"
    lines = [f"{summary.get('name') or '-'} {outcome}", *(f"  {label:<11}{value}" for label, value in rows)]
    return "\n".join(lines)


def _best(best: Mapping[str, Any]) -> str:
    return f"{best['dir']}: {best['metric']} {figure(best['value'], 3)} at v{_count(best['policy_version'])}"


def _course(course: Mapping[str, Any]) -> str:
    """A suite's solve rate from base to end, with the standard error and the best of its samples."""
    metrics = course["metrics"]
    best = [name for name in metrics if name.startswith("pass@") and name[5:].isdigit()]
    error = next(
        (value for name, value in metrics.items() if name.startswith("avg@") and name.endswith("error")), None
    )
    parts = [f"{figure(course['base'], 3)} -> {figure(course['final'], 3)}"]
    parts += [] if error is None else [f"± {figure(error, 3)}"]
    parts += [f"at v{_count(course['final_policy_version'])}"]
    parts += [f"({best[-1]} {figure(metrics[best[-1]], 3)})"] if best else []
    return " ".join(parts)


def command(verb: str, *arguments: str) -> str:
    """A command of launch.py with this interpreter, as one would type it here."""
    path = Path(sys.executable)
    python = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    return f"{python} launch.py {verb} {shlex.join(arguments)}"


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """The last `width` values as bars between their minimum and maximum."""
    shown = list(values)[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in shown)


def figure(value: float | None, digits: int) -> str:
    """`value` with so many decimals (thousands apart); very small values in exponent form; None and
    NaN as "-".
    """
    if value is None or math.isnan(value):
        return "-"
    if digits and 0 < abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    text = f"{value:,.{digits}f}"
    return text.rstrip("0") if digits > 4 else text


def duration(seconds: float | None) -> str:
    """`2h05m`, `2m10s` or `8s`; None as "-"."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _count(value: float | None) -> str:
    """Steps and versions: names rather than amounts, so without thousands marks."""
    return "-" if value is None else f"{value:.0f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.0%}"
