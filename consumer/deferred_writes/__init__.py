"""Deferred writes: which may share one statement, and how they are sent.

Imports core and logs.
"""
