"""What a training step needs before it is run: memory by part, and time.

The model is run on paper: on tensors of torch's device `meta`, which have shapes and no memory.
What is allocated and given back, forwards and backwards, is counted (`counting`), so no family,
length or dtype needs a formula of its own. What cannot run on paper has a stand-in that takes the
memory of what it stands for (`stand_ins`). `step` runs a step, `memory` and `pace` say what it
takes.
"""
