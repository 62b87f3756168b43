"""The `consumer` command: arguments to calls, answers to text.

Decides nothing; imports everything.
"""
