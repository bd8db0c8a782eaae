"""The tests of a configuration compose the same ones again and again: each is composed once."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import dsv3.config.compose


@pytest.fixture(autouse=True, scope="package")
def compositions_are_shared() -> Iterator[None]:
    """Equal overrides in the same folder, with the same folders to look in, give the same config. None changes one."""
    compose = dsv3.config.compose.compose

    @lru_cache(maxsize=32)
    def composed(folder: Path, places: tuple[str, ...], name: str, overrides: tuple[str, ...]) -> Any:
        return compose(name, overrides=list(overrides), return_hydra_config=True)

    def compose_once(name: str, *, overrides: Sequence[str], return_hydra_config: bool) -> Any:
        assert return_hydra_config
        places = GlobalHydra.instance().config_loader().get_search_path().get_path()
        return composed(Path.cwd(), tuple(str(place.path) for place in places), name, tuple(overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3.config.compose, "compose", compose_once)
        yield
