"""Checks everything that can fail before a process of the run starts: the base model, the prompts, the
rewards, the run directory.

    prepare  --check_start--> --ensure_model--> --check_inputs--> --open_run_dir--> Inputs
    dry_run  --check_start--------------------> --check_inputs--> a report

What can be known without an engine is checked in one of the two, so that `train --dry-run` finds it too.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.dataset.template_options import option_notes
from actors.offline import load_offline
from actors.prompts import PromptSet, load_prompts
from actors.reward_model import check_classifier
from actors.sources import TRAIN_SPLIT, split_of
from buffer.stream import PromptStream
from cluster.monitor.backends import check_backends
from cluster.monitor.wandb_writer import DEFAULT_PROJECT, WandbMode, mode_of, project_of, wandb_project
from cluster.preparation.environment_checks import Acted, check_environments, playable
from cluster.preparation.installed import check_installed
from cluster.preparation.model_checks import check_model, lora_notes
from cluster.preparation.model_limits import check_cache, check_length, check_token_ids
from cluster.preparation.model_weights import check_weights
from cluster.preparation.placement import check_machine
from cluster.preparation.run_dir import check_run_dir, open_run_dir
from cluster.preparation.suites import check_suites, load_suites, scorable, scorable_suites, suite_notes
from core import sandbox
from core.config import Config, ModelConfig
from core.errors import AgroError, ConfigError, DataError
from core.model_shape import load_model_config
from core.staleness import StalenessBound
from core.text import user_path
from core.tokenizer import end_token_ids, end_token_notes, load_tokenizer, vocabulary_size
from core.users.code import look_in_working_directory
from learner.objectives import load_objective
from learner.policy.model_files import check_model_files
from rewards.check import check_environments_read, check_functions, length_notes, start_notes
from rewards.hosted import HostedModel, models_of, path_of

HUB_TIMEOUT_S = 20.0
PYTHON_TOOL = "environments.python_tool:"
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The outcome of the checks of a start. `config` has an absolute model path; `eval_prompts` are those of
    each suite that is evaluated, by its name; `notes` are to be told at the start.
    """

    config: Config
    prompts: PromptSet
    eval_prompts: Mapping[str, PromptSet]
    pad_id: int
    wandb_mode: WandbMode
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inputs(Checked):
    """The inputs of a run: checked, and with its directory open."""

    run_dir: Path
    is_continued: bool = False
    wandb_project: str = DEFAULT_PROJECT


def prepare(config: Config) -> Inputs:
    """Checks and loads what the run needs; the run directory is opened last. Raises an AgroError with a
    remedy.
    """
    quiet_libraries()
    config = locate_model(config)
    check_start(config)
    checked = check_inputs(ensure_model(config))
    run_dir = open_run_dir(checked.config)
    known = {**vars(checked), "notes": (*checked.notes, *run_dir.notes)}
    project = DEFAULT_PROJECT
    if checked.wandb_mode != "disabled":
        project = project_of(run_dir.path)
    return Inputs(**known, run_dir=run_dir.path, is_continued=run_dir.is_continued, wandb_project=project)


def check_start(config: Config) -> str:
    """Checks what can be known before the model is there: what the config names, the machine, the run
    directory.

    Returns, in words, which run directory it is.
    """
    check_installed(config)
    if mode_of(config) != "disabled":
        wandb_project()
    check_backends(config)
    check_named(config)
    check_machine(config.actors, config.learner)
    if not Path(config.model.path).is_absolute():
        check_hub_id(config.model.path)
    return check_run_dir(config)


def check_inputs(config: Config) -> Checked:
    """Checks everything that can be known of a run without an engine, once its model is there; leaves nothing
    on disk.

    A start and `--dry-run` both go through here: what is checked here, both find. Raises an AgroError with a
    remedy.
    """
    tokenizer = load_tokenizer(config.model)
    check_model(config)
    check_weights(config.model)
    about_model = (*check_model_files(config.model), *lora_notes(config.model, config.learner))
    end_ids = end_token_ids(config.model, tokenizer)
    acted = check_environments(config, tokenizer, end_ids)
    prompts, notes = load_training(config, tokenizer, acted)
    notes = [
        *notes,
        *acted.notes,
        *end_token_notes(tokenizer, end_ids, vocabulary_size(config.model)),
        *_ended(prompts, end_ids),
        *option_notes(tokenizer, config.data.template_options),
    ]
    eval_prompts = load_suites(config, tokenizer, acted)
    notes = [*notes, *suite_notes(config)]
    found = load_model_config(config.model)
    check_length(config, found, prompts)
    check_cache(config, found)
    check_token_ids(config, found, tokenizer, prompts, *eval_prompts.values())
    prompts, eval_prompts = scorable(config, prompts), scorable_suites(config, eval_prompts)
    PromptStream.of(config, len(prompts), prompts.parts)  # Every shard has prompts.
    # Any token will do, since padding is masked.
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    notes = [*notes, *about_model, *start_notes(config.rewards), *_length_notes(config), *_tool_notes(config)]
    return Checked(
        config=config,
        prompts=prompts,
        eval_prompts=eval_prompts,
        pad_id=pad_id,
        wandb_mode=mode_of(config),
        notes=tuple(notes),
    )


