"""A differential oracle: the framework's batches against plain asyncpg, one message at a time, on random applications."""
