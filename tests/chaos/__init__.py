"""Random faults against real servers and real worker processes, and a check that nothing was lost and nothing doubled.

Read docs/explanation/chaos.md first. schedule.py and workload.py are drawn from a seed alone, invariants.py judges what was found and
knows no server; rig.py has the servers, nemesis.py does the faults, producing.py sends, evidence.py looks, run.py is one run.
mutants.py are consumers that are broken on purpose, model.py is the whole idea in a few hundred states without any server.
"""
