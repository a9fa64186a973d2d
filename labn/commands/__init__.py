"""Commands that need no trainer, one module each; `cli.py` gives them their place on the command line.

Each module has DETAILS, `add_arguments(parser)` and `run(options)`.
"""

COMMANDS = {
    "compare": "Put the results of several runs into one table and one report.",
    "demo": "Explain and score a trained network on photographs, without training or download.",
    "doctor": "Check versions, GPU, disk and data folders, and run a self-test of a few seconds.",
    "explain": "Explain single pictures with a trained network or one with given weights.",
    "export": "Write a trained network to an ONNX file, with its attention map and preprocessing.",
    "shards": "Write the data set of a configuration to tar shards, for datamodules.TarShards.",
    "sweep": "Fit and test a configuration once per seed, in RUN_DIR/seed=N/.",
    "table": "Print tables of the papers with the published numbers and those of the runs.",
    "coarse": "Compare fine and coarse maps: patch sizes at which an exact mask scores above coarse copies of it.",
}
"""Name of a command, which is also that of its module -> what it does. The modules are not imported here, so that
`--help` answers at once."""
