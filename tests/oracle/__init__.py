"""A differential oracle: the framework's batches against plain asyncpg.

One message at a time, on random applications.
"""
