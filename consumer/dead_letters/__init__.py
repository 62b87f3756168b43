"""Dead letters: retry, edit and discard them, and publish them to a topic. Imports transaction, postgres, kafka and handler_records."""
