from importlib.metadata import PackageNotFoundError

import pytest
from command_line import call_main

from labn.commands import doctor


def installed(**versions):
    def lookup(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    return lookup


def test_doctor_succeeds_without_data(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LABN_DATA", str(tmp_path / "nowhere"))
    call_main(["doctor", "--run_dir", str(tmp_path / "a" / "b")])
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    assert "note LABN_DATA" in printed
    assert "self-test: explained and scored two images" in printed
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("2.6.3", "lightning 2.6.3 carried malware"),
        ("2.5.0", "lightning 2.5.0 does not fit"),
        (None, "lightning is missing"),
    ],
)
def test_doctor_names_the_package_and_what_to_do(version, text):
    present = installed(**({"lightning": version} if version else {}))
    failed = [f.text for f in doctor.versions(["lightning>=2.6.6,<3", "quantus; extra == 'test'"], present)][1:]
    assert len(failed) == 1
    assert text in failed[0]
    assert "pip install" in failed[0]


def test_doctor_refuses_two_opencvs_that_differ():
    present = installed(**{"opencv-python": "5.0.0.90", "opencv-python-headless": "4.13.0.90"})
    assert [f.status for f in doctor.pairs(present)] == ["ok", "FAIL"]
    assert [f.status for f in doctor.pairs(installed())] == ["ok"]


def test_doctor_fails_with_status_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "self_test", lambda: doctor.Finding("FAIL", "self-test: broken"))
    with pytest.raises(SystemExit) as exit_:
        call_main(["doctor", "--run_dir", str(tmp_path)])
    assert exit_.value.code == 1
    assert "FAIL self-test: broken" in capsys.readouterr().out
