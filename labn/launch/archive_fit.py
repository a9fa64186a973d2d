"""Archiving an earlier fit, when a new fit starts in its run folder."""

from __future__ import annotations

from pathlib import Path

from labn.io.atomic import unused_folder, write_error
from labn.results.training_logs import log_files


def has_fit(run_dir: Path) -> bool:
    """Whether the run folder has checkpoints or training logs."""
    return any((run_dir / "checkpoints").glob("*.ckpt")) or bool(log_files(run_dir, "fit"))


def archive_fit(run_dir: Path) -> Path | None:
    """Move the files of an earlier fit to `<run_dir>/fit.old-<n>`, which is then a run folder itself.

    These are checkpoints, training logs, validation results and the configuration. Test results stay; the next test
    moves them if they belong to other weights.

    Returns:
        The new folder; None without an earlier fit.

    Raises:
        FileError: the run folder cannot be written.
    """
    if not has_fit(run_dir):
        return None
    archive = unused_folder(run_dir / "fit")
    logs = [path.parent for path in log_files(run_dir, "fit")]
    # Checkpoints are moved first: if the process is killed in between, no run resumes from a fit without its logs.
    for path in (run_dir / "checkpoints", *logs, run_dir / "val", run_dir / "fit.yaml"):
        if path.exists():
            target = archive / path.relative_to(run_dir)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
            except OSError as error:
                raise write_error(target, error) from error
    return archive
