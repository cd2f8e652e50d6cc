"""What every test shares: one thread, no network, and where the fixtures are."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT.parent / "shared" / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encoded data is kept here while the tests run; processes that they start inherit it."""
    os.environ["TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of real material that the project did not write; a test that needs it skips where it is absent."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures at {FIXTURES}")
    return FIXTURES


@pytest.fixture(scope="session")
def stories(fixtures: Path) -> Path:
    """A real story-telling model of 260 K parameters in Mistral form."""
    return fixtures / "models" / "stories260K-mistral"
