"""Models leave the laboratory: weights with their config, a PyTorch model for `transformers`, ONNX graphs.

Nothing imports this room, and the libraries of `requirements-export.txt` are imported in it alone (safetensors in
`gau.training.init_from` as well, which reads weights back).
"""
