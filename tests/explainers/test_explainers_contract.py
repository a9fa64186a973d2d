"""The common contract of all explainers, tested for every registered one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_explainer import INDICES, METHODS, SHORT, SIZE, TARGETS, explainer, network, pictures
from small_networks import GapLinear, Parameterless
from torch import Tensor, nn

from labn.explainers import explainer_by_name
from labn.explainers.base import resize_maps

ANY_CLASS = {"labn", "abn", "lambda", "rollout", "random", "constant", "sobel"}  # one map for all classes
NO_GRADIENT_OF_THE_MODEL = {"random", "constant", "sobel"}
PARAMETERLESS = [
    "rise",
    "rise_released",
    "gradient",
    "gradxinput",
    "integrated_gradients",
    "smoothgrad",
    "occlusion",
    "random",
    "constant",
    "sobel",
    "integrated_gradients_blur",
    "integrated_gradients_bw",
    "expected_gradients",
    "sobol",
    "kernelshap",
]


def last_layer(model: nn.Module) -> nn.Module:
    """The last linear layer, in a detector the last convolution."""
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    return (linear or [module for module in modules if isinstance(module, nn.Conv2d)])[-1]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal up to rounding, relative to the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("name", METHODS)
def test_one_float32_map_per_image(name: str) -> None:
    maps = explainer(name)(network(name), pictures(), TARGETS, INDICES)
    assert maps.shape == (3, SIZE, SIZE)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert maps.isfinite().all()
    assert maps.abs().max() > 0


def hooks_of(model: nn.Module) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


@pytest.mark.parametrize("name", METHODS)
def test_explaining_changes_neither_model_nor_images(name: str) -> None:
    model, images, targets = network(name), pictures(), TARGETS.clone()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        parameter.grad = torch.full_like(parameter, 0.25) if number % 2 else None
    next(model.modules()).register_forward_hook(lambda *_: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    hooks, attributes = hooks_of(model), [sorted(vars(module)) for module in model.modules()]
    random_state, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    explainer(name)(model, images, targets, INDICES)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    for number, parameter in enumerate(model.parameters()):
        assert (parameter.grad == 0.25).all() if number % 2 else parameter.grad is None
    assert hooks_of(model) == hooks
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(images, pictures())
    assert torch.equal(targets, TARGETS)
    assert images.grad is None
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled() is grad_mode


@pytest.mark.parametrize("name", METHODS)
def test_a_failing_model_is_restored(name: str) -> None:
    """The network fails in the middle of a forward."""
    model = network(name)
    hooks, flags = hooks_of(model), [module.training for module in model.modules()]
    last = last_layer(model)
    last.forward = lambda _x: (_ for _ in ()).throw(ZeroDivisionError("broken"))  # type: ignore[method-assign]
    if name in NO_GRADIENT_OF_THE_MODEL:
        explainer(name)(model, pictures(), TARGETS)
    else:
        with pytest.raises(ZeroDivisionError):
            explainer(name)(model, pictures(), TARGETS)
    assert hooks_of(model) == hooks
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", METHODS)
def test_maps_of_a_batch_equal_maps_one_by_one(name: str) -> None:
    model, images, method = network(name), pictures(), explainer(name)
    whole = method(model, images, TARGETS, INDICES)
    for i in range(3):
        alone = method(model, images[i : i + 1], TARGETS[i : i + 1], INDICES[i : i + 1])
        assert close(alone[0], whole[i])


@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_the_global_seed(name: str) -> None:
    model, images = network(name), pictures()
    torch.manual_seed(1)
    first = explainer(name)(model, images, TARGETS, INDICES)
    torch.manual_seed(2)
    assert torch.equal(explainer(name)(model, images, TARGETS, INDICES), first)


_SEEN: list[torch.dtype] = []


def remember_dtype(_module: nn.Module, args: tuple[Any, ...]) -> None:
    """A function, so that copies of a model keep calling this one."""
    _SEEN.append(args[0].dtype)


@pytest.mark.parametrize("name", METHODS)
def test_float64_images_mean_float64_arithmetic(name: str) -> None:
    model, images = network(name), pictures(dtype=torch.float64)
    expected = explainer(name)(copy.deepcopy(model).double(), images, TARGETS, INDICES)
    _SEEN.clear()
    model.register_forward_pre_hook(remember_dtype)
    maps = explainer(name)(model, images, TARGETS, INDICES)
    assert set(_SEEN) <= {torch.float64}
    assert bool(_SEEN) is (name not in NO_GRADIENT_OF_THE_MODEL)
    assert maps.dtype == torch.float32
    assert close(maps, expected, 1e-6)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_backward_is_never_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("backward was called")

    monkeypatch.setattr(Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    explainer(name)(network(name), pictures(1), TARGETS[:1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_the_callers_gradient_mode(name: str, mode: Callable[[], Any]) -> None:
    model, images = network(name), pictures()
    expected = explainer(name)(model, images, TARGETS, INDICES)
    model.train()
    with mode(), torch.autocast("cpu", torch.bfloat16):
        maps = explainer(name)(model, images.clone(), TARGETS.clone(), INDICES)
    assert close(maps, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_runs_with_its_hooks(name: str) -> None:
    """Hooks added after the first compiled call do not fire in compiled code, so explanations must run eagerly."""
    model, images = network(name), pictures()
    expected = explainer(name)(model, images, TARGETS, INDICES)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images)
    fired = []
    last = last_layer(model)
    handle = last.register_forward_hook(lambda *_: fired.append(1))
    maps = explainer(name)(compiled, images, TARGETS, INDICES)
    handle.remove()
    assert close(maps, expected)
    # These run on a copy, made without or with the hook, or on the graph that the first call recorded.
    folds = name in ("rise", "rise_released", "occlusion", "sobol", "kernelshap", "crp")
    assert fired or folds or name in NO_GRADIENT_OF_THE_MODEL
    torch._dynamo.reset()


@pytest.mark.parametrize("name", PARAMETERLESS)
def test_a_model_without_parameters_is_explained(name: str) -> None:
    maps = explainer(name)(Parameterless(), pictures(), torch.tensor([2, 0, 1]), INDICES)
    assert maps.shape == (3, SIZE, SIZE)
    assert maps.abs().max() > 0


@pytest.mark.parametrize("name", METHODS)
def test_maps_depend_on_the_target_for_class_specific_methods_only(name: str) -> None:
    model, images = network(name), pictures()
    maps = explainer(name)(model, images, TARGETS, INDICES)
    other = explainer(name)(model, images, (TARGETS + 1) % 4, INDICES)
    assert torch.equal(maps, other) is (name in ANY_CLASS)


@pytest.mark.parametrize("name", sorted(set(METHODS) - ANY_CLASS))
@pytest.mark.parametrize("target", [4, -1])
def test_a_target_out_of_range_is_refused(name: str, target: int) -> None:
    with pytest.raises(ValueError, match=rf"targets .*got {target}\.|class .* {target}\b|target.* {target}\b"):
        explainer(name)(network(name), pictures(1), torch.tensor([target]))


@pytest.mark.parametrize("name", sorted(set(METHODS) - NO_GRADIENT_OF_THE_MODEL))
def test_images_of_another_channel_count_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"images have 2 channels; .* expects 3"):
        explainer(name)(network(name), pictures(1, channels=2), TARGETS[:1])


@pytest.mark.parametrize("name", METHODS)
def test_a_leading_minus_negates_the_map(name: str) -> None:
    model, images = network(name), pictures(1)
    negated = explainer_by_name(f"-{name}", **SHORT.get(name, {}))(model, images, TARGETS[:1])
    assert torch.equal(negated, -explainer(name)(model, images, TARGETS[:1]))


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (torch.zeros(3, 8, 8), torch.tensor([0, 0, 0]), r"images must be a floating tensor \(B, C, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.tensor([0]), "images must be a floating tensor"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0]), r"targets must be integer class indices \(2,\)"),
        (torch.zeros(1, 3, 8, 8), torch.tensor([0.5]), "targets must be integer class indices"),
    ],
)
def test_bad_inputs_are_refused(images: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explainer("constant")(GapLinear(), images, targets)


def test_resizing_keeps_a_plateau_flat() -> None:
    for cells in (3, 5, 6, 7, 10, 12, 14):
        coarse = torch.full((1, cells, cells), 0.3)
        coarse[0, 0, 0] = 1
        for side in (48, 50, 64, 224):
            resized = resize_maps(coarse, (side, side))
            assert resized[0, side // 2 :, side // 2 :].unique().tolist() == coarse[0, 1, 1:2].tolist()


def test_the_error_for_an_unknown_name_lists_similar_names() -> None:
    with pytest.raises(ValueError, match="no method 'grad-cam'; did you mean gradcam"):
        explainer_by_name("grad-cam")
