"""`megafork analyze`: the entropy pattern of a model's chains of thought, and how it changes between checkpoints."""
