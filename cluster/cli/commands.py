"""What the commands of launch.py do: each takes the parsed arguments, prints, and returns the exit code."""
# ruff: noqa: T201 (the output of the command line)

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.progress import say
from cluster.signals import EXIT_CODES, StopSignal
from core.errors import AgroError, CheckpointError, ConfigError
from core.machine import collect_seldom
from core.text import counted, headline, printable

if TYPE_CHECKING:
    from core.config import Config


def train(arguments: Namespace) -> int:
    """Trains a policy; with --dry-run only says what would run."""
    if arguments.dry_run:
        return _dry_run(arguments)
    collect_seldom()
    with StopSignal() as stop:
        say(f"reading {arguments.config}")
        from cluster.preparation.surroundings import check_surroundings
        from learner.catalogue import load_config

        config = load_config(arguments.config, arguments.overrides)
        check_surroundings()
        say("loading the libraries")
        from cluster.monitor.terminal import summary_screen
        from cluster.train import train

        summary = train(config, stop)
    print(summary_screen(summary, _go_on(arguments, config, summary)))
    return EXIT_CODES[summary["stopped"]]


def _go_on(arguments: Namespace, config: Config, summary: Mapping[str, Any]) -> str | None:
    """Returns the command that goes on with a run that was stopped; None where no steps are left, or no
    checkpoint is kept to go on from.
    """
    from cluster.monitor.terminal import command

    has_steps_left = (summary["steps"] or 0) < config.run.steps
    if not (summary["stopped"] and config.checkpoint.every and has_steps_left):
        return None
    others = [each for each in arguments.overrides if not each.startswith("run.dir=")]
    return command("train", arguments.config, *others, f"run.dir={summary['run_dir']}")


def _dry_run(arguments: Namespace) -> int:
    from cluster.preparation.surroundings import check_surroundings
    from learner.catalogue import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_surroundings()
    from cluster.cli.dry_run import dry_run

    for text in dry_run(config):
        print(text, flush=True)
    return 0


def plan(arguments: Namespace) -> int:
    """Tells what a run would take on given machines; exit code 1 when it does not fit there."""
    from cluster.plan.planning import make_plan
    from cluster.plan.report import render_plan
    from cluster.plan.workload import machines_of
    from learner.catalogue import load_config

    config = load_config(arguments.config, arguments.overrides)
    machines = machines_of(
        config, arguments.gpu, arguments.gpus_per_node, arguments.network, arguments.host_memory
    )
    made = make_plan(config, machines, arguments.prompt_tokens, arguments.new_tokens)
    print(printable(render_plan(made)))
    return 1 if made.fit.problems else 0


def doctor(arguments: Namespace) -> int:
    """Checks this machine; exit code 1 when something is wrong."""
    from cluster.cli.doctor import diagnose, render

    checks = diagnose()
    print(render(checks))
    return 0 if all(check.ok for check in checks) else 1


def chat(arguments: Namespace) -> int:
    """Asks a trained policy."""
    from cluster.cli.try_policy import chat

    print(printable(chat(arguments.dir, arguments.prompt)))
    return 0


def evaluate(arguments: Namespace) -> int:
    """Evaluates a model on the suites of a config, and tells where table and samples are."""
    say("loading the libraries")
    from cluster.cli.evaluate import evaluate, table
    from core.config.evaluation import HELD_OUT

    found = evaluate(
        arguments.dir,
        arguments.overrides,
        config_path=arguments.config,
        suites=arguments.suite,
        out=arguments.out,
        say=lambda text: print(text, flush=True),
    )
    for result in found.results:
        title = "" if result.suite == HELD_OUT else f"{result.suite}: "
        print(
            f"{title}solve rate {result.solve_rate:.3f} on {result.num_problems} held-out problems, "
            f"{result.num_samples - result.num_errors} samples"
        )
    for error, count in found.reasons.items():
        print(f"  {count} not scored: {printable(error)}")
    print(f"\n{table(found.results)}\n\n{found.directory}: the table, and samples.jsonl")
    return 0


def report(arguments: Namespace) -> int:
    """Writes report.html again."""
    from cluster.monitor.report import write_report

    if not (Path(arguments.run_dir) / "config.yaml").is_file():
        raise ConfigError(f"{arguments.run_dir} is no run directory (no config.yaml in it)")
    print(write_report(arguments.run_dir))
    return 0


def export(arguments: Namespace) -> int:
    """Writes a checkpoint as a Hugging Face directory."""
    from learner.checkpoints.export import export

    try:
        print(export(arguments.run_dir, arguments.step, arguments.out))
    except OSError as error:
        if isinstance(error, AgroError):
            raise
        raise CheckpointError(
            f"{arguments.out} cannot be written: {error.strerror}. Free space, or give another --out."
        ) from None
    return 0


