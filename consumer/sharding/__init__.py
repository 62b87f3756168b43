"""One App over several databases. Imports core, postgres, app and settings."""
