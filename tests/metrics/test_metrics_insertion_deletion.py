import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_models import Additive, Constant, Wavy, distinct, even, score, white

from labn.metrics import PatchInsertionDeletion, metric_by_name
from labn.metrics.functional import nominal_fractions, trapezoid_area
from labn.perturbation.engine import PerturbationEngine

ONE = torch.ones(1, dtype=torch.long)


class TestWorkedExample:
    model = Additive(torch.tensor([[0.4, 0.3], [0.2, 0.1]], dtype=torch.float64))
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])

    def test_paper_protocol_gives_the_worked_values(self):
        values = score(PatchInsertionDeletion(1, step=1), self.model, white(2, 2), self.maps)
        assert [values[k].item() for k in ("insertion", "deletion", "pid")] == pytest.approx([0.625, 0.375, 0.25])

    def test_official_protocol_gives_the_worked_values(self):
        metric = PatchInsertionDeletion(1, step=1, protocol="official")
        values = score(metric, self.model, white(2, 2), self.maps)
        expected = [11 / 12, 1 / 12, 10 / 12]
        assert [values[k].item() for k in ("insertion", "deletion", "pid")] == pytest.approx(expected, abs=1e-10)
        curves = metric.curves(self.model, white(2, 2), self.maps, ONE, ONE)
        assert curves.counts.tolist() == [2, 3, 4, 4]
        assert curves.insertion[0].tolist() == pytest.approx([0.7, 0.9, 1, 1], abs=1e-10)
        assert curves.deletion[0].tolist() == pytest.approx([0.3, 0.1, 0, 0], abs=1e-10)


