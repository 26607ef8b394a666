"""AGRO: off-policy RL fine-tuning of language models.

    python launch.py train CONFIG [section.key=value ...]     train; with --dry-run only say what would run
    python launch.py doctor                                   versions, hardware, Ray: what is wrong, what to do
    python launch.py chat DIR PROMPT                          ask a trained policy
    python launch.py evaluate DIR [section.key=value ...]     its solve rate on the run's held-out prompts
    python launch.py report RUN_DIR                           write report.html again
    python launch.py config-reference                         every config field, as markdown

On a Ray cluster: ray job submit --working-dir . -- python launch.py train CONFIG
"""

from __future__ import annotations

import argparse
import sys

from cluster.errors import AgroError, ConfigError

EXIT_CODES = {None: 0, "SIGINT": 130, "SIGTERM": 143}


def _train(arguments: argparse.Namespace) -> int:
    from cluster.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from cluster.placement import dry_run
        from cluster.prepare import check_named

        check_named(config)
        print(dry_run(config))
        return 0
    from cluster.terminal import summary_screen
    from cluster.train import train

    summary = train(config)
    print(summary_screen(summary))
    return EXIT_CODES[summary["stopped"]]


def _doctor(arguments: argparse.Namespace) -> int:
    from cluster.doctor import diagnose, render

    checks = diagnose()
    print(render(checks))
    return 0 if all(check.ok for check in checks) else 1


def _chat(arguments: argparse.Namespace) -> int:
    from actors.try_policy import chat

    print(chat(arguments.dir, arguments.prompt))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from actors.try_policy import evaluate

    result = evaluate(arguments.dir, arguments.overrides)
    rate = "-" if result["solve_rate"] is None else f"{result['solve_rate']:.3f}"
    print(f"solve rate {rate} on {result['problems']} held-out problems, {result['samples']} samples")
    for error, count in result["errors"].items():
        print(f"  {count} not scored: {error}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cluster.report import write_report

    if not (Path(arguments.run_dir) / "config.yaml").is_file():
        raise ConfigError(f"{arguments.run_dir} is no run directory (no config.yaml in it)")
    print(write_report(arguments.run_dir))
    return 0


def _config_reference(arguments: argparse.Namespace) -> int:
    from cluster.reference import config_reference

    print(config_reference(), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser("train", help="train a policy")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--dry-run", action="store_true", help="print the resolved config, the placement and a memory estimate")
    train.set_defaults(run=_train)
    commands.add_parser("doctor", help="check this machine").set_defaults(run=_doctor)
    ask = commands.add_parser("chat", help="ask a trained policy")
    ask.add_argument("dir")
    ask.add_argument("prompt")
    ask.set_defaults(run=_chat)
    measure = commands.add_parser("evaluate", help="solve rate of a trained policy")
    measure.add_argument("dir")
    measure.add_argument("overrides", nargs="*", metavar="section.key=value")
    measure.set_defaults(run=_evaluate)
    report = commands.add_parser("report", help="write report.html again")
    report.add_argument("run_dir")
    report.set_defaults(run=_report)
    commands.add_parser("config-reference", help="every config field").set_defaults(run=_config_reference)
    return root


def _parse_dry_run() -> argparse.Namespace:
    """`--dry-run` anywhere on the line, also before the overrides, which argparse would not take."""
    return parser().parse_args([*(word for word in sys.argv[1:] if word != "--dry-run"), "--dry-run"])


def main() -> int:
    """Exit code of the command; errors in a few lines, without a traceback."""
    arguments = parser().parse_args() if "--dry-run" not in sys.argv else _parse_dry_run()
    try:
        return arguments.run(arguments)
    except AgroError as error:
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
