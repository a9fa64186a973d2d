import pytest
from command_line import call_main
from run_folders import write_run

from labn.commands.coarse import Scored, figure, verdict


def scores(exact, coarse, sizes=(1, 16)):
    values = {}
    for place, size in enumerate(sizes):
        for name, base in (("exact", exact[place]), ("dilated 2", coarse[place])):
            column = [base + 0.001 * i for i in range(6)]
            pid = "id" if size == 1 else f"pid{size}"
            values |= {(name, f"insertion{size}"): column, (name, f"deletion{size}"): [1 - x for x in column]}
            values[name, pid] = [2 * x - 1 for x in column]
    return values


def test_where_the_fine_map_is_ahead_and_where_behind(tmp_path, capsys):
    write_run(tmp_path, scores(exact=(0.4, 0.9), coarse=(0.6, 0.5)))
    scored = Scored.read(tmp_path)
    assert scored.patch_sizes == (1, 16)
    assert scored.lead("exact", "dilated 2", "deletion", 16).mean == pytest.approx(0.4)
    for part in ("insertion", "deletion", "pid"):
        text = verdict(scored, "exact", ["dilated 2"], part)
        assert "(interval above 0) at m = 16; behind one of them (interval below 0) at m = 1" in text
    call_main(["coarse", "--run", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| dilated 2 | -0.400 [-0.400, -0.400] | **+0.800** [+0.800, +0.800] |" in out
    assert (tmp_path / "coarse_fine.png").stat().st_size > 10_000


def test_the_figure_has_a_line_per_map_and_a_panel_per_part(tmp_path):
    write_run(tmp_path, scores((0.4, 0.9), (0.6, 0.5)))
    drawn = figure(Scored.read(tmp_path))
    assert [axis.get_title().split()[0] for axis in drawn.axes] == ["insertion", "deletion", "PID"]
    assert [len(axis.containers) for axis in drawn.axes] == [2, 2, 2]


def test_missing_scores_and_maps_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call_main(["coarse", "--run", str(tmp_path)])
    assert "scores.csv does not exist; run `cli.py test" in capsys.readouterr().err
    write_run(tmp_path, scores((0.4, 0.9), (0.6, 0.5)))
    with pytest.raises(SystemExit):
        call_main(["coarse", "--run", str(tmp_path), "--fine", "sharp"])
    assert "has no map 'sharp'; it has exact, dilated 2" in capsys.readouterr().err


def test_without_a_coarse_map_the_command_raises(tmp_path, capsys):
    write_run(tmp_path, scores((0.4, 0.9), (0.6, 0.5)))
    path = tmp_path / "test" / "scores.csv"
    path.write_text(path.read_text().replace("dilated 2", "random"))
    with pytest.raises(SystemExit):
        call_main(["coarse", "--run", str(tmp_path)])
    told = capsys.readouterr()
    assert "has no map called 'dilated' or 'blurred'; name the coarse ones with --coarse." in told.err
    assert "ahead of every coarse map" not in told.out
    call_main(["coarse", "--run", str(tmp_path), "--coarse", "random"])
    assert "ahead of every coarse map" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("left", "sentence"),
    [
        (lambda key: key != ("dilated 2", "pid16"), "has no pid16 of dilated 2; each map needs insertion, deletion"),
        (lambda key: not key[1].startswith("insertion"), "has no insertion at any patch size; test with metrics such"),
    ],
)
def test_missing_scores_are_named(tmp_path, capsys, left, sentence):
    found = scores((0.4, 0.9), (0.6, 0.5))
    write_run(tmp_path, {key: column for key, column in found.items() if left(key)})
    with pytest.raises(SystemExit):
        call_main(["coarse", "--run", str(tmp_path)])
    assert sentence in capsys.readouterr().err
