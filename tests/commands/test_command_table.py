import pytest
from command_line import call_main
from run_folders import write_run

from labn.commands.table import PaperTable, Row, Runs, markdown, ours, published

TABLE = PaperTable(
    "A paper", ("id", "pid16"), (Row("LABN", "labn", "labn", (0.1, 0.2), (0.01, 0.02), "configs/x/labn.yaml"),)
)


def test_mean_and_deviation_are_over_seeds(tmp_path):
    write_run(tmp_path / "labn" / "seed=38", {("labn", "id"): [0.1, 0.3], ("labn", "id@official"): [0.5, 0.7]})
    write_run(tmp_path / "labn" / "seed=39", {("labn", "id"): [0.3, 0.5]})
    text = markdown(TABLE, tmp_path, ["paper", "official"])
    lines = text.splitlines()
    assert lines[4] == "| LABN | published | 0.100 ± 0.010 | 0.200 ± 0.020 |"
    # means of the runs .2 and .4: .3 with deviation .1414; means of the samples .2 and .4
    assert lines[5] == "| | ours, paper | 0.300 ± 0.141 [0.200, 0.400] | – |"
    assert lines[6].startswith("| | ours, official | 0.600 [0.500, 0.700] | – |")
    assert "LABN: 2 run(s), 2 scored samples" in lines[-1]


def test_accuracy_is_the_logged_one_of_the_whole_split(tmp_path):
    for seed, logged in ((38, [0.2, 0.7]), (39, [0.9])):
        write_run(tmp_path / "labn" / f"seed={seed}", {("labn", "id"): [0.1, 0.3]})
        log = tmp_path / "labn" / f"seed={seed}" / "logs" / "test" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text("step,test/loss,test/accuracy\n" + "".join(f"0,1.5,{value}\n0,,\n" for value in logged))
    lines = markdown(TABLE, tmp_path, ["paper", "official"], ["accuracy", "id"]).splitlines()
    assert lines[5].startswith("| | ours, paper | 0.800 ± 0.141 | 0.200")
    assert lines[6] == "| | ours, official | 0.800 ± 0.141 | – |"


def test_accuracy_is_that_of_the_last_test(tmp_path):
    write_run(tmp_path / "labn", {("labn", "id"): [0.1, 0.3]})
    for number, logged in enumerate(f"0.{digits}" for digits in range(1, 13)):
        folder = tmp_path / "labn" / "logs" / (f"test-{number}" if number else "test")
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,test/accuracy\n0,{logged}\n")
    (tmp_path / "labn" / "logs" / "test-12").mkdir()  # began, and was killed
    lines = markdown(TABLE, tmp_path, ["paper"], ["accuracy"]).splitlines()
    assert lines[5] == "| | ours, paper | 0.120 |"


def test_a_single_run_is_no_further_seed_of_a_sweep(tmp_path):
    for seed, value in ((38, 0.2), (39, 0.4)):
        write_run(tmp_path / "labn" / f"seed={seed}", {("labn", "id"): [value]})
    write_run(tmp_path / "labn", {("labn", "id"): [0.9]}, data="other")
    runs = Runs.read(tmp_path / "labn")
    assert [folder.name for folder in runs.folders] == ["seed=38", "seed=39"]
    assert runs.values("labn", "id") == [0.2, 0.4]


def test_a_single_run_counts_where_no_seed_was_tested(tmp_path):
    (tmp_path / "labn" / "seed=38").mkdir(parents=True)
    write_run(tmp_path / "labn", {("labn", "id"): [0.9]})
    assert Runs.read(tmp_path / "labn").folders == (tmp_path / "labn",)


def test_without_a_log_there_is_no_accuracy(tmp_path):
    write_run(tmp_path / "labn", {("labn", "id"): [0.1, 0.3]})
    assert markdown(TABLE, tmp_path, ["paper"], ["accuracy"]).splitlines()[5] == "| | ours, paper | – |"


def test_other_methods_of_the_same_runs_stand_below(tmp_path):
    write_run(tmp_path / "labn", {("labn", "id"): [0.1, 0.3], ("gradcam", "id"): [0.5, 0.5]})
    lines = markdown(TABLE, tmp_path, ["paper", "official"], everything=True).splitlines()
    assert lines[4].startswith("| LABN | published |")
    assert lines[7] == "| `gradcam` (labn) | ours, paper | 0.500 [0.500, 0.500] | – |"
    assert lines[8] == "| | ours, official | – | – |"
    assert "gradcam" not in markdown(TABLE, tmp_path, ["paper"])


def test_groups_are_drawn_whole(tmp_path):
    column = {("labn", "id"): [0.0, 0.0, 1.0, 1.0]}
    write_run(tmp_path / "a", column)
    write_run(tmp_path / "b", column, group=[7, 7, 9, 9])
    alone, by_day = (Runs.read(tmp_path / name).interval("labn", "id") for name in "ab")
    assert (by_day.low, by_day.high) == (0.0, 1.0)
    assert alone.mean == by_day.mean == 0.5
    assert Runs.read(tmp_path / "b").groups == {"s0": 7, "s1": 7, "s2": 9, "s3": 9}


