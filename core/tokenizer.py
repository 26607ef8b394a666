"""The tokenizer: loaded, checked, and asked where a completion ends and what its text is.

    model.path --load_tokenizer--> tokenizer
        --tokenise-------> the tokens of texts, special tokens once
        --end_token_ids--> the tokens that end a completion
        --closing_ids----> what the policy writes after an answer's last word
        --Detokenizer----> what rewards, samples.jsonl and `chat` show

One set of end tokens serves the engine, offline completions and `chat`: those that the model's files name,
and the one with which the chat template ends a turn. The text of a completion is made here alone, so that
equal tokens have equal texts everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.config import ModelConfig
from core.errors import ConfigError, DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
)
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})
_ANSWER, _QUESTION = "ANSWER", "QUESTION"


# --- Loading ---


def load_tokenizer(model: ModelConfig) -> Any:
    """Returns the model's tokenizer.

    Raises ConfigError, in one line with file and remedy, when it cannot be had, whatever the libraries raise.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except BaseException as error:
        if not _is_failure(error):
            raise
        why, remedy = _diagnosis(Path(model.path), error)
        raise ConfigError(f"model.path = {model.path}: no tokenizer to be had: {why}. {remedy}") from None


def _is_failure(error: BaseException) -> bool:
    """Returns whether the libraries raised this, rather than a signal that came meanwhile.

    A panic in `tokenizers`, which is written in Rust, is no Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _diagnosis(folder: Path, error: BaseException) -> tuple[str, str]:
    """Returns what is wrong with the files of the tokenizer, and what to do."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    if not folder.is_dir():
        return reason, "Give a local Hugging Face directory, or a hub id this machine can reach."
    if broken := next(_broken_files(folder), None):
        return broken, "Fetch that file again from where the model comes from."
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        return (
            f"the directory has no tokenizer.json, but {present}",
            "Copy the tokenizer's files of the base model there.",
        )
    if "requires you to execute" in str(error) or "contains custom code" in str(error):
        return (
            "it comes with Python code of its own",
            "Read that code, then set model.trust_remote_code=true.",
        )
    if why := _too_new(folder / "tokenizer.json"):
        return (
            why,
            "Install a newer tokenizers (and transformers), or save the tokenizer with the version installed "
            "here.",
        )
    if isinstance(error, ImportError):
        return reason, "Install what it asks for."
    return (
        f"transformers could not load it: {type(error).__name__}: {reason}",
        "Look at tokenizer.json and tokenizer_config.json there.",
    )


def _broken_files(folder: Path) -> Iterator[str]:
    """Returns those of the tokenizer's files that are no JSON objects or no text."""
    for name in (*TOKENIZER_FILES, "config.json"):
        if not (folder / name).is_file():
            continue
        content = (folder / name).read_bytes()
        if content.startswith(b"version https://git-lfs"):
            yield f"{name} is a pointer of git-lfs, not the file (`git lfs pull`)"
        try:
            found = json.loads(content)
        except ValueError as error:
            yield f"{name} is not JSON: {error}"
        else:
            if not isinstance(found, dict):
                yield f"{name} does not hold a JSON object"
    for path in folder.glob("*.jinja"):
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError as error:
            yield f"{path.name} is not UTF-8 (byte {error.start + 1})"


def _too_new(path: Path) -> str:
    """Returns why the installed `tokenizers` does not take the file; empty when it does, or when there is no
    such file.
    """
    import tokenizers

    if not path.is_file():
        return ""
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        if not _is_failure(error):
            raise
        why = str(error).splitlines()[0]
        return f"tokenizer.json is not understood by tokenizers {tokenizers.__version__}: {why}"
    return ""


# --- Tokens of texts ---


def tokenise(tokenizer: Any, texts: dict[int, str]) -> tuple[dict[int, tuple[int, ...]], dict[int, str]]:
    """Returns token ids by row, no special token added, and the rows that the tokenizer does not take, with
    its reason.
    """
    if not texts:
        return {}, {}
    try:
        return dict(zip(texts, map(tuple, _encode(tokenizer, list(texts.values()))), strict=True)), {}
    except Exception:  # noqa: BLE001 -- tokenizers raises bare Exceptions
        found, failed = {}, {}
        for index, text in texts.items():
            try:
                found[index] = tuple(_encode(tokenizer, [text])[0])
            except Exception as error:  # noqa: BLE001 -- this one
                failed[index] = f"the tokenizer does not take {text[:40]!r}: {str(error).splitlines()[0]}"
        return found, failed


def is_unknown(tokenizer: Any, text: str, token_ids: tuple[int, ...]) -> bool:
    """Returns whether no token of `text` is one that the tokenizer knows."""
    unknown = tokenizer.unk_token_id
    return bool(token_ids) and set(token_ids) == {unknown} and str(tokenizer.unk_token) not in text


