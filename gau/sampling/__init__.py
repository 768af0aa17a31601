"""Text from a causal model: prefill, decoding, how tokens are drawn, and text as it is written."""
