"""A judge for the verdicts of `consumer replay` and `--rebuild`: random applications, planted faults, and the truth."""
