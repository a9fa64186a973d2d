"""Adaptive curves: few points where a curve is straight, all of them where it is not, and an error that holds."""

import pytest
import torch
from scoring_models import Additive, Wavy, distinct, even, score, white

from labn.errors import InputError
from labn.metrics import ErrorAnalysis, PatchInsertionDeletion, describe_value, metric_by_name, values_named
from labn.metrics.functional import patch_insertion_deletion
from labn.metrics.functional.adaptive import FIRST_POINTS, TOLERANCE, adaptive_curves, interval_variances
from labn.perturbation.engine import PerturbationEngine
from labn.results.fingerprints import describe

ONE = torch.ones(1, dtype=torch.long)
X = torch.linspace(0, 1, 129, dtype=torch.float64).expand(3, -1)


def refined(curves, tolerance=TOLERANCE, x=X):
    """Adaptive curves of known ones (S, 2, K)."""
    return adaptive_curves(x, lambda samples, points: curves[samples].gather(2, points), tolerance)


def pid(curves, x=X):
    return torch.trapezoid(curves[:, 0] - curves[:, 1], x, dim=1)


class TestKnownCurves:
    def test_straight_lines_need_the_first_points_alone(self):
        lines = torch.stack([X, 1 - 0.5 * X], 1)
        found = refined(lines)
        assert found.evaluated.tolist() == [2 * FIRST_POINTS] * 3
        assert found.error.max() < 1e-12
        assert torch.allclose(found.heights, lines)

    def test_a_bent_line_needs_few_points_and_its_error_is_bounded(self):
        bent = torch.stack([(X - 0.3).clamp(min=0), X], 1)
        found = refined(bent)
        gaps = (pid(found.heights) - pid(bent)).abs()
        assert found.evaluated.max() < 50
        assert (gaps <= found.error).all()
        assert (found.error <= TOLERANCE).all()

    def test_a_step_is_found_wherever_it_is(self):
        for place in range(1, 128, 9):
            step = torch.stack([(torch.arange(129) >= place).double().expand(3, -1), torch.zeros_like(X)], 1)
            found = refined(step)
            assert (pid(found.heights) - pid(step)).abs().max() <= TOLERANCE
            assert found.evaluated.max() <= 50

    def test_all_points_of_noise_are_evaluated_and_equal_the_whole_curve(self):
        noise = torch.rand(3, 2, 129, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = refined(noise, tolerance=1e-9)
        assert torch.equal(found.heights, noise)
        assert found.error.tolist() == [0] * 3
        assert found.evaluated.tolist() == [2 * 129] * 3

    def test_samples_do_not_depend_on_each_other(self):
        generator = torch.Generator().manual_seed(1)
        walks = (torch.randn(3, 2, 129, generator=generator, dtype=torch.float64) / 50).cumsum(2)
        together = refined(walks)
        for row in range(3):
            alone = refined(walks[row : row + 1], x=X[:1])
            assert torch.equal(alone.heights[0], together.heights[row])
            assert alone.error[0] == together.error[row]

    def test_the_bound_holds_for_brownian_motion(self):
        x = X[:1].expand(400, -1)
        steps = torch.randn(400, 2, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 128**0.5
        walks = torch.nn.functional.pad(steps.cumsum(2), (1, 0)) * torch.logspace(-2, 0, 400)[:, None, None]
        found = refined(walks, x=x)
        gaps = (pid(found.heights, x) - pid(walks, x)).abs()
        assert (gaps <= found.error + 1e-12).double().mean() >= 0.99
        assert (found.evaluated < 2 * 129).any()

    def test_the_variance_of_an_interval_is_that_of_a_brownian_bridge(self):
        """Points at 0, 1/2 and 1 of a walk with 8 steps: the bend gives q, and each half has 4 steps."""
        x, places = torch.tensor([0, 0.5, 1.0]).double(), torch.tensor([0, 4, 8])
        found = interval_variances(x[None, None], places[None, None], torch.tensor([[[0.0, 1.0, 0.0]]]).double())
        assert found.flatten().tolist() == pytest.approx([4 * 0.5**3 / 12 * (1 - 1 / 16)] * 2)


class TestMetric:
    images = torch.randn(3, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))

    def test_a_tight_tolerance_gives_the_scores_of_all_steps(self):
        every = score(PatchInsertionDeletion(2, step=1), Wavy(256), self.images, self.maps)
        metric = PatchInsertionDeletion(2, step=1, steps="auto", tolerance=1e-12)
        tight = metric.score(Wavy(256), self.images, self.maps, torch.ones(3, dtype=torch.long), torch.arange(3))
        assert list(tight) == ["insertion2", "deletion2", "pid2", "fill_probability", "pid2@error"]
        assert all(torch.equal(a, b) for a, b in zip(every.values(), tight.values()))
        assert tight["pid2@error"].tolist() == [0] * 3

    def test_a_linear_model_needs_the_first_points_alone(self):
        model, images = Additive(even(16, 16)), white(16, 16)
        engine = PerturbationEngine.for_model(model, images, fold=False)
        metric = PatchInsertionDeletion(1, step=1, steps="auto")
        found = score(metric, model, images, distinct(0, 16, 16), cache=engine)
        assert found["insertion"].item() == pytest.approx(0.5)
        assert engine.forwards == 2 * FIRST_POINTS - 2  # the curves share their ends

    @pytest.mark.parametrize("options", [{"ties": "fraction"}, {"ties": "threshold"}, {"protocol": "official"}])
    def test_tied_patches_move_together(self, options):
        """Every input that runs is one that all steps would run."""
        model, maps = Wavy(256), (3 * self.maps).floor()
        engine = PerturbationEngine.for_model(model, self.images, fold=False)
        every = score(PatchInsertionDeletion(1, step=4, **options), model, self.images, maps, cache=engine)
        before = engine.forwards
        metric = PatchInsertionDeletion(1, step=4, steps="auto", tolerance=1e-12, **options)
        found = score(metric, model, self.images, maps, cache=engine)
        assert engine.forwards == before
        assert torch.allclose(found["pid"], every["pid"], atol=1e-12)

    def test_scores_do_not_depend_on_batch_and_chunk(self):
        model, metric = Wavy(256), PatchInsertionDeletion(1, step=2, steps="auto", tolerance=0.02, chunk_size=7)
        together = score(metric, model, self.images, self.maps)
        metric = PatchInsertionDeletion(1, step=2, steps="auto", tolerance=0.02, chunk_size=2)
        for row in range(3):
            alone = score(metric, model, self.images[row : row + 1], self.maps[row : row + 1])
            assert alone["pid"].item() == pytest.approx(together["pid"][row].item(), abs=1e-12)

    def test_samples_that_are_left_out_have_no_bound(self):
        metric = PatchInsertionDeletion(4, steps="auto", positives_only=True)
        labels = torch.tensor([0, 1, 0])
        for of in (labels, labels * 0):
            found = metric.score(Wavy(256), self.images, self.maps, of, torch.arange(3), labels=of)
            assert torch.equal(found["pid4@error"].isnan(), of == 0)

    def test_the_function_and_the_analysis_of_errors_take_it(self):
        targets = torch.ones(3, dtype=torch.long)
        given = (Wavy(256), self.images, self.maps, targets)
        found = patch_insertion_deletion(*given, patch_size=2, steps="auto", tolerance=0.05)
        metric = PatchInsertionDeletion(2, steps="auto", tolerance=0.05).score(*given, torch.arange(3))
        assert torch.equal(found["error"], metric["pid2@error"])
        assert torch.equal(found["pid"], metric["pid2"])
        assert ErrorAnalysis(steps="auto", tolerance=0.05).insertion_deletion.tolerance == 0.05


class TestNamesAndOptions:
    @pytest.mark.parametrize(("name", "stem"), [("id@error", "id"), ("pid16@stable@error", "pid16@stable")])
    def test_the_bound_can_be_asked_for_by_its_name(self, name, stem):
        metric = metric_by_name(name)
        assert values_named(name, metric) == {name: name}
        assert metric.tolerance == TOLERANCE
        assert stem in metric.names
        assert stem in describe_value(name).meaning

    def test_the_default_has_the_key_that_it_had(self):
        assert "tolerance" not in describe(PatchInsertionDeletion())
        assert describe(PatchInsertionDeletion(steps="auto"))["tolerance"] == TOLERANCE

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"steps": "few"}, r"steps must be one of \['all', 'auto'\], got 'few'"),
            ({"tolerance": 0.01}, "tolerance=0.01 would have no effect with steps='all'"),
            ({"steps": "auto", "tolerance": 0}, "tolerance must be above 0 and finite, got 0"),
            ({"steps": "auto", "tolerance": float("nan")}, "tolerance must be above 0 and finite, got nan"),
            ({"steps": "auto", "area": "mean"}, "leave area at 'trapezoid', got 'mean'"),
        ],
    )
    def test_wrong_options_are_refused(self, options, sentence):
        with pytest.raises(InputError, match=sentence):
            PatchInsertionDeletion(**options)
