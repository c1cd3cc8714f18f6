"""Configuration: the schema, method presets, and how files and `key=value` overrides become a `Config`."""
