from pathlib import Path

import pytest
from command_line import ROOT

from labn.launch.config_include import configurations, expand_includes, with_includes


@pytest.fixture
def write(tmp_path):
    def written(**files):
        for name, included in files.items():
            (tmp_path / f"{name}.yaml").write_text(f"include: {included}\n")
        return tmp_path

    return written


def test_included_files_come_first_depth_first_and_once(write):
    folder = write(a="[b.yaml, c.yaml]", b="[d.yaml]", c="[d.yaml]", d="")
    names = [path.stem for path in with_includes(folder / "a.yaml")]
    assert names == ["d", "b", "c", "a"]
    words = expand_includes(["fit", f"--config={folder / 'b.yaml'}", "--x"])
    assert words == ["fit", "--config", f"{folder / 'd.yaml'}", "--config", f"{folder / 'b.yaml'}", "--x"]


def test_a_copy_of_a_configuration_finds_what_it_includes(tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text((ROOT / "configs" / "pictures.yaml").read_text())
    assert with_includes(copy) == [ROOT / "configs" / "shared" / "trainer.yaml", copy]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "trainer.yaml").write_text("{}")
    assert with_includes(copy) == [tmp_path / "shared" / "trainer.yaml", copy]


def test_a_missing_include_names_the_file_that_includes_it(write):
    with pytest.raises(FileNotFoundError, match=r"a\.yaml includes .*nowhere\.yaml, which is not a file"):
        with_includes(write(a="[nowhere.yaml]") / "a.yaml")


def test_a_file_that_two_experiments_include_is_read_once(write):
    folder = write(a="[shared.yaml]", b="[shared.yaml]", shared="")
    words = expand_includes(["fit", "--config", str(folder / "a.yaml"), "--config", str(folder / "b.yaml")])
    assert [Path(word).stem for word in words[2::2]] == ["shared", "a", "b"]
    words = expand_includes(["fit", *["--config", str(folder / "a.yaml")] * 2])  # named twice: the user's wish
    assert [Path(word).stem for word in words[2::2]] == ["shared", "a", "a"]


@pytest.mark.parametrize("spelling", ["-c {}", "-c={}", "-c{}", "--conf {}", "--conf={}", "--co={}", "--config={}"])
def test_every_spelling_of_config_reads_includes(write, spelling):
    file = write(a="[b.yaml]", b="") / "a.yaml"
    words = ["fit", *spelling.format(file).split(), "--ckpt_path=best", "--count"]
    assert [Path(word).stem for word in expand_includes(words)[2:5:2]] == ["b", "a"]
    assert expand_includes(words)[5:] == ["--ckpt_path=best", "--count"]
    assert configurations(words) == [file]


@pytest.mark.parametrize(
    ("included", "shown"),
    [("5", "5"), ("other.yaml", "'other.yaml'"), ("[3]", r"\[3\]"), ("{a: b}", "{'a': 'b'}"), ("0", "0")],
)
def test_an_include_that_is_no_list_of_files_is_refused(write, included, shown):
    folder = write(a=included)
    with pytest.raises(ValueError, match=rf"a\.yaml: include is {shown}; it must be a list of files, such as"):
        with_includes(folder / "a.yaml")


@pytest.mark.parametrize("files", [{"a": "[a.yaml]"}, {"a": "[b.yaml]", "b": "[sub/../a.yaml]"}])
def test_files_that_include_each_other_are_named(write, files):
    folder = write(**files)
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match=r"a\.yaml includes itself: .*a\.yaml -> .*a\.yaml; take one of these out"):
        with_includes(folder / "a.yaml")
