"""The decisions. Nothing in this folder knows asyncio, a driver, a clock or chance: time and draws come in as arguments."""
