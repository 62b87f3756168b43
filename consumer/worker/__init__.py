"""The worker: fetches, settles, and publishes results.

Holds the process and its supervisor too. Imports every layer below it except replay, rebuild and testing.
"""
