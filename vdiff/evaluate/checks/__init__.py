"""A linter for models, and the identities that it rests on."""
