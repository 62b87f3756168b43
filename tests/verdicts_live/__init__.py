"""Checks and rebuilds beside running producers and workers. Read campaign.py; docs/replay.md has the figures."""
