import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LABN_DATA", ROOT.parent / "shared" / "data"))

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["LABN_DATA"] = str(DATA)
# The same examples in every run, so that a change alone makes a test fail; HYPOTHESIS_PROFILE=random draws new ones.
with suppress(ImportError):  # tests/devices run without it
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True)
    settings.register_profile("random", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
# Tests run in parallel, one core each.
torch.set_num_threads(1)


@pytest.fixture
def random_weights_allowed(monkeypatch):
    """Networks may be validated and tested with the weights that they are made with."""
    from labn.modules.base import CheckedModule

    monkeypatch.setattr(CheckedModule, "_check_trained", lambda self: None)


@pytest.fixture(scope="session")
def data_root():
    """Folder of the real data, or a skip that says what is missing."""
    if not DATA.is_dir():
        pytest.skip(f"the real data is not at {DATA}; set LABN_DATA")
    return DATA
