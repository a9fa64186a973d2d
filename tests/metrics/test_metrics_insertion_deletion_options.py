"""Options and errors of insertion-deletion."""

import pickle

import pytest
import torch
from scoring_models import Additive, Constant, Wavy, even, score, white

from labn.errors import InputError
from labn.metrics import AverageDrop, FillProbability, PatchInsertionDeletion, PercentageIn
from labn.metrics.functional import patch_insertion_deletion
from labn.perturbation.engine import PerturbationEngine

ONE = torch.ones(1, dtype=torch.long)


class TestOptions:
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    maps = torch.rand(3, 4, 4)

    def test_score_class_chooses_label_target_or_prediction(self):
        model = Wavy(16)
        targets, labels = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 1])
        predicted = model(self.images).argmax(-1)
        for score_class, classes in (("label", labels), ("target", targets), ("predicted", predicted)):
            metric = PatchInsertionDeletion(2, score_class=score_class)
            curves = metric.curves(model, self.images, self.maps, targets, torch.arange(3), labels=labels)
            expected = model(self.images).softmax(-1)[torch.arange(3), classes]
            assert torch.allclose(curves.insertion[:, -1], expected)

    @pytest.mark.parametrize("probability", ["softmax", "sigmoid", "logit"])
    def test_probability_chooses_softmax_sigmoid_or_logit(self, probability):
        function = {"softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "logit": lambda z: z}[probability]
        model, ones = Wavy(16), torch.ones(3, dtype=torch.long)
        metric = PatchInsertionDeletion(2, probability=probability)
        curves = metric.curves(model, self.images, self.maps, ones, torch.arange(3))
        assert torch.allclose(curves.deletion[:, 0], function(model(self.images))[:, 1])

    def test_positives_only_leaves_out_label_zero_without_a_forward(self):
        model, labels = Additive(even(4, 4)), torch.tensor([0, 2, 0])
        labels[1] = 1
        metric = PatchInsertionDeletion(2, positives_only=True, fold=False)
        engine = PerturbationEngine.for_model(model, white(4, 4).expand(3, -1, -1, -1), fold=False)
        values = score(metric, model, engine.images, self.maps, labels, cache=engine)
        assert values["pid"].isnan().tolist() == [True, False, True]
        assert engine.forwards == 1 + 1 + 2 * 3
        nobody = score(metric, model, engine.images, self.maps, labels * 0)
        assert all(value.isnan().all() for value in nobody.values())

    def test_correct_only_leaves_out_wrong_predictions(self):
        model, one = Wavy(16), torch.ones_like(ONE)
        right = model(self.images).argmax(-1)
        labels = right.clone()
        labels[1] = (labels[1] + 1) % 3
        metric = PatchInsertionDeletion(2, correct_only=True, fold=False)
        engine = PerturbationEngine.for_model(model, self.images, fold=False)
        values = score(metric, model, self.images, self.maps, labels, cache=engine)
        assert values["pid"].isnan().tolist() == [False, True, False]
        assert engine.forwards == 3 + 1 + 2 * 2 * 3  # images, the bare fill, both curves of two in between
        curves = metric.curves(model, self.images, self.maps, labels, torch.arange(3))
        assert curves.samples.tolist() == [0, 2]
        everybody = score(PatchInsertionDeletion(2), model, self.images, self.maps, labels)["pid"]
        assert torch.allclose(values["pid"][[0, 2]], everybody[[0, 2]])
        given = score(metric, model, self.images, self.maps, labels, predictions=labels)
        assert torch.allclose(given["pid"], everybody)
        positives = PatchInsertionDeletion(2, correct_only=True, positives_only=[int(right[2])])
        kept = score(positives, model, self.images, self.maps, labels)["pid"].isfinite()
        assert kept.tolist() == [bool(right[0] == right[2]), False, True]
        assert score(metric, model, self.images[:1], self.maps[:1], right[:1] + one)["pid"].isnan().all()

    def test_mean_area_is_the_mean_of_the_points(self):
        """Linear p, N = 16 in steps of 5: the points lie at 0, 5, 10, 15 and 16 of 16, whose mean is 9.2 / 16."""
        model, images, maps = Additive(even(4, 4)), white(4, 4), self.maps[:1]
        trapezoid = score(PatchInsertionDeletion(1, step=5), model, images, maps)
        assert trapezoid["insertion"].item() == pytest.approx(0.5)
        mean = score(PatchInsertionDeletion(1, step=5, area="mean"), model, images, maps)
        assert mean["insertion"].item() == pytest.approx(9.2 / 16)
        assert mean["pid"].item() == pytest.approx(2.4 / 16)

    @pytest.mark.parametrize("step", [1, 4, 5, 7])
    def test_ties_do_not_shift_the_mean_of_the_points(self, step):
        """Linear p: points that are moved too early by ties are read off the line, whatever is tied."""
        model, images = Additive(even(4, 4)), white(4, 4)
        untied = torch.arange(16.0).view(1, 4, 4)
        metric = PatchInsertionDeletion(1, step=step, area="mean")
        counts = metric.counts((4, 4))
        constant = score(metric, model, images, torch.ones(1, 4, 4))
        assert constant["pid"].item() == pytest.approx(0, abs=1e-12)
        assert constant["insertion"].item() == pytest.approx(0.5)
        plain = counts.double().mean().item() / 16
        assert score(metric, model, images, untied)["insertion"].item() == pytest.approx(plain)
        if 16 % step == 0:
            for tied in (untied.clamp(max=5), untied.clamp(min=11), untied.div(3, rounding_mode="floor")):
                assert score(metric, model, images, tied)["insertion"].item() == pytest.approx(plain)

    def test_mean_area_without_ties_equals_the_plain_mean_exactly(self):
        model, x = Wavy(16), torch.arange(3)
        tied = torch.cat([self.maps[:2], torch.ones(1, 4, 4)])
        for options in ({"step": 5}, {"protocol": "official"}, {"ties": "threshold"}, {"ties": "stable"}):
            metric = PatchInsertionDeletion(1, area="mean", **options)
            curves = metric.curves(model, self.images, tied, torch.ones(3, dtype=torch.long), x)
            means, expected = curves.areas("mean")["insertion"], curves.insertion.double().mean(1)
            assert torch.equal(means[:2], expected[:2])
            assert torch.equal(means[2], expected[2]) == ("step" not in options)

    def test_deletion_fill_is_used_for_deletion_only(self):
        model, images = Wavy(16), self.images[:1]
        metric = PatchInsertionDeletion(2, fill="blur", deletion_fill="mean")
        curves = metric.curves(model, images, self.maps[:1], ONE, ONE)
        assert curves.deletion[0, -1].item() == pytest.approx(model(images * 0).softmax(-1)[0, 1].item())
        assert not torch.allclose(curves.insertion[0, 0], curves.deletion[0, -1])

    def test_black_and_bias_follow_the_normalisation(self):
        model, bias = Wavy(16), torch.rand(1, 4, 4)
        for fill, pixels in (("black", torch.zeros(1, 4, 4)), ("bias", bias)):
            metric = PatchInsertionDeletion(2, fill=fill, bias=bias, mean=[0.3], std=[0.5])
            curves = metric.curves(model, self.images[:1], self.maps[:1], ONE, ONE)
            expected = model((pixels.double() - 0.3)[None] / 0.5).softmax(-1)[0, 1]
            assert curves.fill_probability.item() == pytest.approx(expected.item(), abs=1e-7)

    def test_n_steps_sets_the_step(self):
        assert PatchInsertionDeletion(1, n_steps=224).counts((224, 224)).tolist() == list(range(0, 224**2 + 1, 224))
        assert PatchInsertionDeletion(2, n_steps=5).counts((6, 6)).tolist() == [0, 2, 4, 6, 8, 9]

    def test_the_metric_can_be_pickled(self):
        metric = pickle.loads(pickle.dumps(PatchInsertionDeletion(2, score_class="predicted")))
        assert score(metric, Wavy(16), self.images, self.maps)["pid"].isfinite().all()


class TestErrors:
    def test_a_bad_value_in_a_map_is_named_by_its_sample(self):
        images, maps = torch.rand(3, 1, 4, 4).double(), torch.rand(3, 4, 4)
        for bad in (torch.nan, torch.inf):
            maps[1, 2, 2] = bad
            with pytest.raises(ValueError, match="the map of sample 42 holds NaN"):
                score(PatchInsertionDeletion(2), Wavy(16), images, maps, indices=torch.arange(41, 44))

    def test_a_patch_larger_than_the_image_is_refused(self):
        with pytest.raises(ValueError, match="patch_size must be from 1 to 4 for 4x4 maps, got 16"):
            score(PatchInsertionDeletion(16), Wavy(16), white(4, 4), torch.rand(1, 4, 4))

    def test_a_map_of_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"maps must be \(1, 4, 4\) to fit the images, got \(1, 2, 2\)"):
            score(PatchInsertionDeletion(2), Wavy(16), white(4, 4), torch.rand(1, 2, 2))

    def test_labels_of_another_length_are_refused(self):
        with pytest.raises(ValueError, match="targets must have one entry per image"):
            score(
                PatchInsertionDeletion(2), Wavy(16), white(4, 4), torch.rand(1, 4, 4), torch.ones(2, dtype=torch.long)
            )

    @pytest.mark.parametrize("probability", ["softmax", "sigmoid", "logit"])
    @pytest.mark.parametrize("kind", [PatchInsertionDeletion, FillProbability])
    def test_softmax_of_a_single_logit_is_refused(self, kind, probability):
        model, given = Constant([0.3]), (white(4, 4), torch.rand(1, 4, 4), ONE * 0, ONE)
        metric = kind(**({"patch_size": 2} if kind is PatchInsertionDeletion else {}), probability=probability)
        if probability == "softmax":
            with pytest.raises(ValueError, match=r"the model has one logit, .* read it with probability='sigmoid'"):
                metric.score(model, *given)
        else:
            assert all(value.isfinite().all() for value in metric.score(model, *given).values())

    def test_a_single_logit_has_percentage_in_logits_but_no_drop(self):
        model, given = Constant([0.3]), (white(4, 4), torch.rand(1, 4, 4), ONE * 0, ONE)
        for metric in (AverageDrop(), PercentageIn([50], ["ratio"])):
            with pytest.raises(ValueError, match="the model has one logit"):
                metric.score(model, *given)
        found = PercentageIn([50], ["logit"], headline=True).score(model, *given)
        assert found["pctin50"].item() == pytest.approx(0.3)

    @pytest.mark.parametrize("size", [(6, 6), (4, 8)])
    def test_official_protocol_refuses_sizes_that_the_released_code_fails_on(self, size):
        with pytest.raises(ValueError, match="needs square images divisible by 4"):
            PatchInsertionDeletion(4, protocol="official").counts(size)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"step": 2, "n_steps": 3}, "step or n_steps, not both"),
            ({"step": 0}, "above 0"),
            ({"protocol": "rise"}, "protocol must be one of"),
            ({"protocol": "official", "ties": "stable"}, "leave ties at"),
            ({"ties": "together"}, "ties must be one of"),
            ({"fill": "grey"}, "fill must be one of"),
            ({"score_class": "top"}, "score_class must be one of"),
            ({"area": "sum"}, "area must be one of"),
            ({"pooling": "median"}, "pooling must be one of"),
            ({"probability": "odds"}, "probability must be one of"),
        ],
    )
    def test_wrong_options_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            PatchInsertionDeletion(**arguments)


