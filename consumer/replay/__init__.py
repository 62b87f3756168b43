"""Read topics again: check the ledger, apply what is missing, rebuild, republish.

Promise: a check changes nothing, and an apply settles each missing message once. Imports rebuild, everything that
rebuild imports, and precheck.
"""
