"""A new fit in the folder of a finished or interrupted one: the earlier one is kept, apart."""

from __future__ import annotations

from pathlib import Path

from labn.io.atomic import unused_folder, write_error
from labn.results.training_logs import log_files


def holds_fit(run_dir: Path) -> bool:
    """Whether a fit has left a checkpoint or a log in the run folder."""
    return any((run_dir / "checkpoints").glob("*.ckpt")) or bool(log_files(run_dir, "fit"))


def archive_fit(run_dir: Path) -> Path | None:
    """Move what an earlier fit has left to `<run_dir>/fit.old-<n>`, laid out as a run folder of its own.

    That is checkpoints, logs of training, validation results and the configuration. A test's results stay: the next
    test moves them aside itself, if they are of other weights.

    Returns:
        The folder; None where there was no earlier fit.

    Raises:
        OSError: the run folder cannot be written.
    """
    if not holds_fit(run_dir):
        return None
    aside = unused_folder(run_dir / "fit")
    logs = [path.parent for path in log_files(run_dir, "fit")]
    # Checkpoints first: with them gone, nobody goes on from a fit whose logs are elsewhere.
    for path in (run_dir / "checkpoints", *logs, run_dir / "val", run_dir / "fit.yaml"):
        if path.exists():
            target = aside / path.relative_to(run_dir)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
            except OSError as error:
                raise write_error(target, error) from error
    return aside
