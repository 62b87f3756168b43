"""Replay: read topics again, check them against the ledger, apply what is missing. Imports rebuild and what it imports, and precheck."""
