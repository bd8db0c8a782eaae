"""Models out to Hugging Face's format and in from it.

families.py     config.json <-> our configuration, for deepseek_v3, deepseek_v2 and llama
layout.py       names and slices of tensors, both ways
shards.py       safetensors files, a tensor at a time; block-wise FP8
huggingface.py  a run folder out to a folder that transformers opens, and back
"""
