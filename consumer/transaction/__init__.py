"""The guarantee: claims, effects, dead letters and positions of a batch commit together. Imports postgres and deferred_writes, never Kafka."""