def load_training(config: Config, tokenizer: Any, acted: Acted) -> tuple[PromptSet, list[str]]:
    """Returns what is trained on, from `data.path`, `data.offline` or both, and what to tell about it. Raises
    DataError.
    """
    if config.is_offline:
        return load_offline(config, tokenizer)
    prompts = load_prompts(config.data, tokenizer, environments=acted.tools(config.environment_paths))
    prompts = playable(config, acted, prompts)
    if config.data.offline is None:
        return prompts, list(prompts.notes)
    mixed, notes = load_offline(config, tokenizer, prompts)
    return mixed, [*prompts.notes, *notes]


def _length_notes(config: Config) -> Iterator[str]:
    """Yields what is to be told of rewards for lengths that no answer has."""
    actors = config.actors
    most, limit = actors.max_new_tokens, f"actors.max_new_tokens = {actors.max_new_tokens}"
    if config.environments is not None:
        most, limit = most * actors.max_turns, f"{limit}, actors.max_turns = {actors.max_turns}"
    yield from length_notes(config.rewards, most, limit)


def _tool_notes(config: Config) -> Iterator[str]:
    """Yields what the kernel keeps from programs that the policy runs."""
    if any(path.startswith(PYTHON_TOOL) for path in config.environment_paths.values()):
        yield f"the Python tool runs the policy's programs in processes with limits, {sandbox.isolation()}"


def _ended(prompts: PromptSet, end_ids: Sequence[int]) -> Iterator[str]:
    """Returns what to tell of prompts that the model may take for finished."""
    if ended := [
        row.source_row + 1 for row in prompts.rows if row.token_ids and row.token_ids[-1] in end_ids
    ]:
        yield (
            f"warning: {len(ended)} of {len(prompts)} prompts end in an end token (the first: row "
            f"{ended[0]}), as if nothing were to "
            "follow. Have the chat template open the answer (add_generation_prompt), or take it off the "
            "prompts"
        )


def check_named(config: Config) -> None:
    """Checks that what the config names exists: rewards, objective, local data.

    Raises RewardError, ConfigError or DataError.
    """
    check_functions(config.rewards)
    if config.environments is None:
        check_environments_read(config.rewards)
    check_suites(config)
    check_reward_models(models_of(config))
    check_needs(config, load_objective(config.objective).needs)
    check_progress(config)
    data = config.data
    for field, path in (
        *(("data.path", name) for name in data.sources),
        ("data.eval_path", data.eval_path),
        ("data.offline", data.offline_source),
        *((f"eval.suites.{name}.path", suite.path) for name, suite in config.eval.suites.items()),
    ):
        place, _ = split_of(path or "", TRAIN_SPLIT)
        if place.startswith(("/", ".", "~")) and not os.path.exists(user_path(field, place)):
            raise DataError(
                f"{field} = {path}: no such file or directory (seen from {Path.cwd()}). Give "
                "another path, or a hub id."
            )


def check_reward_models(models: Mapping[str, HostedModel]) -> None:
    """Raises RewardError or ConfigError where a reward model is not there, or is no sequence classifier."""
    for name, model in models.items():
        path = path_of(name)
        if not path.startswith(("/", ".", "~")) and not os.path.exists(path):
            check_hub_id(path, f"reward function {name!r}: the model")
        check_classifier(name, model, path)


def check_progress(config: Config) -> None:
    """Raises ConfigError when, between two snapshots, every group would be too old to be trained on."""
    every = config.weights.publish_every
    step = StalenessBound(config.buffer.max_staleness).starving_step(every, config.run.steps)
    if step is not None and not config.is_offline:
        raise ConfigError(
            f"buffer.max_staleness = {config.buffer.max_staleness} with weights.publish_every = {every}: at "
            "step "
            f"{step} every group is too old, and newer weights come at step {every} only. Set "
            f"weights.publish_every={step}, or raise max_staleness."
        )


