"""Caches of what the tests read, compose and parse again and again and nobody changes.

`configs_are_read_once`, in each process: the YAML files of conf/ and of Hydra, of which a composition reads thirty, and
    the text of interpolations; what a composition was told is written out for an interpolated default alone.
`configs_are_merged_once`, in each process: what the chosen options are together, before keys are set.
`configs_are_composed_once`, in each process: what the preflight composes, the same base under most mistakes.
`lm_eval_is_indexed_once`, in a checkout: the 14,000 YAML files behind lm-eval's own tasks.

Each puts a memory in front of a library's function. What comes out is the same.
"""

import functools
import pickle
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import omegaconf._utils
import omegaconf.base
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import dsv3.config.compose
from dsv3.checkpoint.run_folder import write_atomically
from dsv3.paths import CONF, ROOT

PLACES = {"pkg://hydra.conf", f"file://{CONF}", f"file://{ROOT}/tests/conf", "structured://"}
"""Where configs lie that no test writes."""


@functools.cache  # a conftest.py may be imported twice
def configs_are_read_once() -> None:
    load, read = ConfigRepository.load_config, {}

    def load_once(self: ConfigRepository, config_path: str) -> Any:
        places = tuple(source.full_path() for source in self.get_sources())
        if not PLACES.issuperset(places):
            return load(self, config_path)  # a test may have written it
        key = (places, config_path)
        if key not in read:
            read[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(read[key])  # its nodes become those of the composed config

    ConfigRepository.load_config = load_once  # type: ignore[method-assign]
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]  # each composition copies it
    parse_once = functools.lru_cache(maxsize=4096)(omegaconf.base.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse_once
    written_out = defaults_list._create_interpolation_map

    def written_out_where_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        asked_for = any("${" in str(default) for default in defaults)
        return written_out(overrides, defaults, self_added) if asked_for else None

    defaults_list._create_interpolation_map = written_out_where_needed


@functools.cache
def configs_are_merged_once() -> None:
    merge, merged = ConfigLoaderImpl._compose_config_from_defaults_list, {}

    def merge_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        places = tuple(source.full_path() for source in repo.get_sources())
        if not PLACES.issuperset(places):
            return merge(self, defaults=defaults, repo=repo)  # a test may have written it
        key = (places, *((default.config_path, default.package, default.primary) for default in defaults))
        if key not in merged:
            merged[key] = pickle.dumps(merge(self, defaults=defaults, repo=repo))
        return pickle.loads(merged[key])

    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once  # type: ignore[method-assign]


@functools.cache
def configs_are_composed_once() -> None:
    compose = dsv3.config.compose.compose

    @functools.lru_cache(maxsize=32)
    def composed(places: tuple[str, ...], folder: Path, name: str, overrides: tuple[str, ...]) -> Any:
        return compose(name, overrides=list(overrides), return_hydra_config=True)

    def compose_once(name: str, *, overrides: Sequence[str], return_hydra_config: bool) -> Any:
        assert return_hydra_config
        places = tuple(source.full_path() for source in GlobalHydra.instance().config_loader().get_sources())
        if not PLACES.issuperset(places) or any("hydra.searchpath" in override for override in overrides):
            return compose(name, overrides=list(overrides), return_hydra_config=True)  # a test may have written it
        return composed(places, Path.cwd(), name, tuple(overrides))

    dsv3.config.compose.compose = compose_once  # type: ignore[assignment]


@functools.cache
def lm_eval_is_indexed_once() -> None:
    import lm_eval.tasks
    from filelock import FileLock
    from lm_eval.tasks._index import TaskIndex

    own, build = Path(lm_eval.tasks.__file__).parent, TaskIndex.build

    @functools.cache
    def index_of_own() -> dict[str, Any]:
        file = ROOT / ".cache" / "tests" / f"lm_eval-{version('lm-eval')}.pickle"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            folder, index = pickle.loads(file.read_bytes()) if file.exists() else (None, {})
            if folder != own:  # its files are named there
                index = build([own])
                write_atomically(file, lambda temporary: temporary.write_bytes(pickle.dumps((own, index))))
        return index

    def build_once(paths: Iterable[Path], **settings: Any) -> dict[str, Any]:
        index: dict[str, Any] = {}
        for root in paths:
            index |= index_of_own() if root == own else build([root], **settings)
        return index

    TaskIndex.build = staticmethod(build_once)  # type: ignore[method-assign]
