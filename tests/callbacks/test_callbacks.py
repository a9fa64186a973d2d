"""The callbacks on a tiny run in this process."""

import csv
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import (
    BestCheckpoint,
    EvaluationCallback,
    ExplanationCallback,
    GateWatch,
    LastCheckpoint,
    MapLogger,
)
from callbacks.explanation.lifecycle import evenly_spaced
from callbacks.explanation.session import chosen_classes
from datamodules import SyntheticFundus
from labn.explainers import Explainer
from labn.modules import LABN, Classifier, SaliencyGuidance
from labn.results.store import ResultStore


class Counted(Explainer):
    """Counts what it explains."""

    def __init__(self):
        self._seen = []

    def attribute(self, model, images, targets, indices):
        self._seen += indices.tolist()
        assert torch.is_grad_enabled()
        x = images.requires_grad_()
        return torch.autograd.grad(model(x).logits.sum(), x)[0].sum(1)


def network(**options):
    pl.seed_everything(0, verbose=False)
    backbone = {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}
    module = LABN("lambda_resnet", split=1, theta=0.3, network_options={"backbone_options": backbone}, **options)
    module.random_weights = ()  # as after training, without which a test is refused
    return module


def data(**options):
    return SyntheticFundus(**{"n_train": 8, "n_val": 6, "n_test": 7, "image_size": 48, "batch_size": 3, **options})


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        num_sanity_val_steps=options.pop("num_sanity_val_steps", 0),
        **options,
    )


