"""Names of files with control characters are shown escaped, wherever the terminal shows them."""

import logging
import warnings

import cv2
import numpy as np
import pytest
import torch

import cli
from callbacks.logging.terminal import escape_controls
from datamodules import ImageFolder
from labn.errors import FileError, InputError, UserError, printable
from labn.io.images import read_image
from labn.io.preprocessing import KEY, Preprocessing
from labn.modules import LABN

EVIL = "a\x1b[2J\r\n\u202eb"
SHOWN = "a\\x1b[2J\\r\\n\\u202eb"


def test_only_controlling_characters_are_escaped():
    assert printable(EVIL) == SHOWN
    assert printable(f"{EVIL}\x9b\x7f\udcff\u2028", keep="\n") == "a\\x1b[2J\\r\n\\u202eb\\x9b\\x7f\\udcff\\u2028"
    for text in ("日本語 é \U0001f600 \u200d", "C:\\x1b", ""):
        assert printable(text) == text


@pytest.mark.parametrize("error", [UserError(EVIL), InputError(EVIL), FileError(2, EVIL)])
def test_errors_for_the_user_show_names_escaped(error):
    assert SHOWN in str(error)
    assert not set(str(error)) & set("\x1b\r\n\u202e")


def test_a_sentence_about_a_picture_of_such_a_name(tmp_path):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        read_image(tmp_path / EVIL)
    assert SHOWN in str(caught.value)


def test_the_report_of_a_folder(tmp_path):
    for split in ("train", "test", EVIL):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((8, 8, 3), 40 * number + 9 * (split == "test") + 5 * (name == "bee"), np.uint8)
                assert cv2.imwrite(str(tmp_path / split / name / f"{number}.png"), pixels)
    report = ImageFolder(tmp_path, image_size=8, mean=[0.5] * 3, std=[0.5] * 3).report()
    assert f"left out folder {SHOWN} beside train" in report
    assert len(report.splitlines()) == 5


def test_the_lines_and_errors_of_explain(tmp_path, capsys):
    network = {"backbone": "lambda_resnet", "split": 1}
    network["network_options"] = {"backbone_options": {"layers": [1, 1], "width": 4, "stem_width": 4, "r": 3}}
    preprocessing = Preprocessing(32, [0.5] * 3, [0.25] * 3).plain()
    content = {"state_dict": LABN(**network).state_dict(), KEY: preprocessing}
    torch.save({**content, "hyper_parameters": {"_class_path": "labn.modules.LABN", **network}}, tmp_path / "best.ckpt")
    (tmp_path / f"{EVIL}.png").write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    words = [
        "explain",
        "--method=labn",
        "--device=cpu",
        f"--out={tmp_path / 'out'}",
        f"--ckpt={tmp_path / 'best.ckpt'}",
    ]
    cli.main([*words, f"--image={tmp_path / EVIL}.png"])
    assert f"{SHOWN}.png: class" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*words, f"--image={tmp_path / EVIL}"])
    assert f"{SHOWN} does not exist.\n" in capsys.readouterr().err


def test_warnings_and_log_lines(monkeypatch):
    monkeypatch.delenv("LABN_TRACEBACK", raising=False)
    with cli.plain_warnings():
        shown = warnings.formatwarning(UserWarning(EVIL), UserWarning, "file.py", 1)
    assert shown == "Warning: a\\x1b[2J\\r\n\\u202eb\n"
    record = logging.LogRecord("name", logging.INFO, "file.py", 1, "%s\nnext", (EVIL,), None)
    assert escape_controls(record)
    assert record.getMessage() == "a\\x1b[2J\\r\n\\u202eb\nnext"
