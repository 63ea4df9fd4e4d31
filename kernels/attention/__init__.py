"""flash_attention: forward, backward, the tiles that both are made of, and the forward through TMA."""
