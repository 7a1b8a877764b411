"""swap: what becomes of each norm, and the verb itself."""
