"""How a process is started: configuration includes, SLURM, the memory allocator, the archive of earlier fits."""
