"""Random faults against real servers and workers, checked for losses and doubles.

Read docs/explanation/chaos.md first. schedule.py and workload.py derive everything from a seed. invariants.py judges
the evidence and knows no server. rig.py runs the servers, nemesis.py causes the faults, producing.py sends, evidence.py
reads, run.py is one run. mutants.py holds consumers that are broken on purpose; model.py explores the idea in a few
hundred states without any server.
"""
