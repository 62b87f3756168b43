"""Calls of other systems before a message's transaction.

steps.py decides; stage.py calls. postgres/effects.py keeps intents and results.
"""
