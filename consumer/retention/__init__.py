"""How long the ledger remembers: the task that drops old generations. Imports core, kafka, postgres and settings."""
