"""`consumer console`: pages for operators, rendered on the server.

A process of its own, so that no failure of it reaches a worker. It reads and acts through `admin/`, and runs commands for
what calls handlers. Needs the extra `console`; only `cli/` imports it.
"""
