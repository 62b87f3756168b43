"""A judge for the verdicts of `consumer replay` and `consumer rebuild`: random applications, planted faults, and the truth."""
