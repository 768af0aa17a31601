"""The mathematics: pure functions from arrays to arrays, one file a subject. They know nobody else: not the kernels
(`gau.ops.kernels` knows ops), no mesh, no model.

Arrays are named by what they are and by their shape, `q_BGCS`. The letters, everywhere in `gau`, one meaning each:

    A  devices along a mesh axis                     M  tokens that are looked at: keys, where N or C are queries
    B  batch                                         N  tokens in a sequence
    C  tokens in a chunk                             P  distances k - q between N positions, 2 N - 1
    D  model width                                   R  roles: queries and keys that are made of Z
    E  expanded width, of values                     S  query/key width of a GAU
    F  features: width of the keys that a state      T  tokens of a block that is decoded
       of linear attention sums over                 U  slots of Linformer
    G  chunks in a sequence                          V  vocabulary
    H  heads                                         W  columns of a buffer, of which a reader takes a part:
    I  chunks that are looked at                        joined projections, padded logits
    J  scan directions over chunks
    K  width of a head                               lower case: some of them (n of N tokens), or a half (h of S)
    L  values and, behind them, a denominator's 1

Segment ids are integers [B, N]: 0 is padding, a positive number names the document a token belongs to, and no token
sees another document. `None` stands for one document without padding. The tokens of a document are contiguous, but for
holes of padding; ids need not be ordered, only neighbours must differ.
"""
