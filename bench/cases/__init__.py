"""The cases of every op, made from the specs beside its kernel."""
