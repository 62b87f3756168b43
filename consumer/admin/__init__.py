"""What commands ask of the services, without a terminal. Imports core, kafka, postgres and handler_records."""
