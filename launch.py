"""AGRO: off-policy RL fine-tuning of language models.

    python launch.py train CONFIG [section.key=value ...]     train; with --dry-run only say what would run
    python launch.py plan CONFIG [--gpu h100] [section.key=value ...]     what it would take on GPUs: time, memory, cost
    python launch.py doctor                                   what is wrong with this machine, what to do
    python launch.py status RUN_DIR                           where a run is: step, actors, buffer, waits
    python launch.py why RUN_DIR [NAME]                       who died in a run, of what, and how it ended
    python launch.py scale RUN_DIR --actors N                 more or fewer rollout actors, while it goes on
    python launch.py audit RUN_DIR                            what became of every prompt that was handed out
    python launch.py inspect-batch FILE [--tokenizer DIR]     the batch of a skipped learner step, as text
    python launch.py export RUN_DIR [--step N] --out DIR      a checkpoint as a Hugging Face directory
    python launch.py chat DIR PROMPT                          ask a trained policy
    python launch.py evaluate DIR [--config FILE] [--suite NAME] [--out DIR]     any model, on held-out suites
    python launch.py report RUN_DIR                           write report.html again
    python launch.py config-reference                         every config field, as markdown

On a Ray cluster: ray job submit --working-dir . -- python launch.py train CONFIG
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import Any

from cluster.cli import commands
from cluster.signals import EXIT_CODES, Interrupted
from core.errors import AgroError
from core.text import printable


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    root = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of = root.add_subparsers(dest="command", required=True, metavar="command")
    train = of.add_parser("train", help="train a policy")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, the placement and a memory estimate",
    )
    train.set_defaults(run=commands.train)
    _add_plan(of)
    of.add_parser("doctor", help="check this machine").set_defaults(run=commands.doctor)
    status = of.add_parser("status", help="where a run is")
    status.add_argument("run_dir")
    status.set_defaults(run=commands.status)
    why = of.add_parser("why", help="who died in a run, of what, and how the run ended")
    why.add_argument("run_dir")
    why.add_argument(
        "name", nargs="?", default="", help="one process, as actor-0.1, or all of a role or a kind"
    )
    why.set_defaults(run=commands.why)
    scale = of.add_parser("scale", help="more or fewer rollout actors, while the run goes on")
    scale.add_argument("run_dir")
    scale.add_argument("--actors", type=int, required=True, metavar="N", help="how many there shall be")
    scale.set_defaults(run=commands.scale)
    audit = of.add_parser("audit", help="what became of every prompt that was handed out")
    audit.add_argument("run_dir")
    audit.set_defaults(run=commands.audit)
    inspect = of.add_parser("inspect-batch", help="the batch of a skipped learner step, as text")
    inspect.add_argument("file", help="RUN_DIR/bad-batches/step-*.msgpack")
    inspect.add_argument(
        "--tokenizer", metavar="DIR", help="show the tokens as it decodes them, special ones too"
    )
    inspect.set_defaults(run=commands.inspect_batch)
    export = of.add_parser("export", help="a checkpoint as a Hugging Face directory")
    export.add_argument("run_dir")
    export.add_argument(
        "--step", type=int, metavar="N", help="of which learner step; without it the newest that verifies"
    )
    export.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    export.set_defaults(run=commands.export)
    chat = of.add_parser("chat", help="ask a trained policy")
    chat.add_argument("dir")
    chat.add_argument("prompt")
    chat.set_defaults(run=commands.chat)
    _add_evaluate(of)
    report = of.add_parser("report", help="write report.html again")
    report.add_argument("run_dir")
    report.set_defaults(run=commands.report)
    of.add_parser("config-reference", help="every config field").set_defaults(run=commands.config_reference)
    return root


def _add_plan(of: Any) -> None:
    plan = of.add_parser("plan", help="what a run would take on given machines; starts nothing")
    plan.add_argument("config")
    plan.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    plan.add_argument(
        "--gpu", metavar="NAME", help="a100, h100, h200, b200, l40s, a10g, rtx4090; h100 if left out"
    )
    plan.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    plan.add_argument("--network", type=float, default=400.0, metavar="GBIT", help="of a node, Gbit/s")
    plan.add_argument("--host-memory", type=float, default=1000.0, metavar="GIB", help="of a node")
    plan.add_argument("--prompt-tokens", type=float, metavar="N", help="of a prompt, on average")
    plan.add_argument("--new-tokens", type=float, metavar="N", help="of an answer, on average")
    plan.set_defaults(run=commands.plan)


def _add_evaluate(of: Any) -> None:
    evaluate = of.add_parser("evaluate", help="a model on the suites of a config, by vLLM")
    evaluate.add_argument("dir", help="any Hugging Face directory")
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    evaluate.add_argument("--config", metavar="FILE", help="without it config.yaml beside the directory")
    evaluate.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="one suite; again for more, without it all",
    )
    evaluate.add_argument(
        "--out", metavar="DIR", help="for table and samples: new, or of the same evaluation, which goes on"
    )
    evaluate.set_defaults(run=commands.evaluate)


def _parse() -> argparse.Namespace:
    """Parses the line, with options also before overrides, which argparse alone would not take."""
    root = parser()
    arguments, left = root.parse_known_args()
    is_taken = hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in left)
    if left and not is_taken:
        root.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def main() -> int:
    """Runs the command and returns its exit code; errors are told in a few lines, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A completion may hold characters that this terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    # Read when torch is imported: threads that spin while they wait for one another take the core from who
    # would be waited for, and with another program beside them ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = _parse()
    try:
        return arguments.run(arguments)
    except AgroError as error:
        print(f"error: {printable(str(getattr(error, 'cause', error)))}", file=sys.stderr)
        return 2
    except Interrupted as signal:
        return EXIT_CODES[signal.name]
    except KeyboardInterrupt:
        return EXIT_CODES["SIGINT"]
    except BrokenPipeError:  # `launch.py audit RUN | head`: what reads has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
