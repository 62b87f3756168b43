"""Optional parts for other libraries, one file each.

Each needs its extra: `consumer.ext.sqlalchemy` is `pip install 'idempotent-consumer[sqlalchemy]'`.
"""
