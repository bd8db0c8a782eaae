"""Caches of what the tests read, compose and parse again and again and nobody changes.

`configs_are_read_once`, in each process: the YAML files of conf/ and of Hydra, of which a composition reads thirty, and
    the text of interpolations; what a composition was told is written out for an interpolated default alone.
`configs_are_composed_once`, in each process: what the preflight composes, the same base under most mistakes.
`lm_eval_is_indexed_once`, in a session: the 14,000 YAML files behind lm-eval's own tasks.

Each puts a memory in front of a library's function. What comes out is the same.
"""

import copy
import functools
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import omegaconf._utils
import omegaconf.base
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

import dsv3.config.compose
from dsv3.paths import CONF

PLACES = {"pkg://hydra.conf", str(CONF), "structured://"}
"""Where Hydra looks for configs when it is not told to look elsewhere."""

SHARED = "DSV3_TESTS_SHARED"
"""The environment variable that names a folder for all processes of the session."""


@functools.cache  # a conftest.py may be imported twice
def configs_are_read_once() -> None:
    load, read = ConfigRepository.load_config, {}

    def load_once(self: ConfigRepository, config_path: str) -> Any:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or (isinstance(source, FileConfigSource) and Path(source.path) != CONF):
            return load(self, config_path)  # a test may have written it
        key = (source.scheme(), source.path, config_path)
        if key not in read:
            read[key] = load(self, config_path)
        result = copy.copy(read[key])
        result.config = copy.deepcopy(result.config)  # its nodes become those of the composed config
        return result

    ConfigRepository.load_config = load_once  # type: ignore[method-assign]
    parse_once = functools.lru_cache(maxsize=4096)(omegaconf.base.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse_once
    written_out = defaults_list._create_interpolation_map

    def written_out_where_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        asked_for = any("${" in str(default) for default in defaults)
        return written_out(overrides, defaults, self_added) if asked_for else None

    defaults_list._create_interpolation_map = written_out_where_needed


@functools.cache
def configs_are_composed_once() -> None:
    compose = dsv3.config.compose.compose

    @functools.lru_cache(maxsize=32)
    def composed(folder: Path, name: str, overrides: tuple[str, ...]) -> Any:
        return compose(name, overrides=list(overrides), return_hydra_config=True)

    def compose_once(name: str, *, overrides: Sequence[str], return_hydra_config: bool) -> Any:
        assert return_hydra_config
        places = {place.path for place in GlobalHydra.instance().config_loader().get_search_path().get_path()}
        if places != PLACES or any("hydra.searchpath" in override for override in overrides):
            return compose(name, overrides=list(overrides), return_hydra_config=True)  # a test may have written it
        return composed(Path.cwd(), name, tuple(overrides))

    dsv3.config.compose.compose = compose_once  # type: ignore[assignment]


@functools.cache
def lm_eval_is_indexed_once() -> None:
    import lm_eval.tasks
    from filelock import FileLock
    from lm_eval.tasks._index import TaskIndex

    own, build = Path(lm_eval.tasks.__file__).parent, TaskIndex.build

    @functools.cache
    def index_of_own() -> dict[str, Any]:
        file = Path(os.environ[SHARED], "lm_eval_index.pickle")
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_bytes(pickle.dumps(build([own])))
        return pickle.loads(file.read_bytes())

    def build_once(paths: Iterable[Path], **settings: Any) -> dict[str, Any]:
        index: dict[str, Any] = {}
        for root in paths:
            index |= index_of_own() if root == own else build([root], **settings)
        return index

    TaskIndex.build = staticmethod(build_once)  # type: ignore[method-assign]
