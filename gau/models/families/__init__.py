"""The families: what a block is made of around its attention. One record each; `record` says what a record holds."""
