"""Checks and rebuilds beside running producers and workers.

Read campaign.py; docs/how-to/replay.md has the figures.
"""