def rows(folder, name="scores.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_each_target_rule_chooses_its_classes():
    labels, odds = torch.tensor([2, 0]), torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    expected = {"label": [2, 0], "prediction": [0, 1], "top1": [0, 1], "top2": [2, 2], "top3": [1, 0], "1": [1, 1]}
    for target, classes in expected.items():
        assert chosen_classes(target, labels, odds).tolist() == classes
    for target in ("top4", "3"):
        with pytest.raises(ValueError, match=f"target is {target}; the network has 3 classes"):
            chosen_classes(target, labels, odds)


def test_a_class_index_as_target_is_explained(tmp_path):
    explain = ExplanationCallback({"gradcam": None}, target=1)
    score = EvaluationCallback(["sparseness"], baselines=False)
    trainer(tmp_path, explain, score).test(network(), data(), verbose=False)
    assert {row["target"] for row in rows(tmp_path / "test")} == {"1"}
    with pytest.raises(ValueError, match="must be label, prediction, top<k> such as top2, or a class index"):
        ExplanationCallback({"gradcam": None}, target="best")


def test_several_evaluation_callbacks_would_replace_each_others_tables(tmp_path):
    callbacks = [ExplanationCallback({"gradcam": None}), EvaluationCallback(["pid16"]), EvaluationCallback(["mass"])]
    with pytest.raises(ValueError, match="Several EvaluationCallbacks would replace each other's tables"):
        trainer(tmp_path, *callbacks).test(network(), data(), verbose=False)
    assert not (tmp_path / "test").exists()


def test_every_sample_is_explained_once_and_scored_by_every_metric(tmp_path):
    counted = Counted()
    explain = ExplanationCallback({"counted": counted})
    score = EvaluationCallback(["pid16", "auroc"], also=["official"], metric_options={"step": 3})
    trainer(tmp_path, explain, score, MapLogger(max_images=2)).test(network(), data(), verbose=False)
    assert sorted(counted._seen) == list(range(7))
    found = rows(tmp_path / "test")
    assert {r["explainer"] for r in found} == {"counted", "random", "constant"}
    assert {r["metric"] for r in found} >= {"pid16", "insertion16", "deletion16", "pid16@official", "auroc"}
    assert [(int(r["index"]), r["name"]) for r in found] == sorted((int(r["index"]), r["name"]) for r in found)
    constant = [float(r["value"]) for r in found if (r["explainer"], r["metric"]) == ("constant", "pid16")]
    assert np.allclose(constant, 0, atol=1e-6)
    assert len(list((tmp_path / "test" / "overlays").glob("*.png"))) == 2
    manifest = json.loads((tmp_path / "test" / "maps" / "manifest.json").read_text())
    assert manifest["samples"] == 7
    with np.load(tmp_path / "test" / "curves.npz") as curves:
        assert curves["counted/pid16/index"].tolist() == list(range(7))
        area = np.trapezoid(
            curves["counted/pid16/insertion"] - curves["counted/pid16/deletion"], curves["counted/pid16/x"], axis=1
        )
    values = [float(r["value"]) for r in found if (r["explainer"], r["metric"]) == ("counted", "pid16")]
    assert np.allclose(values, area, atol=1e-6)


def test_summary_csv_holds_the_means_of_scores_csv(tmp_path):
    callback = EvaluationCallback(["pid16"], explainers={"random": None, "constant": None}, metric_options={"step": 3})
    trainer(tmp_path, callback).test(network(), data(), verbose=False)
    found = rows(tmp_path / "test")
    for line in rows(tmp_path / "test", "summary.csv"):
        values = [float(r["value"]) for r in found if all(r[k] == line[k] for k in ("explainer", "metric"))]
        assert float(line["mean"]) == pytest.approx(np.mean(values), abs=1e-12)
        assert float(line["ci_low"]) <= float(line["mean"]) <= float(line["ci_high"])
        assert int(line["n"]) == len(values)
    pair = next(r for r in rows(tmp_path / "test", "paired.csv") if r["metric"] == "pid16")
    means = {r["explainer"]: float(r["mean"]) for r in rows(tmp_path / "test", "summary.csv") if r["metric"] == "pid16"}
    expected = means[pair["explainer_a"]] - means[pair["explainer_b"]]
    assert float(pair["difference"]) == pytest.approx(expected, abs=1e-12)


def test_predictions_do_not_depend_on_the_precision_of_scoring(tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        options = {"metric_options": {"step": 3}, "precision": precision}
        callback = EvaluationCallback(["pid16"], explainers={"random": None}, **options)
        trainer(tmp_path / precision, callback).test(network(), data(), verbose=False)
        found.append([rows(tmp_path / precision / "test", name) for name in ("predictions.csv", "scores.csv")])
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_positives_only_scores_no_negative_sample(tmp_path):
    callback = EvaluationCallback(
        ["pid16", "mass"], explainers={"random": None}, positives_only=True, metric_options={"step": 3}
    )
    trainer(tmp_path, callback).test(network(), data(), verbose=False)
    assert {r["label"] for r in rows(tmp_path / "test") if r["metric"] == "pid16"} == {"1"}


def test_positives_only_as_a_list_scores_those_classes(tmp_path):
    options = {"metric_options": {"step": 3}, "baselines": False}
    cases = [([0], [0]), ([0, 1], [0, 1]), (True, [1]), (False, None)]
    for given, classes in cases:
        callback = EvaluationCallback(["pid16"], explainers={"random": None}, positives_only=given, **options)
        trainer(tmp_path / str(given), callback).test(network(), data(), verbose=False)
        stage = tmp_path / str(given) / "test"
        assert {r["label"] for r in rows(stage) if r["metric"] == "pid16"} == {str(k) for k in classes or (0, 1)}
        manifest = json.loads((stage / "maps" / "manifest.json").read_text())
        assert manifest["settings"]["positives_only"] == given
        assert manifest["positive_classes"] == classes
    callback = EvaluationCallback(["pid16"], explainers={"random": None}, positives_only=[2], **options)
    with pytest.raises(ValueError, match=r"positives_only is \[2\]; the data has 2 classes, from 0"):
        trainer(tmp_path / "unknown", callback).test(network(), data(), verbose=False)


def test_correct_only_scores_the_correct_samples_of_predictions_csv(tmp_path):
    options = {"metric_options": {"step": 3, "correct_only": True}, "precision": "bf16"}
    callback = EvaluationCallback(["pid16", "mass"], explainers={"random": None}, **options)
    trainer(tmp_path, callback).test(network(), data(), verbose=False)
    predictions = rows(tmp_path / "test", "predictions.csv")
    right = {r["index"] for r in predictions if r["label"] == r["prediction"]}
    assert 0 < len(right) < len(predictions)
    assert {r["index"] for r in rows(tmp_path / "test") if r["metric"] == "pid16"} == right
    assert not {r["index"] for r in rows(tmp_path / "test") if r["metric"] == "mass"} <= right
    with np.load(tmp_path / "test" / "curves.npz") as curves:
        (key,) = (k for k in curves if k.startswith("random/pid16/") and k.endswith("index"))
        assert {str(i) for i in curves[key]} == right


def test_positives_only_uses_the_positive_classes_of_the_data(tmp_path):
    callback = EvaluationCallback(["pid16"], explainers={"random": None}, positives_only=True)
    healthy = data()
    healthy.positive_classes = (0,)
    trainer(tmp_path, callback).test(network(), healthy, verbose=False)
    assert {r["label"] for r in rows(tmp_path / "test")} == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [None, SaliencyGuidance(fill="black")])
def test_explaining_at_validation_end_changes_no_weight(tmp_path, guidance):
    weights = []
    for callbacks in ([], [EvaluationCallback(["pid16"], explainers={"gradcam": None, "random": None}, val_images=3)]):
        module = network(guidance=guidance)
        options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 2}
        trainer(tmp_path, *callbacks, max_epochs=2, **options).fit(module, data())
        weights.append(module.state_dict())
    assert (tmp_path / "val" / "epoch=001" / "summary.csv").exists()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("every", "steps"), [(1, 4), (2, 2), (3, 1)])
