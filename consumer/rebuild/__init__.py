"""Rebuild the tables from the topics and compare them. Imports transaction, postgres, kafka, deferred_writes and handler_records."""
