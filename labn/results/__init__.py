"""A results folder, read and written: store of maps and scores, tables, reader, fingerprints."""
