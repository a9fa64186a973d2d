"""What takes seconds to import is imported by the command or the call that needs it."""

import importlib
import subprocess
import sys

import pytest

SLOW = {"torchmetrics", "torchvision", "timm", "wandb", "lightning", "scipy", "matplotlib", "albumentations", "triton"}
MODEL = "torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.AvgPool2d(8), torch.nn.Flatten())"


def imported(code):
    """Top-level modules of a fresh process that has run `code`."""
    report = "; import sys; print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_help_needs_no_torch():
    code = "import cli, contextlib\nwith contextlib.suppress(SystemExit): cli.main(['--help'])\npass"
    assert not imported(code) & {*SLOW, "torch", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradcam", "lrp", "rise"])
def test_a_picture_is_explained_without_the_packages_of_training_and_scoring(method):
    arguments = ", n_masks=4" if method == "rise" else ""
    code = f"import torch, labn; labn.explain({MODEL}, torch.rand(1, 3, 8, 8), '{method}'{arguments})"
    # torch itself imports triton where a model is compiled or its operations are counted.
    assert not imported(code) & (SLOW - {"triton"})


@pytest.mark.slow
def test_a_network_with_given_weights_is_explained_without_lightning():
    assert not imported("import labn.commands.explain") & (SLOW - {"triton", "matplotlib"})


def test_the_names_of_the_lazy_packages_are_there():
    import labn
    import labn.metrics

    assert labn.__getattr__("lrp") is importlib.import_module("labn.lrp")
    for package in (labn, labn.metrics):
        assert set(dir(package)) == set(package.__all__)
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018
