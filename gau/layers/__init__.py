"""Flax Linen modules: they own parameters, initialisers and logical axis names, and call `gau.ops`.

Parameters carry logical axis names ('vocab', 'embed', 'expanded', 'query_key', 'heads', 'head_dim', 'position', 'norm',
'layers'), activations 'batch', 'length', 'act_embed', 'act_expanded' and 'act_heads'; which of them lie on which axis
of a mesh is decided elsewhere. Kernels are called `kernel`, biases `bias`, norm scales `scale`, the affine transforms
of a GAU `gamma` and `beta`, so that rules over parameter paths are short. The state of a decoded
sequence is the collection 'cache' (`gau.layers.state`); without `TokenInfo.decode` there is none.
"""
