"""Config files: YAML and `section.key=value` overrides to a Config and back, with every problem explained in
a line. `ConfigFiles` reads them, given the objectives that there are: this room knows none.

    file ----config_text.read----> tree --overrides--> tree --parse--> Config --dump_config--> text that reads as the same

On the command line a text arrives as it was typed: it is no YAML there. Only numbers, lists and mappings are.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from core.config import DEFAULT_OBJECTIVE, Config, ObjectiveConfig
from core.config import text as config_text
from core.config.evaluation import SuiteConfig
from core.config.other_names import INSTEAD
from core.config.section import PROSE, shown
from core.errors import ConfigError

MAX_FILE_BYTES = 1 << 18
_HINTS = {"eval.every": "data.eval_rows=0 switches evaluation off"}
_EXPECTED = {  # By pydantic's type of problem; its own message where none is here.
    "model_type": "expected a mapping of keys, one a line below it; remove the line to take the defaults",
    "tuple_type": "expected a list of numbers, for example [0.5, 1.0]",
    "too_short": "expected at least one entry, for example {exact_match: 1.0}",
    "string_type": "expected text; if it is meant as text, put it in quotes in the file",
    "string_too_short": "expected text that is not empty",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
}
_MAPPINGS = {  # By the name of a key that takes a mapping.
    "functions": "expected names and their weights, for example {exact_match: 1.0}",
    "suites": "expected names and the settings of each, for example {math: {path: math.jsonl, samples: 8}}",
    "columns": "expected names and where rows keep them, for example {answer: reward_model.ground_truth}",
    "template_options": "expected names of the template's own and their values, for example {enable_thinking: false}",
}


class ConfigFiles:
    """Reads configs, given the objectives that there are: the class of each one's knobs by its name."""

    def __init__(self, objectives: Mapping[str, type[ObjectiveConfig]]) -> None:
        self._objectives = objectives

    def load(self, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """The Config in the YAML file `path` with `section.key=value` overrides applied.

        `model.make` belongs to the path it is written beside: another path from `overrides` leaves it behind.
        Raises ConfigError that lists every problem: the field, the value found, what is accepted, the nearest
        valid name.
        """
        path = Path(path)
        tree = read_tree(path)
        written = _path_of_model(tree)
        changed = {self._apply_override(tree, override) for override in overrides}
        if "model.make" not in changed and _path_of_model(tree) != written:
            tree["model"].pop("make", None)
        return self.parse(tree, source=str(path))

    def parse(self, tree: Mapping[str, Any], source: str = "config") -> Config:
        """The Config that a mapping of sections describes; raises ConfigError (see `load`)."""
        tree = {"objective": {}, **tree}
        try:
            return Config.model_validate(_lists_as_tuples(tree), context=self._objectives)
        except RecursionError:
            raise ConfigError(
                f"{source}: a list or mapping contains itself, or is nested without end."
            ) from None
        except pydantic.ValidationError as error:
            # A list of which an entry is wrong is too short besides, says pydantic.
            problems = [
                self._explain(problem, tree)
                for problem in error.errors()
                if problem["type"] != "too_short" or not problem["input"]
            ]
            told = "\n".join(f"  - {line}" for line in problems[:10])
            more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise ConfigError(
                f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{told}{more}"
            ) from None

    def parse_text(self, text: str, source: str) -> Config:
        """The Config that `dump_config` wrote; raises ConfigError."""
        try:
            return self.parse(config_text.read(text), source)
        except config_text.TextError as error:
            raise ConfigError(f"{source} cannot be read: {error}.") from None

    def _apply_override(self, tree: dict[str, Any], override: str) -> str:
        """Put the value into the tree; the key's name. A suite's setting is `eval.suites.NAME.key=value`, or
        `eval.suites.NAME.functions.FUNCTION=value` where it takes names.
        """
        key, equals, text = override.partition("=")
        if equals and key in Config.model_fields and not self._fields(key, tree):  # It is no section.
            tree[key] = _override_value(Config.model_fields[key], text, override)
            return key
        *sections, name = key.split(".")
        is_of_suite = len(sections) > 2 and sections[:2] == ["eval", "suites"]
        if is_of_suite:
            sections, name = _place_in_suite([*sections, name])
        if not equals or not (len(sections) == 1 or is_of_suite) or not all((*sections, name)):
            raise ConfigError(
                f"override {shown(override)} is not section.key=value, for example learner.lr=1e-5"
            )
        fields = SuiteConfig.model_fields if is_of_suite else self._fields(sections[0], tree)
        field = fields.get(name)
        if len(sections) == 4:  # An entry of a suite's mapping.
            field = FieldInfo(annotation=typing.get_args(_MAPPINGS_OF_SUITES[sections[3]])[1])
        value = _override_value(field, text, override)
        place = tree
        for depth, section in enumerate(sections):
            if place.get(section) is None:
                place[section] = {}
            if not isinstance(place[section], dict):
                where = ".".join(sections[: depth + 1])
                found = f"the file holds {shown(place[section])} there"
                raise ConfigError(
                    f"override {shown(override)}: {where!r} is no section; {found}. Write its keys "
                    f"below `{where}:`."
                )
            place = place[section]
        place[name] = value
        return key

    def _explain(self, problem: Any, tree: Mapping[str, Any]) -> str:
        """One line for one pydantic problem: field, value, what to do."""
        kind, location = problem["type"], problem["loc"]
        names = [str(part) for part in location]
        where = ".".join(name if name.isprintable() and len(name) <= 40 else shown(name) for name in names)
        if kind in ("extra_forbidden", "invalid_key"):
            return f"{where} is not a known key{self._nearest(location, tree)}"
        if kind == "missing":
            how = f"write {names[-1]}: in the file"
            if len(names) == 2 or location[:2] == ("eval", "suites"):
                how = f"set it in the file or with {where}=<value>"
            return f"{where} is missing; {how}"
        if kind == "value_error":
            return problem["msg"].removeprefix("Value error, ")
        expected = _EXPECTED.get(kind, problem["msg"][0].lower() + problem["msg"][1:])
        if kind == "dict_type":
            expected = _MAPPINGS.get(names[-1], "expected a mapping of names")
        if kind == "string_pattern_mismatch":
            expected = f"it is of another form. {self._fields(names[0], tree)[names[1]].description}"
        if where in _HINTS:
            expected += f"; {_HINTS[where]}"
        return f"{where} = {shown(problem['input'])}: {expected}"

    def _nearest(self, location: tuple[Any, ...], tree: Mapping[str, Any]) -> str:
        """What may be meant by a key that is not known: one that has another name here, one of this name in
        another objective, one spelt alike here, or one of this name in another section.
        """
        if instead := INSTEAD.get(".".join(map(str, location))):
            return f"; {instead}"
        key, section = str(location[-1]), str(location[0])
        valid = [*Config.model_fields]
        if len(location) > 1:
            valid = [*self._fields(section, tree)]
        if location[:2] == ("eval", "suites"):
            valid = [*SuiteConfig.model_fields]
        having = [name for name in self._objectives if key in self._objectives[name].model_fields]
        if section == "objective" and having:
            has = "has" if len(having) == 1 else "have"
            return (
                f"; {_named(tree)} is without it, {', '.join(having)} {has} it; valid here: {_listed(valid)}"
            )
        if near := difflib.get_close_matches(key, valid, n=1, cutoff=0.6):
            return f"; did you mean {near[0]!r}?"
        homes = [home for home in Config.model_fields if key in self._fields(home, tree)]
        if homes:
            return "; did you mean " + " or ".join(f"{home}.{key}" for home in homes) + "?"
        return f"; valid here: {_listed(valid)}"

    def _fields(self, section: str, tree: Mapping[str, Any]) -> Mapping[str, FieldInfo]:
        """The fields of the section: of `objective` those of the one that `tree` names; none where there is
        no such.
        """
        if section == "objective":
            chosen = self._objectives.get(_named(tree), ObjectiveConfig)
            return chosen.model_fields
        return getattr(getattr(Config.model_fields.get(section), "annotation", None), "model_fields", {})


def _named(tree: Mapping[str, Any]) -> str:
    """The name of the objective that `tree` names."""
    section = tree.get("objective")
    return str(section.get("name", DEFAULT_OBJECTIVE)) if isinstance(section, dict) else DEFAULT_OBJECTIVE


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _path_of_model(tree: dict[str, Any]) -> Any:
    model = tree.get("model")
    return model.get("path") if isinstance(model, dict) else None


def read_tree(path: Path) -> dict[str, Any]:
    """The sections of the config file `path`, as they are written. Raises ConfigError when it holds none."""
    text = _file_text(path)
    try:
        tree = config_text.read(text, PROSE)
    except config_text.TextError as error:
        raise ConfigError(f"{path}: {error}.") from None
    if not isinstance(tree, dict):
        found = {type(None): "nothing", str: "text", list: "a list"}.get(type(tree), "one value")
        raise ConfigError(
            f"{path} holds {found}, expected sections such as `model:` and `data:`; see "
            "configs/quickstart.yaml."
        )
    return tree


def _file_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise ConfigError(f"no config file {path}: it is a directory; see configs/ for examples.")
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
            hint = f"; did you mean {path.parent / near[0]}?" if near else "; see configs/ for examples."
            raise ConfigError(f"no config file {shown(str(path))[1:-1]}{hint}")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is no config: it has {size:,} bytes.")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path.
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown(str(path))[1:-1]} cannot be read: {reason}.") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path} is UTF-16; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8.") from None


