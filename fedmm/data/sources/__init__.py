"""One file a data set; `load(cfg)` returns the pooled `Dataset`."""