def test_a_plateau_scheduler_steps_only_in_epochs_with_a_validation(tmp_path, every, steps):
    """In the epochs between there is no validation loss to look at, or an old one to count again."""
    run = trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=every)
    run.fit(network(), data())
    assert [config.scheduler.last_epoch for config in run.lr_scheduler_configs] == [steps]


def test_the_explained_subset_is_the_same_in_every_epoch(tmp_path):
    counted = Counted()
    callback = ExplanationCallback({"counted": counted}, val_images=2, every_n_epochs=2)
    trainer(tmp_path, callback, max_epochs=4, num_sanity_val_steps=2).fit(network(), data())
    assert counted._seen == [0, 5, 0, 5]


def test_new_metrics_reuse_the_maps_and_old_scores(tmp_path):
    module = network()
    for metrics in (["pid16"], ["pid16", "auroc"]):
        counted = Counted()
        explain = ExplanationCallback({"counted": counted})
        score = EvaluationCallback(metrics, metric_options={"step": 3}, baselines=False)
        trainer(tmp_path, explain, score).test(module, data(), verbose=False)
    assert counted._seen == []
    assert {r["metric"] for r in rows(tmp_path / "test")} >= {"pid16", "auroc"}
    assert len(list(ResultStore(tmp_path / "test").score_shards())) == 6


@pytest.mark.slow
def test_an_interrupted_batch_gets_the_same_scores_again(tmp_path, monkeypatch):
    """The last explainer's scores are written first, so that those that are missing are never behind those on disk."""
    explainers = {"labn": None, "gradcam": None}
    names = [*explainers, "random", "constant"]

    def test(folder):
        score = EvaluationCallback(["pid16"], metric_options={"step": 3}, explainers=explainers)
        trainer(folder, score).test(network(), data(), verbose=False)

    test(tmp_path / "whole")
    add, written = ResultStore.add_scores, []

    def killed(store, part):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(part.explainer)
        add(store, part)

    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "add_scores", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            test(tmp_path / "cut")
    assert written == [*names[::-1], *names[:1:-1]]
    test(tmp_path / "cut")
    for file in ("scores.csv", "summary.csv", "paired.csv"):
        assert (tmp_path / "cut" / "test" / file).read_bytes() == (tmp_path / "whole" / "test" / file).read_bytes()


def test_another_gate_threshold_invalidates_saved_results(tmp_path):
    module = network()
    for theta in (0.3, 0.6):
        module.network.theta = theta
        counted = Counted()
        pieces = trainer(tmp_path, ExplanationCallback({"counted": counted}))
        if theta == 0.6:
            with pytest.warns(UserWarning, match="another network"):
                pieces.test(module, data(), verbose=False)
        else:
            pieces.test(module, data(), verbose=False)
        assert len(counted._seen) == 7
    assert (tmp_path / "test.old-1" / "maps").is_dir()


def test_tables_hold_only_samples_of_the_current_subset(tmp_path):
    module = network()
    for images in (None, 2):
        callback = EvaluationCallback(
            ["pid16"], explainers={"random": None}, metric_options={"step": 3}, test_images=images
        )
        trainer(tmp_path, callback).test(module, data(), verbose=False)
    assert {r["index"] for r in rows(tmp_path / "test")} == {"0", "6"}
    assert {r["n"] for r in rows(tmp_path / "test", "summary.csv")} == {"2"}


