"""Config files: YAML and `section.key=value` overrides to a Config and back, with every problem explained in a line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from cluster.config import Config, RewardFunction
from cluster.errors import ConfigError

# What PyYAML's constructors raise besides YAMLError: on a date that is none, a bad tag, or nesting without end.
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError)
_EXPECTED = {  # By pydantic's type of problem; its own message where none is here.
    "model_type": "expected a mapping of keys, one a line below it; remove the line to take the defaults",
    "tuple_type": "expected a list, for example [{name: exact_match}]",
    "too_short": "expected a list of at least one entry, for example [{name: exact_match}]",
    "string_type": "expected text; if it is meant as text, put it in quotes in the file",
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
}
_EXPONENT = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: PyYAML would keep the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The Config in the YAML file `path` with `section.key=value` overrides applied (values are YAML).

    Raises ConfigError that lists every problem: the field, the value found, what is accepted, the nearest valid name.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(
            f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "; see configs/ for examples.")
        )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except _NOT_YAML as error:
        raise ConfigError(f"{path} is not YAML: {_first_lines(error)}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} holds {found}, expected sections such as `model:` and `data:`; see configs/quickstart.yaml.")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """The Config that a mapping of sections describes; raises ConfigError (see `load_config`)."""
    try:
        return Config.model_validate(_lists_as_tuples(tree))
    except RecursionError:
        raise ConfigError(f"{source}: a list or mapping contains itself (YAML anchors), or is nested without end.") from None
    except pydantic.ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        shown = "\n".join(f"  - {line}" for line in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ConfigError(f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{shown}{more}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or len(names) != 2 or not all(names):
        raise ConfigError(f"override {_short(override)} is not section.key=value, for example learner.lr=1e-5")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise ConfigError(f"override {_short(override)}: the value is not YAML: {_first_lines(error)}") from None
    section, name = names
    if tree.get(section) is None:
        tree[section] = {}
    if not isinstance(tree[section], dict):
        found = f"the file holds {_short(tree[section])} there"
        raise ConfigError(f"override {_short(override)}: {section!r} is no section; {found}. Write its keys below `{section}:`.")
    tree[section][name] = value


def _lists_as_tuples(value: Any) -> Any:
    """YAML lists as tuples, and YAML's `1e-5` (a string to PyYAML) as the number it means: strict models want both."""
    if isinstance(value, dict):
        return {str(key) if isinstance(key, int) else key: _lists_as_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_as_tuples(item) for item in value)
    if isinstance(value, str) and _EXPONENT.match(value):
        return float(value)
    return value


def _explain(problem: Any) -> str:
    """One line for one pydantic problem: field, value, what to do."""
    kind, location = problem["type"], problem["loc"]
    names = [str(part) for part in location]
    where = ".".join(name if name.isprintable() and len(name) <= 40 else _short(name) for name in names)
    if kind in ("extra_forbidden", "invalid_key"):
        return f"{where} is not a known key; {_nearest(location)}"
    if kind == "missing":
        how = f"set it in the file or with {where}=<value>" if len(names) == 2 else f"write {names[-1]}: in the file"
        return f"{where} is missing; {how}"
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    expected = _EXPECTED.get(kind, problem["msg"][0].lower() + problem["msg"][1:])
    if kind == "string_pattern_mismatch":
        expected += f"; {_description(location)}"
    return f"{where} = {_short(problem['input'])}: {expected}"


def _nearest(location: tuple[Any, ...]) -> str:
    """What may be meant by a key that is not known: one spelt alike here, or one of this name in another section."""
    key, valid = str(location[-1]), _valid_names(location[:-1])
    if near := difflib.get_close_matches(key, valid, n=1, cutoff=0.6):
        return f"did you mean {near[0]!r}?"
    homes = [name for name, field in Config.model_fields.items() if key in getattr(field.annotation, "model_fields", {})]
    if homes:
        return "did you mean " + " or ".join(f"{home}.{key}" for home in homes) + "?"
    return f"valid here: {', '.join(sorted(valid))}"


def _description(location: tuple[Any, ...]) -> str:
    section, name = str(location[0]), str(location[1])
    annotation: Any = Config.model_fields[section].annotation
    return annotation.model_fields[name].description


def _valid_names(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            model = RewardFunction
        else:
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else model
    return list(model.model_fields)


def _short(value: Any) -> str:
    """`repr` of at most 80 characters, on one line."""
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(str(error).splitlines()[:count])


def dump_config(config: Config) -> str:
    """The resolved config as YAML, in the order of the sections. Holds no secret: secrets come from the environment only."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
