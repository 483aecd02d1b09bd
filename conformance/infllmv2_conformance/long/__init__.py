"""Long contexts: the whole call is made, and sampled rows of its result are judged.

`inputs.py` draws the tensors chunk by chunk, `cases.py` says which calls a device can make,
`rows.py` which rows are judged, and `oracle.py` computes what these rows must be, in float64 and in
memory that does not grow with the number of rows. The bounds are those of all other rules.
"""
