"""What a policy's directory holds besides its tensors: config, generation config, tokenizer, templates and
whatever else the base has.

Files are copied as they are, which works for every tokenizer and processor, also for one that its library can
read but not save. Two are not: config.json says the dtype that was written; generation_config.json names
every token at which completions ended (core/tokenizer.py), and is mended, since transformers refuses to
save, and vLLM to serve, settings that do not go together. All of it is tried before a run starts
(`check_model_files`): at its end it cannot fail.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.config import ModelConfig
from core.errors import ConfigError
from core.tokenizer import end_token_ids, load_tokenizer

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
_COPIED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_NOT_COPIED = (
    "*.index.json",
    "adapter_config.json",
    "trainer_state.json",
    "quantize_config.json",
    CONFIG_NAME,
    GENERATION_NAME,
)
_DIRECTORIES = ("additional_chat_templates",)
# Of a model on the hub: files that nothing of ours asks for, but that whoever serves the policy may need.
_ASKED_FOR = (
    GENERATION_NAME,
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def check_model_files(model: ModelConfig) -> tuple[str, ...]:
    """Writes the files into a directory that is gone afterwards and reads them again; returns a sentence for
    each setting left out.

    Raises ConfigError, in one line, for files that no policy could be written with.
    """
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="agro-policy-") as directory:
        try:
            notes = write_model_files(Path(directory), model)
            AutoConfig.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
            AutoTokenizer.from_pretrained(directory, trust_remote_code=model.trust_remote_code)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 -- files and classes of others: whatever they raise
            reason = (str(error).strip().splitlines() or ["no reason given"])[0].replace(
                directory, "a copy of it"
            )
            raise ConfigError(
                f"model.path = {model.path}: the trained policy could not be written beside the files of its "
                "base: "
                f"{type(error).__name__}: {reason}"
            ) from None
    return notes


def write_model_files(directory: Path, model: ModelConfig) -> tuple[str, ...]:
    """Writes the files into `directory`; returns a sentence for each setting left out.

    Raises ConfigError for broken files, OSError for a disk that refuses them.
    """
    base = _base_directory(model)
    for path in _copied(base, with_code=model.trust_remote_code):
        shutil.copyfile(path, directory / path.name)
    for name in _DIRECTORIES:
        if (base / name).is_dir():
            shutil.copytree(base / name, directory / name)
    config = _read(base / CONFIG_NAME)
    _set_dtype(config, model.dtype)
    _write(directory / CONFIG_NAME, config)
    has_settings = (base / GENERATION_NAME).exists()
    settings, left_out = mended(_read(base / GENERATION_NAME)) if has_settings else ({}, [])
    # Whoever serves the policy is to end its completions where they ended in training.
    end_ids = end_token_ids(model, load_tokenizer(model))
    if _as_list((settings if has_settings else config).get("eos_token_id")) != list(end_ids):
        settings["eos_token_id"] = list(end_ids)
    if settings:
        _write(directory / GENERATION_NAME, settings)
    return tuple(
        f"{base / GENERATION_NAME}: the policy's has no {name} = {value!r}: {why}"
        for name, value, why in left_out
    )


def mended(settings: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """Returns generation settings that transformers takes and saves, and what was left out: (name, value,
    why).

    Settings for sampling mean sampling, unless do_sample says otherwise. Of settings that do not go together
    the later ones go.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if "do_sample" not in settings and any(name in settings for name in _SAMPLING):
        settings = {"do_sample": True, **settings}
    kept: dict[str, Any] = {}
    reasons = dict.fromkeys(settings, "")
    while True:  # Some go only with others that come later in the file.
        before = len(kept)
        for name in [name for name in settings if name not in kept]:
            reasons[name] = _fault({**kept, name: settings[name]})
            if not reasons[name]:
                kept[name] = settings[name]
        if len(kept) == before:
            break
    in_order = {name: settings[name] for name in settings if name in kept}
    return in_order, [(name, settings[name], reasons[name]) for name in settings if name not in kept]


def _fault(settings: dict[str, Any]) -> str:
    """Returns why transformers would not save these settings, or nothing when it would."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        GenerationConfig(**settings).validate(strict=True)
    except Exception as error:  # noqa: BLE001 -- values of any type: whatever transformers raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next(
            (line.removeprefix("- ") for line in lines if line.startswith("- ")),
            lines[0] if lines else type(error).__name__,
        )
    finally:
        logging.set_verbosity(verbosity)
    return ""


def _as_list(token_ids: Any) -> list[Any]:
    if isinstance(token_ids, list):
        return sorted(set(token_ids))
    return [] if token_ids is None else [token_ids]


def _base_directory(model: ModelConfig) -> Path:
    """Returns where the base's files lie: `model.path`, or its snapshot in the hub's cache."""
    from transformers.utils import cached_file

    if Path(model.path).is_dir():
        return Path(model.path)
    for name in _ASKED_FOR:
        cached_file(
            model.path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    try:
        return Path(str(cached_file(model.path, CONFIG_NAME))).parent
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path = {model.path}: no {CONFIG_NAME} to be had: {str(error).strip().splitlines()[0]}"
        ) from None


def _copied(base: Path, *, with_code: bool) -> Iterator[Path]:
    patterns = (*_COPIED, "*.py") if with_code else _COPIED
    for path in sorted(base.iterdir()):
        is_wanted = any(path.match(pattern) for pattern in patterns) and not any(
            path.match(pattern) for pattern in _NOT_COPIED
        )
        if is_wanted and path.is_file() and not path.name.startswith("."):
            yield path


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Notes the dtype of what lies beside the config, also where a part of the model has a config of
    its own.
    """
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    for part in config.values():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            _set_dtype(part, dtype)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # Of JSON, and of UTF-8.
        raise ConfigError(f"{path} is no JSON: {error}. Mend it, or take the original.") from None
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: model.path is no Hugging Face model.") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} holds {type(found).__name__}, not an object of settings. Mend it, or take the original."
        )
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
