"""Drops old generations of the ledger.

Imports core, kafka, postgres and settings.
"""
