"""`explain`: the maps are those of the library, the class is the network's, and bad input is one sentence."""

import csv
import importlib
import os
import re
import warnings

import cv2
import numpy as np
import pytest
import timm
import torch
from command_line import call_main
from safetensors.torch import load_file, save_file

from datamodules import ImageFolder, SyntheticFundus
from labn import evaluate, explain
from labn.commands import COMMANDS
from labn.commands.explain import say_time
from labn.explainers import explainer_by_name
from labn.io.preprocessing import KEY, Preprocessing
from labn.models.pretrained import load_pretrained
from labn.modules import LABN, SSD
from labn.modules.restore import restore

OPTIONS = {"backbone": "lambda_resnet", "split": 1, "theta": 0.3}
BACKBONE = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name in ("a.jpg", "b.png"):
        cv2.imwrite(str(folder / name), noise.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    module = LABN(**OPTIONS, network_options=BACKBONE)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    arguments = {"_class_path": "labn.modules.LABN", **OPTIONS, "network_options": BACKBONE}
    preprocessing = SyntheticFundus(n_train=2, n_val=2, n_test=2, image_size=48).preprocessing().plain()
    content = {"state_dict": module.state_dict(), "hyper_parameters": arguments, KEY: preprocessing}
    torch.save(content, path)
    return path


def test_maps_and_class_are_those_of_the_library(pictures, checkpoint, tmp_path, capsys):
    methods = ["labn", "gradcam", "random"]
    command = ["explain", f"--image={pictures / 'a.jpg'}", f"--ckpt={checkpoint}", f"--out={tmp_path}", "--method"]
    call_main([*command, *methods, "--method=-labn", "--device=cpu"])
    network, preprocessing = restore(checkpoint)
    image = preprocessing.normalise(preprocessing.read(pictures / "a.jpg"))[None]
    probabilities = network(image).logits.softmax(1)[0]
    predicted = int(probabilities.argmax())
    name = ["healthy", "lesions"][predicted]
    assert f"a.jpg: {name} ({float(probabilities[predicted].detach()):.3f})" in capsys.readouterr().out
    maps = load_file(tmp_path / "maps" / "a.safetensors")
    assert set(maps) == {*methods, "-labn"}
    for method in methods:
        expected = explain(network, image, method, predicted, indices=torch.tensor([0])).maps[0]
        assert torch.equal(maps[method], expected)
    assert torch.equal(maps["-labn"], -maps["labn"])
    assert cv2.imread(str(tmp_path / "overlays" / "a.png")).shape[1] > 1000
    with (tmp_path / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (int(row["class"]), row["class_name"], row["explained"]) == (predicted, name, name)


def test_metrics_score_the_maps_beside_maps_without_information(pictures, checkpoint, tmp_path, capsys):
    files = [f"--image={pictures / name}" for name in ("b.png",)]
    command = ["explain", *files, f"--ckpt={checkpoint}", f"--out={tmp_path}", "--method", "gradcam", "--device=cpu"]
    call_main([*command, "--metric", "pid8", "average_drop"])
    network, preprocessing = restore(checkpoint)
    image = preprocessing.normalise(preprocessing.read(pictures / "b.png"))[None]
    statistics = {"mean": preprocessing.mean, "std": preprocessing.std}
    found = explain(network, image, "gradcam")
    wanted = evaluate(network, image, found, metrics=["pid8", "average_drop"], **statistics)
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {(row["explainer"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    assert {explainer for explainer, _ in rows} == {"gradcam", "random", "constant"}
    assert {name: rows["gradcam", name] for name in wanted} == {name: float(v) for name, v in wanted.items()}
    assert rows["constant", "pid8"] == pytest.approx(0, abs=1e-6)
    said = capsys.readouterr().out
    assert "pid8: a map without information gets 0 (random: " in said
    assert "predictions.csv and scores.csv of 1 pictures" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--mean", "123", "117", "104"], "divide the values by 255"), (["--class_names=NAMES"], "has 3 names, but .* 2")],
)
def test_settings_that_cannot_be_right_are_one_sentence(pictures, checkpoint, tmp_path, words, message, capsys):
    (tmp_path / "names").write_text("a\nb\nc\n")
    words = [word.replace("NAMES", str(tmp_path / "names")) for word in words]
    command = ["explain", f"--image={pictures / 'b.png'}", f"--ckpt={checkpoint}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit):
        call_main([*command, "--method=gradcam", "--device=cpu", *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_options_are_arguments_of_their_method(pictures, checkpoint, tmp_path):
    command = ["explain", f"--image={pictures / 'a.jpg'}", f"--ckpt={checkpoint}", f"--out={tmp_path}", "--device=cpu"]
    words = ["occlusion.window=16", "occlusion.stride=16", "lrp.rule=epsilon"]
    call_main([*command, "--method", "occlusion", "lrp", "--option", *words])
    network, preprocessing = restore(checkpoint)
    image = preprocessing.normalise(preprocessing.read(pictures / "a.jpg"))[None]
    target = int(network(image).logits.argmax())
    maps = load_file(tmp_path / "maps" / "a.safetensors")
    for method, options in (("occlusion", {"window": 16, "stride": 16}), ("lrp", {"rule": "epsilon"})):
        expected = explainer_by_name(method, **options)(network, image, torch.tensor([target]))[0]
        assert torch.allclose(maps[method], expected, atol=1e-6)


def test_metrics_that_explain_again_do_so_with_the_options(pictures, checkpoint, tmp_path):
    options = {"window": 16, "stride": 16}
    command = ["explain", f"--image={pictures / 'a.jpg'}", f"--ckpt={checkpoint}", f"--out={tmp_path}", "--device=cpu"]
    words = [f"occlusion.{name}={value}" for name, value in options.items()]
    call_main([*command, "--method=occlusion", "--metric=max_sensitivity", "--option", *words])
    with (tmp_path / "scores.csv").open() as file:
        rows = {(row["explainer"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    network, preprocessing = restore(checkpoint)
    image = preprocessing.normalise(preprocessing.read(pictures / "a.jpg"))[None]
    target, explainer = network(image).logits.argmax(1), explainer_by_name("occlusion", **options)
    maps = explainer(network, image, target)
    settings = {"mean": preprocessing.mean, "std": preprocessing.std, "indices": torch.tensor([0])}
    expected = evaluate(network, image, maps, target, ["max_sensitivity"], explainer=explainer, **settings)
    other = evaluate(
        network, image, maps, target, ["max_sensitivity"], explainer=explainer_by_name("occlusion"), **settings
    )
    assert rows["occlusion", "max_sensitivity"] == pytest.approx(float(expected["max_sensitivity"]), rel=1e-4)
    assert rows["occlusion", "max_sensitivity"] != pytest.approx(float(other["max_sensitivity"]), rel=1e-2)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("n_masks=5", "must be METHOD.NAME=VALUE with a method of --method (gradcam)"),
        ("rise.n_masks=5", "must be METHOD.NAME=VALUE"),
        ("gradcam.relu", "must be METHOD.NAME=VALUE"),
        ("gradcam.rely=false", "method 'gradcam' has no argument 'rely'"),
        ("gradcam.relu=[", "cannot be read as YAML"),
    ],
)
def test_a_wrong_option_is_one_sentence(pictures, checkpoint, tmp_path, word, message, capsys):
    command = ["explain", f"--image={pictures / 'b.png'}", f"--ckpt={checkpoint}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit):
        call_main([*command, "--method=gradcam", "--device=cpu", "--option", word])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_long_runs_say_how_long_they_take_and_why(capsys):
    say_time({"lrp": 1.0, "rise": 9.0}, left=30)
    assert capsys.readouterr().out == (
        "30 pictures are left, about 5 minutes, of which rise takes 90%; --option rise.NAME=VALUE sets its arguments.\n"
    )
    say_time({"lrp": 1.0}, left=30)
    assert capsys.readouterr().out == ""


def test_weights_that_are_read_in_order_are_said_to_be(tmp_path):
    state = timm.create_model("resnet18", num_classes=5).state_dict()
    save_file(state, tmp_path / "named.safetensors")
    numbered = {f"_{n}": tensor for n, (name, tensor) in enumerate(state.items()) if "num_batches" not in name}
    torch.save(numbered, tmp_path / "numbered.pt")
    with pytest.warns(UserWarning, match=r"have other names than those of resnet18 and were read in order"):
        network, _ = load_pretrained("resnet18", tmp_path / "numbered.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, _ = load_pretrained("resnet18", tmp_path / "named.safetensors")
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in same.state_dict().items())


@pytest.mark.parametrize(("metric", "message"), [("pix", "pix"), ("mass", "mask")])
def test_metrics_that_cannot_score_pictures_are_one_sentence(pictures, checkpoint, tmp_path, metric, message, capsys):
    command = ["explain", f"--image={pictures / 'b.png'}", f"--ckpt={checkpoint}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit):
        call_main([*command, "--method", "gradcam", "--metric", metric, "--device=cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_picture_overwrites_the_outputs_of_another(checkpoint, tmp_path):
    files = [tmp_path / name for name in ("x/a.png", "y/a.png", "a-2.png")]
    for shade, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((60, 60, 3), 60 * shade, dtype=np.uint8))
    command = ["explain", "--image", *map(str, files), f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}"]
    call_main([*command, "--method=random", "--device=cpu"])
    network, preprocessing = restore(checkpoint)
    for number, (path, name) in enumerate(zip(files, ("a", "a-2", "a-2-2"))):
        image = preprocessing.normalise(preprocessing.read(path))[None]
        expected = explain(network, image, "random", 0, indices=torch.tensor([number])).maps[0]
        assert torch.equal(load_file(tmp_path / "out" / "maps" / f"{name}.safetensors")["random"], expected)
        assert (tmp_path / "out" / "overlays" / f"{name}.png").exists()


def test_no_picture_is_replaced_by_its_overlay(checkpoint, tmp_path, capsys):
    picture = tmp_path / "overlays" / "a.png"
    picture.parent.mkdir()
    cv2.imwrite(str(picture), np.zeros((60, 60, 3), dtype=np.uint8))
    before = picture.read_bytes()
    command = ["explain", f"--image={picture}", f"--ckpt={checkpoint}", "--method=random", "--device=cpu"]
    with pytest.raises(SystemExit):
        call_main([*command, f"--out={tmp_path}"])
    assert "overlays would replace pictures that --image names" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.slow
def test_a_folder_with_a_timm_model_and_its_weights(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    command = ["explain", f"--image={pictures}", "--model=timm/resnet18", f"--weights={tmp_path / 'w.safetensors'}"]
    command += ["--image_size=64", f"--class_names={tmp_path / 'names.txt'}", "--target=cat", f"--out={tmp_path}"]
    with pytest.warns(UserWarning, match=r"broken\.jpg is not an image"):
        call_main([*command, "--device=cpu", "--method", "lrp", "c3lrp", "gradcam"])
    assert "explained cat" in capsys.readouterr().out
    for name in ("a", "b"):
        maps = load_file(tmp_path / "maps" / f"{name}.safetensors")
        assert {m: tuple(heat.shape) for m, heat in maps.items()} == dict.fromkeys(
            ("lrp", "c3lrp", "gradcam"), (64, 64)
        )


@pytest.mark.parametrize(("classes", "name"), [(1000, "tabby"), (5, "class 281")])
def test_a_thousand_classes_have_the_names_of_imagenet(tmp_path, classes, name):
    save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), tmp_path / "w.safetensors")
    assert load_pretrained("timm/test_resnet", tmp_path / "w.safetensors")[1].class_name(281) == name


def test_methods_that_fail_are_listed_and_the_others_keep_their_maps(pictures, tmp_path, capsys, monkeypatch):
    """A running sum has no rule, and a layer raises an error of its own in the gradient that Grad-CAM takes."""
    (tmp_path / "my_summing_net.py").write_text(
        "import torch\n"
        "class Stubborn(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        return x * 1\n"
        "    @staticmethod\n"
        "    def backward(ctx, gradient):\n"
        "        raise RuntimeError('no gradient here')\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes=3):\n"
        "        super().__init__()\n"
        "        self.conv, self.head = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Linear(4, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(Stubborn.apply(self.conv(x).cumsum(-1)).relu().mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    save_file(importlib.import_module("my_summing_net").Net(3).state_dict(), tmp_path / "w.safetensors")
    command = ["explain", "--image", str(pictures / "a.jpg"), str(pictures / "b.png"), "--image_size=24"]
    command += ["--model=my_summing_net.Net", f"--weights={tmp_path / 'w.safetensors'}", f"--out={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        call_main([*command, "--device=cpu", "--method", "lrp", "occlusion", "gradcam", "random"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "overlays/, maps/ and predictions.csv of 2 pictures" in said.out
    assert re.search(r"2 of 4 methods gave no map\. lrp: .*; gradcam: RuntimeError: no gradient here", said.err)
    for name in ("a", "b"):
        assert set(load_file(tmp_path / "maps" / f"{name}.safetensors")) == {"occlusion", "random"}


def test_pictures_are_prepared_as_the_data_module_does(pictures, tmp_path):
    for split in ("train", "test"):
        for label in ("x", "y"):
            (tmp_path / split / label).mkdir(parents=True)
            for n in range(2):
                pixels = np.random.default_rng([n, ord(label), len(split)]).integers(
                    0, 255, (40, 60, 3), dtype=np.uint8
                )
                cv2.imwrite(str(tmp_path / split / label / f"{n}.png"), pixels)
    statistics = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    data = ImageFolder(tmp_path, image_size=32, crop=(0.1, 0.0, 0.8, 1.0), val_fraction=0.5, **statistics)
    kept = Preprocessing(**data.preprocessing().plain())
    sample = data.dataset("test")[0]["image"]
    path = tmp_path / "test" / data.sample_name("test", 0)
    assert torch.allclose(kept.normalise(kept.read(path)), sample, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt=CKPT", "--method=gradcamm"], "did you mean gradcam"),
        (["--method=lrp"], "by --ckpt, or by --model and --weights"),
        (["--ckpt=CKPT", "--model=resnet18", "--weights=w", "--method=lrp"], "by --ckpt, or by --model"),
        (["--model=resnet18", "--method=lrp"], "--model and --weights together"),
        (["--model=resnet18", "--weights=CKPT", "--method=lrp"], "CKPT is of another architecture"),
        (["--ckpt=CKPT", "--method=random", "--target=cat"], "number or a class name .healthy, lesions"),
        (["--ckpt=CKPT", "--method=random", "--target=7"], "--target is class 7; the network has 2 classes"),
        (["--ckpt=CKPT", "--method=-crp"], "-crp explains detectors; use `cli.py test` with callbacks.Det"),
        (["--ckpt=nowhere.ckpt", "--method=random"], "nowhere.ckpt does not exist"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, pictures, checkpoint, tmp_path, capsys):
    words = [word.replace("CKPT", str(checkpoint)) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        call_main(["explain", f"--image={pictures / 'a.jpg'}", f"--out={tmp_path}", "--device=cpu", *words])
    assert ended.value.code == 2
    assert message.replace("CKPT", str(checkpoint)).replace(".healthy", "(healthy") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("--image_size", "0", "--image_size is 0; it must be at least 1 pixel."),
        ("--image_size", "-5", "--image_size is -5; it must be at least 1 pixel."),
        ("--device", "gpu", "--device is 'gpu', which cannot be used here; it must be cpu, or what torch finds"),
        ("--device", "cuda:99", "--device is 'cuda:99', which cannot be used here"),
        ("--device", "meta", "--device is 'meta', which cannot be used here"),
    ],
)
def test_impossible_sizes_and_devices_are_one_sentence(word, value, message, pictures, checkpoint, tmp_path, capsys):
    words = ["explain", "--image", str(pictures), "--ckpt", str(checkpoint), "--method", "labn", word, value]
    with pytest.raises(SystemExit) as left:
        call_main([*words, "--out", str(tmp_path)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_class_names_that_are_not_utf8_are_named_with_their_line(pictures, checkpoint, tmp_path, capsys):
    (tmp_path / "names.txt").write_bytes(b"healthy\nl\xe4sion\n")
    command = ["explain", f"--image={pictures}", f"--ckpt={checkpoint}", f"--class_names={tmp_path / 'names.txt'}"]
    with pytest.raises(SystemExit):
        call_main([*command, "--method=labn", f"--out={tmp_path}"])
    assert f"{tmp_path / 'names.txt'}, line 2: byte 0xe4 is not UTF-8" in capsys.readouterr().err


def test_a_folder_without_pictures_of_its_own_is_named(pictures, checkpoint, tmp_path, capsys):
    (tmp_path / "all" / "cat").mkdir(parents=True)
    with pytest.raises(SystemExit):
        call_main(["explain", f"--image={tmp_path / 'all'}", f"--ckpt={checkpoint}", "--method=random"])
    assert f"{tmp_path / 'all'} holds no pictures of its own; its subfolders" in capsys.readouterr().err


def test_weights_that_leave_something_random_are_refused(pictures, tmp_path, capsys):
    state = timm.create_model("resnet18", num_classes=5).state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "headless.safetensors")
    command = ["explain", f"--image={pictures / 'a.jpg'}", "--model=resnet18", "--method=random"]
    with pytest.raises(SystemExit):
        call_main([*command, f"--weights={tmp_path / 'headless.safetensors'}", f"--out={tmp_path}"])
    assert "does not fill resnet18: 2 of its tensors are missing (first: fc.weight)" in capsys.readouterr().err


def test_a_trained_detector_is_sent_to_its_own_callback(tmp_path):
    module = SSD(num_classes=2, width=1 / 16)
    path = tmp_path / "ssd.ckpt"
    arguments = {"_class_path": "labn.modules.SSD", "num_classes": 2, "width": 1 / 16}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": arguments}, path)
    with pytest.raises(ValueError, match=r"ssd\.ckpt holds a detector; explain it with `cli.py test`"):
        restore(path)


def test_a_checkpoint_cannot_name_foreign_code(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["_class_path"] = "subprocess.Popen"
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"not a checkpoint of `cli\.py fit`"):
        restore(tmp_path / "bad.ckpt")


def wide(content):
    content["state_dict"]["network.attention_branch.class_head.0.weight"] = torch.zeros(7, 10, 1, 1)


def short(content):
    del content["state_dict"]["network.attention_branch.class_head.0.weight"]


def long(content):
    content["state_dict"]["network.tail.weight"] = torch.zeros(2)


def text(content):
    content["state_dict"]["network.attention_branch.class_head.0.weight"] = "weights"


MISFITS = {
    wide: r"network.attention_branch.class_head.0.weight has the shape \(7, 10, 1, 1\) and must have \(2, ",
    short: r"1 of \d+ tensors are missing, such as network.attention_branch.class_head.0.weight",
    long: r"1 tensors are not of this network, such as network.tail.weight",
    text: r"network.attention_branch.class_head.0.weight is no tensor",
    lambda content: content.update(state_dict=[1]): r"does not describe a network that can be built here",
    lambda content: content.update({KEY: [1]}): r"does not describe a network that can be built here",
    lambda content: content.update({KEY: {**content[KEY], "image_size": 2**40}}): r"image_size is 1099511627776",
    lambda content: content.update({KEY: {**content[KEY], "std": [0.0]}}): r"must be one number per channel, std above",
    lambda content: content["hyper_parameters"].update(thetta=1): r"unexpected keyword argument 'thetta'",
    lambda content: content.update(hyper_parameters=[1]): r"is not a checkpoint of `cli.py fit` with a module of labn",
}


@pytest.mark.parametrize("change", MISFITS)
def test_a_checkpoint_of_another_shape_is_one_sentence_that_names_it(checkpoint, tmp_path, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=rf"other\.ckpt .*{MISFITS[change]}") as caught:
        restore(tmp_path / "other.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[1], torch.zeros(2), "text"])
def test_a_file_of_other_content_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint of `cli.py fit`"):
        restore(tmp_path / "other.ckpt")


@pytest.mark.parametrize("command", ["compare", "explain"])
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as ended:
        call_main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert max(len(line) for line in text.splitlines()) <= 130


def test_the_main_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        call_main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("fit", "validate", "test"))
    assert all(f"    {name} " in text and summary in text for name, summary in COMMANDS.items())


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_a_name_that_is_not_utf8_is_skipped_and_long_names_are_cut(checkpoint, tmp_path):
    pixels = cv2.imencode(".png", np.zeros((60, 60, 3), dtype=np.uint8))[1].tobytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("眼" * 80 + ".png")).write_bytes(pixels)
    try:
        with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.png", "wb") as file:
            file.write(pixels)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    command = ["explain", f"--image={tmp_path / 'in'}", f"--ckpt={checkpoint}", f"--out={tmp_path / 'out'}"]
    with pytest.warns(UserWarning, match=r"The name of picture .*/in/caf\\xe9\.png is not UTF-8; rename the file"):
        call_main([*command, "--method=random", "--device=cpu"])
    (overlay,) = (tmp_path / "out" / "overlays").iterdir()
    assert overlay.name.startswith("眼" * 30)
