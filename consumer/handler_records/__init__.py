"""What a database remembers of an App's handlers: what each settled, how it identifies messages, its code. Imports core, app, kafka."""
