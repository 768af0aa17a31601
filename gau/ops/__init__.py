"""The mathematics: pure functions from arrays to arrays, one file a subject. They know nobody else in
the house, but for what keeps libraries from slow imports (`gau.imports`).

Arrays are named by what they are and by their shape, `q_BGCS`. The letters, everywhere in `gau`:

    B batch           N tokens in a sequence    M keys (tokens being looked at)
    D model width     E expanded width          S query/key width of a GAU
    G chunks          C tokens in a chunk       V vocabulary
    H heads           K width of one head

Segment ids are integers [B, N]: 0 is padding, a positive number names the document a token belongs to, and no token
sees another document. `None` stands for one document without padding. The tokens of a document are contiguous, but for
holes of padding; ids need not be ordered, only neighbours must differ.
"""
