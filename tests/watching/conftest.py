"""The folders of tiny models, each written once."""

from pathlib import Path

import pytest

from tests.watching.families import FAMILIES, save


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Returns the folder of a family's tiny model."""
    pytest.importorskip("torchvision", reason="video processors need torchvision: make")
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param
