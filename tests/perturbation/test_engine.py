"""The perturbation engine against plain loops: equal logits, each input run once, chunks, errors."""

import weakref

import pytest
import torch
from torch import nn

from labn.perturbation.engine import PerturbationEngine, is_out_of_memory
from labn.perturbation.patches import patch_ranks, ranks_to_pixels


class Net(nn.Module):
    """Small, non-linear, with BatchNorm; records the batch sizes it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


@pytest.fixture
def model():
    return Net().double()


@pytest.fixture
def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def ranks():
    values = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    return ranks_to_pixels(patch_ranks(values), 2, (6, 6))


COUNTS = torch.tensor([0, 2, 5, 9])


def naive(model, images, ranks, counts, fill, keep):
    model = model.eval()
    rows = []
    for b in range(len(images)):
        for n in counts.tolist():
            inside = (ranks[b] < n) if keep == "first" else (ranks[b] >= n)
            base = fill[b] if len(fill) > 1 else fill[0]
            rows.append(model(torch.where(inside, images[b], base.expand_as(images[b]))[None])[0])
    return torch.stack(rows).view(len(images), len(counts), -1).detach()


@pytest.mark.parametrize("keep", ["first", "rest"])
@pytest.mark.parametrize("fill_shape", [(1, 3, 1, 1), (1, 3, 6, 6), (2, 3, 1, 1), (2, 3, 6, 6)])
@pytest.mark.parametrize("fold", [True, False])
def test_masked_logits_equal_a_loop_over_the_steps(model, images, ranks, keep, fill_shape, fold):
    fill = torch.randn(fill_shape, dtype=torch.float64)
    engine = PerturbationEngine.for_model(model, images, fold=fold)
    assert engine.folded is fold
    logits = engine.masked(ranks, COUNTS, fill, keep)
    assert torch.allclose(logits, naive(model, images, ranks, COUNTS, fill, keep), atol=1e-12)


def test_insertion_and_deletion_share_their_end_points(model, images, ranks):
    engine = PerturbationEngine.for_model(model, images)
    insertion = engine.masked(ranks, COUNTS, 0.0, "first")
    assert engine.forwards == 2 * 3 + 1  # the bare fill is the same for both images
    deletion = engine.masked(ranks, COUNTS, 0.0, "rest")
    assert engine.forwards == 7 + 2 * 2
    assert torch.equal(insertion[:, -1], deletion[:, 0])
    assert torch.equal(insertion[:, 0], deletion[:, -1])
    assert torch.equal(engine.original(), insertion[:, -1])
    assert torch.equal(engine.filled(0.0), insertion[:, 0])
    assert engine.forwards == 11
    assert engine.reused == 1 + 4 + 2 + 2


def test_the_negated_map_needs_no_new_forward(model, images):
    values = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(0, 10, 3)
    engine = PerturbationEngine.for_model(model, images)
    results = {}
    for sign in (1, -1):
        ranks = ranks_to_pixels(patch_ranks(sign * values), 2, (6, 6))
        results[sign] = [engine.masked(ranks, counts, 0.0, keep) for keep in ("first", "rest")]
        if sign == 1:
            before = engine.forwards
    assert engine.forwards == before
    assert torch.equal(results[1][1], results[-1][0].flip(1))


def test_equal_pixel_sets_of_different_patch_sizes_run_once(model, images):
    engine = PerturbationEngine.for_model(model, images)
    coarse = torch.tensor([[0, 1, 2, 3]] * 2)
    engine.masked(ranks_to_pixels(coarse, 3, (6, 6)), torch.tensor([1, 2]), 0.0)
    before = engine.forwards
    fine = ranks_to_pixels(coarse, 3, (6, 6)) * 9  # the same quarter first, counted in pixels
    engine.masked(fine, torch.tensor([9, 18]), 0.0)
    assert engine.forwards == before


def test_different_fills_are_distinguished_and_equal_ones_recognised(model, images, ranks):
    engine = PerturbationEngine.for_model(model, images)
    black = engine.masked(ranks, COUNTS, torch.zeros(1, 3, 1, 1))
    white = engine.masked(ranks, COUNTS, torch.ones(1, 3, 1, 1))
    assert engine.forwards == 2 + 2 * 5  # the full image is shared
    assert not torch.allclose(black[:, 1], white[:, 1])
    engine.masked(ranks, COUNTS, torch.ones(1, 3, 1, 1))
    assert engine.forwards == 12


def test_logits_of_some_samples_equal_those_of_the_whole_batch(model, images, ranks):
    fill = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    engine = PerturbationEngine.for_model(model, images)
    some = engine.masked(ranks[1:], COUNTS, fill, samples=torch.tensor([1]))
    assert engine.forwards == 4
    assert torch.allclose(some, engine.masked(ranks, COUNTS, fill)[1:])


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_logits_do_not_depend_on_the_chunk(model, images, ranks, chunk_size):
    one = PerturbationEngine.for_model(model, images, chunk_size=chunk_size).masked(ranks, COUNTS, 0.0)
    assert torch.allclose(one, PerturbationEngine.for_model(model, images).masked(ranks, COUNTS, 0.0), atol=1e-12)


def test_soft_distinguishes_different_binary_weights():
    """Each of 20 000 binary masks gets its own logits: no two masks have the same hash."""
    generator = torch.Generator().manual_seed(0)
    images = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    weights = (torch.rand(20_000, 8, 8, generator=generator) < 0.5).double()
    readout = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, dtype=torch.float64)).requires_grad_(False)
    found = PerturbationEngine.for_model(readout, images, chunk_size=4096).soft(
        weights, samples=torch.zeros(20_000).long()
    )
    assert torch.allclose(found, readout(weights[:, None]), atol=1e-12)


def test_soft_weights_blend_image_and_fill_and_run_once(model, images):
    weights = torch.rand(2, 6, 6, dtype=torch.float64)
    engine = PerturbationEngine.for_model(model, images)
    logits = engine.soft(weights, 0.5)
    blended = weights[:, None] * images + (1 - weights[:, None]) * 0.5
    assert torch.allclose(logits, model.eval()(blended), atol=1e-12)
    engine.soft(weights.clone(), 0.5)
    assert engine.forwards == 2
    changed = weights.clone()
    changed[1, 3, 3] += 1e-9
    engine.soft(changed, 0.5)
    assert engine.forwards == 3


def test_inputs_are_streamed_one_chunk_alive_at_a_time(images):
    alive: list[weakref.ref] = []
    seen = []

    def forward(batch):
        alive.append(weakref.ref(batch))
        seen.append((len(batch), sum(ref() is not None for ref in alive)))
        return batch.mean((2, 3))

    engine = PerturbationEngine(forward, images, chunk_size=4)
    logits = engine.run(lambda position: torch.ones(len(position), 3, 6, 6).double() * position.view(-1, 1, 1, 1), 30)
    assert logits[:, 0].tolist() == list(range(30))
    assert [size for size, _ in seen] == [4] * 7 + [2]
    assert max(count for _, count in seen) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_running_out_of_memory_halves_the_chunk(images, error):
    sizes = []

    def forward(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise error
        return batch.mean((2, 3))

    engine = PerturbationEngine(forward, images, chunk_size=16)
    logits = engine.run(lambda position: images[position % 2], 7)
    assert torch.allclose(logits, images.mean((2, 3))[torch.arange(7) % 2])
    assert sizes == [7, 3, 3, 1]
    assert engine.forwards == 7


def test_a_chunk_of_one_that_does_not_fit_raises(images):
    def forward(batch):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        PerturbationEngine(forward, images).original()


def test_errors_other_than_out_of_memory_are_raised(images):
    def forward(batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        PerturbationEngine(forward, images).original()
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_the_model_is_not_changed(model, images, ranks):
    model.train()
    model.head.eval()
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for fold in (True, False):
        PerturbationEngine.for_model(model, images, fold=fold).masked(ranks, COUNTS, 0.0)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.training
    assert model.norm.training
    assert not model.head.training


def test_float64_images_mean_float64_arithmetic_for_a_float32_model(images):
    model = Net()
    exact = PerturbationEngine.for_model(Net().double(), images).original()
    assert torch.allclose(PerturbationEngine.for_model(model, images).original(), exact, atol=1e-12)
    assert next(model.parameters()).dtype == torch.float32


def test_bf16_is_close_and_keeps_the_images_dtype(images, ranks):
    images = images.float()
    exact = PerturbationEngine.for_model(Net(), images).masked(ranks, COUNTS, 0.0).softmax(-1)
    engine = PerturbationEngine.for_model(Net(), images, precision="bf16")
    rough = engine.masked(ranks, COUNTS, 0.0).softmax(-1)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "fp8"}, "precision must be one of"), ({"chunk_size": 0}, "chunk_size must be at least 1")],
)
def test_bad_options_are_refused_by_name(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        PerturbationEngine.for_model(model, images, **options)


def test_bad_shapes_are_refused_by_name(model, images, ranks):
    with pytest.raises(ValueError, match="images must be floating"):
        PerturbationEngine.for_model(model, images[0])
    with pytest.raises(ValueError, match="fill must be broadcastable"):
        PerturbationEngine.for_model(model, images).masked(ranks, COUNTS, torch.zeros(1, 3, 4, 4))


def test_logits_do_not_depend_on_inference_mode_and_gradient_mode(model, images, ranks):
    outside = PerturbationEngine.for_model(model, images).masked(ranks, COUNTS, 0.0)
    assert not outside.requires_grad
    with torch.inference_mode():
        inside = PerturbationEngine.for_model(model, images).masked(ranks, COUNTS, 0.0)
    assert torch.equal(outside, inside)


def test_nan_logits_cause_a_warning_with_their_samples(images):
    class Broken(nn.Module):
        """NaN where the upper left pixel is hidden."""

        def forward(self, x):
            return torch.where(x[:, 0, 0, :1] == 0, torch.nan, x[:, 0, 0, :1]) + torch.ones(1, 2, dtype=x.dtype)

    engine = PerturbationEngine.for_model(Broken(), images, indices=torch.tensor([26, 7]))
    with pytest.warns(UserWarning, match=r"Broken gives NaN for 1 of 1 inputs made of the samples \[26, 7\]"):
        engine.filled(0.0)
    assert not engine.original().isnan().any()
