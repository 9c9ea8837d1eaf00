"""The planner: the memory a recipe needs on each GPU and the time of a step, without allocating any GPU or building a model.

`hardware.py`: the GPUs and every assumed figure. `models.py`: shapes of models not downloaded yet. `parameters.py`: weights, gradients
and optimizer, exact. `activations.py`: memory that a forward and backward keep. `experts.py`: what a mixture adds. `memory.py`: a GPU's
memory in each phase. `speed.py`: the time of a step. `deadlines.py`: the time that a batch job must leave it. `planner.py`: the whole
plan. `fixes.py`: keys that make a recipe fit. `search.py`: other layouts. `refit.py`: data that a refit moves. `table.py`: the tables.
"""
