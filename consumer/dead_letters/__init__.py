"""Dead letters: retry, edit, discard, and publish them to a topic.

Imports transaction, postgres, kafka and handler_records.
"""
