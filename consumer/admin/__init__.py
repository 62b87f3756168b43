"""What commands ask of the services and decide, without a terminal.

Imports every package below `worker`. `cli/` calls it and prints the answers.
"""
