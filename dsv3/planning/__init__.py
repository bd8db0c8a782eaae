"""Cost model: parameters, FLOPs, memory, traffic and time by arithmetic; nothing is allocated and nothing is run."""
