"""A report, `report.html`, is a run in one self-contained file, and the curves as a picture.

    metrics.jsonl, evaluations.jsonl, samples.jsonl, events.jsonl, summary.json, config.yaml --> report.html

Every input may be missing, and a torn line is left out and counted. The page draws its curves with a few
hundred lines of its own SVG and JavaScript (report_template.html): plotly.js would put 4.5 MB into every
report, matplotlib has no hover, and a script loaded from elsewhere would need a network and tell it what is
looked at. Its content security policy forbids every request.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from core.config import text as config_text
from core.config.evaluation import HELD_OUT
from core.evaluation.estimates import STANDARD_ERROR
from core.evaluation.records import Evaluation
from core.json_lines import finite_tree, read_json_lines
from core.metrics import METRICS, SOLVE_RATE_BUCKETS
from core.staleness import STALENESS_BUCKETS

MAX_POINTS = 800
MAX_SAMPLES = 1500
_MAX_TEXT_CHARS = 20_000
_TEMPLATE = Path(__file__).with_name("report_template.html")
_FILES = ("metrics", "evaluations", "samples", "events")

# Panel title, what it shows, and its (label, column) lines. Columns are names of METRICS or derived in
# `_columns`.
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", "mean of the batch", (("smoothed", "reward/smoothed"), ("batch", "reward/mean"))),
    ("Solve rate", "held-out prompts, by policy version", (("solve rate", "evaluation"),)),
    ("Staleness", "learner steps", (("mean", "staleness/mean"), ("oldest token", "staleness/oldest_token"))),
    ("KL to the reference", "nats per sequence", (("KL", "objective/kl_ref"),)),
    (
        "Residual",
        "reward minus beta times log-ratio",
        (("mean", "objective/residual_mean"), ("std", "objective/residual_std")),
    ),
    (
        "Spread within groups",
        "standard deviation",
        (("reward", "objective/reward_std"), ("beta * log-ratio", "objective/kl_std")),
    ),
    ("Brake", "share of the reward's push that the KL takes back", (("share", "objective/brake_share"),)),
    (
        "Importance",
        "share",
        (
            ("effective samples of pi/mu", "objective/ess_fraction"),
            ("mean weight", "objective/importance_weight_mean"),
        ),
    ),
    ("Smallest log-ratio", "nats, of the batch", (("smallest", "objective/log_ratio_min"),)),
    (
        "Advantage by staleness",
        "mean size",
        tuple((f"{name} steps", f"by_staleness/advantage_{name}") for name in STALENESS_BUCKETS),
    ),
    (
        "Advantage by solve rate",
        "mean size",
        tuple((f"{name} solved", f"by_solve_rate/advantage_{name}") for name in SOLVE_RATE_BUCKETS),
    ),
    (
        "Loss by staleness",
        "mean",
        tuple((f"{name} steps", f"by_staleness/loss_{name}") for name in STALENESS_BUCKETS),
    ),
    (
        "Loss by solve rate",
        "mean",
        tuple((f"{name} solved", f"by_solve_rate/loss_{name}") for name in SOLVE_RATE_BUCKETS),
    ),
    (
        "Actors against learner",
        "nats a token, fresh samples",
        (("mean", "mismatch/mean"), ("k3", "mismatch/k3")),
    ),
    ("Gradient norm", "before clipping", (("norm", "optim/grad_norm"),)),
    (
        "Throughput",
        "tokens per second",
        (
            ("sampled", "perf/sampled_tokens_per_s"),
            ("trained, prompts included", "perf/trained_all_tokens_per_s"),
        ),
    ),
    (
        "Busy",
        "share of wall time",
        (("actors", "time/actor_busy_fraction"), ("learner", "time/learner_busy_fraction")),
    ),
    ("Completion length", "tokens, mean of the batch", (("length", "completions/mean_length"),)),
    ("Buffer", "groups stored", (("groups", "buffer/groups"),)),
    ("Groups without signal", "share with equal rewards", (("share", "reward/zero_std_fraction"),)),
    (
        "Failures",
        "share of samples",
        (("truncated", "completions/truncated_fraction"), ("reward failed", "reward/error_fraction")),
    ),
)
REWARD_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Waiting for rewards",
        "seconds",
        (("in the queue, mean", "reward/queue_s"), ("actors, so far", "reward/wait_s")),
    ),
    ("Reward workers", "share of time", (("busy", "reward/busy_share"),)),
    (
        "Rewards that did not come",
        "completions so far",
        (("timed out", "reward/timeouts"), ("died", "reward/crashes")),
    ),
)
"""Charts of runs whose actors have said something of their reward functions."""
EPISODE_CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Turns and tool calls",
        "a sample, mean of the batch",
        (("turns", "completions/turns"), ("tool calls", "completions/tool_calls")),
    ),
    (
        "Environment failures",
        "episodes so far, by kind",
        (
            ("raised", "environment/errors"),
            ("timed out", "environment/timeouts"),
            ("died", "environment/crashes"),
        ),
    ),
    (
        "Cut and told",
        "so far",
        (
            ("tool errors", "environment/tool_errors"),
            ("max_turns", "environment/cut_at_max_turns"),
            ("max_new_tokens", "environment/cut_at_max_new_tokens"),
            ("max_sequence_tokens", "environment/cut_at_max_sequence_tokens"),
        ),
    ),
    ("Environment answers", "seconds, mean", (("answer", "environment/answer_s"),)),
)
"""Charts of runs with environments alone."""
PICTURE_CHARTS = ("Reward", "Solve rate", "Staleness", "KL to the reference", "Throughput", "Busy")


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report.html from what is there, and return its path. Works for an empty, running
    or stopped run.
    """
    run_dir = Path(run_dir)
    page = _page(report_data(run_dir))
    path = run_dir / "report.html"
    path.with_suffix(".tmp").write_text(page, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    return path


def report_data(run_dir: Path) -> dict[str, Any]:
    """What the page shows, as JSON-ready data: headline, charts, samples, events, config, notes on what
    was left out.
    """
    records, num_torn = {}, {}
    for name in _FILES:
        records[name], num_torn[name] = read_json_lines(run_dir / f"{name}.jsonl")
    rows = _last_of_each(records["metrics"], "progress/step")
    evaluations = _last_of_each(records["evaluations"], "policy_version", "suite")
    summary, config_text = _read_summary(run_dir), _read_text(run_dir / "config.yaml")
    samples = [_viewer_sample(sample, "training") for sample in records["samples"]]
    for evaluation in evaluations:
        of_version = dict.fromkeys(("version", "step"), evaluation["policy_version"])
        samples += [
            _viewer_sample({**of_version, **sample}, "evaluation")
            for sample in evaluation.get("samples") or []
        ]
    notes = [
        f"{count} torn line{'s' if count > 1 else ''} of {name}.jsonl left out."
        for name, count in num_torn.items()
        if count
    ]
    if summary is None:
        notes.append("summary.json could not be read; the figures on top are from the rows.")
    summary = summary or {}
    if len(samples) > MAX_SAMPLES:
        notes.append(
            f"{MAX_SAMPLES} of {len(samples)} samples are shown, evenly chosen; samples.jsonl has all."
        )
    data = {
        "name": summary.get("name") or _config_value(config_text, "run", "name") or run_dir.name,
        "stopped": summary.get("stopped"),
        "finished": bool(summary),
        "headline": _headline(rows, evaluations, summary, config_text),
        "charts": _charts(rows, evaluations),
        "samples": _thinned(samples, MAX_SAMPLES),
        "events": [
            {"wall_s": event.get("wall_s"), "text": str(event.get("text", ""))} for event in records["events"]
        ],
        "config": config_text,
        "notes": notes,
        "glossary": METRICS,
    }
    return finite_tree(data)


def curves_png(run_dir: str | Path, path: str | Path) -> None:
    """The six main curves as a 2x3 picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    run_dir = Path(run_dir)
    rows = _last_of_each(read_json_lines(run_dir / "metrics.jsonl")[0], "progress/step")
    charts = _charts(rows, _evaluation_lines(run_dir))
    shown = [chart for chart in charts if chart["title"] in PICTURE_CHARTS]
    colors = ("#2a78d6", "#eb6834")
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for panel, chart in zip(panels.flat, shown, strict=True):
        for number, line in enumerate(chart["lines"]):
            behind = line["column"] == "reward/mean"
            values = [math.nan if value is None else value for value in line["y"]]
            marker = "o" if line["column"] == "evaluation" else ""
            color, alpha = (colors[0], 0.3) if behind else (colors[number % 2], 1.0)
            panel.plot(
                line["x"],
                values,
                color=color,
                alpha=alpha,
                linewidth=1.6,
                marker=marker,
                markersize=4,
                label=line["label"],
            )
        panel.set_title(chart["title"], loc="left", fontsize=11, fontweight="bold")
        panel.set_xlabel("learner step", fontsize=9)
        panel.set_ylabel(chart["unit"], fontsize=9)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))
        if len(chart["lines"]) > 1:
            panel.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The evaluations that the run directory holds, by policy version, the last written of each suite."""
    return [
        msgspec.convert({"solve_rate": math.nan, **finite_values}, Evaluation)
        for finite_values in map(_known_values, _evaluation_lines(run_dir))
    ]


def _evaluation_lines(run_dir: Path) -> list[dict[str, Any]]:
    return _last_of_each(read_json_lines(run_dir / "evaluations.jsonl")[0], "policy_version", "suite")


def _known_values(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if value is not None}


def _page(data: dict[str, Any]) -> str:
    # Inside <script>, JSON must hold no "<": a completion may contain </script>. Line separators end lines in
    # old JavaScript.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # The title first: the data may hold anything, the placeholder of the title included.
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{TITLE}}", html.escape(f"{data['name']} - AGRO"))
    # Lone surrogates cannot be written as UTF-8.
    return page.replace("{{DATA}}", text).encode("utf-8", errors="replace").decode("utf-8")


