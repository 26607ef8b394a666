"""AGRO's command line.

python launch.py train CONFIG [section.key=value ...] [--dry-run]
python launch.py report RUN_DIR
python launch.py doctor
"""

from __future__ import annotations

import argparse
import os
import sys

from cluster.config import dump_config, load_config
from cluster.errors import AgroError


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from cluster.terminal import summary_screen
    from cluster.train import train

    summary = train(config)
    print(summary_screen(summary))
    return {"SIGINT": 130, "SIGTERM": 143}.get(summary["stopped"] or "", 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a policy")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--dry-run", action="store_true")
    train.set_defaults(run=_train)
    arguments = parser.parse_args()
    try:
        return arguments.run(arguments)
    except AgroError as error:
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
