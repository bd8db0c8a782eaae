"""What a model and a way of training it cost, by arithmetic alone: nothing is allocated and nothing is run.

skeleton.py       the composed config, and what its plugins say of one layer built on the meta device
recipe.py         how the model is trained (cluster, precision, length), the report's recipe, published figures
parameters.py     parameters by component, total and active
flops.py          floating-point operations per token
cache.py          what decoding keeps per token
stages.py         which layers stand on which GPU
activations.py    what a micro-batch keeps for its backward pass
memory.py         weights, gradients, optimiser states and activations on the fullest GPU
communication.py  all-to-all traffic of expert parallelism
pipeline.py       bubbles of 1F1B, ZB1P and DualPipe
duration.py       training time, GPU hours and MFU
plan.py           all of these as one dictionary
page.py           the dictionary as text
"""
