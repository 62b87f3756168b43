"""What `consumer run --http` serves: metrics, health and status of its workers.

Runs in the supervisor, apart from the workers: nothing here can hold one up.
"""
