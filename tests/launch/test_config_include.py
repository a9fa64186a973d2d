import pytest

from labn.launch.config_include import expand_parts, with_parts


@pytest.fixture
def write(tmp_path):
    def written(**files):
        for name, parts in files.items():
            (tmp_path / f"{name}.yaml").write_text(f"parts: {parts}\n")
        return tmp_path

    return written


def test_parts_come_first_depth_first_and_may_come_twice(write):
    folder = write(a="[b.yaml, c.yaml]", b="[d.yaml]", c="[d.yaml]", d="")
    names = [path.stem for path in with_parts(folder / "a.yaml")]
    assert names == ["d", "b", "d", "c", "a"]
    words = expand_parts(["fit", f"--config={folder / 'b.yaml'}", "--x"])
    assert words == ["fit", "--config", f"{folder / 'd.yaml'}", "--config", f"{folder / 'b.yaml'}", "--x"]


@pytest.mark.parametrize(
    ("parts", "shown"),
    [("5", "5"), ("other.yaml", "'other.yaml'"), ("[3]", r"\[3\]"), ("{a: b}", "{'a': 'b'}"), ("0", "0")],
)
def test_parts_that_are_no_list_of_files_are_refused(write, parts, shown):
    folder = write(a=parts)
    with pytest.raises(ValueError, match=rf"a\.yaml: parts is {shown}; it must be a list of files, such as"):
        with_parts(folder / "a.yaml")


@pytest.mark.parametrize("files", [{"a": "[a.yaml]"}, {"a": "[b.yaml]", "b": "[sub/../a.yaml]"}])
def test_a_circle_is_named(write, files):
    folder = write(**files)
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match=r"a\.yaml is its own part: .*a\.yaml -> .*a\.yaml; take one of these out"):
        with_parts(folder / "a.yaml")
