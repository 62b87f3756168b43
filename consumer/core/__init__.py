"""Decisions and their vocabulary. Pure: no event loop, driver, clock or randomness."""
