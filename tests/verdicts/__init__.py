"""A judge for the verdicts of `consumer replay` and `consumer rebuild`.

Random applications, planted faults, and the truth.
"""
