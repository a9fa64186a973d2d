import pytest
from forked import Server
from run_contents import broken_files, contents, differences

FAULTY = ["--config", "tests/faults/faulty.yaml"]


class Bench:
    """Runs commands of the faulty configuration, and compares what they leave with runs that nothing happened to."""

    def __init__(self, server, folder):
        self.server, self.folder, self.undisturbed = server, folder, {}

    def fit(self, run_dir, *words, **options):
        return self.server.run("fit", *FAULTY, f"--run_dir={run_dir}", *words, **options)

    def test(self, run_dir, *words, **options):
        return self.server.run("test", *FAULTY, f"--run_dir={run_dir}", "--ckpt_path=best", *words, **options)

    def finished(self, ranks=1, config=()):
        """Folder and contents of a run that nothing happened to."""
        key = ranks, *config
        if key not in self.undisturbed:
            run_dir = self.folder / f"undisturbed-{len(self.undisturbed)}" / "run"
            self.fit(run_dir, *config, ranks=ranks)
            self.test(run_dir, *config, ranks=ranks)
            self.undisturbed[key] = run_dir, contents(run_dir)
        return self.undisturbed[key]

    def equals_undisturbed(self, run_dir, **options):
        assert broken_files(run_dir) == []
        assert differences(contents(run_dir), self.finished(**options)[1]) == []


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with Server(folder / "output") as server:
        yield Bench(server, folder)
