"""Pictures of first batches go to a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def picture_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "first_batches"
