"""Which implementation runs a rule's stages."""
