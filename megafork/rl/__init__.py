"""The method, as functions on tensors: batches and packing, advantages, forks, loss."""
