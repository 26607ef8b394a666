"""Which curves a dashboard shows, in the order in which one reads them: W&B's view, Grafana's dashboard.

`python -m cluster.monitor.curves` writes deploy/grafana.json anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.monitor.backends import gauge_name

CURVES: dict[str, dict[str, tuple[str, ...]]] = {
    "What it learns": {
        "Reward": ("reward/mean",),
        "Held-out solve rate": ("eval/solve_rate",),
        "KL to the reference": ("objective/kl_ref",),
        "Residual within groups": ("objective/residual_std",),
    },
    "How old it learns from": {
        "Staleness": ("staleness/mean", "staleness/oldest_token"),
        "Share fresh": ("staleness/fresh_fraction",),
        "Evicted as stale": ("buffer/evicted_stale",),
        "Effective sample size": ("objective/ess_fraction",),
    },
    "How fast": {
        "Tokens a second": ("perf/sampled_tokens_per_s", "perf/trained_all_tokens_per_s"),
        "Busy": ("time/learner_busy_fraction", "time/actor_busy_fraction"),
        "Groups stored": ("buffer/groups",),
        "Publication and update": ("weights/publish_s", "weights/apply_s"),
    },
    "Whether it is well": {
        "Steps done": ("progress/step",),
        "Learner and actors apart": ("mismatch/mean",),
        "Gradient norm": ("optim/grad_norm",),
        "Alarms and skipped steps": ("guard/alarms", "guard/skipped_steps"),
        "Failed rewards": ("reward/error_fraction",),
        "Cut answers": ("completions/truncated_fraction",),
        "Disk errors": ("buffer/disk_errors",),
        "Warnings": ("monitor/warnings",),
    },
}
"""By section and title, the metrics of one panel."""
GRAFANA_FILE = Path(__file__).resolve().parents[2] / "deploy" / "grafana.json"
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_IN_A_LINE, _WIDTH, _HEIGHT = 4, 6, 8


def grafana_dashboard() -> dict[str, Any]:
    """Returns the dashboard as Grafana imports it: four panels a line, a choice of runs."""
    panels: list[dict[str, Any]] = []
    top = 0
    for section, curves in CURVES.items():
        place = {"x": 0, "y": top, "w": _IN_A_LINE * _WIDTH, "h": 1}
        panels.append({"type": "row", "title": section, "collapsed": False, "gridPos": place, "panels": []})
        for number, (title, metrics) in enumerate(curves.items()):
            line, column = divmod(number, _IN_A_LINE)
            place = {"x": _WIDTH * column, "y": top + 1 + _HEIGHT * line, "w": _WIDTH, "h": _HEIGHT}
            panels.append(
                {
                    "type": "timeseries",
                    "title": title,
                    "datasource": _SOURCE,
                    "gridPos": place,
                    "targets": [_target(metric, "ABC"[index]) for index, metric in enumerate(metrics)],
                }
            )
        top += 1 + _HEIGHT * -(-len(curves) // _IN_A_LINE)
    runs = "label_values(ray_agro_progress_step, run)"
    choice: dict[str, Any] = {
        "type": "query",
        "name": "run",
        "label": "run",
        "datasource": _SOURCE,
        "definition": runs,
    }
    choice["query"] = {"query": runs, "refId": "run"}
    choice.update(multi=True, includeAll=True, refresh=2)
    source = {"type": "datasource", "name": "source", "label": "Prometheus", "query": "prometheus"}
    return {
        "title": "AGRO",
        "uid": "agro",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, choice]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, start=1)],
    }


def _target(metric: str, ref_id: str) -> dict[str, Any]:
    shown = f'ray_{gauge_name(metric)}{{run=~"$run"}}'
    name = metric.partition("/")[2].replace("_", " ")
    return {"refId": ref_id, "datasource": _SOURCE, "expr": shown, "legendFormat": f"{{{{run}}}} {name}"}


if __name__ == "__main__":
    GRAFANA_FILE.write_text(json.dumps(grafana_dashboard(), indent=1) + "\n", encoding="utf-8")
