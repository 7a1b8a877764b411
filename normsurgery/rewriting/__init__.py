"""A model's own module tree, rewritten: other modules in place, forwards edited, keys mapped."""
