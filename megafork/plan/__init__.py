"""The planner: what a recipe needs of each GPU, and what a step costs, before any GPU is asked for. It builds no model.

`hardware.py` the GPUs and every assumed figure; `models.py` the shapes of models not downloaded yet; `parameters.py` weights, gradients and
optimizer, exact; `activations.py` what a forward and backward keep; `memory.py` all that lies on a GPU in each phase; `speed.py` the time
of a step; `deadlines.py` what a batch job must leave it; `planner.py` joins them; `fixes.py` the keys that make fit what does not;
`search.py` other layouts; `refit.py` what a refit moves; `table.py` the tables.
"""
