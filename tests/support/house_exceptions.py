"""What breaks a rule of tests/test_house.py while the house is being built."""

EXCEPTIONS: dict[str, set[str]] = {
    "files_are_short": {
        "actors/engine.py",
        "core/config/__init__.py",
        "core/records.py",
        "learner/policy/zero.py",
        "tests/cluster/test_supervisor.py",
        "tests/support/math_answers.py",
    },
    "lines_are_short": {
        "cluster/monitor/monitor.py",
        "core/config/__init__.py",
        "core/config/files.py",
    },
    "functions_are_short": {
        "tests/support/scenarios/guards_scenario.py main",
        "tests/support/scenarios/source_scenario.py main",
    },
    "statements_choose_once": {
        "cluster/monitor/monitor.py",
        "cluster/monitor/report.py",
        "cluster/monitor/terminal.py",
    },
    "docstrings_are_sentences": {
        "cluster/fleet.py",
        "cluster/monitor/monitor.py",
        "cluster/monitor/report.py",
        "cluster/pulse.py",
        "cluster/services.py",
        "cluster/watchdog.py",
        "core/calls.py",
        "core/config/__init__.py",
        "core/config/checks.py",
        "core/weights/transports/base.py",
        "core/weights/transports/snapshot.py",
    },
    "one_class_has_one_name": {
        "benchmarks/fake_engine.py _Request",
        "core/weights/board.py Board",
        "core/weights/transports/base.py Source",
        "core/weights/transports/nccl.py WeightPass",
    },
    "names_hide_no_effect": {
        "actors/exchange.py _is_delivered",
        "actors/offline.py _is_retired",
        "actors/rollout.py _is_over",
    },
    "staleness_is_computed_in_one_file": {
        "learner/worker.py",
    },
    "documents_name_files_that_exist": {
        "README.md learner/objectives/best_of_n.py",
        "docs/extending.md environments/guess.py",
        "docs/objectives.md learner/objectives/best_of_n.py",
    },
}
"""By rule, the places that break it: `path` or `path name`."""
