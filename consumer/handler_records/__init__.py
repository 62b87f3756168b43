"""What a database remembers of an App's handlers.

The offsets that each has settled, how it identifies messages, and its code. Imports core, app, kafka and postgres.
"""
