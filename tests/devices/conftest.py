"""What every test of a second device needs: the device, a GPU or the stand-in of `elsewhere`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import second_device
import torch
from elsewhere import DEVICE, Elsewhere

NO_GPU = "there is no GPU with CUDA on this machine"


@pytest.fixture(params=["elsewhere", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device beside the CPU: the stand-in, and a GPU where there is one."""
    if request.param == "elsewhere":
        with Elsewhere():
            yield DEVICE
    elif torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        pytest.skip(NO_GPU)


@pytest.fixture
def there(device: torch.device, request: pytest.FixtureRequest) -> list[str]:
    """Words that make the command line's trainer use the device."""
    name = request.node.callspec.params["device"]
    return second_device.WORDS if name == "elsewhere" else ["--trainer.accelerator=gpu", "--trainer.devices=1"]


@pytest.fixture
def gpu() -> torch.device:
    """A real GPU, for what the stand-in cannot do."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return torch.device("cuda", 0)
