"""Golden vectors: inputs, oracle results and bounds in files that any language can read.

`docs/vectors.md` describes the files. `catalogue.py` lists what is in a set, `draw.py` makes the
inputs and `expected.py` the results; `folder.py` writes and reads; `compare.py` is the rule by
which a result is judged; `answer.py` asks an implementation.
"""
