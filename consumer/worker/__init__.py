"""The worker: fetch, settle, publish results; its process and supervisor. Imports everything below it but replay and rebuild."""