def check_needs(config: Config, needs: frozenset[str]) -> None:
    """Raises ConfigError when the data cannot give what the objective `needs` (learner/objectives: NEEDS)."""
    name = config.objective.name
    if "behaviour_logprobs" in needs and config.data.offline is not None:
        remedy = "Set objective.importance_weight=none (and objective.on_policy_gate=fresh)."
        if name != "agro":
            remedy = (
                "If it works on ratios, use another objective, such as agro with "
                "objective.importance_weight=none; "
                "else set objective.importance_weight=none."
            )
        raise ConfigError(
            f"objective {name} needs behaviour log-probs, which the samples of data.offline = "
            f"{config.data.offline} "
            f"do not have. {remedy}"
        )
    if "freshness" in needs and config.is_offline:
        remedy = "Set objective.on_policy_coef=0." if name == "agro" else "Use another objective."
        raise ConfigError(
            f"objective {name} needs samples of the current policy, but all samples are "
            f"offline: none is ever fresh. {remedy}"
        )


def quiet_libraries() -> None:
    """Silences progress bars between our own lines, and DeepSpeed's warning that there is no GPU."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_libraries() -> None:
    """Loads what reading a model's config and tokenizer needs, most of the time that `prepare` takes. What
    fails here fails there too, and is told there.
    """
    # A thread's error would be a traceback; whatever it is, `prepare` meets it again and tells it.
    with contextlib.suppress(Exception):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

        del AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def locate_model(config: Config) -> Config:
    """Returns the config with the model's path made absolute, unless it is a hub id.

    A name that could be both is a directory if that exists, and else a hub id: `model.make` wants a path that
    is none. Raises ConfigError for a path where nothing is, or will be.
    """
    model = config.model
    path = user_path("model.path", model.path)
    if os.path.isfile(path):  # Path.is_file would raise for a name that no file can have.
        raise ConfigError(
            f"model.path = {model.path} is a file, expected a Hugging Face directory or a hub id."
        )
    if not os.path.exists(path):
        is_id = _HUB_ID.fullmatch(model.path) is not None
        if is_id and model.make:
            raise ConfigError(
                f"model.path = {model.path} reads as a hub id, but model.make = {model.make} makes a "
                "directory. Write "
                f"model.path=./{model.path} to have it made there, or remove model.make (model.make=null) to "
                "take it from the hub."
            )
        if is_id:
            return config  # transformers resolves it, or says why it cannot.
        if not model.make:
            raise ConfigError(
                f"model.path = {model.path}: there is no {path.absolute()}{_nearest(path)} Give a Hugging "
                "Face directory or a hub id. "
                "(model.make of a config file goes with the path beside it; with another path, give "
                "model.make too.)"
            )
    return config.model_copy(update={"model": model.model_copy(update={"path": str(path.resolve())})})


def check_hub_id(name: str, key: str = "model.path") -> None:
    """Raises ConfigError when the hub has no such model, or cannot be asked while nothing of it is in
    the cache.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        return
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private (set HF_TOKEN)"
    except HFValidationError:
        reason = "the hub has no such names"
    except HfHubHTTPError:
        return  # Some mirrors of the hub do not answer this question.
    except Exception as error:  # noqa: BLE001 -- the network: the hub's client raises what it likes
        told = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        reason = f"the hub cannot be asked ({told})"
    path = Path(name)
    raise ConfigError(
        f"{key} = {name}: there is no directory {path.absolute()}{_nearest(path)} As a hub id: "
        f"{reason}. "
        "Give a Hugging Face directory, or a hub id this machine can reach."
    )


def _nearest(path: Path) -> str:
    names: list[str] = []
    with contextlib.suppress(OSError):  # The parent may be missing, or unreadable.
        names = [found.name for found in path.parent.iterdir() if found.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else "."


def model_to_make(model: ModelConfig) -> Path | None:
    """Returns where `model.make` would make the model; None when it is there, or comes from the hub."""
    path = Path(model.path)
    return path if model.make and not path.exists() else None


def ensure_model(config: Config) -> Config:
    """Returns what `locate_model` returns; a model that does not exist yet is made by `model.make`."""
    config = locate_model(config)
    if path := model_to_make(config.model):
        _make_model(str(config.model.make), path)
    return config


def _make_model(recipe: str, path: Path) -> None:
    module_name, function_name = recipe.split(":")
    look_in_working_directory()
    try:
        make = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.make = {recipe}: {error}. Expected module:function, importable from here."
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        make(str(path))
    except AgroError:
        raise
    except Exception as error:  # noqa: BLE001 -- the user's code: theirs to read, in one line
        raise ConfigError(
            f"model.make = {recipe} failed for {path}: {type(error).__name__}: {error}"
        ) from None


def repository_root() -> Path:
    """Returns where launch.py lies, which workers need on their path."""
    return Path(sys.modules["cluster"].__path__[0]).resolve().parent
