"""What to do in the first minutes on a GPU: builds, checks and measures, what says most first (`make gpu`).

A GPU is at hand rarely and for minutes. So checks run beside each other, nothing stops at a red line, every stage has a
limit, all of it a budget, and everything is written as it is found. `--dry` runs every stage on a CPU with stand-ins.
"""
