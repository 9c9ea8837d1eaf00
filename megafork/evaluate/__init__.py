"""`megafork eval`: sample a model on benchmarks, judge, and say how sure the numbers are."""
