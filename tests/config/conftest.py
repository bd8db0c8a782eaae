"""The tests of a configuration compose the same ones again and again: each is composed once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import dsv3.config.compose


@pytest.fixture(autouse=True, scope="package")
def compositions_are_shared() -> Iterator[None]:
    """Equal overrides in the same folder, with the same folders to look in, give the same config. None changes one."""
    compose = dsv3.config.compose.compose
    made: dict[Any, Any] = {}

    def compose_once(name: str, *, overrides: Sequence[str], **settings: Any) -> Any:
        places = GlobalHydra.instance().config_loader().get_search_path().get_path()
        key = (Path.cwd(), *(place.path for place in places), name, *overrides)
        if key not in made:
            made[key] = compose(name, overrides=overrides, **settings)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3.config.compose, "compose", compose_once)
        yield
