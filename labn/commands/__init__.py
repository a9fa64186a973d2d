"""Commands that need no trainer, one module each; `cli.py` gives them their place on the command line.

Each module has SUMMARY, DETAILS, `add_arguments(parser)` and `run(options)`.
"""