def test_one_sample_and_one_group_have_no_interval(tmp_path):
    write_run(tmp_path / "a", {("labn", "id"): [0.25]})
    write_run(tmp_path / "b", {("labn", "id"): [0.25, 0.75]}, group=[7, 7])
    assert [ours(Runs.read(tmp_path / name), "labn", "id") for name in "ab"] == ["0.250", "0.500"]


def test_runs_on_different_data_are_not_averaged(tmp_path):
    for seed, data in ((38, "d"), (39, "e")):
        write_run(tmp_path / "labn" / f"seed={seed}", {("labn", "id"): [0.1]}, data=data)
    with pytest.raises(
        ValueError, match=r"seed=38/test and .*seed=39/test cannot be compared, they differ in data: d and e"
    ):
        markdown(TABLE, tmp_path, ["paper"])


def test_runs_with_other_settings_or_arguments_of_a_method_are_not_averaged(tmp_path):
    def write(folder, **second):
        scores, rise = {("labn", "id"): [0.1]}, {"rise": {"class": "RISE", "n_masks": 512, "chunk_size": None}}
        write_run(folder / "labn" / "seed=38", scores, settings={"fill": "black", "chunk_size": 8}, explainers=rise)
        write_run(folder / "labn" / "seed=39", scores, **second)
        return folder

    black, masks = {"fill": "black", "chunk_size": None}, {"class": "RISE", "n_masks": 8000, "chunk_size": None}
    with pytest.raises(ValueError, match=r"differ in arguments of rise: .*512.* and .*8000"):
        Runs.read(write(tmp_path / "a", settings=black, explainers={"rise": masks}) / "labn")
    with pytest.raises(ValueError, match=r"differ in protocol \(fill\): black and blur"):
        Runs.read(write(tmp_path / "b", settings={"fill": "blur"}) / "labn")
    # What changes only how fast something is, and methods that the other run does not have, are no difference.
    same = {"rise": {**masks, "n_masks": 512, "chunk_size": 64}, "cam": {"class": "CAM"}}
    assert len(Runs.read(write(tmp_path / "c", settings=black, explainers=same) / "labn").folders) == 2


def test_mean_and_interval_are_over_the_samples_that_all_seeds_have(tmp_path):
    write_run(tmp_path / "labn" / "seed=38", {("labn", "id"): [0.1, 0.3, 0.9, 0.9]})
    write_run(tmp_path / "labn" / "seed=39", {("labn", "id"): [0.3, 0.5]})
    lines = markdown(TABLE, tmp_path, ["paper"]).splitlines()
    assert lines[5] == "| | ours, paper | 0.300 ± 0.141 [0.200, 0.400] | – |"
    assert "LABN: 2 run(s), 2 scored samples and up to 2 left out because not every run has them" in lines[-1]


def test_runs_without_a_common_sample_are_named(tmp_path):
    for seed in (38, 39):
        write_run(tmp_path / "labn" / f"seed={seed}", {("labn", "id"): [0.1]})
    path = tmp_path / "labn" / "seed=39" / "test" / "scores.csv"
    path.write_text(path.read_text().replace(",s0,", ",other,"))
    with pytest.raises(ValueError, match=r"seed=38, .*seed=39 have no sample in common that id of labn"):
        markdown(TABLE, tmp_path, ["paper"])


def test_a_missing_run_says_how_to_make_it(tmp_path):
    text = markdown(TABLE, tmp_path, ["paper"])
    assert "| | ours, paper | – | – |" in text
    assert "not run; python cli.py sweep --config configs/x/labn.yaml --seeds 38 39 40 41 42" in text


def test_the_published_tables_hold_together():
    tables = published()
    for table in tables.values():
        for row in table.rows:
            assert len(row.mean) == len(table.metrics)
            assert len(row.sd) in (0, len(table.metrics))
            assert row.explainer in {"labn", "rise", "lambda", "gradcam", "lrp_simple", "abn", "c3lrp"}
    ablation, main_table = tables["jsai2022-ablation"], tables["jsai2022-idrid"]
    assert ablation.rows[1].mean == main_table.rows[2].mean
    assert {row.name for row in main_table.rows} == {"RISE", "Lambda attention", "LABN"}
    assert tables["accv2022-idrid"].rows[2].mean == (0.431, 0.458, 0.473, 0.470, 0.455)
    assert {row.name: row.mean[3] for row in tables["jsai2024-cub"].rows} == {
        "RISE": 0.328, "Grad-CAM": 0.310, "LRP": 0.011, "ABN": 0.207, "C3-LRP": 0.668,
    }  # fmt: skip
    assert all(abs(i - d - both) < 0.0021 for _, i, d, both in (row.mean for row in tables["jsai2024-cub"].rows))
    assert tables["jsai2022-defn"].rows[2].mean == (0.044, 0.311, 0.489, 0.523, 0.556)


def test_the_command_prints_the_tables_asked_for(tmp_path, capsys):
    call_main(["table", "jsai2022-defn", "--runs", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("## ") == 1
    assert "| Lambda attention | published | 0.374 ± 0.080 |" in out
    with pytest.raises(SystemExit):
        call_main(["table", "unknown"])
    assert "there is no table 'unknown'; the tables are jsai2022-idrid" in capsys.readouterr().err
