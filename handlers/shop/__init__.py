"""A payment page on which one can watch a second tap being stopped, and switch off what stops it. `make shop`.

Importing this registers nothing of the example beside it: the page has an App, tables and topics of its own.
"""