class TestClosedForms:
    def test_pid_of_a_constant_model_is_zero(self):
        model = Constant([0.3, 1.2, -0.5])
        p = model.logits.softmax(0)[1].item()
        for protocol in ("paper", "official"):
            metric = PatchInsertionDeletion(2, protocol=protocol)
            values = score(metric, model, white(8, 8), distinct(0, 8, 8))
            assert values["insertion"].item() == pytest.approx(p, abs=1e-10)
            assert values["deletion"].item() == pytest.approx(p, abs=1e-10)
            assert values["pid"].item() == pytest.approx(0, abs=1e-10)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 99), st.sampled_from([(4, 4, 1), (4, 6, 2), (5, 7, 3)]), st.sampled_from([0.0, 0.2]))
    def test_areas_of_an_additive_model_equal_their_closed_form(self, seed, shape, base):
        height, width, m = shape
        weights = torch.rand(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights *= (1 - base) / weights.sum()
        maps = distinct(seed, height, width)
        values = score(PatchInsertionDeletion(m, step=1), Additive(weights, base), white(height, width), maps)
        patches = [(i, j) for i in range(0, height, m) for j in range(0, width, m)]
        best = {(i, j): maps[0, i : i + m, j : j + m].max().item() for i, j in patches}
        ordered = sorted(patches, key=lambda p: -best[p])
        w = torch.stack([weights[i : i + m, j : j + m].sum() for i, j in ordered])
        n, place = len(ordered), torch.arange(1, len(ordered) + 1)
        insertion = base + (w * (n - place + 0.5) / n).sum().item()
        deletion = base + (w * (place - 0.5) / n).sum().item()
        assert values["insertion"].item() == pytest.approx(insertion, abs=1e-10)
        assert values["deletion"].item() == pytest.approx(deletion, abs=1e-10)
        assert values["pid"].item() == pytest.approx((w * (n - 2 * place + 1) / n).sum().item(), abs=1e-10)
        assert values["fill_probability"].item() == pytest.approx(base, abs=1e-10)

    def test_one_pixel_patches_equal_a_loop_over_pixels(self):
        model, images, maps = Wavy(30), torch.randn(1, 1, 5, 6, dtype=torch.float64), distinct(3, 5, 6)
        order = maps.flatten().argsort(descending=True)
        curves = {"insertion": [], "deletion": []}
        for n in [0, 7, 14, 21, 28, 30]:
            kept = torch.zeros(30, dtype=torch.float64)
            kept[order[:n]] = 1
            for name, mask in (("insertion", kept), ("deletion", 1 - kept)):
                curves[name].append(model(images * mask.view(1, 1, 5, 6)).softmax(-1)[0, 1].item())
        x = [0, 7 / 30, 14 / 30, 21 / 30, 28 / 30, 1]
        values = score(PatchInsertionDeletion(1, step=7), model, images, maps)
        for name, y in curves.items():
            area = sum((x[i + 1] - x[i]) * (y[i] + y[i + 1]) / 2 for i in range(5))
            assert values[name].item() == pytest.approx(area, abs=1e-10)

    def test_curves_run_between_fill_and_image(self):
        model, images = Wavy(36), torch.randn(2, 1, 6, 6, dtype=torch.float64)
        metric = PatchInsertionDeletion(2, step=4, fill="blur")
        maps = distinct(0, 6, 6).expand(2, -1, -1)
        curves = metric.curves(model, images, maps, torch.tensor([1, 2]), torch.arange(2))
        full = model(images).softmax(-1)[[0, 1], [1, 2]]
        assert torch.allclose(curves.insertion[:, -1], full)
        assert torch.allclose(curves.deletion[:, 0], full)
        assert torch.equal(curves.insertion[:, 0], curves.fill_probability)
        assert torch.equal(curves.deletion[:, -1], curves.fill_probability)
        assert curves.counts.tolist() == [0, 4, 8, 9]
        assert curves.x[0].tolist() == pytest.approx([0, 4 / 9, 8 / 9, 1])

    @pytest.mark.parametrize("ties", ["fraction", "stable", "random"])
    def test_mean_pid_of_random_maps_is_zero(self, ties):
        model, images = Wavy(16), torch.randn(1, 1, 4, 4, dtype=torch.float64).expand(400, -1, -1, -1)
        maps = torch.rand(400, 4, 4, generator=torch.Generator().manual_seed(5))
        pid = score(PatchInsertionDeletion(1, step=4, ties=ties), model, images, maps)["pid"]
        assert abs(pid.mean().item()) < 3.5 * pid.std().item() / 20


class TestTies:
    model = Additive(even(8, 8) * 0.8, base=0.1)

    def test_a_constant_map_gets_one_half_with_fraction(self):
        values = score(PatchInsertionDeletion(2, step=3), self.model, white(8, 8), torch.zeros(1, 8, 8))
        assert values["insertion"].item() == pytest.approx(0.5, abs=1e-10)
        assert values["deletion"].item() == pytest.approx(0.5, abs=1e-10)

    def test_a_constant_map_gets_the_artefact_of_the_official_protocol(self):
        metric = PatchInsertionDeletion(2, step=3, protocol="official")
        values = score(metric, self.model, white(8, 8), torch.zeros(1, 8, 8))
        assert values["pid"].item() == pytest.approx(0.9 - 0.1, abs=1e-10)

    def test_stable_inserts_ties_in_raster_order(self):
        weights = torch.zeros(4, 4)
        weights[0] = 0.25
        metric = PatchInsertionDeletion(1, step=4, ties="stable")
        curves = metric.curves(Additive(weights), white(4, 4), torch.zeros(1, 4, 4), ONE, ONE)
        assert curves.insertion[0].tolist() == pytest.approx([0, 1, 1, 1, 1], abs=1e-10)

    def test_ties_move_together_and_x_is_the_moved_fraction(self):
        maps = torch.zeros(1, 4, 4)
        maps[0, 0] = torch.tensor([3.0, 2.0, 2.0, 2.0])
        metric = PatchInsertionDeletion(1, step=2)
        curves = metric.curves(self.model_of(4), white(4, 4), maps, ONE, ONE)
        assert curves.x[0].tolist() == [0, 4 / 16, 4 / 16, 1, 1, 1, 1, 1, 1]
        assert curves.insertion[0].tolist() == pytest.approx(curves.x[0].tolist(), abs=1e-10)

    def test_threshold_moves_ties_together_and_x_by_the_nominal_step(self):
        """Without ties nothing changes; a constant map scores all but the first step."""
        metric = PatchInsertionDeletion(1, step=2, ties="threshold")
        maps = distinct(0, 4, 4)
        assert score(metric, self.model_of(4), white(4, 4), maps)["pid"].item() == pytest.approx(
            score(PatchInsertionDeletion(1, step=2), self.model_of(4), white(4, 4), maps)["pid"].item(), abs=1e-12
        )
        curves = metric.curves(self.model_of(4), white(4, 4), torch.zeros(1, 4, 4), ONE, ONE)
        assert curves.x[0].tolist() == [n / 16 for n in range(0, 17, 2)]
        assert curves.areas()["pid"].item() == pytest.approx(1 - 2 / 16, abs=1e-10)

    @staticmethod
    def model_of(side):
        return Additive(even(side, side))

    @pytest.mark.parametrize(("share", "official"), [(0.02, True), (0.02, False), (1.0, True), (1.0, False)])
    def test_sparse_noise_scores_above_zero_with_the_official_protocol(self, share, official):
        """Sparse noise scores high only because its zeros enter at once; dense noise does not (linear model)."""
        generator = torch.Generator().manual_seed(0)
        maps = torch.rand(1, 100, 100, generator=generator) * (torch.rand(1, 100, 100, generator=generator) < share)
        metric = PatchInsertionDeletion(1, step=100, protocol="official" if official else "paper")
        pid = score(metric, self.model_of(100), white(100, 100), maps)["pid"].item()
        assert pid > 0.9 if (official and share < 1) else abs(pid) < 0.03


# Side, patch, published points, published first count and offset of an uninformative map under a linear model.
OFFICIAL = [
    (224, 16, 40, 6, 0.056),
    (224, 32, 49, 2, 0.061),
    (224, 8, 79, 11, 0.023),
    (512, 32, 26, 11, 0.062),
    (512, 64, 13, 6, 0.122),
    (512, 128, 16, 2, 0.183),
]


@pytest.mark.parametrize(("side", "m", "points", "first", "offset"), OFFICIAL)
def test_offsets_of_the_official_protocol(side, m, points, first, offset):
    model = Additive(even(side, side))
    values = torch.randperm((side // m) ** 2, generator=torch.Generator().manual_seed(0)).double()
    maps = values.view(1, side // m, -1).repeat_interleave(m, 1).repeat_interleave(m, 2)
    metric = PatchInsertionDeletion(m, protocol="official")
    curves = metric.curves(model, white(side, side), maps, ONE, ONE)
    assert len(curves.counts) == points
    assert curves.counts[0] == first
    assert curves.areas()["pid"].item() == pytest.approx(offset, abs=6e-4)
    assert curves.deletion[0, 0].item() == pytest.approx(1 - first / (side // m) ** 2, abs=1e-10)
    paper = score(PatchInsertionDeletion(m), model, white(side, side), maps)
    assert paper["pid"].item() == pytest.approx(0, abs=1e-10)


# The sizes with many points, checked on the counts alone.
OFFICIAL_COUNTS = [
    (224, 1, 101, 501, 0.016),
    (224, 2, 126, 101, 0.013),
    (224, 4, 157, 21, 0.008),
    (512, 1, 27, 10001, 0.067),
    (512, 2, 27, 2501, 0.067),
    (512, 4, 33, 501, 0.038),
    (512, 8, 41, 101, 0.026),
    (512, 16, 52, 21, 0.037),
]


@pytest.mark.parametrize(("side", "m", "points", "first", "offset"), OFFICIAL_COUNTS)
def test_offsets_of_the_official_counts(side, m, points, first, offset):
    counts = PatchInsertionDeletion(m, protocol="official").counts((side, side))
    n = (side // m) ** 2
    y, x = counts[None].double() / n, nominal_fractions(torch.zeros(1, n), counts)
    assert (len(counts), counts[0].item()) == (points, first)
    assert 2 * trapezoid_area(y, x).item() - 1 == pytest.approx(offset, abs=6e-4)


class TestInvariants:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 99), st.sampled_from([(4, 4, 1, 4), (6, 4, 2, 2), (5, 5, 2, 3), (4, 4, 2, 1)]))
    def test_rank_reversal_is_antisymmetric_for_any_model(self, seed, shape):
        height, width, m, step = shape
        images = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows, columns = -(-height // m), -(-width // m)
        values = distinct(seed, rows, columns)
        maps = values.repeat_interleave(m, 1).repeat_interleave(m, 2)[:, :height, :width]
        model, metric = Wavy(height * width, seed), PatchInsertionDeletion(m, step=step)
        forth, back = score(metric, model, images, maps), score(metric, model, images, -maps)
        assert back["deletion"].item() == pytest.approx(forth["insertion"].item(), abs=1e-10)
        assert back["pid"].item() == pytest.approx(-forth["pid"].item(), abs=1e-10)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 99), st.integers(1, 4), st.sampled_from(["paper", "official"]), st.booleans())
    def test_pid_does_not_change_under_increasing_transforms_of_the_map(self, seed, m, protocol, tied):
        side = 4 * m
        images = torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        maps = distinct(seed, side, side) % (5 if tied else side**2 + 1)
        model, metric = Wavy(side**2), PatchInsertionDeletion(m, step=3, protocol=protocol)
        one, two = score(metric, model, images, maps), score(metric, model, images, (maps / 7).exp() - 9)
        assert all(torch.equal(one[name], two[name]) for name in one)

    @settings(max_examples=15, deadline=None)
    @given(
        st.integers(0, 99), st.sampled_from([(5, 7, 2), (6, 6, 3), (7, 4, 3)]), st.sampled_from(["black", "uniform"])
    )
    def test_scores_of_a_sample_do_not_depend_on_its_batch(self, seed, shape, fill):
        height, width, m = shape
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 2, height, width, generator=generator, dtype=torch.float64)
        maps = torch.randint(5, (4, height, width), generator=generator).double()
        labels, indices = torch.tensor([0, 1, 2, 1]), torch.tensor([9, 4, 7, 1])
        for ties in ("fraction", "stable", "random"):
            metric = PatchInsertionDeletion(m, step=2, ties=ties, fill=fill, seed=seed)
            together = score(metric, Wavy(2 * height * width), images, maps, labels, indices)
            for b in range(4):
                only = slice(b, b + 1)
                alone = score(metric, Wavy(2 * height * width), images[only], maps[only], labels[only], indices[only])
                for name, value in alone.items():
                    assert value.item() == pytest.approx(together[name][b].item(), abs=1e-12)

    @pytest.mark.parametrize("chunk_size", [1, 5, 1000])
    def test_scores_do_not_depend_on_the_chunk_size(self, chunk_size):
        images, maps = torch.randn(2, 1, 6, 6, dtype=torch.float64), torch.rand(2, 6, 6)
        model = Wavy(36)
        one = score(PatchInsertionDeletion(1, step=1, chunk_size=chunk_size), model, images, maps)
        two = score(PatchInsertionDeletion(1, step=1), model, images, maps)
        assert all(torch.allclose(one[name], two[name], atol=1e-12) for name in one)


class TestSharing:
    images = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    maps = torch.rand(2, 6, 6, dtype=torch.float64)
    labels = torch.ones(2, dtype=torch.long)

    def run(self, names, *maps):
        engine = PerturbationEngine.for_model(Wavy(36), self.images)
        forwards = []
        for name in names:
            for one in maps or (self.maps,):
                metric_by_name(name, step=3).score(
                    Wavy(36), self.images, one, self.labels, torch.arange(2), cache=engine
                )
                forwards.append(engine.forwards)
        return forwards

    def test_end_points_of_the_two_curves_are_computed_once(self):
        assert self.run(["id"]) == [1 + 2 + 2 * 2 * 11]

    def test_metrics_of_the_same_curves_share_all_forwards(self):
        assert len(set(self.run(["id", "id@stable", "insertion1", "deletion1", "fill_probability"]))) == 1

    def test_fill_probability_costs_one_forward(self):
        assert self.run(["fill_probability", "id"]) == [1, 1 + 2 + 2 * 2 * 11]

    def test_the_negated_map_shares_all_forwards(self):
        assert len(set(self.run(["id", "id@stable"], self.maps, -self.maps))) == 1

    def test_curves_after_a_score_need_no_forward(self):
        engine, metric = PerturbationEngine.for_model(Wavy(36), self.images), PatchInsertionDeletion(2, step=2)
        arguments = (Wavy(36), self.images, self.maps, self.labels, torch.arange(2))
        values = metric.score(*arguments, cache=engine)
        before = engine.forwards
        assert torch.equal(metric.curves(*arguments, cache=engine).areas()["pid"], values["pid2"])
        assert engine.forwards == before

    def test_an_engine_of_other_images_is_refused(self):
        engine = PerturbationEngine.for_model(Wavy(36), self.images + 1)
        with pytest.raises(ValueError, match="cache must be a perturbation engine of these images"):
            PatchInsertionDeletion(2).score(
                Wavy(36), self.images, self.maps, self.labels, torch.arange(2), cache=engine
            )
