"""A terminal shows the sentence that is meant for the user, and no traceback around it."""

import sys
from pathlib import Path

import pytest
from command_line import TINY, call_main

import cli
from labn.errors import sentence_of
from labn.explainers import explainer_by_name
from labn.launch.error_messages import config_sentence

QUICKSTART = ["--config", "configs/quickstart.yaml", *TINY]


@pytest.fixture
def root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def caught(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def wrapped():
    try:
        explainer_by_name("gradcm")
    except ValueError as error:
        raise ValueError("Does not validate against any of the Union subtypes") from error


def test_the_sentence_is_that_of_the_project_also_inside_a_librarys_error():
    for work in (lambda: explainer_by_name("gradcm"), wrapped):
        assert sentence_of(caught(work)) == "There is no method 'gradcm'; did you mean gradcam, xgradcam, gradcam++?"


@pytest.mark.parametrize("work", [lambda: explainer_by_name(3), lambda: int("x"), lambda: [][1]])
def test_an_unforeseen_error_has_no_sentence(work):
    assert sentence_of(caught(work)) is None


def test_a_message_of_nothing_but_types_stays_whole():
    message = 'Parser key "model":\n  Not a valid subclass of LightningModule'
    assert config_sentence(message) == message


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("trainer: {max_epoch: 2}", "does not accept option 'trainer.max_epoch'; did you mean trainer.max_epochs,"),
        ("model: {init_args: {tetha: 1}}", "labn.modules.LABN: Option 'tetha' is not accepted; did you mean theta?"),
        ("model: {init_args: {lr: x}}", "model: labn.modules.LABN: lr: Expected a <class 'float'>. Got value: x."),
        ("data: {class_path: datamodules.Synthetc}", "no attribute 'Synthetc'; did you mean SyntheticFundus"),
        (
            "trainer: {callbacks: [{class_path: callbacks.ExplanationCallback, init_args: "
            "{explainers: {rise: {n_masks: 30}}}}]}",
            "the layout must be {class_path: <a class derived from labn.explainers.Explainer>, init_args: {",
        ),
        (
            "trainer: {callbacks: [{class_path: callbacks.ExplanationCallback, init_args: {explainers: [lrp]}}]}",
            "explainers: the layout must be {<name>: <value>}.",
        ),
        (
            "trainer: {callbacks: [{class_path: callbacks.EvaluationCallback, init_args: {metric: [id]}}]}",
            "callbacks.EvaluationCallback: Option 'metric' is not accepted; did you mean metrics,",
        ),
    ],
)
def test_a_mistake_in_a_configuration_is_one_line_with_the_nearest_names(tmp_path, capsys, content, told):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(SystemExit) as left:
        call_main(["fit", *QUICKSTART, "--config", str(tmp_path / "mine.yaml")])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert told in said
    assert len(said.splitlines()) == 1


@pytest.mark.usefixtures("root")
def test_a_mistyped_option_and_a_missing_configuration_say_what_to_write(capsys):
    for argv, told in (
        (["fit", *QUICKSTART, "--trainer.max_epocs=3"], "did you mean trainer.max_epochs,"),
        (["fit"], "name a configuration, as in --config configs/quickstart.yaml."),
    ):
        with pytest.raises(SystemExit):
            call_main(argv)
        assert told in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_all_of_them():
    with pytest.raises(ValueError, match=r"no command 'compaer'; did you mean compare\? The commands are fit, .*table"):
        call_main(["compaer", "a", "b"])


def test_a_missing_package_is_answered_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    """As with the python of the system; a package that the user's own file imports keeps its traceback."""
    own, ours = (
        compile("import no_package.of_this_name", str(folder / "my_net.py"), "exec")
        for folder in (tmp_path, Path(cli.__file__).parent / "labn" / "models")
    )
    monkeypatch.setattr(cli, "main", lambda: exec(ours))
    with pytest.raises(SystemExit):
        cli.console()
    said = capsys.readouterr().err
    assert said.startswith(
        f"cli.py: the package no_package is not installed for {sys.executable}; run `python3 -m venv"
    )
    assert said.count("\n") == 1
    monkeypatch.setattr(cli, "main", lambda: exec(own))
    with pytest.raises(ModuleNotFoundError):
        cli.console()


def test_the_terminal_shows_one_line_and_the_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit) as left:
        cli.console()
    assert (left.value.code, capsys.readouterr().err) == (1, "cli.py: --config nowhere.yaml is not a file.\n")
    monkeypatch.setenv("LABN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=f"--config {Path('nowhere.yaml')} is not a file"):
        cli.console()
