"""The model: decoder, blocks, MoE, layers, losses, initialisation, compilation, activation recomputation."""
