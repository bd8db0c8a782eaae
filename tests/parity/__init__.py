"""Our models beside transformers', with the same weights."""
