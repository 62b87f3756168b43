"""The pre-check in Redis: a hint that a message was settled before.

Imports core and logs.
"""