def _last_of_each(records: list[dict[str, Any]], key: str, name: str = "") -> list[dict[str, Any]]:
    """Records in the order of `key`, the last written of each, and of each `name`: a run continued from a
    checkpoint repeats some steps.
    """
    by_key = {
        (record[key], str(record.get(name, ""))): record
        for record in records
        if isinstance(record.get(key), int | float)
    }
    return [by_key[value] for value in sorted(by_key)]


def _headline(
    rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], summary: dict[str, Any], config_text: str
) -> dict[str, Any]:
    """The figures on top: from the summary, else (a run that has none yet) from the rows. None: not known."""
    last = rows[-1] if rows else {}
    solve_rates = [
        evaluation["solve_rate"]
        for evaluation in evaluations
        if evaluation.get("suite") == HELD_OUT and evaluation.get("solve_rate") is not None
    ]
    ages = [row["staleness/mean"] for row in rows if row.get("staleness/mean") is not None]
    oldest = [row["staleness/oldest_token"] for row in rows if row.get("staleness/oldest_token") is not None]
    samples, wall_s = last.get("progress/samples"), last.get("time/wall_s")
    from_rows = {
        "base_solve_rate": next(iter(solve_rates), None),
        "final_solve_rate": next(iter(solve_rates[:0:-1]), None),
        "final_policy_version": last.get("eval/policy_version"),
        "steps": last.get("progress/step"),
        "wall_s": wall_s,
        "staleness_mean": _mean(ages),
        "staleness_max": max(oldest, default=None),
        "samples": samples,
        "samples_per_s": samples / wall_s if samples and wall_s else None,
        "tokens": last.get("progress/sampled_tokens"),
    }
    known = {name: summary[name] for name in from_rows if summary.get(name) is not None}
    planned, bound = (
        _config_value(config_text, "run", "steps"),
        _config_value(config_text, "buffer", "max_staleness"),
    )
    return {
        **from_rows,
        **known,
        "planned_steps": planned,
        "max_staleness": bound,
        "errors": summary.get("errors") or {},
        "last_errors": summary.get("last_errors") or {},
    }


