"""Retries, edits, discards and publishes dead letters.

Imports transaction, postgres, kafka and handler_records.
"""