class TestArgumentsOfTheFunction:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"area": "simpson"}, r"area must be one of \['mean', 'trapezoid'\], got 'simpson'\."),
            ({"protocol": "released"}, r"protocol must be one of \['official', 'paper'\], got 'released'\."),
            ({"probability": "softmx"}, "probability must be one of .*'softmax'.*, got 'softmx'"),
            ({"ties": "first"}, "ties must be one of .*, got 'first'"),
            ({"pooling": "median"}, "pooling must be one of .*, got 'median'"),
            ({"fill": "green"}, "fill must be one of .*, got 'green'"),
            ({"deletion_fill": "green"}, "deletion_fill must be one of .*, got 'green'"),
            ({"step": 0}, "step must be at least 1, got 0"),
            ({"step": -2}, "step must be at least 1, got -2"),
            ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
            ({"maps": torch.rand(2, 64, 32)}, r"maps must be \(2, 32, 64\) to fit the images, got \(2, 64, 32\)"),
            ({"maps": torch.rand(1, 32, 64)}, r"maps must be \(2, 32, 64\) to fit the images, got \(1, 32, 64\)"),
            ({"maps": torch.rand(2, 1, 32, 64)}, r"maps must be \(2, 32, 64\) .*, got \(2, 1, 32, 64\)"),
            ({"maps": torch.rand(2, 32, 64).index_fill(0, ONE, torch.nan)}, "maps must be finite; map 1 holds NaN"),
        ],
    )
    def test_a_wrong_argument_is_named_before_the_model_runs(self, arguments, sentence):
        model, calls = Constant([0.0, 1.0]), []
        model.register_forward_hook(lambda *_: calls.append(1))
        images, targets = torch.rand(2, 3, 32, 64), torch.zeros(2, dtype=torch.long)
        with pytest.raises(InputError, match=sentence):
            patch_insertion_deletion(model, images, **{"maps": torch.rand(2, 32, 64), "targets": targets, **arguments})
        assert calls == []

    @pytest.mark.parametrize("kind", [torch.int64, torch.float64])
    def test_maps_of_any_dtype_are_scored(self, kind):
        maps = (4 * torch.rand(2, 32, 64)).to(kind)
        scores = patch_insertion_deletion(Wavy(3 * 32 * 64), torch.rand(2, 3, 32, 64), maps, torch.tensor([0, 1]))
        assert scores["pid"].isfinite().all()
