"""The real Label Studio, one for the whole run, and our backend with the weights that are at hand.

Run by `make e2e`; without `-m e2e` everything here is skipped, since it installs and starts servers. I2F_CHECKPOINT
names other weights than the starter; where there are none, it is the tests' tiny model: the contract holds for any.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from label_studio_real import Client, Photo, backend, label_studio
from PIL import Image

from inter2former.checkpoints import STARTER

CHECKPOINT = os.environ.get("I2F_CHECKPOINT")  # now: no setting of the machine is left once the tests run
PHOTOS = Path(__file__).resolve().parents[1] / "fixtures" / "label_studio" / "images"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in here:
        item.add_marker("e2e")
        if "e2e" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="starts real servers; use make e2e"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def weights(tiny_checkpoint: Path) -> dict[str, str]:
    """The setting that names the weights; empty for the starter, which the server finds by itself."""
    if CHECKPOINT:
        return {"I2F_CHECKPOINT": CHECKPOINT}
    return {} if STARTER.is_file() else {"I2F_CHECKPOINT": str(tiny_checkpoint)}


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with label_studio(tmp_path_factory.mktemp("label_studio")) as address, closing(Client(address)) as client:
        client.allow_legacy_tokens(True)
        yield client


@pytest.fixture(scope="session")
def server(client: Client, logs: Path, weights: dict[str, str]) -> Iterator[str]:
    """The backend as `make serve` starts it: it knows nothing of a platform. Ends before Label Studio does."""
    # Nothing is looked at before its time: tests count encodes.
    with backend(logs / "backend.txt", **weights, I2F_AHEAD_TASKS="0") as address:
        yield address


@pytest.fixture
def photo(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Photo]:
    """photo(name): a fixture photo, scaled to a size that no other test uses, so that nobody has encoded it before."""
    made = request.session.stash.setdefault(_MADE, [])

    def make(name: str) -> Photo:
        made.append(name)
        width = 320 + len(made)
        with Image.open(PHOTOS / name) as picture:
            scaled = picture.convert("RGB").resize((width, round(width * picture.height / picture.width)))
        path = tmp_path / f"{width}-{name}"
        scaled.save(path, quality=90)
        return Photo(path, scaled.size)

    return make


_MADE = pytest.StashKey[list[str]]()
