"""Looking at runs: what is counted of the routing, what is found in it, and the pictures of it.

routing_statistics.py   sums over tokens of what one MoE layer's router decides, and the figures made of them
findings.py             dead experts, collapsed layers: what the figures say that someone should know
"""