def _override_value(field: FieldInfo | None, text: str, override: str) -> Any:
    try:
        return _typed_value(field, text)
    except config_text.TextError as error:
        raise ConfigError(f"override {shown(override)}: {error}.") from None


def _typed_value(field: FieldInfo | None, text: str) -> Any:
    """What was typed on the command line: itself where the field takes text (`null` where it may be none),
    else YAML, also where it takes a number or a word.
    """
    kinds = _kinds(field.annotation) if field is not None else set()
    takes_mapping = any(typing.get_origin(kind) is dict for kind in kinds)
    if str not in kinds or float in kinds or (takes_mapping and text.startswith("{")):
        return config_text.read(text, comments=False)
    return None if text == "null" and type(None) in kinds else text


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows; of `Literal` those of its values."""
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return set().union(*map(_kinds, typing.get_args(annotation)))
    return {annotation}


def _lists_as_tuples(value: Any) -> Any:
    """Lists as tuples, which the frozen models want."""
    if isinstance(value, dict):
        return {key: _lists_as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_as_tuples(item) for item in value)
    return value


_MAPPINGS_OF_SUITES = {
    name: kind
    for name, field in SuiteConfig.model_fields.items()
    for kind in _kinds(field.annotation)
    if typing.get_origin(kind) is dict
}
"""Settings of a suite that take names, and the type of each."""


def _place_in_suite(names: list[str]) -> tuple[list[str], str]:
    """Returns where `eval.suites...` leads: the sections, and the name in the last of them. The name of a
    suite may hold dots, and so may that of a function.
    """
    for depth in range(3, len(names) - 1):
        if names[depth] in _MAPPINGS_OF_SUITES:
            return ["eval", "suites", ".".join(names[2:depth]), names[depth]], ".".join(names[depth + 1 :])
    return ["eval", "suites", ".".join(names[2:-1])], names[-1]


def dump_config(config: Config) -> str:
    """The resolved config as YAML, in the order of the sections; `load_config` reads it as the same, and
    nothing in it is hidden.

    Holds no secret: secrets come from the environment only.
    """
    return config_text.write(config.model_dump())
