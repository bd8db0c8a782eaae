"""Looking at runs: what is counted of the routing, what is found in it, and the pictures of it.

routing_statistics.py   sums over tokens of what one MoE layer's router decides, and the figures made of them
findings.py             dead experts, collapsed layers: what the figures say that someone should know
facts.py                what a run's numbers are counted in, written before its first step
history.py              a run folder, read while it grows
curves.py, experts.py   pictures of runs and of experts; style.py is how all of them look
page.py                 report.html, a page that needs no server
dashboard.py            the live page
workspace.py            the same for Weights & Biases
"""