def inspect_batch(arguments: Namespace) -> int:
    """Shows the batch that a skipped step left, as text, with the given tokenizer or that of its run."""
    from core.config import ModelConfig
    from core.tokenizer import load_tokenizer
    from learner.step.bad_batch import render

    path = Path(arguments.file)
    tokenizer: Any = None
    if arguments.tokenizer:
        tokenizer = load_tokenizer(ModelConfig(path=arguments.tokenizer))
    elif path.is_file():
        tokenizer = _tokenizer_of_run(path.resolve().parent.parent)

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids)))

    print(render(path, None if tokenizer is None else decode))
    return 0


def _tokenizer_of_run(run_dir: Path) -> Any:
    """Returns the tokenizer of a run's model; None where there is no run, or its model is gone."""
    from core.tokenizer import load_tokenizer
    from learner.catalogue import load_config

    try:
        return load_tokenizer(load_config(str(run_dir / "config.yaml"), []).model)
    except ConfigError:
        return None


def config_reference(arguments: Namespace) -> int:
    """Prints every config field, as markdown."""
    from cluster.cli.reference import config_reference

    print(config_reference(), end="")
    return 0


# --- A run that goes on ---


def scale(arguments: Namespace) -> int:
    """Asks a running run for so many actors, and tells what happens in one line per actor."""
    from cluster.control import ask_for_actors

    answer, status = ask_for_actors(Path(arguments.run_dir), arguments.actors)
    if answer.refused:
        raise ConfigError(f"{arguments.run_dir}: not scaled: {answer.refused}")
    signs = {**dict.fromkeys(answer.added, "+"), **dict.fromkeys(answer.retired, "-")}
    print(
        f"{status.name}: {counted(answer.actors, 'actor')}; {len(answer.added)} added, {len(answer.retired)} retire"
    )
    print("\n".join(actor_lines(status.actors, signs, with_gone=False)))
    return 0


def status(arguments: Namespace) -> int:
    """Tells where a run is."""
    from cluster.control import death_of_driver, read_status

    run_dir = Path(arguments.run_dir)
    found = read_status(run_dir)
    age_s = max(0.0, time.time() - found.time)
    how = (
        f"over: {headline(found.stopped).rstrip('.')}"
        if found.state == "over" and found.stopped
        else found.state
    )
    print(
        f"{found.name} {how}, step {found.step}/{found.steps}; driver {found.pid} on {found.host}, "
        f"{age_s:.0f} s ago"
    )
    print("\n".join(actor_lines(found.actors, {}, with_gone=True)))
    buffer = found.buffer
    names = ("groups", "unconsumed", "leased", "inserted")
    print("buffer   " + ", ".join(f"{name} {buffer.get(f'buffer/{name}') or 0:.0f}" for name in names))
    waits = (f"{who} {waited_s or 0:.1f} s" for who, waited_s in found.waits.items())
    print("waited   " + ", ".join(waits), flush=True)
    if dead := death_of_driver(run_dir, found):  # It may wait to see.
        raise ConfigError(f"{run_dir}: {dead}")
    return 0


def why(arguments: Namespace) -> int:
    """Prints who died in a run, of what, and how the run ended."""
    from cluster.cli.why import why

    print("\n".join(printable(line) for line in why(Path(arguments.run_dir), arguments.name)))
    return 0


def audit(arguments: Namespace) -> int:
    """Tells what became of every prompt handed out; exit code 1 when the ledger contradicts itself."""
    from buffer.ledger import audit_run

    found = audit_run(arguments.run_dir)
    print(found["balance"])
    for title in ("status", "events", "evictions"):
        for name, count in sorted(found[title].items()):
            print(f"  {title:<10}{name:<20}{count:>10,}")
    print(
        f"  oldest sample trained on: {found['max_staleness']} learner steps; torn lines: "
        f"{found['torn_lines']}"
    )
    violations = found["violations"]
    print(f"{len(violations) or 'no'} violation{'' if len(violations) == 1 else 's'}")
    for sentence in violations:
        print(f"  {sentence}")
    return 1 if violations else 0


def actor_lines(
    actors: Sequence[Mapping[str, Any]], signs: Mapping[str, str], *, with_gone: bool
) -> list[str]:
    """Returns one line for each actor of status.json; `signs` gives, by name, what is put before it."""
    lines = []
    for actor in actors:
        if actor["state"] == "gone" and not with_gone and actor["name"] not in signs:
            continue
        version, rate = actor.get("version"), actor.get("tokens_per_s")
        figures = [f"for {actor['since_s']:.0f} s"]
        figures += [f"version {version:.0f}"] if version is not None and actor["state"] != "gone" else []
        figures += [f"{rate:,.0f} tokens/s"] if rate is not None and actor["state"] == "running" else []
        figures += [str(actor["note"])] if actor["note"] else []
        lines.append(
            f"{signs.get(actor['name'], ' ')} {actor['name']:<12}{actor['state']} {', '.join(figures)}"
        )
    return lines