def test_the_loss_does_not_depend_on_the_batch_size(tmp_path):
    losses = []
    for size in (2, 3, 7):
        module = network(class_weights=[2.0, 1.0])
        losses.append(trainer(tmp_path).test(module, data(batch_size=size), verbose=False)[0]["test/loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_a_plain_classifier_is_explained(tmp_path):
    pl.seed_everything(0, verbose=False)
    options = {"metric_options": {"step": 3}, "baselines": False}
    callback = EvaluationCallback(["pid16"], explainers={"gradcam": None}, **options)
    module = Classifier("resnet18")
    module.random_weights = ()  # as after training, without which a test is refused
    trainer(tmp_path, callback).test(module, data(), verbose=False)
    assert len([r for r in rows(tmp_path / "test") if r["metric"] == "pid16"]) == 7


def test_a_map_logger_alone_without_explainers_raises(tmp_path):
    with pytest.raises(MisconfigurationException, match="nothing to explain"):
        trainer(tmp_path, MapLogger()).test(network(), data(), verbose=False)
    trainer(tmp_path, MapLogger(explainers={"labn": None}, max_images=1)).test(network(), data(), verbose=False)
    assert len(list((tmp_path / "test" / "overlays").glob("*.png"))) == 1


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_samples_with_long_names_in_any_script_get_pictures(tmp_path, monkeypatch):
    long = "糖尿病網膜症/右眼_後極部カラー眼底写真_$二〇二四年四月一日_a$"
    monkeypatch.setattr(SyntheticFundus, "sample_name", lambda self, split, index: f"{long}_{index}.jpg")
    trainer(tmp_path, MapLogger(explainers={"random": None}, max_images=2)).test(network(), data(), verbose=False)
    names = sorted(path.name for path in (tmp_path / "test" / "overlays").glob("*.png"))
    assert [name[6:20] for name in names] == ["-糖尿病網膜症_右眼_後極部"] * 2


def test_a_callback_before_the_one_with_explainers_raises(tmp_path):
    with pytest.raises(MisconfigurationException, match="MapLogger stands before ExplanationCallback"):
        trainer(tmp_path, MapLogger(), ExplanationCallback({"labn": None})).test(network(), data(), verbose=False)


def test_two_callbacks_with_explainers_raise(tmp_path):
    pair = [ExplanationCallback({"labn": None}), MapLogger(explainers={"random": None})]
    with pytest.raises(MisconfigurationException, match="both have explainers"):
        trainer(tmp_path, *pair).test(network(), data(), verbose=False)


def test_inference_mode_raises(tmp_path):
    pieces = trainer(tmp_path, ExplanationCallback({"labn": None}))
    pieces.test_loop.inference_mode = True
    with pytest.raises(MisconfigurationException, match="inference_mode"):
        pieces.test(network(), data(), verbose=False)


def test_a_closed_gate_causes_a_warning(tmp_path):
    module = network()
    module.network.theta = 1.0
    with pytest.warns(UserWarning, match="gate is closed everywhere in eval mode"):
        trainer(tmp_path, GateWatch(), max_epochs=1).fit(module, data())


@pytest.mark.parametrize(("theta", "warned"), [(1e-9, True), (0.0, False)])
def test_an_open_gate_with_a_threshold_above_0_causes_a_warning(tmp_path, theta, warned, recwarn):
    module = network()
    module.network.theta = theta
    trainer(tmp_path, GateWatch(), max_epochs=1).fit(module, data())
    found = [str(w.message) for w in recwarn if "attention gate" in str(w.message)]
    assert len(found) == 2 * warned
    assert all("gate is open everywhere" in text and "Raise theta" in text for text in found)


def test_last_is_saved_in_every_epoch_and_best_in_the_best(tmp_path):
    class Worse(LABN):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    pl.seed_everything(0, verbose=False)
    backbone = {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}
    module = Worse("lambda_resnet", split=1, network_options={"backbone_options": backbone})
    pieces = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[BestCheckpoint(), LastCheckpoint()],
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pieces.fit(module, data())
    epochs = {
        path.stem: torch.load(path, weights_only=False)["epoch"] for path in (tmp_path / "checkpoints").glob("*.ckpt")
    }
    assert epochs == {"best": 0, "last": 2, "previous": 1}


def test_evenly_spaced_indices_are_sorted_and_distinct():
    assert evenly_spaced(10, None) == list(range(10))
    assert evenly_spaced(10, 3) == [0, 4, 9]
    assert evenly_spaced(10, 1) == [0]
    assert evenly_spaced(2, 8) == [0, 1]
