"""`launch.py evaluate MODEL_DIR` runs the suites of a config on any Hugging Face directory, by vLLM.

    config --suites--> prompts --all in one stream--> engine --> rewards --> OUT/samples.jsonl, a line a problem
                                                                          '--> OUT/evaluation.json and .md, the table

The engine's slots are kept full with the prompts of all suites, one after the other; episodes, scores and
estimates are those of evaluations during a run. Ended in the middle, the same command with the same --out
goes on: problems that are in samples.jsonl are not asked again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from actors.engine import Engine
from actors.evaluating import SuiteScorers, eval_sample, open_item
from actors.groups import Generator, Groups
from actors.playing.player import make_player
from actors.prompts import PromptSet
from actors.reward_model.asked import hosted_here
from actors.scoring import Scoring
from cluster.cli.try_policy import check_policy
from cluster.preparation.environment_checks import check_environments
from cluster.preparation.model_limits import check_length, check_token_ids
from cluster.preparation.suites import check_suites, load_prompts_of, scorable_suites
from core.config import Config
from core.config.evaluation import Suite
from core.errors import ConfigError
from core.evaluation.estimates import STANDARD_ERROR
from core.evaluation.open_evaluation import evaluation_of
from core.evaluation.records import EvalItem, EvalSample, Evaluation
from core.json_lines import finite_tree, replace_json
from core.model_shape import load_model_config
from core.sums import mean
from core.tokenizer import end_token_ids, load_tokenizer
from learner.catalogue import load_config
from rewards.hosted import hosted_models

SETTINGS, SAMPLES, RESULT, TABLE = "settings.json", "samples.jsonl", "evaluation.json", "evaluation.md"
SAY_EVERY_S = 5.0
VERSION = 0
"""Of the weights: there is one."""


@dataclass(frozen=True)
class Evaluated:
    """What came of it: results in the order of the suites, where they are written, and how long it took.

    reasons   why samples have no reward, and how many
    """

    results: Sequence[Evaluation]
    directory: Path
    wall_s: float
    num_tokens: int
    reasons: Mapping[str, int] = field(default_factory=dict)


def evaluate(
    directory: str,
    overrides: Sequence[str] = (),
    *,
    config_path: str | None = None,
    suites: Sequence[str] = (),
    out: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluated:
    """Evaluates the model in `directory` on the suites of a config, that beside it unless one is given.

    `suites` names those that are wanted, none: all. `out` is a new directory, or one of the same evaluation
    to go on with. `say` is told how far it is. Raises AgroError with what to do.
    """
    check_policy(directory)
    config = _config(directory, config_path, overrides)
    chosen = _chosen(config, suites)
    check_suites(config)
    prompts = _prompts(config)
    path = Path(out or f"runs/evaluate-{Path(directory).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")
    work = _Work(chosen, prompts, _open(path, _settings(config, chosen)))
    if work.num_done:
        say(f"going on in {path}: {work.num_done} of {work.num_problems} problems are there")
    start_s = time.monotonic()
    try:
        if work.num_done < work.num_problems:
            _generate(config, work, _make_engine(config), say)
    except KeyboardInterrupt:
        say(f"ended at {work.num_done} of {work.num_problems} problems; with --out {path} it goes on")
        raise
    evaluated = Evaluated(
        [work.result(suite) for suite in chosen],
        path,
        time.monotonic() - start_s,
        work.num_tokens,
        work.reasons(),
    )
    _write(evaluated, _settings(config, chosen))
    return evaluated


def table(results: Sequence[Evaluation]) -> str:
    """Returns the results as a table of markdown, a row a suite; a cell is a value ± its standard error."""
    names = sorted({name for result in results for name in _shown(result)}, key=_place)
    head = ["suite", "problems", "samples", "errors", *names, "tokens", "cut"]
    rows = [head, ["---"] * len(head)]
    for result in results:
        metrics = result.metrics
        counts = [
            result.suite,
            *(str(n) for n in (result.num_problems, result.num_samples, result.num_errors)),
        ]
        values = [_value(metrics, name) for name in names]
        rows.append(
            [*counts, *values, f"{metrics['mean_length']:.1f}", f"{metrics['truncated_fraction']:.0%}"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def _shown(result: Evaluation) -> list[str]:
    return [name for name in result.metrics if "@" in name and not name.endswith(STANDARD_ERROR)]


def _place(name: str) -> tuple[int, int]:
    kind, _, count = name.partition("@")
    return ("avg", "pass", "majority").index(kind), int(count)


def _value(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    error = metrics.get(name + STANDARD_ERROR)
    return f"{metrics[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


# --- Before ---


def _config(directory: str, config_path: str | None, overrides: Sequence[str]) -> Config:
    path = Path(directory).resolve().parent / "config.yaml" if config_path is None else Path(config_path)
    if config_path is None and not path.is_file():
        raise ConfigError(
            f"there is no {path} beside the model, which would say what to evaluate on. Give a config: --config FILE."
        )
    return load_config(path, [*overrides, f"model.path={Path(directory).resolve()}"])


def _chosen(config: Config, names: Sequence[str]) -> list[Suite]:
    known = {suite.name: suite for suite in config.suites}
    if not known:
        raise ConfigError(
            "there is nothing to evaluate on: data.eval_rows = 0, and there are no eval.suites. Set either."
        )
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--suite {unknown[0]}: there is no such suite; valid here: {', '.join(known)}")
    return [suite for name, suite in known.items() if not names or name in names]


def _prompts(config: Config) -> dict[str, PromptSet]:
    tokenizer = load_tokenizer(config.model)
    acted = check_environments(config, tokenizer, end_token_ids(config.model, tokenizer))
    prompts = load_prompts_of(config, tokenizer, acted)
    found = load_model_config(config.model)
    for each in prompts.values():
        check_length(config, found, each)
    check_token_ids(config, found, tokenizer, *prompts.values())
    return scorable_suites(config, prompts)


def _settings(config: Config, suites: Sequence[Suite]) -> dict[str, Any]:
    """Returns what makes two evaluations the same: settings, and the sizes and times of the model's files."""
    tree = config.model_dump(mode="json")
    kept = {name: tree[name] for name in ("model", "environments", "data", "rewards", "actors")}
    files = sorted(path for path in Path(config.model.path).iterdir() if path.is_file())
    return {
        **kept,
        "seed": config.run.seed,
        "suites": [dataclasses.asdict(suite) for suite in suites],
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }


