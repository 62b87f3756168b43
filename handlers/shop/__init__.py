"""A payment page that shows how a second tap is stopped.

`make shop` runs it. What stops the tap can be switched off. Importing this registers nothing of the example beside it:
the page has an App, tables and topics of its own.
"""