def _encode(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return list(encoded["input_ids"])


def text_prefix(tokenizer: Any, texts: dict[int, str], found: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the tokens that the tokenizer puts before every text; `found` are tokens without it.

    What it puts after one (EOS, SEP) is not the beginning of an answer.
    """
    index = next((index for index, token_ids in found.items() if token_ids), None)
    if index is None:
        return ()
    bare, full = found[index], tuple(_encode(tokenizer, [texts[index]], add_special_tokens=True)[0])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    special = special_token_ids(tokenizer)  # The first word is another one behind a special token.
    return full[: next((place for place, token_id in enumerate(full) if token_id not in special), 0)]


def with_prefix(tokenizer: Any, prefix: tuple[int, ...], token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the tokens with `prefix`, once, also where the text or the template brings it along."""
    shared = next(
        (length for length in range(len(prefix), 0, -1) if token_ids[:length] == prefix[-length:]), 0
    )
    token_ids = (*prefix, *token_ids[shared:])
    while tokenizer.bos_token_id is not None and token_ids[:2] == (tokenizer.bos_token_id,) * 2:
        token_ids = token_ids[1:]
    return token_ids


# --- Chat templates ---


def is_mistral(tokenizer: Any) -> bool:
    """Returns whether this is Mistral's own tokenizer (tekken.json).

    It makes tokens of messages itself; text stays text there.
    """
    return type(tokenizer).__name__ == "MistralCommonBackend"


def has_chat_template(tokenizer: Any) -> bool:
    """Returns whether messages can be rendered. Raises DataError for several templates of which none is the
    default.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(map(repr, template)) or "nothing"
        raise DataError(
            f"the tokenizer has chat templates called {names}, but none called 'default'. Put the one to "
            "train with into chat_template.jinja in the model's directory, or set data.chat_template=false "
            "to use prompts as they are."
        )
    return bool(template) or is_mistral(tokenizer)


def render_messages(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] = (),
    options: Mapping[str, Any] = NO_OPTIONS,
) -> tuple[str, tuple[int, ...] | None]:
    """Returns the prompt's text, up to where the answer begins, and its tokens where the tokenizer makes them
    itself.

    `tools` are the JSON schemas of what the policy may call, `options` are `data.template_options`. Raises
    whatever a template may raise.
    """
    given: dict[str, Any] = {**options, "tools": list(tools)} if tools else {**options}
    if is_mistral(tokenizer):
        made = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **given)
        return tokenizer.decode(list(made)), tuple(made)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **given)
    return str(text), None


# --- Where completions end ---


def end_token_ids(model: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns every token that ends a completion, ascending; empty when there is none.

    These are the tokens named by the tokenizer, generation_config.json or config.json, and the special token
    with which the chat template ends a turn. Raises ConfigError when a file names something that is no token
    id.
    """
    named = set(_named_ids(model))
    if isinstance(tokenizer.eos_token_id, int):
        named.add(tokenizer.eos_token_id)
    return tuple(sorted(named.union(_turn_end(tokenizer, named)[-1:])))


def closing_ids(tokenizer: Any, end_ids: Sequence[int], *, chat_template: bool) -> tuple[int, ...]:
    """Returns what the policy samples after the last word of an answer, an end token last: as the chat
    template has it, else EOS.
    """
    if chat_template and (turn_end := _turn_end(tokenizer, set(end_ids))):
        return turn_end
    if tokenizer.eos_token_id in end_ids:
        return (tokenizer.eos_token_id,)
    return tuple(end_ids[:1])


def split_at_end(tokenizer: Any, end_ids: Sequence[int], text: str) -> tuple[str, tuple[int, ...], str]:
    """Returns what comes before the first end token written out in `text`, that token, and what comes after
    it.

    The policy samples neither the white space nor the further end tokens behind it: they are left out of the
    last.
    """
    by_name = {_name(tokenizer, token_id): token_id for token_id in end_ids}
    pattern = "|".join(map(re.escape, sorted(by_name, key=len, reverse=True)))
    if not pattern or (found := re.search(pattern, text)) is None:
        return text, (), ""
    return text[: found.start()], (by_name[found[0]],), re.sub(pattern, "", text[found.end() :]).strip()


def end_token_notes(tokenizer: Any, end_ids: Sequence[int], vocabulary: int | None = None) -> list[str]:
    """Returns what to tell at the start about where completions end.

    `vocabulary` is how many tokens the model knows, where that is known.
    """
    if not end_ids:
        return [
            "warning: no end token is known (neither tokenizer, generation_config.json, config.json nor chat "
            "template names one): "
            "no completion ever ends, all are cut at actors.max_new_tokens. Give the tokenizer an eos_token."
        ]
    notes = []
    if vocabulary is not None and (beyond := [token_id for token_id in end_ids if token_id >= vocabulary]):
        notes.append(
            f"warning: the model has {vocabulary} tokens and can never sample the end token "
            f"{', '.join(map(str, beyond))}"
        )
    if len(end_ids) > 1:
        names = ", ".join(f"{_name(tokenizer, token_id)} ({token_id})" for token_id in end_ids)
        notes.append(f"completions end at any of {names}")
    return notes


def vocabulary_size(model: ModelConfig) -> int | None:
    """Returns how many tokens the model itself knows, by its config.json; None where that does not say."""
    config = _json_file(model, "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    return None


def _named_ids(model: ModelConfig) -> Iterator[int]:
    """Returns what the model's own files name as end tokens."""
    for name in ("generation_config.json", "config.json"):
        config = _json_file(model, name)
        for section in (config, config.get("text_config")):
            found = section.get("eos_token_id") if isinstance(section, dict) else None
            for token_id in found if isinstance(found, list) else [found]:
                if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0:
                    yield token_id
                elif token_id is not None and token_id != -1:  # Some files write -1 for none.
                    raise ConfigError(
                        f"{model.path}/{name}: eos_token_id = {token_id!r} is no token id. Write a number, "
                        "or a list of them."
                    )


def _json_file(model: ModelConfig, name: str) -> dict[str, Any]:
    """Returns a file of the model, from disk or the hub; empty when it has none. Raises ConfigError when it
    is no JSON object.
    """
    path = Path(model.path, name) if Path(model.path).is_dir() else _hub_file(model.path, name)
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON: {error}. Fetch it again from where the model comes from."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} does not hold a JSON object. Fetch it again from where the model comes from."
        )
    return found


def _hub_file(hub_id: str, name: str) -> Path | None:
    """Returns a file of a model on the hub whose config.json lies in the cache already; None when the model
    has no such file.
    """
    from transformers.utils import cached_file

    try:
        known = cached_file(
            hub_id, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        found = (
            known
            if name == "config.json" or known is None
            else cached_file(hub_id, name, _raise_exceptions_for_missing_entries=False)
        )
    # There is no such id, or the hub cannot be reached: that is told where the model itself is asked for.
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _turn_end(tokenizer: Any, named: set[int]) -> tuple[int, ...]:
    """Returns the tokens that the chat template puts after an answer, an end token last.

    The end token is the first of `named`, or where the template puts none of them the first special token.
    Empty without a template, or when it puts neither.
    """
    if is_mistral(tokenizer):
        return (tokenizer.eos_token_id,)
    special = special_token_ids(tokenizer) | named
    heads = [
        _head_of_tail(tokenizer, special, *more) for more in ((), ({"role": "user", "content": _QUESTION},))
    ]
    for head in heads:  # Some models' answers are ended by the head of the next turn (GLM's `<|user|>`).
        if cut := next((place for place, token_id in enumerate(head, start=1) if token_id in named), 0):
            return head[:cut]
    cut = next((place for place, token_id in enumerate(heads[0], start=1) if token_id in special), 0)
    return heads[0][:cut]


def _head_of_tail(tokenizer: Any, special: set[int], *more: dict[str, str]) -> tuple[int, ...]:
    """Returns the white space and the special tokens side by side that a template renders after an answer
    which messages follow.

    What comes after them belongs to the next turn.
    """
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}, *more]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        tail = text[text.rindex(_ANSWER) + len(_ANSWER) :].split(_QUESTION)[0]
        token_ids = tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])
    except Exception:  # noqa: BLE001 -- no template, or one that takes no such conversation
        return ()
    start = next((place for place, token_id in enumerate(token_ids) if token_id in special), len(token_ids))
    end = next(
        (place for place in range(start, len(token_ids)) if token_ids[place] not in special), len(token_ids)
    )
    if start == len(token_ids) or tail.split(_name(tokenizer, token_ids[start]))[0].strip():
        return ()
    return token_ids[:end]


