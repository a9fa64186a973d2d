import pytest
import torch

from labn.modules.losses import kl_divergence, make_loss


def test_kl_has_the_stated_direction():
    p, q = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert kl_divergence(p, q).item() == pytest.approx(0.3681, abs=5e-5)
    assert kl_divergence(q, p).item() == pytest.approx(0.5108, abs=5e-5)


def test_kl_is_zero_on_equal_and_not_negative():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, 4, generator=generator, dtype=torch.float64).log_softmax(1) for _ in range(2))
    assert kl_divergence(a, a).item() == 0
    assert all(kl_divergence(x[None], y[None]) >= 0 for x, y in zip(a, b))


def test_cross_entropy_weights_are_per_class():
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    each = -logits.log_softmax(1)[torch.arange(2), labels]
    expected = (2 * each[0] + 1 * each[1]) / 3
    assert make_loss("ce", [2.0, 1.0], 2)(logits, labels).item() == pytest.approx(expected.item())


def test_one_hot_bce_weights_the_positive_terms():
    logits = torch.tensor([[0.3, -0.7], [1.2, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    p = torch.sigmoid(logits)
    terms = [
        -2 * p[0, 0].log(),
        -(1 - p[0, 1]).log(),
        -(1 - p[1, 0]).log(),
        -1 * p[1, 1].log(),
    ]
    assert make_loss("bce_onehot", [2.0, 1.0], 2)(logits, labels).item() == pytest.approx((sum(terms) / 4).item())


@pytest.mark.parametrize(("name", "weights", "message"), [("mse", None, "loss is 'mse'"), ("ce", [1.0], "1 numbers")])
def test_wrong_loss_arguments_raise_an_error_that_names_them(name, weights, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, weights, 2)
