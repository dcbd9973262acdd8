"""Templates of model cards, installed with the package as `hf_compressm.hub_cards`."""
