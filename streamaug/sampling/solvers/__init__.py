"""Solvers: from the user's diffusers scheduler object to the recurrence of the `step` kernel, or to its own step.

table.py      the coefficients, checked against the scheduler; `solver_for` chooses
stepped.py    what does not fit: `scheduler.step` itself, with our noise
schedulers.py names, conversions and refusals
driver.py     runs a scheduler with our noise; probe.py reads its coefficients off symbols
page.py       writes docs/schedulers.md
"""
