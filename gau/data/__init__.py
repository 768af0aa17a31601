"""Text in, batches out: sources, tokenizers, packing, objectives."""
