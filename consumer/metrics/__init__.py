"""Metrics without I/O: names, what a worker counts, and sums over workers.

Pure. A worker counts into a Recorder and sends what has changed to its supervisor; the supervisor's Totals add the workers
up, so that a counter never falls when one of them ends. `monitoring/` serves them.
"""
