"""Registry of every name a configuration may use: where its code is, what it composes with."""