def _charts(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, unit and lines of each chart; a line has label, column, x, y (None: a gap), at most
    MAX_POINTS points.
    """
    steps = [row["progress/step"] for row in rows]
    charted = (
        *CHARTS,
        *_known(REWARD_CHARTS, "reward/busy_share", rows),
        *_known(EPISODE_CHARTS, "environment/errors", rows),
    )
    smoothed = _smoothed([row.get("reward/mean") for row in rows])
    suites: dict[str, list[dict[str, Any]]] = {}
    for evaluation in evaluations:
        suites.setdefault(str(evaluation.get("suite")), []).append(evaluation)
    suites = dict(sorted(suites.items(), key=lambda known: (known[0] != HELD_OUT, known[0]))) or {
        HELD_OUT: []
    }
    charts = []
    for title, unit, lines in charted:
        drawn = []
        for label, column in lines:
            if column == "evaluation":
                drawn += [_suite_line(suite, "solve_rate", lines) for suite, lines in suites.items()]
                continue
            y = smoothed if column == "reward/smoothed" else [row.get(column) for row in rows]
            drawn.append(_line(label, column, steps, y))
        charts.append({"title": title, "unit": unit, "lines": drawn})
        if title == "Solve rate":
            charts += [chart for suite, lines in suites.items() if (chart := _suite_chart(suite, lines))]
    return charts


def _line(label: str, column: str, x: Sequence[float], y: Sequence[float | None]) -> dict[str, Any]:
    x, y = _downsampled(x, y, worst=column == "staleness/oldest_token")
    return {"label": label, "column": column, "x": x, "y": y}


def _suite_line(suite: str, metric: str, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A metric of a suite over the versions that were evaluated, called by the suite where it is the solve
    rate.
    """
    label = metric
    if metric == "solve_rate":
        label = "solve rate" if suite == HELD_OUT else suite
    x = [evaluation["policy_version"] for evaluation in evaluations]
    y = [{**(evaluation.get("metrics") or {}), **evaluation}.get(metric) for evaluation in evaluations]
    return _line(label, "evaluation", x, y)


def _suite_chart(suite: str, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a suite's samples achieve alone and together; None where each prompt has one sample."""
    metrics = (evaluations[-1].get("metrics") or {}) if evaluations else {}
    names = [name for name in metrics if "@" in name and not name.endswith(STANDARD_ERROR)]
    if len(names) < 3:  # avg@1 and pass@1 are the solve rate.
        return None
    lines = [_suite_line(suite, name, evaluations) for name in names if name != "pass@1"]
    return {"title": f"Suite {suite}", "unit": "held-out prompts, by policy version", "lines": lines}


def _known(charts: tuple[Any, ...], column: str, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The charts, where any row has a value of `column`."""
    return charts if any(row.get(column) is not None for row in rows) else ()


def _smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Mean over a centred window, a twentieth of the run and 9 rows at least: a trailing one would lag
    behind the curve.
    """
    reach = max(4, len(values) // 40)
    sums = list(itertools.accumulate((value or 0.0 for value in values), initial=0.0))
    counts = list(itertools.accumulate((value is not None for value in values), initial=0))
    out: list[float | None] = []
    for index in range(len(values)):
        start, end = max(0, index - reach), min(len(values), index + reach + 1)
        count = counts[end] - counts[start]
        out.append((sums[end] - sums[start]) / count if count else None)
    return out


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _downsampled(
    x: Sequence[float], y: Sequence[float | None], worst: bool
) -> tuple[list[float], list[float | None]]:
    """Returns at most MAX_POINTS points, one a bucket: its last x, and its mean, or its maximum where the
    `worst` is what counts.
    """
    size = max(1, math.ceil(len(x) / MAX_POINTS))
    out_x, out_y = [], []
    for start in range(0, len(x), size):
        known = [value for value in y[start : start + size] if value is not None]
        value = max(known, default=None) if worst else _mean(known)
        out_x.append(x[min(start + size, len(x)) - 1])
        out_y.append(None if value is None else float(f"{value:.5g}"))
    return out_x, out_y


def _viewer_sample(sample: dict[str, Any], source: str) -> dict[str, Any]:
    def cut(value: Any) -> Any:
        if isinstance(value, str) and len(value) > _MAX_TEXT_CHARS:
            return (
                value[:_MAX_TEXT_CHARS]
                + f"\n[{len(value) - _MAX_TEXT_CHARS} more characters in the run directory]"
            )
        return value

    shown = {"source": source, **{key: cut(value) for key, value in sample.items()}}
    if sample.get("transcript"):
        shown["transcript"] = [[role, cut(text)] for role, text in sample["transcript"]]
    return shown


def _thinned(items: list[Any], limit: int) -> list[Any]:
    if len(items) <= limit:
        return items
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary, {} while there is none, None if it is torn."""
    try:
        summary = json.loads(_read_text(run_dir / "summary.json") or "{}")
    except ValueError:
        return None
    return summary if isinstance(summary, dict) else None


def _config_value(text: str, section: str, name: str) -> Any:
    try:
        tree = config_text.read(text)
    except config_text.TextError:
        return None
    values = tree.get(section) if isinstance(tree, dict) else None
    return values.get(name) if isinstance(values, dict) else None
