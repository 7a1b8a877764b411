"""Random small models whose structure is known, and an oracle that says which norms can go.

    program    the structure as data
    modules    hand-written modules that the models are built from
    grow       a random structure
    motifs     what it is grown of
    steps      and what those are made of
    parts      the random layers
    render     a structure as Python source, and the model made from that source
    interpret  what a structure computes, from its tensors alone
    labels     which rules and which hazards a structure exercises
    neighbours the layers on either side of a norm
    oracle     which norms can go, by least squares
    trial      one model folded and judged
    tally      many of these, counted

Only `trial` (and so `tally`) imports normsurgery.
"""
