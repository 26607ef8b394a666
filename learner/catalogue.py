"""The objectives that there are, and the config files that name them.

    learner/objectives/gspo.py: Config  <--OBJECTIVES["gspo"]--  ConfigFiles  <--  {name: gspo, clip_low: 0.2}

An objective owns its knobs, and core, which reads the file of a run, imports no room: it takes the classes
from a mapping that is filled here, by the names of the files in learner/objectives/. A new objective is one
new file. An objective is imported when a file names it; torch comes with it, so that nothing here is for
processes that do without. These hand their parts the sections that they use.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from core.config import ObjectiveConfig
from core.config.files import ConfigFiles
from core.errors import ConfigError
from core.users.code import find

_FOLDER = Path(__file__).with_name("objectives")


class _Objectives(Mapping[str, type[ObjectiveConfig]]):
    """The class of knobs of each objective, by its file's name; files that begin with _ hold none.

    Raises ConfigError for a file that does not import, or holds no class of knobs or no `build`.
    """

    def __init__(self) -> None:
        found = (module.name for module in pkgutil.iter_modules([str(_FOLDER)]))
        self._names = sorted(name for name in found if not name.startswith("_"))

    def __getitem__(self, name: str) -> type[ObjectiveConfig]:
        if name not in self._names:
            raise KeyError(name)
        what, module = f"objective.name = {name!r}", f"learner.objectives.{name}"
        knobs = find(what, f"{module}:Config", ConfigError)
        if not (isinstance(knobs, type) and issubclass(knobs, ObjectiveConfig)):
            raise ConfigError(
                f"{what}: Config of {module} is no class of knobs; derive it from ObjectiveConfig."
            )
        find(what, f"{module}:build", ConfigError)
        return knobs

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


OBJECTIVES = _Objectives()
_FILES = ConfigFiles(OBJECTIVES)
load_config, parse_config, parse_text = _FILES.load, _FILES.parse, _FILES.parse_text
