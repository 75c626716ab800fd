"""Compare methods over models, tasks and seeds: `drlora compare PLAN.yaml`.

plan.py        the plan file
cells.py       one run of it, and the key of what decides its result
worker.py      what the process of one run does
run.py         the processes
results.py     result files, the tuned choice, pairing
statistics.py  means, t-intervals, paired gains
page.py, figures.py, metrics.py    what is shown
comparison.py  all of that in turn
"""