def _name(tokenizer: Any, token_id: int) -> str:
    """Returns the token as it is written in texts."""
    return str(tokenizer.convert_ids_to_tokens(token_id))


def special_token_ids(tokenizer: Any) -> set[int]:
    """Returns the tokens that the tokenizer calls special, `<think>` among them in some models."""
    added = {} if is_mistral(tokenizer) else tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


# --- Text ---


class Detokenizer:
    """Makes the text of completions, without what ends them and, with `skip_special_tokens`, without any
    special token.

    A completion ends in an end token, with the special tokens that the chat template has before it.

        detokenizer = Detokenizer(tokenizer, end_token_ids(model, tokenizer))
        detokenizer.text(sample_ids)
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int], *, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._size, self._end_ids = tokenizer, len(tokenizer), frozenset(end_ids)
        self._closing = closing_ids(tokenizer, end_ids, chat_template=True)
        self._skipped = special_token_ids(tokenizer) if skip_special_tokens else set()

    def text(self, token_ids: Sequence[int]) -> str:
        """Returns text that can always be encoded.

        Bytes that are no UTF-8 become U+FFFD, and so do tokens that the tokenizer does not have.
        """
        num_kept, closing = len(token_ids), self._closing
        if token_ids and token_ids[-1] in self._end_ids:
            num_kept -= len(closing) if tuple(token_ids[-len(closing) :]) == closing else 1
        kept = [token_id for token_id in token_ids[:num_kept] if token_id not in self._skipped]
        if max(kept, default=0) >= self._size:  # A model may have more tokens than its tokenizer.
            text = "".join(
                self._decode([token_id]) if token_id < self._size else "\ufffd" for token_id in kept
            )
        else:
            text = self._decode(kept)
        return text.encode("utf-8", "replace").decode()

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
