"""The attentions: one record each, all that the rest of the house asks of it. `record` says what a record holds."""
