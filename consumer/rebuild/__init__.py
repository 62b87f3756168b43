"""Rebuilds the tables from the topics, and compares them.

rebuild.py is the entry, single_pass.py one transaction of it. Nothing is changed: handlers run on temporary copies in
transactions that are rolled back. Imports transaction, postgres, kafka, deferred_writes and handler_records.
"""