def _open(path: Path, settings: Mapping[str, Any]) -> Path:
    """Makes the directory, or finds the same evaluation in it."""
    if (path / SETTINGS).is_file():
        if json.loads((path / SETTINGS).read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
            raise ConfigError(
                f"{path} holds an evaluation of another model or of other settings ({SETTINGS}). Give another --out."
            )
        return path
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty directory. Give another --out.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace_json(path / SETTINGS, settings)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Give another --out.") from None
    return path


# --- Meanwhile ---


class _Work:
    """What is asked and what is done; every problem that is done is on disk."""

    def __init__(self, suites: Sequence[Suite], prompts: Mapping[str, PromptSet], directory: Path) -> None:
        self.suites = {suite.name: suite for suite in suites}
        self.prompts = {name: prompts[name] for name in self.suites}
        self._path = directory / SAMPLES
        self._done: dict[str, dict[int, EvalSample]] = {name: {} for name in self.suites}
        for sample in _read_samples(self._path):
            self._done[sample.item.suite][sample.item.prompt_index] = sample
        self._file = self._path.open("ab")

    @property
    def num_problems(self) -> int:
        return sum(map(len, self.prompts.values()))

    @property
    def num_done(self) -> int:
        return sum(map(len, self._done.values()))

    @property
    def num_tokens(self) -> int:
        return sum(sum(sample.lengths) for done in self._done.values() for sample in done.values())

    def items(self, seed: int) -> Iterator[EvalItem]:
        """Yields what is not done, suite by suite, with the seeds that a run would give it."""
        for name, prompts in self.prompts.items():
            for index in range(len(prompts)):
                if index not in self._done[name]:
                    yield EvalItem(name, VERSION, index, (seed + index) % 2**31)

    def take(self, sample: EvalSample) -> None:
        """Notes the samples of a problem."""
        self._file.write(msgspec.json.encode(sample) + b"\n")
        self._file.flush()
        self._done[sample.item.suite][sample.item.prompt_index] = sample

    def result(self, suite: Suite) -> Evaluation:
        """Returns what came of a suite."""
        done = self._done[suite.name]
        return evaluation_of(suite.name, VERSION, [done[index] for index in sorted(done)], suite.samples)

    def reasons(self) -> Counter[str]:
        """Returns why samples have no reward."""
        samples = (sample for done in self._done.values() for sample in done.values())
        return Counter(error for sample in samples for error in sample.errors if error is not None)

    def told(self, started: int, since_s: float) -> str:
        """Returns one line on how far it is."""
        parts = []
        for name, done in self._done.items():
            rewards = [reward for each in done.values() for reward in each.rewards if reward is not None]
            rate = f" {mean(rewards):.3f}" if rewards else ""
            parts.append(f"{name} {len(done)}/{len(self.prompts[name])}{rate}")
        elapsed_s = time.monotonic() - since_s
        done_here = self.num_done - started
        parts.append(f"{elapsed_s:.0f} s")
        if done_here:
            parts.append(f"{elapsed_s / done_here * (self.num_problems - self.num_done):.0f} s left")
        return "  ".join(parts)


def _read_samples(path: Path) -> Iterator[EvalSample]:
    """Yields the samples in the file; a line that a kill tore is cut off."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    for line in whole.splitlines():
        yield msgspec.json.decode(line, type=EvalSample)


def _make_engine(config: Config) -> Generator:
    return Engine(
        config.model,
        config.actors,
        max_model_len=config.max_sequence_tokens,
        seed=config.run.seed,
        version=VERSION,
        skip_special_tokens=config.rewards.skip_special_tokens,
    )


def _generate(config: Config, work: _Work, engine: Generator, say: Callable[[str], None]) -> None:
    """Plays every problem that is not done, and has it scored."""
    groups = Groups(engine, config.actors, player=make_player(config))
    models = hosted_models(name for suite in work.suites.values() for name in suite.functions)
    scorers = SuiteScorers(
        config, models_for=hosted_here(models, config.run.timeout_s, config.data.system_prompt)
    )
    scoring = Scoring(scorers.of(next(iter(work.suites))), config.rewards.max_pending)
    waiting, since_s, started = work.items(config.run.seed), time.monotonic(), work.num_done
    said_s, item = since_s, next(waiting, None)
    try:
        while item is not None or len(groups) or len(scoring):
            while item is not None and groups.has_room and not scoring.is_full:
                groups.start(open_item(item, work.suites[item.suite], work.prompts[item.suite]))
                item = next(waiting, None)
            for group in groups.step():
                assert isinstance(group.item, EvalItem)
                scoring.submit(group, scorers.of(group.item.suite))
            if not engine.num_unfinished and (groups.is_waiting or scoring.futures):
                groups.wait(scoring.futures, 0.1)
            for group, samples in scoring.take():
                assert isinstance(group.item, EvalItem)
                work.take(eval_sample(group.item, group, samples))
            if time.monotonic() - said_s > SAY_EVERY_S:
                said_s = time.monotonic()
                say(work.told(started, since_s))
    finally:
        groups.close()
        scorers.close()


# --- Afterwards ---


def _write(evaluated: Evaluated, settings: Mapping[str, Any]) -> None:
    results = [msgspec.structs.asdict(result) for result in evaluated.results]
    tree = {
        "model": settings["model"]["path"],
        "wall_s": evaluated.wall_s,
        "sampled_tokens": evaluated.num_tokens,
        "results": results,
        "errors": dict(evaluated.reasons),
    }
    replace_json(evaluated.directory / RESULT, finite_tree(tree))
    text = f"# {settings['model']['path']}\n\n{table(evaluated.results)}\n"
    (evaluated.directory / TABLE).write_text(text, encoding="utf-8")
